"""The evaluation recipe from end to end on a small collection: whole, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tct_hf import Report, read_run, write_run
from tests.recipe import run
from tests.searching import Material
from tests.splade import tiny_splade

KEYS = ["bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"]


def evaluate(material: Material, output: Path, *more: str, **how: Any) -> str:
    words = [f"--data.source={material.beir}", f"--student={material.student}", f"--teacher={material.teacher}"]
    words += ["--measures.names=[RR@10, nDCG@10, R@20]", "--measures.depth=20", "--cost.queries=4"]
    words += ["--cost.teacher_queries=3", "--cost.warm_up=1", f"--output_dir={output}"]
    done = run("evaluate", material.folder, *words, *more, **how)
    return done.stderr if how.get("code") else done.stdout


def test_one_command_gives_table_json_plots_and_runs(material: Material) -> None:
    foreign, output = material.folder / "foreign.trec", material.folder / "whole"
    write_run({f"test{number}": {"p0": 2.0, "p1": 1.0} for number in range(12)}, foreign, "foreign")
    splade = tiny_splade(material.folder / "reported-sparse")
    verify = ["--verify", "--expected.figures={test: {bm25: {RR@10: 0.5, tolerance: 1}}}"]
    said = evaluate(material, output, f"--runs.elsewhere={foreign}", f"--sparse_student={splade}", *verify)
    assert "| yes |" in said
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
    assert (output / "settings.yaml").is_file() and report.tuning["hybrid"]["split"] == "dev"
    assert report.settings["measures"]["depth"] == 20 and report.settings["student"] == str(material.student)
    assert len(report.collection["fingerprint"]["sha256"]) == 64 and report.threads["torch"] == 1
    assert report.environment["packages"]["torch"] and report.machine["processor"]
    assert all(len(report.models[role]["weights_sha256"]) == 64 for role in ("student", "teacher"))


def test_a_faulty_collection_and_a_missing_student_are_one_message(material: Material, tmp_path: Path) -> None:
    shutil.copytree(material.beir, tmp_path / "beir")
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\ntest0\tp999\t1\n")
    faulty = f"--data.source={tmp_path / 'beir'}"
    [message] = evaluate(material, tmp_path / "output", faulty, "--data.dev_split=null", code=1).splitlines()
    assert message.startswith("error: ") and "p999" in message
    [message] = evaluate(material, tmp_path / "output", "--student=null", code=2).splitlines()
    assert "student: name the folder or Hub id" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_two_processes_encode_together_and_one_reports(material: Material, tmp_path: Path) -> None:
    said = evaluate(material, tmp_path, "--teacher=null", launched=2)
    assert said.count("[3/3] report") == 1 and said.count("\n# ") == 1
