"""Whether a difference between systems is more than the luck of the queries: paired tests over per-query values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.stats

from tct_hf.evaluation.measures import Evaluation, evaluate_run, find_themselves
from tct_hf.evaluation.tables import difference_table, p_text
from tct_hf.retrieval.runs import check_common

Judgements = Mapping[str, Mapping[str, int]]

# Sign flips drawn at a time: (flips, queries) float64 of about 32 MB, whatever the number of queries.
_FLIPS_PER_BLOCK = 1 << 22
# Sums that differ by less than this part of the largest possible sum are the same sum, added in another order.
_SAME_SUM = 1e-12


@dataclass(frozen=True)
class SystemDifference:
    """One system against the baseline."""

    mean: float
    difference: float
    better: int
    worse: int
    p_randomisation: float
    p_t_test: float
    p_randomisation_holm: float
    p_t_test_holm: float


@dataclass(frozen=True)
class Comparison:
    """Systems against one baseline on the same queries; `str()` of it is a Markdown table."""

    measure: str
    queries: int
    baseline: str
    baseline_mean: float
    systems: dict[str, SystemDifference]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        base = (f"{self.baseline} (baseline)", f"{self.baseline_mean:.4f}", None)
        others = [(name, f"{one.mean:.4f}", asdict(one)) for name, one in self.systems.items()]
        over = f", Holm-corrected over {len(self.systems)} systems" if len(self.systems) > 1 else ""
        note = f"{self.queries} queries; two-sided paired tests against {self.baseline}{over}."
        return f"{difference_table(self.measure, [base, *others])}\n\n{note}"


def compare_runs(
    a: Any,
    b: Any,
    qrels: Judgements | None = None,
    *,
    baseline: str | None = None,
    measure: str = "RR@10",
    relevance: int = 1,
    ignore_identical_ids: bool | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Test whether systems differ from a baseline on the same judged queries.

    Two forms: `compare_runs(a, b, qrels)`, where `a` is the baseline and the systems are called "a" and "b", and
    `compare_runs({name: run, ...}, qrels, baseline=name)` for any number. Runs may come from anywhere (`read_run`).
    A query that a run lacks counts 0 for it, as in `evaluate_run`.

    Args:
        a: the baseline's run; or name of each system to its run.
        b: the other run; or the judgements, when `a` holds the runs.
        qrels: query id to passage id to relevance.
        baseline: the system that the others are compared with; belongs to the second form.
        measure: ir-measures name, for instance RR@10 or R(rel=2)@1000.
        relevance: from which grade on a passage is relevant, as in `evaluate_run`.
        ignore_identical_ids: as in `evaluate_run`; None decides for all runs together.
        samples: sign flips of the randomisation test.
        seed: of the sign flips. Every system gets the same ones, so that its p value does not depend on the others.

    Returns:
        Means, differences and p values, plain and Holm-corrected.

    Raises:
        ValueError: the baseline is not among the runs, there is nothing to compare it with, fewer than two queries
            are judged, or a run has results but none for a judged query.
    """
    if qrels is None:
        runs, qrels = dict(a), b
        if baseline is None:
            raise ValueError(f"baseline: name the system to compare with, one of {', '.join(map(repr, runs))}")
    elif baseline is not None:
        raise ValueError("baseline: with two runs the first is the baseline; pass {name: run} to name it yourself")
    else:
        runs, baseline = {"a": a, "b": b}, "a"
    if baseline not in runs:
        raise ValueError(f"baseline: {baseline!r} is not among the runs ({', '.join(map(repr, runs))})")
    if len(runs) < 2:
        raise ValueError(f"runs: only {baseline!r}; add at least one system to compare it with")
    if len(qrels) < 2:
        raise ValueError(f"qrels: {len(qrels)} judged queries; a paired test needs two or more")
    for name, run in runs.items():
        check_common(f"runs: {name!r}", run, "qrels", qrels)
    own = find_themselves(qrels, *runs.values()) if ignore_identical_ids is None else ignore_identical_ids
    rules: dict[str, Any] = {"relevance": relevance, "ignore_identical_ids": own}
    evaluations = {name: evaluate_run(run, qrels, [measure], **rules) for name, run in runs.items()}
    return compare_evaluations(evaluations, baseline, measure, samples=samples, seed=seed)


