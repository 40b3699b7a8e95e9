from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tct_hf import evaluate_run
from tct_hf.evaluation.measures import named_measures, relevant_from

QRELS = {"q1": {"a": 1, "b": 2}, "q2": {"c": 1}, "q3": {"d": 1}}
RUN = {"q1": {"x": 3.0, "a": 2.0, "b": 1.0}, "q2": {"x": 9.0, "y": 8.0, "z": 7.0}, "unjudged": {"a": 1.0}}


def test_measures_equal_those_worked_out_by_hand() -> None:
    gain = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    expected = {"RR@10": 1 / 2, "nDCG@10": gain / ideal, "R@2": 1 / 2, "AP": (1 / 2 + 2 / 3) / 2, "P@2": 1 / 2}
    found = evaluate_run(RUN, QRELS, list(expected))
    assert list(found.mean) == list(expected)
    for name, value in expected.items():
        assert found.per_query[name] == pytest.approx({"q1": value, "q2": 0, "q3": 0})
        assert found.mean[name] == pytest.approx(value / 3)


def test_equal_scores_are_ordered_by_id_not_by_the_engine() -> None:
    for order in ("abc", "cba"):
        found = evaluate_run({"q": dict.fromkeys(order, 1.0)}, {"q": {"b": 1}}, ["RR@10", "P@1"])
        assert found.mean == {"RR@10": 0.5, "P@1": 0.0}


@pytest.mark.parametrize("relevance", [1, 2])
@pytest.mark.parametrize(
    ("ours", "asked", "theirs", "options"),
    [
        ("AP", "map", "map", {}),
        ("RR", "recip_rank", "recip_rank", {}),
        ("RR@10", "recip_rank", "recip_rank", {}),
        ("nDCG@10", "ndcg_cut.10", "ndcg_cut_10", {}),
        ("R@20", "recall.20", "recall_20", {}),
        ("P@5", "P.5", "P_5", {}),
        ("Rprec", "Rprec", "Rprec", {}),
        # Where a negative grade is unjudged.
        ("Bpref", "bpref", "bpref", {}),
        ("infAP", "infAP", "infAP", {}),
        ("P(judged_only=True)@5", "P.5", "P_5", {"judged_docs_only_flag": True}),
    ],
)
def test_values_are_those_of_trec_eval(ours: str, asked: str, theirs: str, options: Any, relevance: int) -> None:
    """Forty queries over sixty passages, grades -2 to 3, scores without ties; some queries lack in the run."""
    import pytrec_eval

    draw = random.Random(relevance)
    names = [f"d{at}" for at in range(60)]
    qrels = {f"q{at}": {name: draw.randint(-2, 3) for name in draw.sample(names, 20)} for at in range(40)}
    ranked = {query: draw.sample(names, draw.randint(1, 60)) for query in list(qrels)[:35]}
    run = {query: {name: -float(place) for place, name in enumerate(found)} for query, found in ranked.items()}
    cut = {query: dict(list(hits.items())[:10]) for query, hits in run.items()} if ours == "RR@10" else run
    expected = pytrec_eval.RelevanceEvaluator(qrels, {asked}, relevance_level=relevance, **options).evaluate(cut)
    found = evaluate_run(run, qrels, [ours], relevance=relevance).per_query[ours]
    assert found == pytest.approx({query: expected.get(query, {}).get(theirs, 0.0) for query in qrels})


def test_relevance_cut_off_as_worked_out_by_hand() -> None:
    qrels = {"q": {"a": 1, "b": 2, "c": 3}, "none": {"a": 1}}
    run = {"q": {"a": 3.0, "b": 2.0, "x": 1.0}, "none": {"a": 1.0}}
    names = ["RR@10", "R@10", "AP", "RR(rel=1)@10", "R(rel=3)@10"]
    found = evaluate_run(run, qrels, names, relevance=2)
    assert [found.per_query[name]["q"] for name in names] == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1.0, 0.0])
    assert [found.per_query[name]["none"] for name in names] == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0])
    assert list(found.mean) == names
    assert evaluate_run(run, qrels, ["R(rel=2)@10"]).mean["R(rel=2)@10"] == found.mean["R@10"] == 0.25


