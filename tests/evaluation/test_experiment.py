from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from datasets import Dataset

from tct_hf.data.collection import Collection, Split
from tct_hf.evaluation.experiment import Experiment, read_log, show_examples, write_metrics
from tct_hf.evaluation.measures import standard_error
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import means_table, shorten, weight_text

QRELS = {f"q{row}": {f"p{row}": 1} for row in range(8)}
QUERIES = {name: f"what is {name}" for name in reversed(QRELS)}
CORPUS = Dataset.from_dict({"id": [f"p{row}" for row in range(8)], "text": [f"text  of\np{row}" for row in range(8)]})
COLLECTION = Collection("tiny", CORPUS, {"train": Split({}, {}), "test": Split(QUERIES, QRELS)}, {})


def found(rank_of_answer: int) -> dict[str, dict[str, float]]:
    """Every query's answer at this rank, of three."""
    run: dict[str, dict[str, float]] = {}
    for row in range(8):
        names = [f"p{(row + 1) % 8}", f"p{(row + 2) % 8}"]
        names.insert(rank_of_answer - 1, f"p{row}")
        run[f"q{row}"] = {name: float(3 - place) for place, name in enumerate(names)}
    return run


def test_examples_are_evenly_spaced_in_the_order_of_ids_and_an_answer_that_is_not_found_is_named() -> None:
    shown = show_examples(COLLECTION, found(2), count=2, depth=2)
    hits = ["  1. p3 (3.0)", "     text of p3", "  2. p2 (2.0)  <- the answer", "     text of p2", ""]
    assert shown.splitlines()[:6] == ['Question: "what is q2"', *hits]
    for count, rows in ((2, (2, 6)), (99, range(8))):
        lines = show_examples(COLLECTION, found(1), count=count).splitlines()
        assert [line for line in lines if "Question" in line] == [f'Question: "what is q{row}"' for row in rows]
    assert "  the answer is p4" in show_examples(COLLECTION, found(3), count=1, depth=2).splitlines()
    assert show_examples(COLLECTION, {}, count=1).splitlines() == ['Question: "what is q4"', "  the answer is p4"]


def test_a_system_searches_once_for_all_sets_and_not_again_where_its_runs_are(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    def find(queries: Mapping[str, str]) -> dict[str, dict[str, float]]:
        asked.append(dict(queries))
        return {query: {text: 1.0} for query, text in queries.items()}

    systems = [System("one", "System one", find), System("two", "System two", find)]
    splits = {name: Split({"q": f"{name}-text"}, {}) for name in ("dev", "test")}  # the same id in both
    said: list[str] = []

    def search() -> dict[tuple[str, str], dict[str, dict[str, float]]]:
        experiment = Experiment(splits, ["RR@10"], 10, write=said.append)
        experiment.search(systems, tmp_path / "runs")
        return experiment.runs

    first = search()
    assert first == {(key, split): {"q": {f"{split}-text": 1.0}} for key in ("one", "two") for split in splits}
    (tmp_path / "runs" / "two.dev.trec").unlink()  # as after a kill between two files
    assert search() == first
    assert len(asked) == 3 and [line[-10:] for line in said] == ["System one", "System two", "System two"]


def test_metrics_hold_mean_and_standard_error_of_each_split_and_system(tmp_path: Path) -> None:
    half = {query: hits for query, hits in found(1).items() if query < "q4"}
    experiment = Experiment(COLLECTION.splits, ["RR@10"], 10, runs={("x", "test"): half})
    write_metrics(tmp_path / "metrics.json", experiment.evaluate(), corpus={"sha256": "1"})
    written = json.loads((tmp_path / "metrics.json").read_text())
    expected = {"mean": 0.5, "standard_error": (8 * 0.25 / 7 / 8) ** 0.5}
    assert written["measured"]["test"]["x"]["RR@10"] == pytest.approx(expected)
    assert written["corpus"] == {"sha256": "1"}


def test_tables_and_texts_for_people(tmp_path: Path) -> None:
    rows = [("first", {"RR@10": 1.0, "R@3": 1.0}), ("a longer second", {"RR@10": 0.5, "R@3": 1.0})]
    assert means_table(rows, ["RR@10", "R@3"]).splitlines() == [
        "| system          |     RR@10 |       R@3 |",
        "|-----------------|----------:|----------:|",
        "| first           | **1.000** | **1.000** |",
        "| a longer second |     0.500 | **1.000** |",
    ]
    for text, short in ((" a\n b ", "a b"), ("one two three", "one two..."), ("x" * 50, "x" * 7 + "...")):
        assert shorten(text, 10) == short
    assert [weight_text(alpha) for alpha in (0.0, 0.26149, 999.7, 3094.2)] == ["0", "0.261", "1,000", "3,094"]
    assert read_log(tmp_path) == [] and read_log("owner/name") == []  # a model without a log
    # mean 2, squares of differences 4 + 1 + 0 + 1 + 4 = 10, variance 10 / 4, of the mean 10 / 4 / 5
    assert standard_error([0, 1, 2, 3, 4]) == pytest.approx((10 / 4 / 5) ** 0.5) and standard_error([0.5]) == 0
