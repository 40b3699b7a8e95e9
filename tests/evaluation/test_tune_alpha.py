from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tct_hf import evaluate_run, fuse, tune_alpha
from tests.retrieval.test_fusion import DENSE, SPARSE, common


def case(queries: int, at: float) -> tuple[dict, dict, dict]:
    """The relevant passage is first where alpha is between 0.9 and 1.1 of `at`."""
    sparse = {"right": 10.0, "sparse": 20.0, "neither": 0.0}
    # right beats dense from alpha 0.9 at on, sparse beats right from 1.1 at on.
    dense = {"right": 11.0 * at, "sparse": 0.0, "dense": 20.0 * at}
    names = [f"q{number}" for number in range(queries)]
    return dict.fromkeys(names, sparse), dict.fromkeys(names, dense), {name: {"right": 1} for name in names}


@pytest.mark.parametrize("at", [0.1, 1.0, 37.0])
def test_alpha_is_found_on_any_scale(at: float) -> None:
    tuned = tune_alpha(*case(3, at))
    assert 0.9 * at <= tuned <= 1.1 * at
    assert tuned.value == 1.0 and (float(tuned), 1.0) in tuned.curve
    assert tuned.queries == ["q0", "q1", "q2"] and tuned.measure == "RR@10"
    assert [alpha for alpha, _ in tuned.curve] == sorted({float(f"{alpha:.3g}") for alpha, _ in tuned.curve})
    assert tuned.curve[0][0] == 0.0
    assert json.loads(json.dumps(tuned.to_dict()))["queries"] == 3


@settings(max_examples=25, deadline=None)
@given(
    pair=common.filter(lambda pair: bool(pair[0] or pair[1])),
    measure=st.sampled_from(["RR@10", "RR@1", "AP", "nDCG@3", "R(rel=2)@2"]),
    normalize=st.booleans(),
)
def test_curve_is_what_fused_runs_measure(pair: tuple[dict, dict], measure: str, normalize: bool) -> None:
    qrels = {query: {"d1": 1, "d2": 2, "d5": 1} for query in {**pair[0], **pair[1]}}
    alphas = [0.0, 0.3, 1.0, 12.5]
    tuned = tune_alpha(*pair, qrels, measure, normalize=normalize, alphas=alphas)
    runs = [fuse(*pair, alpha, normalize=normalize) for alpha in alphas]
    values = [evaluate_run(run, qrels, [measure]).mean[measure] for run in runs]
    assert tuned.curve == [(alpha, pytest.approx(value)) for alpha, value in zip(alphas, values, strict=True)]
    assert tuned.value == max(value for _, value in tuned.curve)


def test_the_middle_one_of_equally_good_weights_is_taken() -> None:
    sparse, dense, qrels = case(1, 1.0)
    assert tune_alpha(sparse, dense, qrels, alphas=[5.0, 1.08, 0.95, 1.0, 0.1]) == 1.0
    assert tune_alpha(sparse, dense, {"q0": {"absent": 1}}, alphas=[3.0, 1.0, 2.0, 4.0]) == 2.0
    # Of a measure that empty lists have not.
    qrels = {"q1": {"a": 1, "b": 2}, "q2": {"c": 1}, "q3": {"d": 1}}
    tuned = tune_alpha({"q1": {"a": 1.0}}, {"q1": {"x": 1.0}, "q2": {"c": 1.0}}, qrels, "Judged@1")
    assert tuned.value == pytest.approx(2 / 3)


OTHER = {"other": {"a": 1.0}}


@pytest.mark.parametrize(
    ("sparse", "dense", "qrels", "more", "message"),
    [
        (SPARSE, DENSE, {}, {}, "no judged query"),
        (SPARSE, DENSE, {"other": {"a": 1}}, {}, "none of the judged queries"),
        (SPARSE, OTHER, {"q": {"a": 1}}, {}, "none of the judged queries"),
        (OTHER, DENSE, {"q": {"a": 1}}, {}, "none of the judged queries"),
        (SPARSE, DENSE, {"q": {"a": 1}}, {"alphas": []}, "no weight to try"),
        (SPARSE, DENSE, {"q": {"a": 1}}, {"alphas": [-1.0]}, "alpha: -1.0"),
        (SPARSE, DENSE, {"q": {"a": 1}}, {"measure": "MRR@ten"}, "not an ir-measures name"),
    ],
)
def test_what_cannot_be_tuned_on_is_named(sparse: Any, dense: Any, qrels: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune_alpha(sparse, dense, qrels, **more)
