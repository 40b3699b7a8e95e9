from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tct_hf.evaluation import significance
from tct_hf.evaluation.significance import compare_runs, holm, paired_randomisation_test, paired_t_test

# q0's passage is found first by "good" on all twelve, by "poor" on the even ones; "same" is "poor" again.
QRELS = {f"q{at}": {"d": 1} for at in range(12)}
GOOD = {query: {"d": 2.0, "x": 1.0} for query in QRELS}
POOR = {query: {"d": 2.0 if at % 2 == 0 else 0.0, "x": 1.0} for at, query in enumerate(QRELS)}
values = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


def draw(count: int, shift: float, seed: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=count)
    return a.tolist(), (a + generator.normal(shift, 1, count)).tolist()


@given(pairs=values)
def test_few_pairs_are_enumerated(pairs: list[tuple[int, int]]) -> None:
    a, b = [list(side) for side in zip(*pairs, strict=True)]
    differences = np.subtract(a, b)
    sums = [abs(differences @ signs) for signs in itertools.product((1, -1), repeat=len(pairs))]
    expected = np.mean(sums >= abs(differences.sum()))
    assert paired_randomisation_test(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_sampled_p_value_is_near_the_exact_one(shift: float) -> None:
    from scipy.stats import permutation_test

    a, b = draw(14, shift, 7)
    options: Any = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True}
    exact = permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), **options).pvalue
    assert paired_randomisation_test(a, b, samples=2**14) == pytest.approx(exact, abs=1e-9)
    error = 4 * math.sqrt(exact * (1 - exact) / 10_000)
    assert paired_randomisation_test(a, b, samples=10_000) == pytest.approx(exact, abs=error + 1e-4)


def test_p_values_at_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    # Signs + + - give 0.1 + 0.2 - 0.3, which is not 0 in floating point; every sum is at least as far from 0.
    assert paired_randomisation_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1.0
    a, b = [1.0] * 40, [0.0] * 40
    assert paired_randomisation_test(a, b, samples=99) == paired_randomisation_test(b, a, samples=99) == 1 / 100
    assert paired_t_test([0.5, 0.25], [0.5, 0.25]) == paired_randomisation_test([0.5, 0.25], [0.5, 0.25]) == 1.0
    assert paired_t_test([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == 0.0
    a, b = draw(50, 0.3, 1)
    whole = paired_randomisation_test(a, b, samples=500, seed=3)
    monkeypatch.setattr(significance, "_FLIPS_PER_BLOCK", 350)  # drawn at a time
    assert paired_randomisation_test(a, b, samples=500, seed=3) == whole
    assert paired_randomisation_test(a, b, samples=500, seed=4) != whole


def test_holm_as_worked_out_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and the last may not be below .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_several_systems_are_compared_with_the_baseline_in_markdown_and_json() -> None:
    found = compare_runs({"poor": POOR, "good": GOOD, "same": POOR}, QRELS, baseline="poor", measure="RR@10")
    good, same = found.systems["good"], found.systems["same"]
    # Six differences of one sign: 2 of 64 sign patterns reach their sum.
    assert good.p_randomisation == 2 / 64 and good.p_randomisation_holm == 4 / 64
    assert good.p_t_test_holm == pytest.approx(2 * good.p_t_test) and same.p_t_test_holm == 1.0
    assert str(found).splitlines() == [
        "| system          |  RR@10 | difference | better/worse | p (randomisation) | p (t-test) |",
        "|-----------------|-------:|-----------:|-------------:|------------------:|-----------:|",
        "| poor (baseline) | 0.7500 |            |              |                   |            |",
        "| good            | 1.0000 |    +0.2500 |          6/0 |            0.0625 |     0.0137 |",
        "| same            | 0.7500 |    +0.0000 |          0/0 |            1.0000 |     1.0000 |",
        "",
        "12 queries; two-sided paired tests against poor, Holm-corrected over 2 systems.",
    ]
    assert json.loads(json.dumps(found.to_dict()))["systems"]["good"]["better"] == 6


def test_the_first_of_two_runs_is_the_baseline_and_a_p_value_does_not_depend_on_other_systems() -> None:
    found = compare_runs(POOR, GOOD, QRELS, measure="P@1")
    assert (found.baseline, list(found.systems)) == ("a", ["b"])
    assert found.systems["b"].difference == 0.5 and found.systems["b"].p_randomisation_holm == 2 / 64
    assert compare_runs(GOOD, POOR, QRELS, measure="P@1").systems["b"].difference == -0.5
    alone = compare_runs({"poor": POOR, "good": GOOD}, QRELS, baseline="poor", samples=20)
    among = compare_runs({"same": POOR, "good": GOOD, "poor": POOR}, QRELS, baseline="poor", samples=20)
    assert alone.systems["good"].p_randomisation == among.systems["good"].p_randomisation


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        (({"x": POOR}, QRELS), {"baseline": "y"}, "'y' is not among the runs"),
        (({"x": POOR}, QRELS), {"baseline": "x"}, "only 'x'"),
        (({"x": POOR, "y": POOR}, QRELS), {}, "baseline: name the system"),
        ((POOR, GOOD, QRELS), {"baseline": "a"}, "the first is the baseline"),
        ((POOR, GOOD, {"q0": {"d": 1}}), {}, "1 judged queries"),
        ((POOR, {"1": {"d": 1.0}}, QRELS), {}, "runs: 'b', qrels: no query in common"),
        ((POOR, GOOD, QRELS), {"measure": "MRR@ten"}, "not an ir-measures name"),
        ((POOR, GOOD, QRELS), {"samples": 0}, "samples: 0"),
    ],
)
def test_wrong_comparisons_are_named(arguments: tuple, named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_runs(*arguments, **named)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1.0], [1.0, 2.0], "shapes"), ([], [], "0 values"), ([1.0, math.nan], [1.0, 2.0], "not finite")],
)
def test_wrong_values_are_named(a: list[float], b: list[float], message: str) -> None:
    for test in (paired_randomisation_test, paired_t_test):
        with pytest.raises(ValueError, match=message):
            test(a, b)
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.5])
