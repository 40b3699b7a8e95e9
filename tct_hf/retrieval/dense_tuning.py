"""Choose a Faiss index's search parameters for a wanted recall."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.faiss_tools import parts, search_engine, set_parameters
from tct_hf.retrieval.vector_blocks import blocks

if TYPE_CHECKING:
    import numpy as np

SLICE = 256  # queries tuned on, at most
# Scores closer than this, relative, are the same to float32, whose last bits depend on the order of additions.
_ROUNDING = 1e-6
# The part of the allowed misses that is kept back: a slice is small, and what stands for queries is easier to find
# than they are. Searching 32 to 128 of 256 lists for the exact top 100, a student's queries missed 0.8 to 2.0 times
# what stand-ins missed, and 1.1 to 3.0 times what passages missed (two collections, 13,000 and 16,000 passages).
_KEPT_BACK = {"queries": 0.15, "passages": 0.4}
_PROBES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384]
_FACTORS = [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0]
_EFFORTS = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]
# Microseconds, for comparing settings with each other: measured at dimension 384, but fixed, so that the same vectors
# give the same index whatever else the machine does.
_COST_LIST, _COST_CODE, _COST_REFINED = 3.0, 0.0072, 0.85


def stand_ins(passages: np.ndarray, seed: int) -> np.ndarray:
    """Make vectors that stand for queries: each passage plus the difference of two others.

    A passage lies where an index has many vectors, a query beside them: it has its passage's subject and something of
    its own. The difference of two passages gives it that, in the directions that the collection uses.

    Args:
        passages: (rows, dimension) float32.
        seed: of what is added to which.

    Returns:
        (rows, dimension) float32.
    """
    import numpy as np

    # Neighbours in a ring, so that with three rows or more none is added to or taken from itself.
    ring = np.random.default_rng(seed).permutation(len(passages))
    made = np.empty_like(passages)
    made[ring] = passages[ring] + passages[np.roll(ring, 1)] - passages[np.roll(ring, 2)]
    return made


@dataclass(frozen=True)
class ExactNeighbours:
    """What exhaustive search finds.

    Args:
        queries: (queries, dimension) float32.
        vectors: (rows, dimension), of any kind that gives rows by number.
        rows: (queries, k) int64 row numbers, best first.
        tied: (queries,) bool: other rows score what the last of these does.
    """

    queries: np.ndarray
    vectors: Any
    rows: np.ndarray
    tied: np.ndarray

    def recall(self, found: np.ndarray) -> np.ndarray:
        """Recall@k of what an index found: a row is as good as the k-th exact one where it scores no less.

        Args:
            found: (queries, any) row numbers, -1 for none.

        Returns:
            (queries,) float64.
        """
        import numpy as np

        recall = recall_at_k(found, self.rows)
        k = self.rows.shape[1]
        for at in np.flatnonzero(self.tied & (recall < 1)):
            others = np.setdiff1d(found[at][found[at] >= 0], self.rows[at])
            scored = np.append(others, self.rows[at, -1])
            order = np.argsort(scored)  # in the order of a file that is mapped
            scores = np.empty(len(scored))
            block = np.asarray(self.vectors[scored[order]], dtype=np.float64)
            scores[order] = block @ self.queries[at].astype(np.float64)
            as_good = int((scores[:-1] >= scores[-1] - _ROUNDING * abs(scores[-1])).sum())
            recall[at] = min(1.0, recall[at] + as_good / k)
        return recall


def exact_neighbours(queries: np.ndarray, vectors: Any, k: int) -> ExactNeighbours:
    """Find the rows with the greatest inner products by exhaustive search, block by block.

    Args:
        queries: (queries, dimension) float32.
        vectors: (rows, dimension), of any kind that gives rows by slice and number.
        k: rows a query, at most as many as there are vectors.
    """
    import faiss
    import numpy as np

    # One more than asked for shows where equal scores straddle the cut.
    depth = min(k + 1, len(vectors))

    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    begin = 0
    for block in blocks(vectors):
        values, found = faiss.knn(queries, block, min(depth, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.hstack([scores, values])
        rows = np.hstack([rows, found + begin])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        begin += len(block)
    tied = np.zeros(len(queries), bool)
    if depth > k:
        tied = scores[:, k] >= scores[:, k - 1] - _ROUNDING * np.abs(scores[:, k - 1])
    return ExactNeighbours(queries, vectors, rows[:, :k], tied)


def recall_at_k(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Part of the exact rows that was found, a query.

    Args:
        found: (queries, any) row numbers, -1 for none.
        exact: (queries, k) row numbers.

    Returns:
        (queries,) float64.
    """
    import numpy as np

    return np.array([np.isin(best, mine).mean() for mine, best in zip(found, exact, strict=True)])


