"""Hybrid retrieval: two or more runs fused into one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tct_hf.retrieval.runs import Run, check_common

Scores = Mapping[str, float]


def fuse(
    sparse_run: Mapping[str, Scores],
    dense_run: Mapping[str, Scores],
    alpha: float,
    *,
    normalize: bool = False,
    k: int | None = None,
) -> Run:
    """Fuse a sparse and a dense run: `alpha * sparse + dense` over the union of their passages.

    A passage that one list lacks gets that list's lowest score for the query; a list that is empty, or lacks the
    query, gives 0 to all. This is the rule of TCT-ColBERT's hybrid (arXiv 2010.11386, section 3.2, as in Pyserini's
    `HybridSearcher`).

    Args:
        sparse_run: query id to passage id to score, of BM25 for instance.
        dense_run: the same of a student.
        alpha: weight of the sparse scores, 0 or more; see `tune_alpha`.
        normalize: make every score s of a list (s - (min + max) / 2) / (max - min) first, or 0 where all are equal.
        k: passages a query, at most; None keeps the union.

    Returns:
        The fused run: every query of either run, passages best first, equal scores by id.

    Raises:
        ValueError: alpha is negative or not finite, a score is not finite, k is below 1, or the runs have no query
            in common.
    """
    check_weight(alpha)
    _check_depth(k, "k")
    check_common("sparse_run", sparse_run, "dense_run", dense_run)
    fused: Run = {}
    for query in dict.fromkeys([*sparse_run, *dense_run]):
        ids, sparse, dense = align(query, sparse_run.get(query, {}), dense_run.get(query, {}), normalize)
        fused[query] = _ordered(ids, alpha * sparse + dense, k)
    return fused


def reciprocal_rank_fusion(runs: Sequence[Mapping[str, Scores]], k: int = 60, *, depth: int | None = None) -> Run:
    """Fuse runs by their ranks: a passage scores the sum of 1 / (k + rank) over the runs that have it.

    Ranks count from 1, score descending, equal scores by passage id (Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        runs: query id to passage id to score, one or more.
        k: constant that lowers the weight of the first ranks; 60 in the paper.
        depth: passages a query, at most; None keeps the union.

    Returns:
        The fused run: every query of any run, passages best first, equal scores by id.

    Raises:
        ValueError: there is no run, one has no query in common with the first, k is negative or not finite, depth is
            below 1, or a score is NaN.
    """
    if isinstance(runs, Mapping) or not runs:
        raise ValueError("runs: pass a list of one or more runs")
    if not 0 <= k < math.inf:
        raise ValueError(f"k: {k} must be finite and 0 or more; 60 is usual")
    _check_depth(depth, "depth")
    for at, run in enumerate(runs[1:], 1):
        check_common("runs[0]", runs[0], f"runs[{at}]", run)
    fused: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        sums: dict[str, float] = {}
        for run in runs:
            scores = run.get(query, {})
            values = np.fromiter(scores.values(), np.float64, len(scores))
            if np.isnan(values).any():
                raise ValueError(_not_finite(query, scores))
            names = list(scores)
            for place, at in enumerate(order_of(names, values).tolist(), start=1):
                sums[names[at]] = sums.get(names[at], 0.0) + 1 / (k + place)
        fused[query] = _ordered(list(sums), np.fromiter(sums.values(), np.float64, len(sums)), depth)
    return fused


def _ordered(ids: Sequence[str], scores: np.ndarray, depth: int | None) -> dict[str, float]:
    order = order_of(ids, scores, depth)
    return dict(zip([ids[at] for at in order.tolist()], scores[order].tolist(), strict=True))


def equal_spread_alpha(
    sparse_run: Mapping[str, Scores], dense_run: Mapping[str, Scores], queries: Collection[str] | None = None
) -> float:
    """The weight at which both lists count the same, found without judgements.

    It is the median over `queries` (all when None) of the dense list's spread (max - min) over the sparse list's; 1
    where no query has both.
    """
    ratios = []
    for query in sparse_run if queries is None else queries:
        sparse, dense = sparse_run.get(query), dense_run.get(query)
        if sparse and dense:
            spread = max(sparse.values()) - min(sparse.values())
            if spread > 0 and max(dense.values()) > min(dense.values()):
                ratios.append((max(dense.values()) - min(dense.values())) / spread)
    return statistics.median(ratios) if ratios else 1.0


def align(query: str, sparse: Scores, dense: Scores, normalize: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The union of two lists: ids, sparse scores and dense scores (passages,) float64, each missing one filled in."""
    values, lowest = [], []
    for scores in (sparse, dense):
        # Rows are fused as arrays, so that tuning adds and multiplies exactly as fusing does.
        array = np.fromiter(scores.values(), np.float64, len(scores))
        if not np.isfinite(array).all():
            raise ValueError(_not_finite(query, scores))
        if normalize and len(array):
            low, high = array.min(), array.max()
            array = (array - (low + high) / 2) / (high - low) if low < high else np.zeros_like(array)
        values.append(array)
        lowest.append(float(array.min()) if len(array) else 0.0)
    (sparse_values, dense_values), (sparse_low, dense_low) = values, lowest
    # One look-up a passage: what is left after the sparse list's passages are taken out is in the dense list only.
    rest = dict(zip(dense, dense_values.tolist(), strict=True))
    take = rest.pop
    shared = [take(passage, dense_low) for passage in sparse]
    sparse_all = np.concatenate([sparse_values, np.full(len(rest), sparse_low)])
    return [*sparse, *rest], sparse_all, np.array([*shared, *rest.values()], np.float64)


def order_of(ids: Sequence[str], scores: np.ndarray, depth: int | None = None) -> np.ndarray:
    """Rows best first, equal scores by id, the first `depth` of them: `rank` for arrays."""
    rows = np.arange(len(scores))
    if depth is not None and depth < len(scores):
        # All that equal the last one kept come along, for the ids to decide among.
        rows = np.flatnonzero(scores >= np.partition(scores, -depth)[-depth])
    order = rows[np.argsort(-scores[rows], kind="stable")]
    ordered = scores[order]
    equal = ordered[1:] == ordered[:-1]
    if equal.any():
        # Borders between groups of equal scores; only groups of two and more need sorting.
        borders = np.concatenate([[0], np.flatnonzero(~equal) + 1, [len(order)]])
        groups = np.flatnonzero(np.diff(borders) > 1)
        listed = order.tolist()
        for start, end in zip(borders[groups].tolist(), borders[groups + 1].tolist(), strict=True):
            listed[start:end] = sorted(listed[start:end], key=ids.__getitem__)
        order = np.array(listed, np.int64)
    return order[:depth]


def check_weight(alpha: float) -> None:
    """Refuse a weight that is negative or not finite."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: {alpha} must be finite and 0 or more; tune_alpha finds a good one")


def _check_depth(depth: int | None, name: str) -> None:
    if depth is not None and depth < 1:
        raise ValueError(f"{name}: {depth} is below 1; ask for at least one passage, or None for all")


def _not_finite(query: str, scores: Scores) -> str:
    passage = next(passage for passage, score in scores.items() if not math.isfinite(score))
    return (
        f"run: query {query!r}, passage {passage!r}: score {scores[passage]!r} is not finite; "
        "look for NaN in the vectors or the scores that made it"
    )
