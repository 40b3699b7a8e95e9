"""Faiss indexes for inner products: which kind for how many vectors, how one is trained, and tuned for a recall."""

from __future__ import annotations

import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from tct_hf.retrieval.vectors import BLOCK, as_matrix, blocks

EXACT_UP_TO = 50_000  # vectors: exact search of so many takes milliseconds
_TRAINING_ROWS_PER_LIST = 64
# Of the graph: inner products are no distance, and with Faiss's own 40 a few passages can't be reached at any effort.
_CONSTRUCTION_EFFORT = 200
_MOST_LISTS = 65_536

_LOADED_BY = os.getpid()
if hasattr(os, "register_at_fork"):
    # A child has none of the threads of its parent's pool, and would wait for them for ever.
    os.register_at_fork(after_in_child=partial(faiss.omp_set_num_threads, 1))

SLICE = 512  # queries tuned on, at most
# Scores closer than this, relative, are the same to float32, whose last bits depend on the order of additions.
_ROUNDING = 1e-6
# Standard errors of the mean recall of real queries that are kept back (a 95% bound on one side), and the part of the
# allowed misses with stand-ins, which are easier to find than queries. Searching 32 to 128 of 256 lists for the exact
# top 100, a student's queries missed 0.8 to 2.0 times what stand-ins missed (two collections, 13,000 and 16,000
# passages).
_ERRORS, _KEPT_BACK = 1.645, 0.4
_PROBES = sorted({round(2 ** (step / 4)) for step in range(65)})
_FACTORS = [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0]
_EFFORTS = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]
# Microseconds, for comparing settings with each other: measured at dimension 384, but fixed, so that the same vectors
# give the same index whatever else the machine does.
_COST_LIST, _COST_CODE, _COST_REFINED = 3.0, 0.0072, 0.85


def codes_for(bits: Iterable[int]) -> list[str]:
    """Faiss factory strings of exhaustive search in codes of so many bits a component, those of 32 left out.

    The best candidates of one bit are found with and without scoring them again by one byte.
    """
    codes = {32: [], 8: ["SQ8"], 1: ["RaBitQfs", "RaBitQfs,Refine(SQ8)"]}
    return [factory for one in sorted(set(bits), reverse=True) for factory in codes[one]]


def factory_for(count: int, dimension: int) -> str:
    """The Faiss factory string that "auto" stands for with `count` vectors.

    "Flat" (exact), or inverted lists with 4 bits for every two components (residual product quantization, read by fast
    scan) whose best candidates are scored again with one byte a component.
    """
    if count <= EXACT_UP_TO:
        return "Flat"
    return f"IVF{_lists_for(count)},PQ{dimension if dimension % 2 else dimension // 2}x4fsr,Refine(SQ8)"


def _lists_for(count: int) -> int:
    """Near 2 sqrt(count): reading the centroids then costs about as much as reading the lists."""
    return min(_MOST_LISTS, 2 ** round(math.log2(2 * math.sqrt(count))))


def usable_threads(threads: int) -> int:
    """How many of these threads Faiss and torch can use: one in a forked process."""
    return threads if os.getpid() == _LOADED_BY else 1


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """Give Faiss a number of threads for a while; None leaves its own setting, and below 1 is a ValueError."""
    if threads is None:
        yield
        return
    if threads < 1:
        raise ValueError(f"threads: {threads} is below 1; pass None for Faiss's own setting")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(usable_threads(threads))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(usable_threads(before))


def parts(engine: Any) -> tuple[Any, Any, Any]:
    """Look into an index: its refining wrapper, the inverted lists and the graph in it, None for what it has not."""
    refine = None
    inner = faiss.downcast_index(engine)
    while True:
        if isinstance(inner, faiss.IndexRefine):
            refine, inner = inner, faiss.downcast_index(inner.base_index)
        elif isinstance(inner, (faiss.IndexPreTransform, faiss.IndexIDMap)):
            inner = faiss.downcast_index(inner.index)
        else:
            ivf = inner if isinstance(inner, faiss.IndexIVF) else None
            return refine, ivf, inner if isinstance(inner, faiss.IndexHNSW) else None


