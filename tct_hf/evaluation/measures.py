"""How good a run is against judgements."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tct_hf.data.ids import is_utf8
from tct_hf.retrieval.runs import check_common, rank

logger = logging.getLogger(__name__)

DEFAULT_MEASURES = ("RR@10", "nDCG@10", "R@100")
# TREC Deep Learning counts grades 2 and 3 as relevant for all but nDCG. Recall is often given from grade 1 on, too:
# the two have different names.
MEASURE_SETS = {
    "msmarco-dev": ("RR@10", "R@1000"),
    "trec-dl": ("nDCG@10", "RR(rel=2)@10", "R(rel=2)@1000", "R(rel=1)@1000"),
}
# A Perl script, which fails on query ids that are not numbers.
_UNUSABLE_ENGINES = ("gdeval",)
# trec_eval keeps an array of so many entries as the highest grade or gain of a query.
_HIGHEST_GRADE = 2**20


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
    ignore_identical_ids: bool | None = None,
) -> Evaluation:
    """Measure a run against judgements.

    Every judged query counts: one without a passage in the run, or without a relevant passage, scores 0. Queries
    without judgements are left out. A passage of a negative grade is not relevant, and not judged to Bpref, infAP and
    measures of judged passages only, as in trec_eval; a query that has no other grades scores 0. Equal scores are
    ordered by passage id, ascending; trec_eval by itself orders them by descending id, and compares in single
    precision.

    Args:
        run: query id to passage id to score.
        qrels: query id to passage id to relevance.
        measures: ir-measures names, for instance RR@10, nDCG@10, R@1000, AP, R(rel=2)@1000, or
            nDCG(dcg='exp-log2')@10 for gains of 2^relevance - 1.
        relevance: lowest relevant grade of measures without (rel=...); nDCG takes grades as gains. TREC Deep Learning
            takes 2.
        ignore_identical_ids: leave a passage with the query's own id out of its ranking, as BEIR does; None: where
            most of the queries find themselves, and none of them is judged relevant to itself.

    Returns:
        The means over the judged queries and the value of each query, under the names given.

    Raises:
        ValueError: an unknown measure, one that no installed engine computes or leaves without a value for a query, no
            judged query or none that is in the run, an id that trec_eval can't hold, a grade that is no whole number
            up to 2^20, or a score that is NaN or no number.
    """
    if isinstance(measures, str):
        raise ValueError(f"measures: {measures!r} is one string; pass a list, for instance [{measures!r}]")
    if not measures:
        raise ValueError("measures is empty; name at least one, for instance RR@10")
    if not qrels and isinstance(qrels, Mapping):
        raise ValueError("qrels: no judged query; load the judgements of a split that has some")
    if type(relevance) is not int or not 1 <= relevance <= _HIGHEST_GRADE:
        raise ValueError(f"relevance: {relevance!r} is no grade of 1 or more")
    check_common("run", run, "qrels", qrels)
    _check_ids("qrels: query id", qrels)
    # Copied into fresh dictionaries: engines accept nothing but plain int and float.
    judged = {query: _graded(query, grades) for query, grades in qrels.items()}
    scored = {query: _scored(query, run[query]) for query in judged if query in run}
    if any(scored.values()) and all(judged[query].keys().isdisjoint(scores) for query, scores in scored.items()):
        query = next(query for query, scores in scored.items() if scores)
        logger.warning(
            f"run, qrels: no passage of the run is judged for its query (for instance {next(iter(scored[query]))!r}, "
            f"where {next(iter(judged[query]), None)!r} is judged): all measures are 0. Do both name passages of one "
            "collection, with the same ids?"
        )
    own = find_themselves(qrels, scored) if ignore_identical_ids is None else ignore_identical_ids
    import ir_measures

    usable = [one for one in ir_measures.DefaultPipeline.providers if one.NAME not in _UNUSABLE_ENGINES]
    engine = ir_measures.providers.FallbackProvider(usable)
    grades_judged = {grade for grades in judged.values() for grade in grades.values()}
    parsed = {name: _parse(name, relevance, grades_judged, engine) for name in measures}
    # No measure is asked for what has no passages: some engines divide by their number.
    by_rank = {query: _by_rank(query, scores, own) for query, scores in scored.items() if judged[query]}
    ranked = {query: places for query, places in by_rank.items() if places}
    # trec_eval dies of a query that has negative grades alone.
    graded = {
        query: grades if max(grades.values()) >= 0 else dict.fromkeys(grades, 0)
        for query, grades in judged.items()
        if grades
    }
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in parsed}
    for name, measure in parsed.items():
        per_query[name].update(_values(engine, measure, name, graded, ranked))
    mean = {name: math.fsum(values.values()) / len(judged) for name, values in per_query.items()}
    return Evaluation(mean=mean, per_query=per_query)


def find_themselves(qrels: Mapping[str, Mapping[str, int]], *runs: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether queries are passages: in a run most find their own id, which is relevant to none of them."""
    for run in runs:
        own = [query for query in qrels if query in run.get(query, ())]
        if own and 2 * len(own) >= len(qrels.keys() & run.keys()):
            return not any(qrels[query].get(query, 0) > 0 for query in own)
    return False


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
    gains = (measure.params.get("gains") or {}).values()
    whole = {"cutoff": measure.params.get("cutoff"), "rel": measure.params.get("rel")}
    for what, number in [*whole.items(), *(("gain", gain + 1) for gain in gains)]:
        if number is not None and not (type(number) is int and 1 <= number <= _HIGHEST_GRADE):
            raise ValueError(f"measures: {name!r} has a {what} that no engine can take; use 1 or more")
    if not 0 <= (measure.params.get("recall") or 0) <= 1:
        raise ValueError(f"measures: {name!r} has a recall that is not between 0 and 1; use for instance IPrec@0.1")
    return measure


