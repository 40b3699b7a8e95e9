"""Whether a difference between systems is more than the luck of the queries: paired tests over per-query values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast, overload

from tct_hf.evaluation.measures import evaluate_run

if TYPE_CHECKING:
    import numpy as np

    Scores = Mapping[str, Mapping[str, float]]
    Judgements = Mapping[str, Mapping[str, int]]

# Sign flips drawn at a time: (flips, queries) float64 of about 32 MB, whatever the number of queries.
_FLIPS_PER_BLOCK = 1 << 22
# Sums that differ by less than this part of the largest possible sum are the same sum, added in another order.
_SAME_SUM = 1e-12


@dataclass(frozen=True)
class SystemDifference:
    """One system against the baseline.

    Args:
        mean: the system's mean over the judged queries.
        difference: its mean minus the baseline's.
        better: queries on which it is above the baseline.
        worse: queries on which it is below.
        p_randomisation: of the paired randomisation test, two-sided.
        p_t_test: of the paired t-test, two-sided.
        p_randomisation_holm: the former, Holm-corrected over the systems compared.
        p_t_test_holm: the latter, alike.
    """

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
    """Systems against one baseline on the same queries; `str()` of it is a Markdown table.

    Args:
        measure: ir-measures name.
        queries: judged queries.
        baseline: the baseline's name.
        baseline_mean: its mean over the judged queries.
        systems: name of each other system to its difference.
    """

    measure: str
    queries: int
    baseline: str
    baseline_mean: float
    systems: dict[str, SystemDifference]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-ready values."""
        return asdict(self)

    def table(self) -> str:
        """A Markdown table, one line a system, p values Holm-corrected, and a line that says what they are."""
        head = ("system", self.measure, "difference", "better/worse", "p (randomisation)", "p (t-test)")
        rows = [head, (f"{self.baseline} (baseline)", f"{self.baseline_mean:.4f}", "", "", "", "")]
        for name, found in self.systems.items():
            rows.append(
                (
                    name,
                    f"{found.mean:.4f}",
                    f"{found.difference:+.4f}",
                    f"{found.better}/{found.worse}",
                    _shown(found.p_randomisation_holm),
                    _shown(found.p_t_test_holm),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "| " + " | ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row)) + " |"
            for row in rows
        ]
        rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
        over = f", Holm-corrected over {len(self.systems)} systems" if len(self.systems) > 1 else ""
        note = f"{self.queries} queries; two-sided paired tests against {self.baseline}{over}."
        return "\n".join([lines[0], rule, *lines[1:], "", note])

    def __str__(self) -> str:
        return self.table()


@overload
def compare_runs(
    a: Mapping[str, Scores],
    b: Judgements,
    /,
    *,
    baseline: str,
    measure: str = "RR@10",
    relevance: int = 1,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison: ...


@overload
def compare_runs(
    a: Scores,
    b: Scores,
    qrels: Judgements,
    *,
    measure: str = "RR@10",
    relevance: int = 1,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison: ...


def compare_runs(
    a: Any,
    b: Any,
    qrels: Judgements | None = None,
    *,
    baseline: str | None = None,
    measure: str = "RR@10",
    relevance: int = 1,
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
        samples: sign flips of the randomisation test.
        seed: of the sign flips. Every system gets the same ones, so that its p value does not depend on the others.

    Returns:
        Means, differences and p values, plain and Holm-corrected.

    Raises:
        ValueError: the baseline is not among the runs, there is nothing to compare it with, fewer than two queries
            are judged, or a run has results but none for a judged query.
    """
    if qrels is None:
        runs, qrels = dict(a), cast("Judgements", b)
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
        if run and qrels.keys().isdisjoint(run):
            raise ValueError(
                f"runs: {name!r} has none of the judged queries (it has {next(iter(run))!r}, judged is "
                f"{next(iter(qrels))!r}); take the run and the judgements of one split, with the same ids"
            )
    evaluations = {name: evaluate_run(run, qrels, [measure], relevance=relevance) for name, run in runs.items()}
    values = {name: [found.per_query[measure][query] for query in qrels] for name, found in evaluations.items()}
    base = values[baseline]
    others = [name for name in runs if name != baseline]
    randomised = [paired_randomisation_test(values[name], base, samples=samples, seed=seed) for name in others]
    t_tested = [paired_t_test(values[name], base) for name in others]
    systems = {
        name: SystemDifference(
            mean=evaluations[name].mean[measure],
            difference=evaluations[name].mean[measure] - evaluations[baseline].mean[measure],
            better=sum(value > against for value, against in zip(values[name], base, strict=True)),
            worse=sum(value < against for value, against in zip(values[name], base, strict=True)),
            p_randomisation=randomised[at],
            p_t_test=t_tested[at],
            p_randomisation_holm=holm(randomised)[at],
            p_t_test_holm=holm(t_tested)[at],
        )
        for at, name in enumerate(others)
    }
    return Comparison(measure, len(base), baseline, evaluations[baseline].mean[measure], systems)


def paired_randomisation_test(
    a: Sequence[float], b: Sequence[float], *, samples: int = 10_000, seed: int = 0
) -> float:
    """The chance of a mean difference this large, up or down, if each query's two values were swapped at random.

    All swaps are gone through where there are no more than `samples` of them, which makes the p value exact;
    otherwise it is (hits + 1) / (samples + 1), never 0 (Smucker, Allan and Carterette, CIKM 2007; Phipson and
    Smyth, 2010, for the added one).

    Args:
        a: values of one system, one a query.
        b: values of the other, in the same order of queries.
        samples: random swaps of all queries.
        seed: of the swaps.

    Returns:
        The two-sided p value; 1 for equal values.

    Raises:
        ValueError: unequal or no values, one that is not finite, or samples below 1.
    """
    import numpy as np

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
        kept = np.unpackbits(words.view(np.uint8), axis=1, count=count).astype(
            np.float64
        )  # (flips, queries), 1: sign kept
        sums = 2 * (kept @ differences) - differences.sum()
        hits += int(np.count_nonzero(np.abs(sums) >= reached))
        left -= rows
    return (hits + 1) / (samples + 1)


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Student's paired t-test of the mean difference, two-sided.

    Args:
        a: values of one system, one a query.
        b: values of the other, in the same order of queries.

    Returns:
        The p value; 1 where no query differs, 0 where all differ by the same amount.

    Raises:
        ValueError: unequal numbers of values, fewer than two, or one that is not finite.
    """
    differences = _differences(a, b, at_least=2)
    count = len(differences)
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if mean == 0:
        return 1.0
    if deviation == 0:
        return 0.0
    t = mean / (deviation / math.sqrt(count))
    return t_two_sided(t, count - 1)


def t_two_sided(t: float, degrees: float) -> float:
    """The chance that Student's t lies at least this far from 0, on either side.

    Args:
        t: the statistic.
        degrees: of freedom, above 0.

    Returns:
        A probability.
    """
    # Both arguments of the beta integral are formed without a subtraction, so that neither tail loses digits.
    square = t * t
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + square), square / (degrees + square))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number, keeping the family-wise error rate (Holm, 1979).

    Args:
        p_values: of the comparisons.

    Returns:
        The corrected p values in the same order: the smallest times their number, the next times one less and so
        on, none below one before it, none above 1.

    Raises:
        ValueError: a value is not between 0 and 1.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"p_values: {value} is not between 0 and 1")
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[at] = highest
    return corrected


def _differences(a: Sequence[float], b: Sequence[float], *, at_least: int) -> np.ndarray:
    import numpy as np

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


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), where `rest` is 1 - x (DLMF 8.17.22)."""
    if x <= 0:
        return 0.0
    if rest <= 0:
        return 1.0
    # The fraction converges quickly below the mean of the beta distribution; above it, take the other tail.
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, rest, x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(scale) / a / _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1 + d1/(1 + d2/(1 + ...)), evaluated forwards by the modified Lentz method."""
    tiny = 1e-300
    value, numerator, denominator = 1.0, 1.0, 0.0
    for step in range(1, 10_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / (1 + term * denominator or tiny)
        numerator = 1 + term / numerator or tiny
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            return value
    raise ArithmeticError(f"incomplete beta function of a={a}, b={b}, x={x} does not converge")


def _shown(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"
