"""Triples of one's own may hold no query that the run is measured on."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from datasets import Dataset

from tct_hf.data.collection import Collection, Split
from tct_hf.pipeline.data import refuse_reported_queries

SPLITS = {
    "train": Split({"1": "trained on"}, {}),
    "dev": Split({"2": "What is  dense?"}, {}),
    "test": Split({"3": "Where is it"}, {}),
}
COLLECTION = Collection("set", Dataset.from_dict({"id": [], "text": []}), SPLITS, {})


def rows(*queries: str) -> Dataset:
    return Dataset.from_list([{"query": query, "positive": "p", "negative": "n"} for query in queries])


def test_triples_of_other_queries_pass_as_they_are() -> None:
    given = rows("trained on", "another", "what is")
    assert refuse_reported_queries(given, COLLECTION) is given


def test_triples_of_dev_or_test_queries_are_counted_and_refused_with_the_fix() -> None:
    given = rows("another", *["WHERE  is it "] * 3, *["more"] * 12_000, "what is dense?")
    message = (
        r"triples\.path: 4 of the 12,005 rows have a query of dev or test, such as 'WHERE  is it ' "
        r"\(test of set\).*leave these rows out.*data\.test_split"
    )
    with pytest.raises(ValueError, match=message):
        refuse_reported_queries(given, COLLECTION)


def test_streamed_triples_are_checked_as_they_pass() -> None:
    given: Any = rows("one", "two", "where is it").to_iterable_dataset().shuffle(seed=1, buffer_size=2)
    checked = refuse_reported_queries(given, COLLECTION)
    assert checked.features == given.features
    checked = pickle.loads(pickle.dumps(checked))
    with pytest.raises(ValueError, match=r"a row has a query of dev or test, such as 'where is it'"):
        list(checked)
    fine: Any = rows("one", "two").to_iterable_dataset()
    assert list(refuse_reported_queries(fine, COLLECTION)) == list(fine)