def _check_ids(what: str, names: Iterable[str]) -> None:
    """Refuse ids that trec_eval, which is written in C, would end the process over or take for others."""
    try:
        usable = b"\0" not in "\n".join(names).encode()
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        wrong = next(one for one in names if not isinstance(one, str) or "\0" in one or not is_utf8(one))
        raise ValueError(f"{what} {wrong!r} must be a text of valid UTF-8 without NUL; rename it first")


def _check_inner(place: str, scores: Any, what: str) -> None:
    if not isinstance(scores, Mapping):
        raise ValueError(f"{place} has a {type(scores).__name__}; give a mapping of passage id to {what}")
    _check_ids(f"{place}: passage id", scores)


def _graded(query: str, grades: Mapping[str, Any]) -> dict[str, int]:
    _check_inner(f"qrels: query {query!r}", grades, "grade")
    for passage, grade in grades.items():
        number: Any = grade if isinstance(grade, numbers.Real) else math.nan
        if not (abs(number) <= _HIGHEST_GRADE and number % 1 == 0):
            raise ValueError(
                f"qrels: query {query!r}, passage {passage!r}: grade {grade!r} is no whole number up to "
                f"{_HIGHEST_GRADE:,}; write 0, 1, 2, ..."
            )
    return {passage: int(grade) for passage, grade in grades.items()}


def _parse(name: str, relevance: int, grades: Set[int], engine: Any) -> Any:
    measure = _named(name)
    supported = measure.SUPPORTED_PARAMS
    # Where there is no cut-off by default, as in RBP, the measure without one is another measure.
    if "rel" in supported and supported["rel"].default == 1 and "rel" not in measure.params:
        measure = measure(rel=relevance)
    if measure.NAME == "nDCG" and measure["dcg"] == "exp-log2" and "gains" not in measure.params:
        # The same measure in the words of trec_eval, which has the discount and takes any gains.
        if max(grades, default=0) > math.log2(_HIGHEST_GRADE):
            raise ValueError(f"measures: {name!r}: grade {max(grades)} is too high for gains of 2^grade; use up to 20")
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


def _scored(query: str, scores: Mapping[str, float]) -> Mapping[str, float]:
    _check_inner(f"run: query {query!r}", scores, "score")
    try:
        usable = not any(map(math.isnan, scores.values()))
    except (TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise ValueError(
            f"run: query {query!r} has a score that is NaN or no number; look for NaN in the vectors that made it"
        )
    return scores


def _by_rank(query: str, scores: Mapping[str, float], own: bool) -> dict[str, float]:
    ordered = [passage for passage, _ in rank(scores) if not own or passage != query]
    return {passage: float(len(ordered) - place) for place, passage in enumerate(ordered)}
