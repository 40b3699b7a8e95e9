"""What no tokenizer takes is named by every teacher, however the texts come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tct_hf import CachedTeacher, ColBERTTeacher, DenseTeacher, TeacherEnsemble
from tct_hf.evaluation.maxsim import TokenVectors, encode_query_tokens
from tests.train_helpers import make_teacher

BAD = [("\ud800", "half a surrogate pair"), (None, "no text"), (7, "holds 7 where text is needed")]


@pytest.fixture(scope="module")
def teachers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {kind: make_teacher(models, kind) for kind in ("colbert", "dense", "bm25", "cross-encoder in-batch")}
    made["cached"] = CachedTeacher(make_teacher(models, "colbert"), tmp_path_factory.mktemp("cache"))
    made["ensemble"] = TeacherEnsemble({made["bm25"]: 1.0, made["dense"]: 1.0}, normalize="none")
    return made


@pytest.mark.parametrize(("bad", "message"), BAD)
@pytest.mark.parametrize("kind", ["colbert", "dense", "bm25", "cross-encoder in-batch", "cached", "ensemble"])
def test_a_text_that_is_none_is_refused_with_its_number(
    teachers: dict[str, Any], kind: str, bad: Any, message: str
) -> None:
    teacher = teachers[kind]
    passages = ["a passage", bad, "the student"]
    with pytest.raises(ValueError, match=f"document texts, number 1: {message}"):
        teacher.collate(["a", "b", "c"], [passages], [{}] * 3)
    with pytest.raises(ValueError, match=f"query texts, number 0: {message}"):
        teacher.list_scores(bad, ["a passage"])
    if isinstance(teacher, (ColBERTTeacher, DenseTeacher, CachedTeacher)):
        with pytest.raises(ValueError, match=f"document texts, number 1: {message}"):
            teacher.vectors(passages, "document")
    if kind == "colbert":
        with pytest.raises(ValueError, match=f"query texts, number 1: {message}"):
            encode_query_tokens(teacher.model, passages)
        with pytest.raises(ValueError, match=f"document texts, number 0: {message}"):
            TokenVectors.encoded(teacher.model, {"p": bad}, bf16=False)


@pytest.mark.parametrize("kind", ["colbert", "dense", "cross-encoder", "cross-encoder in-batch", "cached"])
def test_queries_that_a_teacher_cuts_are_counted_once(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    teacher = make_teacher(models, "colbert" if kind == "cached" else kind)
    if kind == "dense":
        teacher = DenseTeacher(str(models / "plain"), dtype="float32")
    if kind == "cached":
        teacher = CachedTeacher(teacher, tmp_path)
    queries = ["query " * 300, "a query", "student " * 300]
    teacher.announce([{"query": one, "positive": "a passage"} for one in queries], ["positive"], queries=2, devices=1)
    assert "2 of 3 queries have more than the " in caplog.text
    caplog.clear()
    for query in queries:
        teacher.list_scores(query, ["a passage"])
    assert "queries have more than" not in caplog.text


@pytest.mark.parametrize("kind", ["colbert", "bm25", "cross-encoder in-batch", "cached", "ensemble"])
def test_no_passages_have_no_scores(teachers: dict[str, Any], kind: str) -> None:
    assert teachers[kind].list_scores("a query", []).shape == (0,)
    assert teachers[kind].list_scores("", ["", "the student"]).isfinite().all()