def test_ndcg_of_exponential_gains_as_worked_out_by_hand() -> None:
    qrels = {"q": {"a": 1, "b": 3, "c": -1, "d": 0}}
    run = {"q": {"c": 4.0, "a": 3.0, "b": 2.0, "d": 1.0}}
    gain = 1 / math.log2(3) + 7 / math.log2(4)
    name = "nDCG(dcg='exp-log2')@10"
    assert evaluate_run(run, qrels, [name]).mean[name] == pytest.approx(gain / (7 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    ("run", "qrels", "measures", "message"),
    [
        ({}, QRELS, ["MRR@ten"], "'MRR@ten' is not an ir-measures name"),
        ({}, QRELS, ["alpha_nDCG@10"], r"computes 'alpha_nDCG@10' \(pip install ir-measures\[pyndeval\] adds one"),
        ({}, QRELS, [], "measures is empty"),
        ({}, QRELS, "RR@10", "one string"),
        ({}, {}, ["RR@10"], "no judged query"),
        ({"q1": {"a": math.nan}}, QRELS, ["RR@10"], "query 'q1' has a score that is NaN"),
        ({"q1": {"a": None}}, QRELS, ["RR@10"], "query 'q1' has a score that is NaN or no number"),
        ({"q1": {"q1": "0.5", "b": 2.0}}, QRELS, ["RR@10"], "query 'q1' has a score that is NaN or no number"),
        ({"q1": {1: 2.0}}, QRELS, ["RR@10"], "run: query 'q1': passage id 1 must be a text"),
        ({"q1": ["a", "b"]}, QRELS, ["RR@10"], "run: query 'q1' has a list; give a mapping of passage id to score"),
        ({}, {"q1": ["a"]}, ["RR@10"], "qrels: query 'q1' has a list; give a mapping of passage id to grade"),
        (["q1"], QRELS, ["RR@10"], "run is a list; give a mapping of query id"),
        (RUN, ["q1"], ["RR@10"], "qrels is a list; give a mapping of query id"),
        (None, None, ["RR@10"], "run is a NoneType"),
        ({"x": {"a": 1.0}}, QRELS, ["RR@10"], "no query in common .for instance 'x' and 'q1'"),
        # What would end the process in C, or be taken for something else there.
        ({"q1": {"a\ud800": 1.0}}, QRELS, ["RR@10"], r"run: query 'q1': passage id 'a\\ud800' must be a text"),
        ({}, {"q\ud800": {"a": 1}}, ["RR@10"], r"qrels: query id 'q\\ud800' must be a text"),
        ({}, {"q": {"a\ud800": 1}}, ["RR@10"], r"qrels: query 'q': passage id 'a\\ud800' must be a text"),
        ({}, {"q\0a": {"a": 1}, "q\0b": {"a": 1}}, ["RR@10"], r"query id 'q\\x00a' must be a text"),
        ({}, {1: {"a": 1}}, ["RR@10"], "query id 1 must be a text"),
        ({}, {"q": {"a": 2**21}}, ["RR@10"], "query 'q', passage 'a': grade 2097152 is no whole number"),
        ({}, {"q": {"a": 0.5}}, ["RR@10"], "grade 0.5 is no whole number"),
        ({}, {"q": {"a": 31}}, ["nDCG(dcg='exp-log2')@10"], "grade 31 is too high for gains"),
        ({}, QRELS, ["P@0"], "'P@0' has a cutoff that no engine can take"),
        ({}, QRELS, ["P(rel=0)@5"], "has a rel that no engine can take"),
        ({}, QRELS, ["IPrec@1.5"], "recall that is not between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(run: dict, qrels: dict, measures: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, qrels, measures)
    for relevance in (0, True, 2**21):
        with pytest.raises(ValueError, match="is no grade of 1 or more"):
            evaluate_run(RUN, QRELS, relevance=relevance)


def test_a_run_without_a_judged_passage_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for run, said in (({"q2": {"1": 2.0}}, 1), ({"q2": {}}, 0), (RUN, 0), ({"q2": {"c": 1.0, "x": 2.0}}, 0)):
        caplog.clear()
        evaluate_run(run, QRELS)
        assert ["(for instance '1', where 'c' is judged)" in one.message for one in caplog.records] == [True] * said


def test_variants_of_a_measure_in_one_call_keep_their_own_values() -> None:
    qrels, run = {"q": {"a": 3, "b": 1, "c": 2}}, {"q": {"b": 3.0, "a": 2.0, "c": 1.0}}
    names = ["nDCG@10", "nDCG(dcg='exp-log2')@10", "nDCG(judged_only=True)@10", "R(rel=2)@1", "R@1", "R(rel=3)@1"]
    alone = {name: evaluate_run(run, qrels, [name]).mean[name] for name in names}
    assert alone["nDCG@10"] != alone["nDCG(dcg='exp-log2')@10"]
    assert evaluate_run(run, qrels, names).mean == evaluate_run(run, qrels, names[::-1]).mean == alone


def test_a_query_of_negative_grades_alone_or_without_passages_scores_zero_by_every_measure() -> None:
    for grades in ({"a": -2}, {"a": -1, "b": 0}):
        qrels = {"first": {"a": 1}, "junk": grades, "last": {"b": 2}}
        run = {query: {"a": 2.0, "b": 1.0, "c": 0.5} for query in qrels}
        found = evaluate_run(run, qrels, ["AP", "RR@10", "nDCG@10", "R@5", "nDCG(dcg='exp-log2')@10"])
        for values in found.per_query.values():
            assert values["junk"] == 0 and values["first"] == 1 and values["last"] > 0
    measures = ["Judged@10", "P@2", "RR@10"]
    found = evaluate_run({"q1": {}, "q2": {"c": 1.0, "x": 0.5}}, QRELS | {"empty": {}}, measures)
    assert found.per_query["Judged@10"] == {"q1": 0.0, "q2": 0.5, "q3": 0.0, "empty": 0.0}
    assert evaluate_run({}, QRELS, measures).mean == dict.fromkeys(measures, 0.0)


def test_a_value_that_the_engine_leaves_out_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from ir_measures.providers.base import Evaluator

    monkeypatch.setattr(Evaluator, "iter_calc", lambda self, run: iter(list(self._iter_calc(run))[1:]))
    with pytest.raises(ValueError, match="the engine of RR@10 gave no value for query 'q"):
        evaluate_run(RUN, QRELS, ["RR@10"])


def test_names_of_measure_sets_stand_for_their_measures() -> None:
    named = named_measures(["trec-dl", "nDCG@10", "AP"])
    assert named == ["nDCG@10", "RR(rel=2)@10", "R(rel=2)@1000", "R(rel=1)@1000", "AP"]
    assert [relevant_from(one, 1) for one in named] == [None, 2, 2, 1, 1] and relevant_from("RR@10", 2) == 2
