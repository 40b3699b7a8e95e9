"""The recipe for questions that nobody has judged: a teacher, passages and a file of questions are enough."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tct_hf import read_run, validate_checkpoint
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.settings import DataSettings
from tests.recipe import ROOT, Run
from tests.searching import Material

RECIPE = "train"
QUESTIONS = 40
SETTINGS = f"""
extends: {ROOT / "recipes" / "unlabelled.yaml"}
precision: fp32
data: {{source: FOLDER/passages, questions: FOLDER/questions.txt, negative_depth: 10}}
encoder: {{encoding: tct, query_length: 16, document_length: 48}}
teacher: {{model: FOLDER/teacher/colbert}}
student:
  layers: [1]
  training: {{per_device_train_batch_size: 8, max_steps: 3, logging_steps: 1}}
evaluation: {{depth: 20, measures: [RR@10, R@20]}}
"""


@pytest.fixture(scope="module", autouse=True)
def questions(material: Material) -> list[str]:
    """A file of questions, one of them twice, and passages that nobody has judged."""
    (material.folder / "passages").mkdir()
    shutil.copyfile(material.beir / "corpus.jsonl", material.folder / "passages" / "corpus.jsonl")
    lines = (material.beir / "queries.jsonl").read_text().splitlines()[:QUESTIONS]
    texts = [f"{json.loads(line)['text']} {number}" for number, line in enumerate(lines)]  # each a question of its own
    (material.folder / "questions.txt").write_text("\n".join([*texts, "", texts[0]]) + "\n")
    return texts


@pytest.mark.usefixtures("warm_checks")
def test_a_teacher_passages_and_questions_make_a_student_that_is_measured_by_what_the_teacher_finds(
    questions: list[str], recipe: Run, trained: list[Any], tmp_path: Path
) -> None:
    assert f"{QUESTIONS - 4} without judgements" in recipe(tmp_path).stdout

    [rows] = trained
    test = set(read_run(tmp_path / "runs" / "student.test.trec"))
    assert len(test) == 4 and not test & set(rows["query_id"])
    assert test | set(rows["query_id"]) == {f"question-{number}" for number in range(1, QUESTIONS + 1)}
    assert rows["labelled"][:] == [False] * len(rows)
    assert not {questions[int(name.partition("-")[2]) - 1] for name in test} & set(rows["query"])

    validate_checkpoint(tmp_path / "student")
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert [entry["hard_label"] for entry in log if "hard_label" in entry] == [0, 0, 0]
    assert all(entry["distillation"] > 0 for entry in log if "distillation" in entry)

    report = (tmp_path / "report.md").read_text()
    assert "what it would put first: ColBERT teacher (one vector a token)." in report
    measured = json.loads((tmp_path / "metrics.json").read_text())["measured"]
    assert set(measured) == {"test"} and set(measured["test"]) == {"bm25", "student", "student-bm25", "teacher"}
    assert measured["test"]["teacher"]["RR@10"]["mean"] == 1.0
    runs = {key: read_run(tmp_path / "runs" / f"{key}.test.trec") for key in ("student", "teacher")}
    reciprocal = []
    for query, hits in runs["teacher"].items():
        best = max(hits, key=hits.__getitem__)
        order = sorted(runs["student"][query], key=runs["student"][query].__getitem__, reverse=True)[:10]
        reciprocal.append(1 / (1 + order.index(best)) if best in order else 0.0)
    assert measured["test"]["student"]["RR@10"]["mean"] == pytest.approx(sum(reciprocal) / 4, abs=1e-6)

    # With other questions, the student is another.
    (tmp_path / "other.txt").write_text("\n".join([*questions, "one more question\n"]))
    again = recipe(tmp_path, f"--data.questions={tmp_path / 'other.txt'}", code=1)
    assert "holds a run with data.questions = " in again.stderr


def test_without_a_trained_teacher_the_mixture_names_positives_and_own_maxsim_judges(
    material: Material, recipe: Run, trained: list[Any], tmp_path: Path
) -> None:
    own = [f"--encoder.base_model={material.folder / 'mean'}", "--encoder.encoding=own", "--encoder.query_length=null"]
    recipe(tmp_path, *own, "--teacher.model=null", "--student.layers=null", "--data.made_questions=5")
    [rows] = trained
    assert not any(rows["labelled"]) and all(weight > 0 for weight in rows["label_weight"])
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert [entry["hard_label"] > 0 for entry in log if "hard_label" in entry] == [True] * 3
    report = (tmp_path / "report.md").read_text()
    assert "what it would put first: base reranked by its own MaxSim, untrained." in report
    assert "alpha that gives both lists the same spread (this run uses no labels)" in report


def test_questions_join_the_train_queries_of_a_judged_collection_whose_test_split_is_measured(
    material: Material, recipe: Run, tmp_path: Path
) -> None:
    done = recipe(tmp_path, f"--data.source={material.beir}", "--stages=evaluate", code=2)
    assert f"{QUESTIONS} train, 10 dev, 12 test, {QUESTIONS} without judgements" in done.stdout
    assert "Add the stage student" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data.questions=null"], 2, "has no test split, and there are no data.questions or data.made_questions"),
        (["--data.unlabelled=false"], 2, "data.questions: these have no labels; set data.unlabelled"),
        (["--data.questions=null", "--stages=student"], 1, "give a file as data.questions"),
        (["--data.labels=1.0"], 1, "qrels: no train.tsv"),
    ],
)
def test_what_is_missing_is_said_before_any_training(
    recipe: Run, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    assert message in recipe(tmp_path / "new", *options, code=code).stderr
    assert not (tmp_path / "new" / "student").exists()


def test_made_questions_are_held_out_where_there_is_no_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    words = itertools.product("abcd", ("index", "run"), ("text", "user"))
    texts = [f"The {a} {b} holds the vectors of {c}. It answers the question {a} of a {c}." for a, b, c in words]
    lines = [json.dumps({"_id": f"p{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    data = DataSettings(source=str(tmp_path), labels=0.0, unlabelled=True, made_questions=16)
    collection = read_collection(data)
    test, left = collection.splits["test"].queries, collection.questions
    assert test and left and not test.keys() & left.keys() and not collection.splits["test"].qrels
