"""How good a run is against judgements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tct_hf.retrieval.runs import rank

DEFAULT_MEASURES = ("RR@10", "nDCG@10", "R@100")


@dataclass(frozen=True)
class Evaluation:
    """Measured effectiveness: `mean` {measure: value} and `per_query` {measure: {query id: value}}."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> Evaluation:
    """Measure a run against judgements.

    Every judged query counts; one that the run lacks scores 0. Queries of the run without judgements are left out.
    Equal scores are ordered by passage id, ascending, before any engine sees them: trec_eval orders ties by
    descending id and compares in single precision.

    Args:
        run: query id to passage id to score.
        qrels: query id to passage id to relevance, 1 and more is relevant.
        measures: ir-measures names, for instance RR@10, nDCG@10, R@1000, AP, nDCG(dcg='exp-log2')@10.

    Returns:
        The means over the judged queries and the value of each query, under the names given.

    Raises:
        ValueError: an unknown measure, one that no installed engine computes, no judged query, or a NaN score.
    """
    import ir_measures

    if isinstance(measures, str):
        raise ValueError(f"measures: {measures!r} is one string; pass a list, for instance [{measures!r}]")
    if not measures:
        raise ValueError("measures is empty; name at least one, for instance RR@10")
    if not qrels:
        raise ValueError("qrels: no judged query; load the judgements of a split that has some")
    parsed = {name: _parse(name) for name in measures}
    # Copied into fresh dictionaries: engines accept nothing but plain int and float.
    judged = {query: {passage: int(grade) for passage, grade in grades.items()} for query, grades in qrels.items()}
    ranked = {query: _by_rank(query, run.get(query, {})) for query in judged}
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in parsed}
    # Two names may mean one measure (P@10, Precision@10): each gets its values.
    names: dict[Any, list[str]] = {}
    for name, measure in parsed.items():
        names.setdefault(measure, []).append(name)
    try:
        values = list(ir_measures.iter_calc(list(names), judged, ranked))
    except ValueError as error:
        raise ValueError(f"measures: {', '.join(parsed)}: {error}") from error
    for value in values:
        for name in names[value.measure]:
            per_query[name][value.query_id] = float(value.value)
    mean = {name: math.fsum(values.values()) / len(judged) for name, values in per_query.items()}
    return Evaluation(mean=mean, per_query=per_query)


def _parse(name: str) -> Any:
    import ir_measures

    try:
        return ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"measures: {name!r} is not an ir-measures name ({error}); use for instance RR@10, nDCG@10, R@1000, AP"
        ) from error


def _by_rank(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    if any(math.isnan(score) for score in scores.values()):
        raise ValueError(f"run: query {query!r} has a score that is NaN; look for NaN in the vectors that made it")
    ordered = rank(scores)
    return {passage: float(len(ordered) - place) for place, (passage, _) in enumerate(ordered)}