def choose_parameters(engine: Any, exact: ExactNeighbours, recall: float, source: str, k: int) -> dict[str, Any]:
    """Set the cheapest search parameters that reach a recall, by a fixed estimate of their cost.

    Args:
        engine: the filled index; left with the parameters chosen.
        exact: the queries to tune on and their exact rows.
        recall: wanted mean Recall@k, below 1.
        source: "queries", or "passages" of which stand-ins were made: what is aimed at lies above `recall` by a
            margin that is greater for these.
        k: passages a query.

    Returns:
        "parameters", "recall" wanted, "measured" on the slice, "aim", "k", "source" and "slice" (queries). A warning
        is given when no setting reaches the wanted recall; the best is then set.
    """
    queries, places = exact.queries, exact.rows.shape[1]
    aim = recall + (1 - recall) * _KEPT_BACK[source]

    def measure(parameters: dict[str, float]) -> float:
        set_parameters(engine, parameters)
        return float(exact.recall(search_engine(engine, queries, places)[1]).mean())

    best: tuple[float, dict[str, float], float] | None = None
    highest: tuple[float, dict[str, float]] = (-1.0, {})
    for line in _lines(engine, places):
        # Recall rises along a line, so that halving finds the first setting that reaches the aim.
        low, high = 0, len(line) if best is None else sum(cost < best[0] for cost, _ in line)
        reached: tuple[float, dict[str, float], float] | None = None
        while low < high:
            middle = (low + high) // 2
            cost, parameters = line[middle]
            measured = measure(parameters)
            highest = max(highest, (measured, parameters), key=lambda one: one[0])
            if measured >= aim:
                reached, high = (cost, parameters, measured), middle
            else:
                low = middle + 1
        best = reached or best
    if best is None:
        measured, parameters = highest
        if measured < recall:
            warnings.warn(
                f"recall: {recall} wanted, {measured:.4f} is the most this index reaches on {len(queries)} {source}; "
                "its codes are too coarse for these vectors. Name a factory with finer ones, such as 'HNSW32', or "
                "accept less",
                stacklevel=3,
            )
    else:
        _, parameters, measured = best
    set_parameters(engine, parameters)
    return {
        "parameters": parameters,
        "recall": recall,
        "aim": round(aim, 6),
        "measured": round(measured, 6),
        "k": k,
        "source": source,
        "slice": len(queries),
    }


def _lines(engine: Any, k: int) -> list[list[tuple[float, dict[str, float]]]]:
    """Settings with their costs, in lines of rising cost and recall; a line for each k_factor."""
    refine, ivf, graph = parts(engine)
    factors = _FACTORS if refine is not None else [0.0]
    if ivf is not None:
        a_list = _COST_LIST + _COST_CODE * ivf.ntotal / ivf.nlist
        steps: list[tuple[float, dict[str, float]]] = [
            (step * a_list, {"nprobe": step}) for step in _PROBES if step < ivf.nlist
        ]
        steps.append((ivf.nlist * a_list, {"nprobe": ivf.nlist}))
    elif graph is not None:
        # An effort compares about 30 vectors; beyond this much, exact search is as fast.
        most = max(8 * k, graph.ntotal // 50)
        efforts = sorted({min(round(k * step), most) for step in _EFFORTS})
        steps = [(float(effort), {"efSearch": effort}) for effort in efforts]
    else:
        return [[(factor, {"k_factor": factor}) for factor in factors]]
    if refine is None:
        return [steps]
    return [
        [(cost + _COST_REFINED * k * factor, {**step, "k_factor": factor}) for cost, step in steps]
        for factor in factors
    ]
