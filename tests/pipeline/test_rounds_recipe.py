"""The rounds recipe from end to end on a tiny encoder: whole, killed in each kind of stage, prolonged, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load
from sentence_transformers import MultiVectorEncoder

from tct_hf import validate_checkpoint
from tests.recipe import Check, Run, results
from tests.searching import Material

RECIPE, KINDS = "rounds", ("triples.parquet", "metrics.json")


SETTINGS = """
extends: tiny.yaml
rounds: 1
variant: HN+
mining: {depth: 10, margin: 5.0}
later:
  student.training.learning_rate: 5.0e-4
  teacher: {training: {learning_rate: 5.0e-4}}
"""


def weights(folder: Path, number: int, role: str) -> bytes:
    return (folder / f"round-{number}" / role / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("warm_checks")
def test_each_round_leaves_its_models_triples_and_runs(whole: Path) -> None:
    for number in (0, 1):
        folder = whole / f"round-{number}"
        assert MultiVectorEncoder(str(folder / "teacher"), device="cpu").encode_query("dense").shape == (16, 16)
        assert not list(folder.glob("training/*/checkpoint-*"))
    validate_checkpoint(whole / "round-1" / "student")
    assert weights(whole, 0, "student") != weights(whole, 1, "student")
    assert weights(whole, 0, "teacher") != weights(whole, 1, "teacher")
    rows = pq.read_table(whole / "round-1" / "mined" / "triples.parquet").to_pylist()
    assert len(rows) == 40 and {row["origin"] for row in rows} == {"student base"}
    assert not any(row["negative_id"] in row["known_positive_ids"] for row in rows)
    runs = {str(file.relative_to(whole)) for file in whole.rglob("*.test.trec")}
    made = ("round-0/runs/student-0", "round-1/runs/student-1", "round-1/runs/teacher-1")
    shared = (f"runs/{key}" for key in ("bm25", "base-native", "base-maxsim", "teacher"))
    assert runs == {f"{name}.test.trec" for name in (*made, *shared)}

    # Six small steps from the last round's weights stay near them; from the base encoder's they would not.
    for role in ("student", "teacher"):
        before, after = (load(weights(whole, number, role)) for number in (0, 1))
        assert before.keys() == after.keys()
        assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.02


def test_one_table_has_the_figures_of_every_round_on_dev_and_test(whole: Path) -> None:
    report = (whole / "report.md").read_text()
    measured = json.loads((whole / "metrics.json").read_text())["measured"]
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    names = [f"{split} {name}" for split in ("dev", "test") for name in ("RR@10", "nDCG@10", "R@20")]
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == names
    titles = {"bm25": "BM25", "base-native": "base as it is", "base-maxsim": "base reranked by its own MaxSim"}
    titles |= {"student-0": "student, base", "student-1": "student, round 1"}
    titles |= {"teacher": "ColBERT teacher", "teacher-1": "ColBERT teacher, round 1"}
    for line, (key, title) in zip(lines[1:], titles.items(), strict=True):
        assert line[2:].startswith(title)
        shown = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        assert shown == [f"{measured[s][key][m]['mean']:.3f}" for s, m in (name.split() for name in names)]
    best = max((0, 1), key=lambda number: measured["dev"][f"student-{number}"]["RR@10"]["mean"])
    assert f"{whole / f'round-{best}' / 'student'}" in report
    assert "Plot: rounds.png" in report and (whole / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert "Mined for round 1: 40 triples of 40 queries" in report and "p: paired randomisation" in report


@pytest.mark.slow
def test_a_finished_run_does_nothing_again_and_goes_on_with_another_round(
    whole: Path, recipe: Run, tmp_path: Path
) -> None:
    before = results(whole, *KINDS)
    output = shutil.copytree(whole, tmp_path / "longer")
    verify = ["--verify", "--expected.figures={test: {student-2: {RR@10: 0.5, tolerance: 1}}}"]
    said, after = recipe(output, "--rounds=2", *verify).stdout, results(output, *KINDS)
    assert "| yes |" in said and "round 1: student: skipped" in said and "student, round 2" in said
    del before["metrics.json"]
    assert {name: after[name] for name in before} == before
    assert weights(output, 2, "student") != weights(output, 1, "student")


@pytest.mark.slow
def test_hn_trains_the_student_alone_and_may_begin_anew(recipe: Run, material: Material, tmp_path: Path) -> None:
    options = ["--variant=HN", "--start_from=new", "--student.training.max_steps=2"]
    recipe(tmp_path / "hn", f"--teacher.model={material.teacher}", *options)
    assert not list((tmp_path / "hn").glob("round-*/teacher"))
    report = (tmp_path / "hn" / "report.md").read_text()
    assert "student, round 1" in report and "ColBERT teacher, round 1" not in report and "base as it is" not in report
    log = json.loads((tmp_path / "hn" / "round-1" / "student" / "training_log.json").read_text())
    assert next(entry["learning_rate"] for entry in log if "learning_rate" in entry) <= 5.0e-4


def test_other_settings_in_the_same_folder_are_refused_by_name(kept: Check) -> None:
    kept("--variant=HN", "variant")
    kept("--later={student: {training: {learning_rate: 0.1}}}", "student.training.learning_rate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=-1"], "rounds: -1 is below 0"),
        (["--data.unlabelled=true"], "negatives are mined for judged train queries"),
        (["--teacher.kind=bm25"], "only a ColBERT works here"),
        (["--mining.depth=0"], "mining.depth=0: too few candidates"),
        (["--data.labels=0"], "has no judged train queries to mine for"),
        (["--later={student: {training: {temperature: -1}}}"], "later.student.training.temperature=-1"),
        (["--later={student: {trianing: {}}}"], "student.trianing"),
    ],
)
def test_wrong_settings_are_one_message_before_anything(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
