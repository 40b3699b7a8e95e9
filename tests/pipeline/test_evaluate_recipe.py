"""The evaluation recipe from end to end on a small collection: whole, killed and started again, refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tct_hf import Report, read_run, write_run
from tests.recipe import ROOT
from tests.searching import Material, run_recipe, write_material

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


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def said(material: Material) -> dict[str, Any]:
    """What the recipe printed; the outputs are in folders of these names."""
    foreign = material.folder / "foreign.trec"
    write_run({f"test{number}": {"p0": 2.0, "p1": 1.0} for number in range(12)}, foreign, "foreign")

    def interrupted() -> list[str]:
        output = material.folder / "interrupted"
        said = [run_recipe("evaluate", material, *options(material, output), kill_at=line).stdout for line in KILLED]
        return [*said, run_recipe("evaluate", material, *options(material, output)).stdout]

    def whole() -> str:
        return run_recipe("evaluate", material, *options(material, material.folder / "whole")).stdout

    def with_foreign() -> str:
        more = [f"--runs.elsewhere={foreign}", "--teacher=null"]
        return run_recipe("evaluate", material, *options(material, material.folder / "foreign", *more)).stdout

    with ThreadPoolExecutor(3) as pool:
        jobs = {job.__name__: pool.submit(job) for job in (interrupted, whole, with_foreign)}
        return {name: job.result() for name, job in jobs.items()}


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a run went: runs and indexes."""
    files = [*folder.glob("runs/*.trec"), *folder.glob("indexes/*/index/*"), *folder.glob("tokens/vectors/*.npy")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_one_command_gives_table_json_plots_and_runs(said: dict[str, Any], material: Material) -> None:
    output = material.folder / "whole"
    report = Report.load(output)
    assert [system.key for system in report.systems] == KEYS
    assert report.table() in said["whole"] and (output / "report.md").read_text() in said["whole"]
    for name in ("latency.png", "storage.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    for key in KEYS:
        assert set(read_run(output / "runs" / f"{key}.test.trec")) <= {f"test{number}" for number in range(12)}
    assert "settings.yaml" in {file.name for file in output.iterdir()}


def test_the_json_holds_settings_environment_and_corpus(said: dict[str, Any], material: Material) -> None:
    content = json.loads((material.folder / "whole" / "report.json").read_text())
    assert content["settings"]["measures"]["depth"] == 20 and content["settings"]["student"] == str(material.student)
    assert len(content["collection"]["fingerprint"]["sha256"]) == 64
    assert content["environment"]["packages"]["torch"] and content["machine"]["processor"]
    assert content["threads"]["torch"] == 1
    for role in ("student", "teacher"):
        assert len(content["models"][role]["weights_sha256"]) == 64


def test_alpha_comes_from_dev(said: dict[str, Any], material: Material) -> None:
    folder = material.folder / "whole"
    assert Report.load(folder).tuning["hybrid"]["split"] == "dev"
    tuned = {file.name for file in (folder / "runs").glob("*.dev.trec")}
    assert tuned == {"bm25.dev.trec", "dense-exact.dev.trec"}


def test_killed_three_times_it_ends_with_the_figures_of_an_undisturbed_run(
    said: dict[str, Any], material: Material
) -> None:
    whole, interrupted = (material.folder / name for name in ("whole", "interrupted"))
    assert results(interrupted) == results(whole)
    assert len(results(whole)) > 20
    first, second = Report.load(whole), Report.load(interrupted)
    for one, other in zip(first.systems, second.systems, strict=True):
        assert (one.key, one.title, one.effectiveness) == (other.key, other.title, other.effectiveness)
        assert one.significance == other.significance


def test_a_killed_run_does_not_repeat_what_is_there(said: dict[str, Any]) -> None:
    last = said["interrupted"][-1].partition("# ")[0]
    assert "search" not in last and "token vectors" not in last
    assert "time 3 of 6" in last and "time 2 of 6" not in last


def test_the_run_of_another_system_stands_in_the_table(said: dict[str, Any], material: Material) -> None:
    report = Report.load(material.folder / "foreign")
    assert [system.key for system in report.systems] == [*KEYS[:4], "elsewhere"]
    assert any(line.startswith("| elsewhere ") for line in said["with_foreign"].splitlines())


def test_the_quickstarts_settings_file_names_the_quickstarts_models(tmp_path: Path) -> None:
    import importlib.util
    import sys

    from tct_hf.settings import load_settings

    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_recipe"] = module
    spec.loader.exec_module(module)
    settings = load_settings(module.Settings, [str(ROOT / "recipes" / "evaluate.yaml")], description="")
    del sys.modules["evaluate_recipe"]
    assert (settings.student, settings.teacher) == ("outputs/quickstart/student", "own")
    quickstart = (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert "output_dir: outputs/quickstart" in quickstart
    assert f"packages: [{', '.join(settings.data.packages)}]" in quickstart


def spoil(material: Material, folder: Path, file: str, content: str) -> Path:
    """A copy of the collection with one file changed."""
    import shutil

    shutil.copytree(material.beir, folder)
    (folder / file).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\ntest0\tp999\t1\n", "p999"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv"),
        ("queries.jsonl", "", "queries.jsonl"),
        ("queries.jsonl", '{"_id": "test0", "text": "  \\t"}\n', "test0"),
    ],
)
def test_a_faulty_collection_is_one_message_that_names_the_place(
    material: Material, tmp_path: Path, file: str, content: str, said: str
) -> None:
    beir = spoil(material, tmp_path / "beir", file, content)
    more = [f"--data.source={beir}", "--data.dev_split=null"]
    done = run_recipe("evaluate", material, *options(material, tmp_path / "output", *more), code=1)
    [message] = done.stderr.splitlines()
    assert message.startswith("error: ") and said in message
    assert not (tmp_path / "output").exists()


def test_the_student_must_be_named(material: Material, tmp_path: Path) -> None:
    done = run_recipe("evaluate", material, f"--output_dir={tmp_path / 'output'}", code=2)
    [message] = done.stderr.splitlines()
    assert "student: name the folder or Hub id" in message


@pytest.mark.slow
def test_two_processes_encode_together_and_one_reports(material: Material, tmp_path: Path) -> None:
    import subprocess

    from tests.recipe import environment, launch
    from tests.warm_process import free_port

    words = launch(2, "--multi_gpu", f"--main_process_port={free_port()}")
    done = subprocess.run(
        [*words, str(ROOT / "recipes" / "evaluate.py"), *options(material, tmp_path, "--teacher=null")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(material.folder),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[3/3] report") == 1 and done.stdout.count("\n# ") == 1
