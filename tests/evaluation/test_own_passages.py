"""Queries that are passages: BEIR leaves a passage with the query's own id out of its ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import build_report, compare_runs, evaluate_run, read_run, tune_alpha, write_run
from tct_hf.data.collection import Collection, Split
from tct_hf.evaluation.experiment import Experiment
from tct_hf.evaluation.references import BM25, References
from tct_hf.pipeline.settings import DataSettings
from tct_hf.training.run import dev_evaluator
from tests.evaluation.reports import tiny_settings
from tests.searching import Material

NOTE = "A passage with the query's own id is left out of its ranking"
# Each query finds itself first, then its answer.
RUN = {f"a{row}": {f"a{row}": 3.0, f"b{row}": 2.0, "c": 1.0} for row in range(5)}
QRELS = {f"a{row}": {f"b{row}": 1} for row in range(5)}
TWO = {"a": "text", "b": "other"}


def collection_of(texts: dict[str, str], qrels: dict[str, dict[str, int]], **more: Any) -> Collection:
    """The judged passages are the queries of dev, under other ids, and of test."""
    corpus = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    test = Split({name: texts.get(name, "words") for name in qrels}, qrels)
    dev = Split(*({f"dev{name}": value for name, value in of.items()} for of in (test.queries, qrels)))
    return Collection("own", corpus, {"dev": dev, "test": test}, {"sha256": "0", "passages": len(corpus)}, **more)


def arguments(**more: Any) -> Collection:
    """Arguments and what answers them: each argument is a query."""
    texts = {}
    for row, word in enumerate(("wind", "grain", "stone", "river", "lamp")):
        texts |= {f"a{row}": f"{word} and {word} of the {word} {row}", f"b{row}": f"against the {word} nothing"}
    return collection_of(texts, QRELS, **more)


@pytest.mark.parametrize(("rule", "expected"), [(None, 1.0), (True, 1.0), (False, 0.5)])
def test_every_measure_of_runs_leaves_a_query_out_of_its_own_ranking(rule: bool | None, expected: float) -> None:
    options: dict[str, Any] = {"ignore_identical_ids": rule}
    assert evaluate_run(RUN, QRELS, ["RR@10"], **options).mean == {"RR@10": expected}
    assert compare_runs({}, RUN, QRELS, **options).systems["b"].mean == expected
    assert tune_alpha(RUN, RUN, QRELS, alphas=[1.0], **options).value == expected
    # A question that its own id answers keeps it.
    assert evaluate_run(RUN, {name: {name: 1} for name in RUN}, ["RR@10"]).mean == {"RR@10": 1.0}


@pytest.mark.parametrize(
    ("texts", "qrels", "expected"),
    [
        (TWO, {"a": {"b": 1}}, True),
        (TWO, {"a": {"a": 1}}, False),
        (TWO, {"q": {"b": 1}}, False),
        ({"7": "A text.", "8": "other"}, {"7": {"8": 1}}, True),
        ({"7": "the title is beside a text", "8": "other", "9": "x"}, {"9": {"8": 1}}, True),
    ],
)
def test_queries_are_passages_by_their_ids(texts: dict[str, str], qrels: dict[str, Any], expected: bool) -> None:
    made = collection_of(texts, qrels)
    assert made.skips_own == expected == made.part(queries=5).skips_own
    assert replace(made, ignore_identical_ids=not expected).skips_own != expected
    chance = collection_of({"7": "a text", "8": "other"}, {"7": {"8": 1}})
    chance.splits["test"].queries["7"] = "something else"  # equal numbers make no query a passage
    assert not chance.skips_own and not chance.own_note


def test_runs_hold_as_many_passages_as_without_the_rule(tmp_path: Path) -> None:
    made = arguments()
    experiment = Experiment(made.splits, ["R@1"], 1, ignore_identical_ids=made.skips_own)
    experiment.search(References(made, 1, bf16=False).systems(base_model=None, teacher=None), tmp_path)
    assert experiment.runs[BM25, "test"].keys() == QRELS.keys()
    assert experiment.evaluate()["test"][BM25].mean == {"R@1": 1.0}
    assert all(query not in hits for query, hits in read_run(tmp_path / "bm25.test.trec").items())


@pytest.mark.parametrize(("rule", "note"), [(None, NOTE), (False, "which stay in their own rankings")])
def test_a_report_applies_the_rule_to_every_system_and_says_so(
    rule: bool | None, note: str, material: Material, tmp_path: Path
) -> None:
    write_run({query: dict(list(hits.items())[:2]) for query, hits in RUN.items()}, tmp_path / "mine.trec", "mine")
    options: dict[str, Any] = {"settings": tiny_settings(), "runs": {"mine": str(tmp_path / "mine.trec")}}
    made, out = arguments(ignore_identical_ids=rule), tmp_path / "out"
    report = build_report(made, str(material.student), out, teacher=None, **options)
    assert report.system("mine").effectiveness["RR@10"]["mean"] == (1.0 if rule is None else 0.5)
    assert any(note in line for line in report.notes) and note in (out / "report.md").read_text()
    for key in ("bm25", "dense-exact", "dense-ann", "hybrid"):
        run = read_run(out / report.system(key).run["file"])
        assert run and all((query in hits) == (rule is False) for query, hits in run.items()), key


def test_models_are_chosen_without_the_queries_themselves_and_do_not_depend_on_the_rule() -> None:
    made = arguments()
    made.splits["dev"] = made.splits["test"]
    hits = [[{"corpus_id": name, "score": score} for name, score in found.items()] for found in RUN.values()]
    assert dev_evaluator(made, "dense").compute_metrics(hits)["mrr@k"][10] == 1.0
    assert DataSettings(ignore_identical_ids=True).of_trained == DataSettings().of_trained
