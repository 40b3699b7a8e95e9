"""The index that "auto" chooses against exact search: latency, recall, bytes a vector.

    python recipes/benchmarks/search.py [--count 1000000] [--queries 500] [--work DIR] [--factory auto] [--peers ...]

One thread, one query at a time through `DenseIndex.search`, both indexes saved, loaded from disk and searched in turn
in one run. Recall@100 is counted against exact search over all queries. Bytes a vector on disk are all files of the
index folder, passage ids and settings too; in memory, the private memory that loading takes. Latencies are CPU times:
other programs on the machine lengthen them by crowding the caches, but not by taking the core.

--peers HNSW32 IVF1024,Flat takes turns with Faiss indexes made without this package: `index_factory`, train, add,
search, rows instead of ids; at Faiss's own nprobe or efSearch, and at the first power of two that reaches recall 0.97.

The vectors are made up, but after a real student: a 6-layer, 384-dimension student in TCT encoding, trained by the
quickstart, over the 13,447 single-sentence passages of a question-answering collection and 3,000 of its questions.
What was measured there, and what `World` gives for as many vectors (`--compare` prints it):

                                                     student          World
    length of passages, mean and deviation           6.19, 0.54       6.19, 0.54
    length of queries                                5.31, 0.38       5.31, 0.38
    length of the mean passage, of the mean query    2.91, 2.98       2.93, 3.51
    cosine of those two                              0.70             0.70
    dimensions that count, (sum l)^2 / sum l^2,
      of passages, of queries                        100, 66          80, 66
    distance from 64 k-means centres, squared,
      relative to the variance; from 256             0.76, 0.68       0.75, 0.58
    exact top 100 of a query in the nearest
      8, 16, 32, 64 of 256 clusters                  .68 .79 .88 .95  .67 .78 .88 .95

Queries are no passages: another mean, other directions, other noise. The index is tuned on what `DenseIndex` makes of
held-out passages; with --train-queries N on N queries whose mean is another than that of the queries searched with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from common import clocked, give_back, memory_of, options, table

DIMENSION = 384
K = 100
BLOCK = 65_536


class World:
    """Topics and subtopics in a space whose axes count unequally, away from the origin; queries elsewhere."""

    topics, subtopics = 100, 2200
    shares = (0.31, 0.34, 0.35)  # of the variance: between topics, between subtopics, within
    passage_length, query_length = (6.19, 0.54), (5.31, 0.38)  # mean, deviation
    passage_mean, query_mean, cosine_of_means = 2.91, 2.98, 0.70
    relevance, query_noise = 0.53, 0.33  # how much of a passage is in its query, and what else is

    def __init__(self, seed: int = 0, dimension: int = DIMENSION) -> None:
        draw = np.random.default_rng(seed)
        self.dimension = dimension
        self.axes = np.linalg.qr(draw.standard_normal((dimension, dimension)))[0].astype(np.float32)
        variance = (np.arange(dimension) + 14.0) ** -1.38
        self.deviation = np.sqrt(variance / variance.sum()).astype(np.float32)
        self.query_deviation = self.deviation**1.35
        self.query_deviation /= np.linalg.norm(self.query_deviation)
        between, among, self.within = (np.float32(np.sqrt(share)) for share in self.shares)
        topics = self._normal(draw, self.topics) * between
        self.centres = topics[draw.integers(self.topics, size=self.subtopics)]
        self.centres += self._normal(draw, self.subtopics) * among
        self.sizes = draw.dirichlet(np.full(self.subtopics, 0.7))
        self.mean, other = np.linalg.qr(draw.standard_normal((dimension, 2)))[0].T.astype(np.float32)
        self.away = self.cosine_of_means * self.mean + np.float32(np.sqrt(1 - self.cosine_of_means**2)) * other
        self.spread = np.float32(np.sqrt(self.passage_length[0] ** 2 - self.passage_mean**2))

    def _normal(self, draw: np.random.Generator, rows: int) -> np.ndarray:
        return draw.standard_normal((rows, self.dimension), dtype=np.float32) * self.deviation

    @staticmethod
    def _with_lengths(draw: np.random.Generator, rows: np.ndarray, length: tuple[float, float]) -> np.ndarray:
        mean, deviation = length
        wanted = draw.normal(mean, deviation, len(rows)).clip(mean - 4 * deviation, mean + 6 * deviation)
        return (rows * (wanted / np.linalg.norm(rows, axis=1))[:, None]).astype(np.float32)

    def passages(self, rows: int, draw: np.random.Generator) -> np.ndarray:
        chosen = self.centres[draw.choice(self.subtopics, rows, p=self.sizes)]
        deviations = (chosen + self._normal(draw, rows) * self.within) @ self.axes
        return self._with_lengths(draw, self.passage_mean * self.mean + self.spread * deviations, self.passage_length)

    def queries(
        self, relevant: np.ndarray, draw: np.random.Generator, *, mean: np.ndarray | None = None
    ) -> np.ndarray:
        noise = draw.standard_normal(relevant.shape, dtype=np.float32) * self.query_deviation
        rows = self.query_mean * (self.away if mean is None else mean)
        rows = rows + self.relevance * (relevant - self.passage_mean * self.mean)
        return self._with_lengths(draw, rows + self.query_noise * self.spread * (noise @ self.axes), self.query_length)


def make_vectors(path: Path, count: int, world: World) -> None:
    """Write the passage vectors block by block, aside and renamed."""
    aside = path.with_suffix(".tmp.npy")
    out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(count, world.dimension))
    for number, start in enumerate(range(0, count, BLOCK)):
        rows = min(BLOCK, count - start)
        out[start : start + rows] = world.passages(rows, np.random.default_rng([1, number]))
    out.flush()
    del out
    aside.replace(path)


class Plain:
    """A Faiss index as its user would make it, with its own search parameters or one value of them."""

    def __init__(self, factory: str, vectors: np.ndarray) -> None:
        import faiss

        self.factory, (self._engine, seconds) = factory, clocked(self._made, factory, vectors)
        self.build_s, self.parameters = round(seconds[1], 1), dict[str, int]()
        self.graph = isinstance(faiss.downcast_index(self._engine), faiss.IndexHNSW)
        self.bytes = faiss.serialize_index(self._engine).nbytes

    @staticmethod
    def _made(factory: str, vectors: np.ndarray) -> Any:
        import faiss

        engine = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        engine.train(np.ascontiguousarray(vectors[:: max(1, len(vectors) // 200_000)]))
        for start in range(0, len(vectors), BLOCK):
            engine.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
        return engine

    def at(self, value: int) -> Plain:
        other = copy(self)
        other.parameters = {"efSearch" if self.graph else "nprobe": value}
        return other

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        kind = faiss.SearchParametersHNSW if self.graph else faiss.SearchParametersIVF
        scores, rows = self._engine.search(queries, k, params=kind(**self.parameters) if self.parameters else None)
        return rows, scores


def recall_of(index: Any, queries: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Recall@K `(queries,)`, one query at a time."""
    found = [np.asarray(index.search(query[None], K)[0][0], dtype=np.int64) for query in queries]
    return np.array([np.isin(best, mine).mean() for mine, best in zip(found, exact, strict=True)])


