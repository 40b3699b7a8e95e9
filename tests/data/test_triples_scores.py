"""Scores that come with triples: kept where they are asked for, in one list a row, and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples

LISTED = {"query": "first query", "positive": "right", "negatives": ["wrong", "worse"], "label": [1.5, 0, -2]}
EACH = {
    "query": "first query", "positive": "right", "negative_1": "wrong", "negative_2": "worse", "origin": "bm25",
    "positive_teacher_score": 1.5, "negative_1_teacher_score": 0.0, "negative_2_teacher_score": -2.0,
    "positive_score": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    file = path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [dict(row) for row in load_triples(file, **settings)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("row", "name"), [(LISTED, "label"), (EACH, "teacher_score")])
def test_scores_become_one_list_a_row(tmp_path: Path, row: dict[str, Any], name: str, streaming: bool) -> None:
    texts = {"query": "first query", "positive": "right", "negative_1": "wrong", "negative_2": "worse"}
    assert load(tmp_path, [row], scores=name, streaming=streaming) == [{**texts, "scores": [1.5, 0.0, -2.0]}]
    assert load(tmp_path, [row], streaming=streaming) == [texts]  # as if they were not there
    fewer = load(tmp_path, [row], scores=name, num_negatives=1, streaming=streaming)
    assert fewer == [{**{k: texts[k] for k in ("query", "positive")}, "negative": "wrong", "scores": [1.5, 0.0]}]
    none = load(tmp_path, [row], scores=name, num_negatives=0, streaming=streaming)
    assert none == [{"query": "first query", "positive": "right", "scores": [1.5]}]


def test_one_negative_and_ids(tmp_path: Path) -> None:
    row = {"query_id": 1, "positive_id": "a", "negative_id": "b", "positive_score": 2, "negative_score": 1.0}
    texts = {"collection": {"a": "right", "b": "wrong"}, "queries": {"1": "query"}}
    [found] = load(tmp_path, [row], scores="score", **texts)
    assert found["scores"] == [2.0, 1.0] and found["negative_id"] == "b"
    Dataset.from_list([{**found, "labelled": True}]).to_parquet(tmp_path / "t.parquet")
    [again] = [dict(row) for row in load_triples(tmp_path / "t.parquet", scores="scores")]
    assert again == {**found, "labelled": True}


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"label": [1.0, 2.0]}, "label", "line 2, column 'label': 2 scores for 3 candidates; give one each, positive"),
        ({"label": 1.0}, "label", "line 2, column 'label': holds 1.0, where a list of 3 scores is needed"),
        ({"label": [1.0, None, 2.0]}, "label", r"column 'label': negatives\[0\] of query 'first query' has no score"),
        (
            {"label": [1, 0, "x"]},
            "label",
            r"the score of negatives\[1\] of query 'first query' is 'x', which is no number",
        ),
        ({"positive": ["right", "also right"]}, "label", "2 positives in a row with scores"),
    ],
)
def test_bad_scores_are_named_and_can_be_skipped(
    tmp_path: Path, change: dict[str, Any], name: str, message: str
) -> None:
    first = {**LISTED, "positive": ["right"]} if "positive" in change else LISTED
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [first, {**first, **change}], scores=name)
    skipped = SkippedRows()
    assert len(load(tmp_path, [first, {**first, **change}], scores=name, skip_bad_rows=True, skipped=skipped)) == 1
    assert skipped.total == 1


def test_scores_that_are_not_finite_or_not_there_are_named(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf"), 1e300):
        rows = Dataset.from_list([LISTED, {**LISTED, "label": [1.0, 0.0, bad]}])
        message = r"row 1, column 'label': the score of negatives\[1\] of query 'first query' is"
        with pytest.raises(ValueError, match=message):
            load_triples(rows, scores="label")
    with pytest.raises(ValueError, match=r"neither a column 'scores' nor 'positive_scores' .*what follows positive_"):
        load(tmp_path, [EACH], scores="scores")
    with pytest.raises(ValueError, match="nor 'negative_1_score'"):
        load(tmp_path, [EACH], scores="score")
