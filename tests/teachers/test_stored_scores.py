"""Scores that were there before: from columns and from tables, in their places, and refused where not right."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import StoredScores, TeacherEnsemble
from tests.train_helpers import make_trainer, score, triples, with_scores

ROW = {"query": "a query", "positive": "one", "negative": "two", "query_id": "q1", "positive_id": "p1"}
ROW |= {"negative_id": "p2"}


def of(teacher: StoredScores, rows: list[dict[str, Any]]) -> torch.Tensor:
    columns = [[row[name] for row in rows] for name in ("positive", "negative")]
    found: torch.Tensor = score(teacher, [row["query"] for row in rows], columns, rows)
    return found


EXPECTED = torch.tensor([[2.0, 0.0, -1.0, 0.0], [0.0, 4.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (None, ["scores"]),
        ("label", ["label"]),
        (None, ["positive_teacher_score", "negative_teacher_score"]),
        ("teacher_score", ["positive_teacher_score", "negative_teacher_score"]),
        (None, ["positive_score", "negative_score"]),
    ],
)
def test_columns_give_own_scores_in_their_places(column: str | None, names: list[str]) -> None:
    values: list[list[Any]] = [[2.0, -1.0], [4, 3]]
    rows = [ROW | dict(zip(names, pair if len(names) > 1 else [pair], strict=True)) for pair in values]
    assert torch.equal(of(StoredScores(column=column), rows), EXPECTED)


def test_columns_of_any_name_train(student: Any, teacher: Any, tmp_path: Path) -> None:
    dataset = with_scores(16).rename_column("scores", "minilm")
    stored = StoredScores(column="minilm")
    settings: Any = {"candidates": "own", "batch_sampler": "no_duplicates", "max_steps": 1, "eval_dataset": dataset}
    for one in (stored, TeacherEnsemble({stored: 1.0, teacher: 1.0})):
        make_trainer(tmp_path / "run", student, one, dataset, **settings).train()
    with pytest.raises(ValueError, match="'other' is not known"):
        make_trainer(tmp_path / "run", student, stored, dataset.add_column("other", [0] * 16), candidates="own")


def test_what_a_teacher_said_goes_before_what_a_miner_found() -> None:
    found = {"positive_score": 9.0, "negative_score": None, "origin": "bm25"}
    row = ROW | found | {"positive_teacher_score": 2.0, "negative_teacher_score": -1.0}
    assert of(StoredScores(), [row]).tolist() == [[2.0, -1.0]]
    with pytest.raises(ValueError, match="what the miner found candidates by"):
        of(StoredScores(), [ROW | found])
    assert of(StoredScores(column="score"), [ROW | found | {"negative_score": 1}]).tolist() == [[9.0, 1.0]]


def test_a_table_is_looked_up_by_ids_and_goes_to_workers(tmp_path: Path) -> None:
    table = {"q1": {"p1": 2.0, "p2": -1.0}, "q2": {"p1": 4.0, "p2": 3.0}}
    teacher = StoredScores(table, cache_dir=tmp_path)
    rows = [ROW, ROW | {"query_id": "q2"}]
    assert torch.equal(of(teacher, rows), EXPECTED)
    assert torch.equal(of(pickle.loads(pickle.dumps(teacher)), rows), EXPECTED)
    with pytest.raises(ValueError, match=r"query 'q3', column 'positive_id': .* has no score of passage 'p1'"):
        of(teacher, [ROW | {"query_id": "q3"}])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scores": [1.0, float("nan")]}, "query 'q1', column 'scores': the score of negative is nan, .*not finite"),
        ({"scores": [1e300, 0.0]}, "the score of positive .*not finite.*remove it"),
        ({"scores": [1.0, None]}, "negative has no score"),
        ({"scores": [1.0]}, r"column 'scores': holds .*where a list of 2 scores is needed \(positive, negative\)"),
        ({"label": 0.7}, "column 'label': holds 0.7, where a list of 2 scores is needed.*store both"),
        ({"scores": ["high", 0]}, "is 'high', which is no number"),
        ({"positive_score": 1.0, "negative_score": None}, "column 'negative_score': negative has no score"),
        ({"positive_score": 1.0}, "has scores in 'positive_score', but no negative_score"),
        ({}, "but no scores .*recipes/score.py"),
    ],
)
def test_scores_that_are_not_right_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(StoredScores(), [ROW | more])


def test_a_data_set_without_scores_or_ids_is_refused_before_training(student: Any, tmp_path: Path) -> None:
    def refused(message: str, teacher: Any, rows: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "run", student, teacher, rows, **{"candidates": "own", **options})

    refused("but no scores", StoredScores(), triples(8))
    refused("but no scores", StoredScores(), with_scores(8), eval_dataset=triples(8))
    table = StoredScores({"q1": {"p1": 1.0}}, cache_dir=tmp_path)
    refused("has no query_id, positive_id, negative_id", table, triples(8, ids=False))
    for one in (StoredScores(), TeacherEnsemble({StoredScores(): 1.0})):
        refused(f"{type(one).__name__} here scores a query's own", one, with_scores(8), candidates="in-batch")
    with pytest.raises(ValueError, match="from a table or from the column"):
        StoredScores({"q": {"p": 1.0}}, column="scores")