def compare_evaluations(
    evaluations: Mapping[str, Evaluation], baseline: str, measure: str, *, samples: int = 10_000, seed: int = 0
) -> Comparison:
    """The tests of `compare_runs` on runs that are evaluated already."""
    others = [name for name in evaluations if name != baseline]
    values = {name: np.array([*found.per_query[measure].values()]) for name, found in evaluations.items()}
    own, base = values[baseline], evaluations[baseline].mean[measure]
    randomised = [paired_randomisation_test(values[one], own, samples=samples, seed=seed) for one in others]
    t_tested = [paired_t_test(values[one], own) for one in others]
    systems = {}
    for name, *ps in zip(others, randomised, t_tested, holm(randomised), holm(t_tested), strict=True):
        mean, better, worse = evaluations[name].mean[measure], values[name] > own, values[name] < own
        systems[name] = SystemDifference(mean, mean - base, int(better.sum()), int(worse.sum()), *ps)
    return Comparison(measure, len(own), baseline, base, systems)


def compare_pairs(
    evaluations: Mapping[str, Evaluation], pairs: Sequence[tuple[str, str]], measure: str
) -> list[dict[str, Any]]:
    """Each pair of systems by the paired randomisation test, p values Holm-corrected over all pairs, JSON-ready."""
    found = [difference(evaluations[one], evaluations[other], measure) for one, other in pairs]
    return [
        {"system": one, "against": other, "measure": measure, "difference": change, "p": p, "p_holm": corrected}
        for (one, other), (change, p), corrected in zip(pairs, found, holm([p for _, p in found]), strict=True)
    ]


def placed(one: Evaluation, other: Evaluation, measure: str) -> str:
    """Whether a system is above another, with the p value of the difference: chance alone makes some."""
    return p_text(*difference(one, other, measure))


def difference(one: Evaluation, other: Evaluation, measure: str) -> tuple[float, float]:
    """Difference of the means, and the p value of the paired randomisation test."""
    a, b = (list(evaluation.per_query[measure].values()) for evaluation in (one, other))
    return one.mean[measure] - other.mean[measure], paired_randomisation_test(a, b)


def paired_randomisation_test(a: Any, b: Any, *, samples: int = 10_000, seed: int = 0) -> float:
    """The chance of a mean difference this large, up or down, if each query's two values were swapped at random.

    All swaps are gone through where there are no more than `samples` of them, which makes the p value exact; otherwise
    it is (hits + 1) / (samples + 1), never 0 (Smucker, Allan and Carterette, CIKM 2007; Phipson and Smyth, 2010).
    """
    if samples < 1:
        raise ValueError(f"samples: {samples} is below 1; 10,000 is usual")
    differences = _differences(a, b, at_least=1)
    # A swap of equal values changes nothing.
    differences = differences[differences != 0]
    count = len(differences)
    largest = np.abs(differences).sum()
    reached = abs(differences.sum()) - _SAME_SUM * largest
    if count == 0:
        return 1.0
    if 2**count <= samples:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= reached))
    generator = np.random.default_rng(seed)
    hits, left, block = 0, samples, max(1, _FLIPS_PER_BLOCK // count)
    while left:
        rows = min(block, left)
        # Whole 64-bit words: the generator would throw away what is left of one at the end of a block.
        words = generator.integers(0, 2**64, size=(rows, -(-count // 64)), dtype=np.uint64)
        # (flips, queries), 1: sign kept
        kept = np.unpackbits(words.view(np.uint8), axis=1, count=count).astype(np.float64)
        sums = 2 * (kept @ differences) - differences.sum()
        hits += int(np.count_nonzero(np.abs(sums) >= reached))
        left -= rows
    return (hits + 1) / (samples + 1)


def paired_t_test(a: Any, b: Any) -> float:
    """Two-sided p value of Student's paired t-test; 1 where no query differs, 0 where all differ by one amount."""
    differences = _differences(a, b, at_least=2)
    if differences.mean() == 0 or differences.std() == 0:  # where the statistic is 0 / 0 or infinite
        return float(differences.mean() == 0)
    return float(scipy.stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in their order, keeping the family-wise error rate (Holm, 1979)."""
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"p_values: {value} is not between 0 and 1")
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[at] = highest
    return corrected


def _differences(a: Any, b: Any, *, at_least: int) -> np.ndarray:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"a, b: shapes {first.shape} and {second.shape}; pass one value a query, the same queries for both"
        )
    if len(first) < at_least:
        raise ValueError(f"a, b: {len(first)} values; this test needs {at_least} or more")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a, b: a value is not finite; look for the query whose measure is NaN")
    return first - second
