"""The recipe for questions that nobody has judged: a teacher, passages and a file of questions are enough."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tct_hf import build_student
from tct_hf.pipeline import train as pipeline
from tests.models import tiny_bert, tiny_colbert
from tests.recipe import RECIPE, ROOT, in_this_process, write_beir

QUESTIONS = 40


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    colbert = tiny_colbert(folder / "teacher")
    write_beir(folder / "whole", train=QUESTIONS)
    (folder / "passages").mkdir()
    shutil.copyfile(folder / "whole" / "corpus.jsonl", folder / "passages" / "corpus.jsonl")
    lines = (folder / "whole" / "queries.jsonl").read_text().splitlines()[:QUESTIONS]
    texts = [f"{json.loads(line)['text']} {number}" for number, line in enumerate(lines)]  # each a question of its own
    (folder / "questions.txt").write_text("\n".join([*texts, "", texts[0]]) + "\n")
    (folder / "tiny.yaml").write_text(
        f"""
extends: {ROOT / "recipes" / "unlabelled.yaml"}
precision: fp32
data: {{source: {folder / "passages"}, questions: {folder / "questions.txt"}, negative_depth: 10}}
encoder: {{encoding: tct, query_length: 16, document_length: 48}}
teacher: {{model: {colbert}}}
student:
  layers: [1]
  training: {{per_device_train_batch_size: 8, max_steps: 3, logging_steps: 1}}
evaluation: {{depth: 20, measures: [RR@10, R@20]}}
"""
    )
    return folder / "tiny.yaml"


@pytest.fixture
def recipe(settings: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, monkeypatch)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that students were trained on."""
    found: list[Any] = []
    original = pipeline.collection_triples

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(original(*args, **options))
        return found[-1]

    monkeypatch.setattr(pipeline, "collection_triples", recorded)
    return found


@pytest.mark.usefixtures("warm_checks")
def test_a_teacher_passages_and_questions_make_a_student_that_is_measured_by_what_the_teacher_finds(
    settings: Path,
    recipe: Callable[..., int],
    trained: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tct_hf import read_run, validate_checkpoint

    assert recipe(tmp_path) == 0
    assert f"{QUESTIONS - 4} without judgements" in capsys.readouterr().out

    [rows] = trained
    test = set(read_run(tmp_path / "runs" / "student.test.trec"))
    assert len(test) == 4 and not test & set(rows["query_id"])
    assert test | set(rows["query_id"]) == {f"question-{number}" for number in range(1, QUESTIONS + 1)}
    assert rows["labelled"][:] == [False] * len(rows)
    texts = list(dict.fromkeys((settings.parent / "questions.txt").read_text().split("\n")))
    held_out = {texts[int(name.partition("-")[2]) - 1] for name in test}
    assert not held_out & set(rows["query"])

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

    # Called again, nothing is done again; with other questions, the student is another.
    assert recipe(tmp_path) == 0
    assert "  step " not in capsys.readouterr().out and len(trained) == 1
    other = tmp_path.with_name("other.txt")
    other.write_text((settings.parent / "questions.txt").read_text() + "one more question\n")
    assert recipe(tmp_path, f"--data.questions={other}") == 1
    assert "holds a run with data.questions = " in capsys.readouterr().err


def test_without_a_trained_teacher_the_mixture_names_positives_and_own_maxsim_judges(
    settings: Path, recipe: Callable[..., int], trained: list[Any], tmp_path: Path
) -> None:
    base = build_student(str(tiny_bert(settings.parent / "encoder")))
    base.similarity_fn_name = "cosine"
    base.save_pretrained(str(settings.parent / "base"))
    own = [f"--encoder.base_model={settings.parent / 'base'}", "--encoder.encoding=own", "--encoder.query_length=null"]
    assert recipe(tmp_path, *own, "--teacher.model=null", "--student.layers=null", "--data.made_questions=5") == 0
    [rows] = trained
    assert not any(rows["labelled"]) and all(weight > 0 for weight in rows["label_weight"])
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert [entry["hard_label"] > 0 for entry in log if "hard_label" in entry] == [True] * 3
    report = (tmp_path / "report.md").read_text()
    assert "what it would put first: base reranked by its own MaxSim, untrained." in report
    assert "alpha that gives both lists the same spread (this run uses no labels)" in report


def test_questions_join_the_train_queries_of_a_judged_collection_whose_test_split_is_measured(
    settings: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path, f"--data.source={settings.parent / 'whole'}", "--stages=evaluate") == 2
    said = capsys.readouterr()
    assert f"{QUESTIONS} train, 10 dev, 12 test, {QUESTIONS} without judgements" in said.out
    assert "Add the stage student" in said.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data.questions=null"], 2, "has no test split, and there are no data.questions or data.made_questions"),
        (["--data.unlabelled=false"], 2, "data.questions: these have no labels; set data.unlabelled"),
        (["--data.questions=null", "--stages=student"], 1, "give a file of them as data.questions"),
        (["--data.labels=1.0"], 1, "qrels: no train.tsv"),
    ],
)
def test_what_is_missing_is_said_before_any_training(
    recipe: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert recipe(tmp_path / "new", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "student").exists()


def test_made_questions_are_held_out_where_there_is_no_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.settings import DataSettings

    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    texts = [
        f"The {one} {two} holds the vectors of {three}. It answers the question {one} of a {three}."
        for one in "abcd"
        for two in ("index", "run")
        for three in ("text", "user")
    ]
    lines = [json.dumps({"_id": f"p{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    data = DataSettings(source=str(tmp_path), labels=0.0, unlabelled=True, made_questions=16)
    collection = read_collection(data)
    test, left = collection.splits["test"].queries, collection.questions
    assert test and left and not test.keys() & left.keys() and not collection.splits["test"].qrels