def parameter_names(engine: Any) -> list[str]:
    """Search parameters that an index has."""
    names = zip(("k_factor", "nprobe", "efSearch"), parts(engine), strict=True)
    return [name for name, part in names if part is not None]


def set_parameters(engine: Any, parameters: Mapping[str, float]) -> None:
    """Set search parameters; ValueError where the index has no such parameter, or a value is below 1."""
    for name, value in parameters.items():
        if name not in parameter_names(engine):
            raise ValueError(f"parameters: this index has {parameter_names(engine) or 'none'}, not {name!r}")
        if not value >= 1:
            raise ValueError(f"parameters: {name}={value} is below 1")
        value = min(value, max(engine.ntotal, 1))  # more makes no difference, but to the memory that Faiss takes
        if name == "k_factor":  # ParameterSpace would round it
            parts(engine)[0].k_factor = float(value)
        else:
            faiss.ParameterSpace().set_index_parameter(engine, name, int(value))


def search_engine(engine: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (queries, k) float32 and rows (queries, k) int64, best first, -1 where there is none.

    So many queries are searched at a time that the tables of fast-scan codes, 6 kB a query and list, stay small.
    """
    if len(queries) == 1:
        return engine.search(queries, k)
    _, ivf, _ = parts(engine)
    block = 1024 if ivf is None else max(1, 16_384 // ivf.nprobe)
    found = [engine.search(queries[start : start + block], k) for start in range(0, len(queries), block)]
    return np.vstack([scores for scores, _ in found]), np.vstack([rows for _, rows in found])


def search_all(engine: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, with no place left empty: a query that falls short of `k` rows is searched again in all lists.

    Where that is not enough, as with rows that no edge of a graph leads to, it is compared with every row.
    """
    scores, rows = search_engine(engine, queries, k)
    for again in (_search_lists, _search_rows):
        if rows.min() < 0:
            short = np.flatnonzero(rows.min(axis=1) < 0)
            scores[short], rows[short] = again(engine, queries[short], k)
    return scores, rows


def _search_lists(engine: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    parameters = _of_all_lists(engine)
    found = [engine.search(query[None], k, params=parameters) for query in queries]
    return np.vstack([scores for scores, _ in found]), np.vstack([rows for _, rows in found])


def _of_all_lists(engine: Any) -> Any:
    """Parameters of one search, so that others at the same time keep theirs."""
    kinds: Any = faiss  # whose stubs lack the names of arguments
    engine = faiss.downcast_index(engine)
    if isinstance(engine, faiss.IndexRefine):
        base = _of_all_lists(engine.base_index)
        return kinds.IndexRefineSearchParameters(k_factor=engine.k_factor, base_index_params=base)
    if isinstance(engine, faiss.IndexPreTransform):
        return kinds.SearchParametersPreTransform(index_params=_of_all_lists(engine.index))
    return kinds.SearchParametersIVF(nprobe=engine.nlist) if isinstance(engine, faiss.IndexIVF) else None


def _search_rows(engine: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    count = engine.ntotal
    kept = (engine.reconstruct_n(start, min(BLOCK, count - start)) for start in range(0, count, BLOCK))
    found: tuple[np.ndarray, np.ndarray] = knn_ground_truth(queries, kept, k, faiss.METRIC_INNER_PRODUCT)
    return found


def search_flat(engine: Any, queries: np.ndarray, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores and rows of each query by exhaustive search, best first: k, and all that score what the kth does."""
    scores, rows = search_engine(engine, queries, min(k + 1, engine.ntotal))
    found = [(values[:k], at[:k]) for values, at in zip(scores, rows, strict=True)]
    for number, values in enumerate(scores):
        depth = len(values)
        # One more than asked for shows whether equal scores straddle the cut.
        if depth <= k or values[k] != values[k - 1]:
            continue
        wider, at = scores[number : number + 1], rows[number : number + 1]
        while wider[0, -1] >= wider[0, k - 1] and depth < engine.ntotal:
            depth = min(4 * depth, engine.ntotal)
            wider, at = engine.search(queries[number : number + 1], depth)
        kept = wider[0] >= wider[0, k - 1]
        found[number] = wider[0][kept], at[0][kept]
    return [values for values, _ in found], [at for _, at in found]


def make_engine(dimension: int, factory: str) -> Any:
    """An empty Faiss index for inner products; RuntimeError where Faiss refuses the string."""
    engine = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    _, _, graph = parts(engine)
    if graph is not None:
        graph.hnsw.efConstruction = _CONSTRUCTION_EFFORT
    return engine


def filled_engine(vectors: Any, factory: str, seed: int) -> tuple[Any, np.ndarray]:
    """A Faiss index with all vectors `(rows, dimension)`, and the rows held out to tune it on.

    RuntimeError where Faiss refuses the string, or has too few vectors to train on.
    """
    engine = make_engine(vectors.shape[1], factory)
    _, ivf, _ = parts(engine)
    wanted = min(len(vectors), max(BLOCK, 0 if ivf is None else ivf.nlist * _TRAINING_ROWS_PER_LIST))
    order = np.random.default_rng(seed).permutation(len(vectors))
    # In the order of a file that is mapped; apart where there are enough.
    held_out, rest = np.sort(order[:SLICE]), order[SLICE:] if len(vectors) - SLICE >= wanted else order
    if not engine.is_trained:
        # The least and greatest value of each component are all that scalar quantizers learn: no vector is clipped.
        extremes = [(block.min(axis=0), block.max(axis=0)) for block in blocks(vectors)]
        limits = np.stack([np.min([low for low, _ in extremes], 0), np.max([high for _, high in extremes], 0)])
        _train(engine, as_matrix(vectors[np.sort(rest[:wanted])], "vectors"), limits, seed)
    for block in blocks(vectors):
        engine.add(block)
    return engine, held_out


def _train(engine: Any, sample: np.ndarray, limits: np.ndarray, seed: int) -> None:
    top: Any = faiss.downcast_index(engine)
    base = faiss.downcast_index(top.base_index) if isinstance(top, faiss.IndexRefine) else top
    if isinstance(base, faiss.IndexIVF) and isinstance(faiss.downcast_index(base.quantizer), faiss.IndexFlat):
        _train_centroids(base, sample, seed)
    base.train(np.vstack([sample, limits]) if isinstance(base, faiss.IndexScalarQuantizer) else sample)
    if base is not top:
        top.refine_index.train(np.vstack([sample, limits]))
        top.is_trained = True


def _train_centroids(ivf: Any, sample: np.ndarray, seed: int) -> None:
    """Cluster by direction, then give every centroid the length that vectors have along it.

    Clusters under the inner product have unit centroids, because a long one would draw vectors and queries to itself.
    But codes hold what a vector has beyond its centroid, and beside vectors of length 6 a unit centroid explains next
    to nothing. One common length changes no choice of cluster and makes the rest, and the error of its code, smaller:
    with a student's vectors, Recall@100 0.866 instead of 0.833 at the same cost (32 of 256 lists, k_factor 2).
    """
    clustering: Any = faiss.Kmeans(
        ivf.d,
        ivf.nlist,
        niter=10,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAINING_ROWS_PER_LIST,
    )
    clustering.train(sample)
    lengths, _ = clustering.index.search(sample[:BLOCK], 1)
    length = float(lengths.mean())
    ivf.quantizer.add(clustering.centroids * (length if length > 0 else 1.0))


def stand_ins(passages: np.ndarray, seed: int) -> np.ndarray:
    """Make vectors that stand for queries: each passage plus the difference of two others.

    A passage lies where an index has many vectors, a query beside them: it has its passage's subject and something of
    its own. The difference of two passages gives it that, in the directions that the collection uses.
    """
    # Neighbours in a ring, so that with three rows or more none is added to or taken from itself.
    ring = np.random.default_rng(seed).permutation(len(passages))
    made = np.empty_like(passages)
    made[ring] = passages[ring] + passages[np.roll(ring, 1)] - passages[np.roll(ring, 2)]
    return made


class ExactNeighbours:
    """The k rows with the greatest inner products, by exhaustive search.

    Attributes:
        rows: `(queries, k)` int64, best first.
        tied: `(queries,)` bool, whether other rows score what the last of these does.
    """

    def __init__(self, queries: np.ndarray, vectors: Any, k: int) -> None:
        self.queries, self.vectors = queries, vectors
        depth = min(k + 1, len(vectors))  # one more than asked for shows where equal scores straddle the cut
        scores, rows = knn_ground_truth(queries, blocks(vectors), depth, faiss.METRIC_INNER_PRODUCT)
        self.rows = rows[:, :k]
        self.tied = np.zeros(len(queries), bool)
        if depth > k:
            self.tied = scores[:, k] >= scores[:, k - 1] - _ROUNDING * np.abs(scores[:, k - 1])

    def recall(self, found: np.ndarray) -> np.ndarray:
        """Recall@k (queries,) of the rows that an index found (queries, any), -1 for none.

        A row is as good as the k-th exact one where it scores no less.
        """
        recall = np.array([np.isin(best, mine).mean() for mine, best in zip(found, self.rows, strict=True)])
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


def tune(
    engine: Any, vectors: Any, held_out: np.ndarray, queries: np.ndarray | None, recall: float, k: int, seed: int
) -> dict[str, Any]:
    """Set the cheapest search parameters of a filled index that reach a recall, by a fixed estimate of their cost.

    They are tuned on a slice of `queries`, or of stand-ins made of the held-out rows of `vectors`. The recall aimed at
    lies above the one wanted: by less, the more queries there are. Where no setting reaches that, the best is set,
    with a warning if it falls short of the one wanted.
    """
    source = "passages" if queries is None else "queries"
    if queries is None:
        queries = stand_ins(as_matrix(vectors[held_out], "vectors"), seed)
    else:
        queries = queries[np.sort(np.random.default_rng(seed).permutation(len(queries))[:SLICE])]
    exact = ExactNeighbours(queries, vectors, min(k, len(vectors)))
    places = exact.rows.shape[1]

    tried: list[tuple[float, float, float, dict[str, float]]] = []  # cost, recall, the one aimed at, parameters

    def reaches(setting: tuple[float, dict[str, float]]) -> bool:
        cost, parameters = setting
        set_parameters(engine, parameters)
        found = exact.recall(search_engine(engine, queries, places)[1])
        # The few recalls of a handful of queries may all be 1.
        margin = _ERRORS * max(float(found.std()), 1 - recall) / math.sqrt(len(found))
        aim = min(1.0, recall + (margin if source == "queries" else (1 - recall) * _KEPT_BACK))
        tried.append((cost, float(found.mean()), aim, parameters))
        return bool(found.mean() >= aim)

    for line in _lines(engine, places):
        cheapest = min((cost for cost, measured, aim, _ in tried if measured >= aim), default=math.inf)
        # Recall rises along a line, so that halving finds the first setting that reaches the aim.
        bisect_left([setting for setting in line if setting[0] < cheapest], True, key=reaches)
    enough = [one for one in tried if one[1] >= one[2]]
    _, measured, aim, parameters = min(enough, key=itemgetter(0)) if enough else max(tried, key=itemgetter(1))
    if measured < recall:
        coarse = parts(engine)[2] is None
        warnings.warn(
            f"recall: {recall} wanted, {measured:.4f} is the most this index reaches on {len(queries)} {source}: "
            f"{'its codes are too coarse for these vectors' if coarse else 'its graph does not lead to all vectors'}. "
            f"Name another factory, such as 'IVF{_lists_for(len(vectors))},Flat' or 'Flat', or accept less",
            stacklevel=3,
        )
    set_parameters(engine, parameters)
    found = {"parameters": parameters, "recall": recall, "aim": round(aim, 6), "measured": round(measured, 6)}
    return {**found, "k": k, "source": source, "slice": len(queries)}


def _lines(engine: Any, k: int) -> list[list[tuple[float, dict[str, float]]]]:
    """Settings with their costs, in lines of rising cost and recall; a line for each k_factor."""
    refine, ivf, graph = parts(engine)
    factors = _FACTORS if refine is not None else [0.0]
    if ivf is not None:
        a_list = _COST_LIST + _COST_CODE * ivf.ntotal / ivf.nlist
        probes = [*(step for step in _PROBES if step < ivf.nlist), ivf.nlist]
        steps: list[tuple[float, dict[str, float]]] = [(step * a_list, {"nprobe": step}) for step in probes]
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