def peers(factories: list[str], vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> dict[str, Plain]:
    """The sides of `--peers`."""
    sides: dict[str, Plain] = {}
    for factory in factories:
        sides[f"Faiss {factory}"] = plain = Plain(factory, vectors)
        value = 1
        while recall_of(plain.at(value), queries, exact).mean() < 0.97 and value < 4096:
            value *= 2
        sides[f"Faiss {factory}, set by hand"] = plain.at(value)
    return sides


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{at}_ms": round(float(np.percentile(seconds, at)) * 1e3, 3) for at in (50, 95)}


def take_turns(
    sides: dict[str, Any], queries: np.ndarray, steps: dict[str, int]
) -> tuple[dict[str, list[float]], float]:
    """Time single queries, a few of one side and then a few of the other, until each of the first side's is done.

    Also returns the part of the time for which this process had a core: below 1 on a busy machine, which delays long
    searches and leaves short ones alone.
    """
    import faiss

    times: dict[str, list[float]] = {name: [] for name in sides}
    started, used = time.perf_counter(), time.process_time()
    at = dict.fromkeys(sides, 0)
    first = next(iter(sides))
    while at[first] < len(queries):
        for name, index in sides.items():
            for turn in range(steps[name] + 1):
                query = queries[at[name] % len(queries)][None]
                _, (_, taken) = clocked(index.search, query, K)
                if turn:  # the first after a change of sides finds the other's data in the caches
                    times[name].append(taken)
                    at[name] += 1
            assert faiss.omp_get_max_threads() == 1, "more than one thread"
    return times, (time.process_time() - used) / (time.perf_counter() - started)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import faiss

    from tct_hf import DenseIndex

    faiss.omp_set_num_threads(1)
    world = World()
    path = work / f"vectors-{args.count}.npy"
    if not path.is_file():
        make_vectors(path, args.count, world)
    vectors = np.load(path, mmap_mode="r")
    ids = [str(row) for row in range(args.count)]
    draw = np.random.default_rng(2)
    queries = world.queries(vectors[np.sort(draw.choice(args.count, args.queries, replace=False))], draw)
    tuned_on = None
    if args.train_queries:
        # A third of the way back to the passages' mean, and another draw: training questions are not test questions.
        mean = (2 * world.away + world.mean) / np.linalg.norm(2 * world.away + world.mean)
        draw = np.random.default_rng(3)
        relevant = vectors[np.sort(draw.choice(args.count, args.train_queries, replace=False))]
        tuned_on = world.queries(relevant, draw, mean=mean)

    built: dict[str, dict[str, Any]] = {}
    sides: dict[str, Any] = {}
    for name, factory in (("auto", args.factory), ("Flat", "Flat")):
        begun = time.process_time()
        index = DenseIndex.build(vectors, ids, factory, query_vectors=tuned_on, threads=1)
        index.save(work / f"{name}-{args.count}")
        built[name] = {"factory": index.factory, "parameters": index.parameters, "tuning": index.tuning}
        built[name]["build_s"] = round(time.process_time() - begun, 1)
        print(f"{name}: {built[name]}", flush=True)
        del index
        give_back()  # so that loading can't take it
        before = memory_of("RssAnon")
        sides[name], (seconds, _) = clocked(DenseIndex.load, work / f"{name}-{args.count}")
        built[name]["load_s"] = round(seconds, 2)
        built[name]["memory_bytes_a_vector"] = round((memory_of("RssAnon") - before) * 2**20 / args.count, 1)
        disk = sum(file.stat().st_size for file in (work / f"{name}-{args.count}").iterdir())
        built[name]["disk_bytes_a_vector"] = round(disk / args.count, 1)

    exact = np.array([[int(name) for name in found] for found in sides["Flat"].search(queries, K)[0]])
    for name, plain in peers(args.peers, vectors, queries, exact).items():
        sides[name], size = plain, round(plain.bytes / args.count, 1)
        built[name] = {"factory": name, "parameters": plain.parameters, "build_s": plain.build_s}
        built[name] |= {"disk_bytes_a_vector": size, "memory_bytes_a_vector": size}
    times, share = take_turns(sides, queries, {"Flat": 5, **{name: 50 for name in sides if name != "Flat"}})
    for name, index in sides.items():
        recall = recall_of(index, queries, exact)
        built[name] |= {**percentiles(times[name]), "timed": len(times[name])}
        built[name] |= {"recall": round(float(recall.mean()), 4), "p5": round(float(np.percentile(recall, 5)), 4)}
        built[name]["times_faster"] = round(float(np.median(times["Flat"]) / np.median(times[name])), 1)
    return {
        "machine": f"{platform.machine()}, Faiss {faiss.__version__} {faiss.get_compile_options().strip()}, 1 thread",
        "share_of_a_core": round(share, 3),
        "count": args.count,
        "queries": args.queries,
        "sides": built,
    }


def compare(count: int = 13_447) -> None:
    """Print of the made-up vectors what the head of this file states."""
    import faiss

    faiss.omp_set_num_threads(1)
    world, draw = World(), np.random.default_rng(1)
    passages = world.passages(count, draw)
    queries = world.queries(passages[draw.choice(count, 1000)], draw)
    for name, rows in (("passages", passages), ("queries", queries)):
        lengths, values = np.linalg.norm(rows, axis=1), np.linalg.eigvalsh(np.cov(rows.T))
        print(f"{name}: length {lengths.mean():.2f}, {lengths.std():.2f}; mean {np.linalg.norm(rows.mean(0)):.2f}")
        print(f"  dimensions that count {values.sum() ** 2 / (values**2).sum():.0f}")
    means = passages.mean(0), queries.mean(0)
    print(f"cosine of means {means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]):.2f}")
    variance = ((passages - means[0]) ** 2).sum(1).mean()
    for centres in (64, 256):
        plain = faiss.Kmeans(DIMENSION, centres, niter=15, seed=1)
        plain.train(passages)
        print(f"distance from {centres} centres {plain.index.search(passages, 1)[0].mean() / variance:.2f}")
    clusters = faiss.Kmeans(DIMENSION, 256, niter=10, seed=7, spherical=True)
    clusters.train(passages)
    _, exact = faiss.knn(queries, passages, K, metric=faiss.METRIC_INNER_PRODUCT)
    home = clusters.index.search(passages, 1)[1][:, 0][exact]
    for probes in (8, 16, 32, 64):
        probed = clusters.index.search(queries, probes)[1]
        share = np.mean([np.isin(mine, near).mean() for mine, near in zip(home, probed, strict=True)])
        print(f"top {K} in the nearest {probes} of 256: {share:.3f}")


def main() -> None:
    parser = options(
        __doc__,
        count=(1_000_000, "passage vectors"),
        queries=500,
        factory=("auto", "Faiss factory string of the index compared with Flat"),
    )
    parser.add_argument("--train-queries", type=int, default=0, help="tune on so many queries instead of passages")
    parser.add_argument("--peers", nargs="*", default=[], help="Faiss factory strings of indexes beside it")
    parser.add_argument("--work", type=Path, help="folder for vectors and indexes; a temporary one when left out")
    parser.add_argument("--compare", action="store_true", help="only show what the vectors are like")
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # read when Faiss is loaded
    if args.compare:
        compare()
        return
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        figures = measure(args, work)
    print(json.dumps(figures, indent=1))
    rows = []
    for side in figures["sides"].values():
        recall = f"{side['recall']} ({side['p5']})"
        latency = f"{side['p50_ms']} / {side['p95_ms']}"
        size = f"{side['disk_bytes_a_vector']} / {side['memory_bytes_a_vector']}"
        what = f"{side['factory']} {json.dumps(side['parameters'])}"
        rows.append([f"{args.count:,}", what, recall, latency, f"{side['times_faster']}x", size, side["build_s"]])
    head = "vectors | index | Recall@100 (5th percentile) | p50 / p95 ms | faster | B a vector on disk / in memory"
    table(f"{head} | build s", rows)
    if figures["share_of_a_core"] < 0.97:
        print(f"The machine was busy: {figures['share_of_a_core']:.0%} of a core was left for this.")


if __name__ == "__main__":
    main()
