"""Triples of one's own may hold no query that the run is measured on."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples
from tct_hf.data.collection import Collection, Split
from tct_hf.pipeline.data import leave_out_reported

SPLITS = {
    "train": Split({"1": "trained on"}, {}),
    "dev": Split({"2": "What is  dense?"}, {}),
    "test": Split({"3": "Where is it"}, {}),
}
COLLECTION = Collection("set", Dataset.from_dict({"id": [], "text": []}), SPLITS, {})


def rows(*queries: str) -> Dataset:
    return Dataset.from_list([{"query": query, "positive": "p", "negative": "n"} for query in queries])


def test_triples_of_other_queries_pass_as_they_are() -> None:
    given, said = rows("trained on", "another", "what is"), list[str]()
    assert leave_out_reported(given, COLLECTION, said.append) is given and not said


def test_triples_of_dev_or_test_queries_are_left_out_and_counted() -> None:
    given, said = rows("another", *["WHERE  is it? "] * 3, *["more"] * 12_000, "what is dense?"), list[str]()
    left = leave_out_reported(given, COLLECTION, said.append)
    assert left["query"][:] == ["another", *["more"] * 12_000]
    assert said == ["  4 of 12,005 rows are left out: their queries are of dev or test"]
    with pytest.raises(ValueError, match=r"triples\.path: all rows have queries of dev or test; .*data\.test_split"):
        leave_out_reported(rows("where is it"), COLLECTION, said.append)


def test_streamed_triples_are_left_out_as_they_pass(caplog: pytest.LogCaptureFixture) -> None:
    given: Any = rows("one", "two", "where is it").to_iterable_dataset()
    skipped = SkippedRows()
    stream = load_triples(given, streaming=True, skipped=skipped).shuffle(seed=1, buffer_size=2)
    checked = leave_out_reported(stream, COLLECTION, print)
    assert checked.features == stream.features
    assert {row["query"] for row in pickle.loads(pickle.dumps(checked))} == {"one", "two"}
    assert {row["query"] for row in checked} == {"one", "two"} and skipped.counts == {"query of dev or test": 1}
    assert "'where is it' (test of set)" in caplog.text
