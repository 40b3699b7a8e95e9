"""How good a run is against judgements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tct_hf.retrieval.runs import rank

DEFAULT_MEASURES = ("RR@10", "nDCG@10", "R@100")
# TREC Deep Learning counts grades 2 and 3 as relevant for all but nDCG. Recall is often given from grade 1 on, too:
# the two have different names.
MEASURE_SETS = {
    "msmarco-dev": ("RR@10", "R@1000"),
    "trec-dl": ("nDCG@10", "RR(rel=2)@10", "R(rel=2)@1000", "R(rel=1)@1000"),
}
# A Perl script, which fails on query ids that are not numbers.
_UNUSABLE_ENGINES = ("gdeval",)


@dataclass(frozen=True)
class Evaluation:
    """Measured effectiveness: `mean` {measure: value} and `per_query` {measure: {query id: value}}."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    relevance: int = 1,
) -> Evaluation:
    """Measure a run against judgements.

    Every judged query counts: one without a passage in the run, or without a relevant passage, scores 0. Queries
    without judgements are left out. A negative grade (TREC's -2 for junk) counts as 0. Equal scores are ordered by
    passage id, ascending; trec_eval by itself orders ties by descending id and compares in single precision.

    Args:
        run: query id to passage id to score.
        qrels: query id to passage id to relevance.
        measures: ir-measures names, for instance RR@10, nDCG@10, R@1000, AP, R(rel=2)@1000, or
            nDCG(dcg='exp-log2')@10 for gains of 2^relevance - 1.
        relevance: lowest relevant grade of measures without (rel=...); nDCG takes grades as gains. TREC Deep Learning
            takes 2.

    Returns:
        The means over the judged queries and the value of each query, under the names given.

    Raises:
        ValueError: an unknown measure, one that no installed engine computes or leaves without a value for a query, no
            judged query, or a NaN score.
    """
    if isinstance(measures, str):
        raise ValueError(f"measures: {measures!r} is one string; pass a list, for instance [{measures!r}]")
    if not measures:
        raise ValueError("measures is empty; name at least one, for instance RR@10")
    if not qrels:
        raise ValueError("qrels: no judged query; load the judgements of a split that has some")
    if type(relevance) is not int or relevance < 1:
        raise ValueError(f"relevance: {relevance!r} is no grade of 1 or more")
    # Copied into fresh dictionaries: engines accept nothing but plain int and float. Negative grades have a meaning of
    # their own in trec_eval, and crash it where a query has no others.
    judged = {
        query: {passage: max(int(grade), 0) for passage, grade in grades.items()} for query, grades in qrels.items()
    }
    import ir_measures

    usable = [one for one in ir_measures.DefaultPipeline.providers if one.NAME not in _UNUSABLE_ENGINES]
    engine = ir_measures.providers.FallbackProvider(usable)
    grades_judged = {grade for grades in judged.values() for grade in grades.values()}
    parsed = {name: _parse(name, relevance, grades_judged, engine) for name in measures}
    # No measure is asked for what has no passages: some engines divide by their number.
    ranked = {query: _by_rank(query, run[query]) for query, grades in judged.items() if grades and run.get(query)}
    graded = {query: grades for query, grades in judged.items() if grades}
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in parsed}
    # Two names may mean one measure (P@10, Precision@10): each gets its values.
    names: dict[Any, list[str]] = {}
    for name, measure in parsed.items():
        names.setdefault(measure, []).append(name)
    for measure, same in names.items():
        values = _values(engine, measure, same[0], graded, ranked)
        for name in same:
            per_query[name].update(values)
    mean = {name: math.fsum(values.values()) / len(judged) for name, values in per_query.items()}
    return Evaluation(mean=mean, per_query=per_query)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over queries."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def named_measures(names: Sequence[str]) -> list[str]:
    """The ir-measures names that `names`, which may hold keys of MEASURE_SETS, stand for, each once."""
    return list(dict.fromkeys(one for name in names for one in MEASURE_SETS.get(name, (name,))))


def cutoff_of(measure: str) -> int | None:
    """The number of top passages a measure looks at (10 for RR@10); None for all."""
    found = _named(measure)
    # Where unjudged passages are taken out first, those below the cut move up.
    return None if found.params.get("judged_only") else found.params.get("cutoff")


def relevant_from(measure: str, relevance: int) -> int | None:
    """The grade from which a measure takes a passage as relevant; None where grades are gains."""
    found = _named(measure)
    if found.params.get("rel") is not None:
        return int(found.params["rel"])
    return relevance if "rel" in found.SUPPORTED_PARAMS else None


def check_measures(measures: Sequence[str], depth: int, *, setting: str, relevance: int = 1) -> None:
    """Refuse an unknown measure, or one that looks deeper than runs of `depth` passages."""
    evaluate_run({}, {"query": {"passage": 1}}, measures, relevance=relevance)
    for measure in measures:
        if (cutoff := cutoff_of(measure)) is not None and cutoff > depth:
            raise ValueError(f"{setting} is {depth}, too little for {measure}: {cutoff} or more.")


def _named(name: str) -> Any:
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
        measure.validate_params()
    except (NameError, ValueError, SyntaxError, TypeError, KeyError, AssertionError) as error:
        raise ValueError(
            f"measures: {name!r} is not an ir-measures name ({error}); use for instance RR@10, nDCG@10, R@1000, AP"
        ) from error
    return measure


def _parse(name: str, relevance: int, grades: Set[int], engine: Any) -> Any:
    measure = _named(name)
    supported = measure.SUPPORTED_PARAMS
    # Where there is no cut-off by default, as in RBP, the measure without one is another measure.
    if "rel" in supported and supported["rel"].default == 1 and "rel" not in measure.params:
        measure = measure(rel=relevance)
    if measure.NAME == "nDCG" and measure["dcg"] == "exp-log2" and "gains" not in measure.params:
        # The same measure in the words of trec_eval, which has the discount and takes any gains.
        measure = measure(dcg="log2", gains={grade: 2 ** max(grade, 0) - 1 for grade in grades})
    if not engine.supports(measure):
        fixes = [
            f" ({one.install_instructions()} adds one that does)"
            for one in engine.providers
            if not one.is_available() and one.supports(measure) and one.install_instructions()
        ]
        raise ValueError(
            f"measures: no installed engine computes {name!r}{''.join(fixes[:1])}; use for instance RR@10, nDCG@10, "
            "R@1000, AP"
        )
    return measure


def _values(
    engine: Any,
    measure: Any,
    name: str,
    judged: Mapping[str, Mapping[str, int]],
    ranked: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """One measure of each ranked query, alone: trec_eval's name for it may be that of another as well."""
    try:
        evaluator = engine.evaluator([measure], judged)
        found = {value.query_id: float(value.value) for value in evaluator.iter_calc(ranked)} if ranked else {}
    except ValueError as error:
        raise ValueError(f"measures: {name}: {error}") from error
    if lacking := [query for query in ranked if query not in found]:
        raise ValueError(f"measures: the engine of {name} gave no value for query {lacking[0]!r}; use another measure")
    return {query: found[query] for query in ranked}


def _by_rank(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    if any(math.isnan(score) for score in scores.values()):
        raise ValueError(f"run: query {query!r} has a score that is NaN; look for NaN in the vectors that made it")
    ordered = rank(scores)
    return {passage: float(len(ordered) - place) for place, (passage, _) in enumerate(ordered)}
