"""Queries to tune a hybrid and an index on, never those that are reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tct_hf.evaluation.report_systems import HYBRIDS
from tct_hf.evaluation.tune_alpha import check_tuning_queries

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.evaluation.report_settings import HybridSettings


@dataclass(frozen=True)
class TuningQueries:
    """Judged queries to tune on.

    Args:
        split: they are of.
        queries: id to text.
        qrels: their judgements.
        left_out: queries of the split with the text, or the id, of a reported one.
    """

    split: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    left_out: int


def weight_text(alpha: float) -> str:
    """A weight to read: three digits that count, and large ones in full rather than in powers of ten."""
    return f"{alpha:.3g}" if alpha < 999.5 else f"{alpha:,.0f}"


def check_weight(settings: HybridSettings) -> None:
    """Refuse a weight that no fusion can take.

    Args:
        settings: with `alpha`.

    Raises:
        ValueError: it is negative or not finite, or of a pair that there is none of.
    """
    alpha = settings.alpha
    given: Mapping[str, float | None] = alpha if isinstance(alpha, dict) else {"": alpha}
    for key, weight in given.items():
        name = f"hybrid.alpha.{key}".rstrip(".")
        if key and key not in HYBRIDS:
            raise ValueError(f"{name}: there is no such pair; there are {', '.join(HYBRIDS)}")
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"{name}: {weight} must be finite and 0 or more; leave it out to have it tuned")


def tuning_queries(collection: Collection, settings: HybridSettings) -> TuningQueries | None:
    """Choose the queries to tune on: of dev, of train where there is no dev.

    Queries with the text of a reported one are left out; of the others, those kept are drawn by a hash of the id.

    Args:
        collection: the reported queries are its split "test", where it has one.
        settings: which split, and how many queries.

    Returns:
        The queries; None where `tune_on` is "auto" and there is none.

    Raises:
        ValueError: the split that is asked for is not there, `tune_queries` is below 1, or a query of the split is
            reported, by its id.
    """
    if settings.tune_queries < 1:
        raise ValueError(f"hybrid.tune_queries: {settings.tune_queries} is below 1; set hybrid.alpha to tune nothing")
    reported = collection.splits["test"].queries if "test" in collection.splits else {}
    also = {query: text for split in collection.also.values() for query, text in split.queries.items()}
    names = ("dev", "train") if settings.tune_on == "auto" else (settings.tune_on,)
    known = {_plain(text) for queries in (reported, also) for text in queries.values()}
    for name in names:
        split = collection.splits.get(name)
        if split is None or not split.queries:
            continue
        check_tuning_queries(list(split.queries), list(reported), setting="hybrid.tune_on")
        free = [query for query, text in split.queries.items() if query not in also and _plain(text) not in known]
        if not free:
            continue
        from tct_hf.data.collection import _place

        kept = sorted(free, key=_place)[: settings.tune_queries]
        queries = {query: split.queries[query] for query in kept}
        check_tuning_queries(queries, reported, setting="hybrid.tune_on")
        judged = {query: split.qrels[query] for query in kept}
        return TuningQueries(name, queries, judged, len(split.queries) - len(free))
    if settings.tune_on != "auto":
        there = ", ".join(name for name in collection.splits if name != "test") or "none"
        raise ValueError(
            f"hybrid.tune_on: {collection.name} has no {settings.tune_on} query to tune on (splits besides test: "
            f"{there}); name another split, or set hybrid.alpha"
        )
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
