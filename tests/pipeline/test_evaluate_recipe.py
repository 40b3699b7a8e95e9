"""The evaluation recipe from end to end on a small collection: whole, killed and started again, refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tct_hf import Report, read_run, write_run
from tct_hf.settings import load_settings
from tests.recipe import ROOT, environment, launch, load_recipe
from tests.searching import Material, run_recipe
from tests.splade import tiny_splade
from tests.warm_process import free_port

KEYS = ["bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"]
# Where an interrupted run is killed: the line it has just printed.
KILLED = ["token vectors of 60 of 60 passages", "search 4 of 6", "time 3 of 6"]


def options(material: Material, output: Path, *more: str) -> list[str]:
    return [
        f"--data.source={material.beir}",
        f"--student={material.student}",
        f"--teacher={material.teacher}",
        f"--output_dir={output}",
        "--measures.names=[RR@10, nDCG@10, R@20]",
        "--measures.depth=20",
        "--cost.queries=4",
        "--cost.teacher_queries=3",
        "--cost.warm_up=1",
        *more,
    ]


def test_one_command_gives_table_json_plots_and_runs(material: Material) -> None:
    foreign, output = material.folder / "foreign.trec", material.folder / "whole"
    write_run({f"test{number}": {"p0": 2.0, "p1": 1.0} for number in range(12)}, foreign, "foreign")
    splade = tiny_splade(material.folder / "reported-sparse")
    more = [f"--runs.elsewhere={foreign}", f"--sparse_student={splade}"]
    said = run_recipe("evaluate", material, *options(material, output, *more)).stdout
    report = Report.load(output)
    keys = [system.key for system in report.systems]
    assert keys[-1] == "elsewhere" and {*KEYS, "learned-sparse", "dense-learned-sparse"} < {*keys}
    assert "sparse student (learned)" in said and "active dims a query" in said
    assert report.settings["sparse_student"] == str(splade)
    assert report.table() in said and (output / "report.md").read_text() in said
    for name in ("latency.png", "storage.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    for key in KEYS:
        assert set(read_run(output / "runs" / f"{key}.test.trec")) <= {f"test{number}" for number in range(12)}
    assert "settings.yaml" in {file.name for file in output.iterdir()}
    assert report.tuning["hybrid"]["split"] == "dev"
    tuned = {file.name for file in (output / "runs").glob("*.dev.trec")}
    assert tuned == {f"{key}.dev.trec" for key in ("bm25", "dense-exact", "learned-sparse")}
    assert report.settings["measures"]["depth"] == 20 and report.settings["student"] == str(material.student)
    assert len(report.collection["fingerprint"]["sha256"]) == 64 and report.threads["torch"] == 1
    assert report.environment["packages"]["torch"] and report.machine["processor"]
    assert all(len(report.models[role]["weights_sha256"]) == 64 for role in ("student", "teacher"))


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_figures_of_an_undisturbed_run(material: Material) -> None:
    whole, output = material.folder / "undisturbed", material.folder / "interrupted"
    run_recipe("evaluate", material, *options(material, whole))
    for line in KILLED:
        run_recipe("evaluate", material, *options(material, output), kill_at=line)
    last = run_recipe("evaluate", material, *options(material, output)).stdout.partition("# ")[0]
    assert "search" not in last and "token vectors" not in last
    assert "time 3 of 6" in last and "time 2 of 6" not in last
    # Runs and indexes must not depend on how a run went.
    files = [file for pattern in ("runs/*.trec", "indexes/*/index/*") for file in whole.glob(pattern)]
    assert len(files) > 15
    assert all((output / file.relative_to(whole)).read_bytes() == file.read_bytes() for file in files)
    for one, other in zip(Report.load(whole).systems, Report.load(output).systems, strict=True):
        assert (one.key, one.title, one.effectiveness) == (other.key, other.title, other.effectiveness)
        assert one.significance == other.significance


def test_the_quickstarts_settings_file_names_the_quickstarts_models() -> None:
    schema = load_recipe(ROOT / "recipes" / "evaluate.py").Settings
    settings = load_settings(schema, [str(ROOT / "recipes" / "evaluate.yaml")], description="")
    assert (settings.student, settings.teacher) == ("outputs/quickstart/student", "own")
    quickstart = (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert "output_dir: outputs/quickstart" in quickstart
    assert f"packages: [{', '.join(settings.data.packages)}]" in quickstart


def test_a_faulty_collection_and_a_missing_student_are_one_message(material: Material, tmp_path: Path) -> None:
    shutil.copytree(material.beir, tmp_path / "beir")
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\ntest0\tp999\t1\n")
    more = [f"--data.source={tmp_path / 'beir'}", "--data.dev_split=null"]
    done = run_recipe("evaluate", material, *options(material, tmp_path / "output", *more), code=1)
    [message] = done.stderr.splitlines()
    assert message.startswith("error: ") and "p999" in message
    assert not (tmp_path / "output").exists()
    done = run_recipe("evaluate", material, f"--output_dir={tmp_path / 'output'}", code=2)
    [message] = done.stderr.splitlines()
    assert "student: name the folder or Hub id" in message


@pytest.mark.slow
def test_two_processes_encode_together_and_one_reports(material: Material, tmp_path: Path) -> None:
    words = launch(2, "--multi_gpu", f"--main_process_port={free_port()}")
    words += [str(ROOT / "recipes" / "evaluate.py"), *options(material, tmp_path, "--teacher=null")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(material.folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[3/3] report") == 1 and done.stdout.count("\n# ") == 1
