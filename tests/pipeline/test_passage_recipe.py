"""The whole experiment on files in MS MARCO's formats: every command of run.sh."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tct_hf.settings import load_settings
from tests.models import tiny_bert
from tests.passage_files import write_few
from tests.recipe import ROOT, environment, load_recipe
from tests.warm_process import run_warm

RECIPE = ROOT / "recipes" / "msmarco-passage"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files, an encoder, and settings that stand in for those of the sample."""
    folder = tmp_path_factory.mktemp("experiment")
    write_few(folder / "msmarco")
    tiny_bert(folder / "encoder", dropout=0.1)
    settings = folder / "settings"
    settings.mkdir()
    training = (
        "training: {per_device_train_batch_size: 8, max_steps: 4, learning_rate: 1.0e-3, logging_steps: 1, "
        "save_steps: 2, warmup_steps: 1}"
    )
    encoder = f"encoder: {{encoding: tct, base_model: {folder / 'encoder'}, query_length: 16, document_length: 48}}"
    counts = {"train": 30, "tune": 12, "dev": 6, "dl19": 6, "dl20": 6}
    own = {
        "data": "expected_passages: 80\nexpected_triples: 90\nsplits:\n"
        + "".join(f"  {n}: {{expected_queries: {c}, expected_qrels: null}}\n" for n, c in counts.items()),
        "train": f"precision: fp32\n{encoder}\nteacher:\n  dim: 16\n  {training}\nstudent:\n  {training}\n",
        "rounds": f"precision: fp32\n{encoder}\nstudent:\n  {training}\nmining: {{depth: 10}}\n"
        "later: {student: {training: {max_steps: 2}}}\nevaluation: {depth: 20, measures: [RR@10, R@20]}\n",
        "report": "precision: fp32\n",
        "index": "precision: fp32\n",
        "expander": "precision: fp32\nsizes: {vocabulary: 200, d_model: 16, layers: 1, heads: 2, d_ff: 32}\n"
        "training: {per_device_train_batch_size: 8, max_steps: 4, logging_steps: 1, save_steps: 2}\n",
        "expansion": "shard_size: 25\nmax_length: 6\nprogress_every: 0.0\n",
    }
    own |= {"report-hn": own["report"], "index-hn": own["index"]}
    for name, text in own.items():
        above = os.path.relpath(RECIPE / "sample" / f"{name}.yaml", settings)
        (settings / f"{name}.yaml").write_text(f"extends: {above}\n{text}")
    return folder


def commands(*options: str) -> list[list[str]]:
    """The words of the commands that run.sh would run, in order."""
    env = {**os.environ, "LAUNCH": "echo", "PYTHON": "echo"}
    words = ["sh", str(RECIPE / "run.sh"), *options]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_step_reads_what_another_left(material: Path) -> None:
    files, settings = str(material / "msmarco"), str(material / "settings")
    for words in commands("--files", files, "--sample", "60", "--settings", settings):
        done = run_warm(words, env=environment(material), cwd=material)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    sample = material / "outputs" / "msmarco-passage" / "sample"
    assert json.loads((sample / "data" / "counts.json").read_text())["passages"] == 60
    assert (sample / "release" / "README.md").is_file() and (sample / "report-hn" / "report.md").is_file()


def test_every_command_stands_in_the_readme_and_in_its_settings() -> None:
    readme = (ROOT / "docs" / "msmarco.md").read_text(encoding="utf-8")
    for script, file, *options in commands():
        launch = "python" if Path(script).name in ("data.py", "release.py") else "accelerate launch"
        paths = (str(Path(path).relative_to(ROOT)) for path in (script, file))
        command = " ".join([launch, *paths, *options])
        assert f"| `{command}` |" in readme
        assert f"# {command}" in Path(file).read_text(encoding="utf-8")


def test_files_elsewhere_are_those_that_training_reads_too(tmp_path: Path) -> None:
    write_few(tmp_path / "files")
    folder = str(tmp_path / "files")
    triples, packed = (tmp_path / "files" / f"triples.train.small.tsv{end}" for end in ("", ".gz"))
    for place in (triples, packed):
        data, teacher, student, *_ = commands("--files", folder)
        assert data[2:] == ["--files", folder]
        for name, words in (("teacher", teacher), ("student", student)):
            assert words[2:] == ["--stages", name, "--triples.path", str(place)]
        if place == triples:
            triples.rename(packed)
    # A sample has triples of its own.
    assert commands("--files", folder, "--sample", "9")[1][2:] == ["--stages", "teacher"]
    refused = subprocess.run(["sh", str(RECIPE / "run.sh"), "--steps", "x"], capture_output=True, text=True)
    assert refused.returncode == 2 and "there is no option --steps" in refused.stderr


@pytest.mark.parametrize("options", [[], ["--sample", "100"], ["--settings", str(RECIPE / "hub")]], ids=str)
def test_the_settings_of_every_step_are_known_and_fit_together(options: list[str]) -> None:
    made: set[str] = set()
    splits: set[str] = set()
    for script, file, *more in commands(*options):
        settings = load_settings(load_recipe(Path(script)).Settings, [file, *more], description="")
        said = json.dumps(asdict(settings))
        # What a step reads below the folder of the experiment, another has made before it.
        read = set(re.findall(r"outputs/msmarco-passage/[^\"]*", said)) - {settings.output_dir}
        assert all(any(place.startswith(one) for one in made) for place in read), (file, read)
        assert ("/sample/" in said) == ("--sample" in options)
        # What a step reports on, the data has.
        splits |= set(getattr(settings, "splits", {}))
        assert splits >= set(getattr(settings, "also_report", {})), file
        made.add(settings.output_dir)
