"""The whole experiment on files in MS MARCO's formats: every step, a kill in each, steps that are done or refused."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from tests.models import tiny_bert
from tests.passage_files import results, write_few
from tests.recipe import ROOT, environment
from tests.warm_process import run_warm

RECIPE = ROOT / "recipes" / "msmarco-passage"
# What each step has printed when it is killed: something is done by then, and something is left.
KILLED = {
    "data": "sample: 60 passages",
    "teacher": "step     3 of 4",
    "student": "step     3 of 4",
    "rounds": "round 1: student",
    "expander": "step     3 of 4",
    "expansion": "of 60 passages",
    "index": "passages, with",
    "report": "search 2 of",
    "index-hn": "passages, with",
    "report-hn": "time 1 of",
    "release": "checking the vectors",
    "release-hn": "checking the vectors",
}


def load(path: Path) -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_passages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
        "later: {student: {max_steps: 2}}\nevaluation: {depth: 20, measures: [RR@10, R@20]}\n",
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


@pytest.fixture(scope="module")
def experiment(material: Path) -> Callable[..., list[str]]:
    """A function of a folder that runs the experiment there, and returns the lines of progress."""
    from tct_hf.pipeline.commands import run_steps

    module = load(RECIPE / "run.py")
    env = environment(material)

    def run(folder: Path, *, kill: dict[str, str] | None = None, steps: list[str] | None = None) -> list[str]:
        settings = module.Settings(
            files=str(material / "msmarco"), sample=60, settings=str(material / "settings"), steps=steps
        )
        told: list[str] = []

        def start(words: list[str]) -> int:
            name = told[-1].split()[1].rstrip(":")
            words = words[1:]
            if kill and name in kill:
                words = ["-m", "tests.recipe_worker", kill[name], *words]
            done = run_warm(words, env=env, cwd=folder)
            assert done.returncode in (0, -9), f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
            return done.returncode

        here = Path.cwd()
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        try:
            steps_ = module.steps_of(settings)
            run_steps(steps_, "outputs", only=steps, launcher="python", start=start, write=told.append)
        finally:
            os.chdir(here)
        return told

    return run


@pytest.fixture(scope="module")
def whole(experiment: Callable[..., list[str]], material: Path) -> tuple[Path, list[str]]:
    folder = material / "whole"
    return folder / "outputs" / "msmarco-passage" / "sample", experiment(folder)


@pytest.mark.slow
def test_every_step_leaves_what_the_next_one_reads(whole: tuple[Path, list[str]]) -> None:
    folder, told = whole
    assert [line.split()[1] for line in told] == [f"{name}:" for name in names()]
    assert json.loads((folder / "data" / "counts.json").read_text())["passages"] == 60
    assert (folder / "release" / "README.md").is_file() and (folder / "report-hn" / "report.md").is_file()


@pytest.mark.slow
def test_what_is_done_is_left(whole: tuple[Path, list[str]], experiment: Callable[..., list[str]]) -> None:
    folder, _ = whole
    before = results(folder)
    assert all(line.endswith("it is done") for line in experiment(folder.parents[2]))
    assert results(folder) == before


@pytest.mark.slow
def test_a_kill_in_each_step_changes_no_result(
    whole: tuple[Path, list[str]], experiment: Callable[..., list[str]], material: Path
) -> None:
    folder = material / "killed"
    for name, line in KILLED.items():
        with pytest.raises(ChildProcessError, match=f"^{name}: .* was ended by signal 9; mend"):
            experiment(folder, kill={name: line})
    experiment(folder)
    found, wanted = results(folder / "outputs" / "msmarco-passage" / "sample"), results(whole[0])
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def names() -> list[str]:
    module = load(RECIPE / "run.py")
    return [name for name, script, file, *_ in module.STEPS if (RECIPE / "sample" / file).is_file()]


def test_every_command_stands_in_the_readme_and_in_its_settings() -> None:
    module = load(RECIPE / "run.py")
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    for name, script, file, options, _, alone in module.STEPS:
        if name == "expander":  # of a sample alone
            continue
        words = ["python" if alone else "accelerate launch", script.relative_to(ROOT), RECIPE.relative_to(ROOT) / file]
        command = " ".join(map(str, [*words, *options]))
        assert f"| {name} | `{command}` |" in readme
        assert f"# {command}" in (RECIPE / file).read_text(encoding="utf-8")


def test_files_elsewhere_are_those_that_training_reads_too(tmp_path: Path) -> None:
    module = load(RECIPE / "run.py")

    def options(**settings: object) -> dict[str, tuple[str, ...]]:
        return {step.name: step.options for step in module.steps_of(module.Settings(**settings))}

    write_few(tmp_path / "files")
    triples, packed = (tmp_path / "files" / f"triples.train.small.tsv{end}" for end in ("", ".gz"))
    for place in (triples, packed):
        found = options(files=str(tmp_path / "files"))
        assert found["data"] == ("--files", str(tmp_path / "files"))
        for name in ("teacher", "student"):
            assert found[name] == ("--stages", name, "--triples.path", str(place))
        if place == triples:
            triples.rename(packed)
    assert options()["teacher"] == ("--stages", "teacher")
    # A sample has triples of its own, and so has the Hub.
    assert options(files=str(tmp_path / "files"), sample=9)["teacher"] == ("--stages", "teacher")
    assert options(settings=str(RECIPE / "hub"))["teacher"] == ("--stages", "teacher")


def test_settings_and_samples_that_would_run_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf.settings import SettingsError

    module = load(RECIPE / "run.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="sample: 0 is below 1; leave it out"):
        module.main(module.Settings(sample=0))
    for folder in ("nowhere", "."):
        with pytest.raises(SettingsError, match=f"settings: {folder} holds none of data.yaml, train.yaml"):
            module.main(module.Settings(settings=folder))
    data = tmp_path / "outputs" / "msmarco-passage" / "sample" / "data"
    data.mkdir(parents=True)
    (data / "counts.json").write_text("{}")
    (data / "tct_settings.json").write_text('{"sample": 600}')
    with pytest.raises(
        SettingsError, match=r"outputs/msmarco-passage/sample holds .* = 600, but now it is 700; delete"
    ):
        module.main(module.Settings(sample=700))
    (data / "tct_settings.json").write_text('{"sample": null}')
    with pytest.raises(SettingsError, match="sample = none, but now it is 700"):
        module.main(module.Settings(sample=700))
    # Data that no step of the experiment reads.
    (tmp_path / "own").mkdir()
    for wrong, sample, right in (("data.yaml", 700, "sample/data.yaml"), ("sample/data.yaml", None, "data.yaml")):
        (tmp_path / "own" / "data.yaml").write_text(f"extends: {RECIPE / wrong}\n")
        told = rf"own/data.yaml writes .*, but .*train.yaml reads .*sample = {sample or 'none'}, .* {RECIPE / right}$"
        with pytest.raises(SettingsError, match=told):
            module.main(module.Settings(sample=sample, settings="own"))


@pytest.mark.parametrize(("sample", "own"), [(None, None), (100, None), (None, "hub")])
def test_the_settings_of_every_step_are_known_and_fit_together(sample: int | None, own: str | None) -> None:
    from tct_hf.settings import load_settings

    module = load(RECIPE / "run.py")
    made: set[str] = set()
    splits: set[str] = set()
    for step in module.steps_of(module.Settings(sample=sample, settings=own and str(RECIPE / own))):
        options = [word for word in step.options if word not in ("--sample", str(sample))]
        settings = load_settings(load(step.script).Settings, [str(step.settings), *options], description="")
        said = json.dumps(asdict(settings))
        # What a step reads below the folder of the experiment, another has made before it.
        read = set(re.findall(r"outputs/msmarco-passage/[^\"]*", said)) - {settings.output_dir}
        assert all(any(place.startswith(one) for one in made) for place in read), (step.name, read)
        assert ("/sample/" in said) == (sample is not None)
        # What a step reports on, the data has.
        splits |= set(getattr(settings, "splits", {}))
        assert splits >= set(getattr(settings, "also_report", {})), step.name
        made.add(settings.output_dir)
