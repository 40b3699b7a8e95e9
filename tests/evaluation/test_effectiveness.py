from __future__ import annotations

import math

import pytest

from tct_hf.evaluation import evaluate_run

QRELS = {"q1": {"a": 1, "b": 2}, "q2": {"c": 1}, "q3": {"d": 1}}
RUN = {"q1": {"x": 3.0, "a": 2.0, "b": 1.0}, "q2": {"x": 9.0, "y": 8.0, "z": 7.0}, "unjudged": {"a": 1.0}}


def test_measures_equal_those_worked_out_by_hand() -> None:
    found = evaluate_run(RUN, QRELS, ["RR@10", "nDCG@10", "R@2", "AP", "P@2"])
    gain = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    expected = {
        "RR@10": {"q1": 1 / 2, "q2": 0, "q3": 0},
        "nDCG@10": {"q1": gain / ideal, "q2": 0, "q3": 0},
        "R@2": {"q1": 1 / 2, "q2": 0, "q3": 0},
        "AP": {"q1": (1 / 2 + 2 / 3) / 2, "q2": 0, "q3": 0},
        "P@2": {"q1": 1 / 2, "q2": 0, "q3": 0},
    }
    for name, values in expected.items():
        assert found.per_query[name] == pytest.approx(values)
        assert found.mean[name] == pytest.approx(sum(values.values()) / 3)
    assert list(found.mean) == list(expected)


def test_cut_is_applied() -> None:
    run = {"q2": {f"x{at:02}": 100.0 - at for at in range(10)} | {"c": 1.0}}
    found = evaluate_run(run, {"q2": {"c": 1}}, ["RR@10", "RR@11", "RR"])
    assert found.mean == pytest.approx({"RR@10": 0, "RR@11": 1 / 11, "RR": 1 / 11})


def test_equal_scores_are_ordered_by_id_not_by_the_engine() -> None:
    qrels = {"q": {"b": 1}}
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        assert evaluate_run({"q": dict.fromkeys(order, 1.0)}, qrels, ["RR@10", "P@1"]).mean == {
            "RR@10": 0.5,
            "P@1": 0.0,
        }


def test_scores_that_differ_only_in_double_precision_are_not_ties() -> None:
    run = {"q": {"a": 1.0, "b": 1.0 + 1e-12}}
    assert evaluate_run(run, {"q": {"b": 1}}, ["RR@10"]).mean["RR@10"] == 1.0


def test_empty_run_scores_zero() -> None:
    assert evaluate_run({}, QRELS).mean == {"RR@10": 0.0, "nDCG@10": 0.0, "R@100": 0.0}
    assert evaluate_run({"q1": {}}, QRELS).mean["RR@10"] == 0.0


def test_two_names_of_one_measure_both_get_values() -> None:
    found = evaluate_run(RUN, QRELS, ["P@2", "Precision@2"])
    assert found.mean["P@2"] == found.mean["Precision@2"] > 0


def test_judgements_below_one_are_not_relevant() -> None:
    run = {"q": {"a": 2.0, "b": 1.0}}
    assert evaluate_run(run, {"q": {"a": 0, "b": 1}}, ["RR@10"]).mean["RR@10"] == 0.5


@pytest.mark.parametrize(
    ("run", "qrels", "measures", "message"),
    [
        ({}, QRELS, ["MRR@ten"], "'MRR@ten' is not an ir-measures name"),
        ({}, QRELS, ["nothing@10"], "'nothing@10' is not an ir-measures name"),
        ({}, QRELS, [], "measures is empty"),
        ({}, QRELS, "RR@10", "one string"),
        ({}, {}, ["RR@10"], "no judged query"),
        ({"q1": {"a": math.nan}}, QRELS, ["RR@10"], "query 'q1' has a score that is NaN"),
    ],
)
def test_wrong_arguments_are_named(run: dict, qrels: dict, measures: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, qrels, measures)
