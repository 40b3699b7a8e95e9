"""Time of fusing two runs: `fuse`, plain and normalised, and `reciprocal_rank_fusion`, against a loop over passages.

    python recipes/benchmarks/fusion.py [--queries 1000] [--depth 1000] [--corpus 100000] [--rounds 7]

One thread. Every query has two lists of `depth` passages; half of what one list holds is in the other. All ways take
turns in every round and give the same run: the loop's result is compared with that of `fuse` first. Runs are plain
dictionaries before and after, so that the figures hold what a caller waits for. CPU time is shown beside the wall
clock's: they part where other programs compete for the cores.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tct_hf import fuse, reciprocal_rank_fusion, tune_alpha
from tct_hf.retrieval.runs import Run, rank

ALPHA = 0.1


def make_runs(queries: int, depth: int, corpus: int, seed: int) -> tuple[Run, Run]:
    generator = np.random.default_rng(seed)
    sparse: Run = {}
    dense: Run = {}
    for query in range(queries):
        ids = [f"p{row}" for row in generator.choice(corpus, depth + depth // 2, replace=False).tolist()]
        for run, names, scale in ((sparse, ids[:depth], 30.0), (dense, ids[-depth:], 90.0)):
            scores = np.sort(generator.gamma(2.0, scale / 6, depth))[::-1]
            names = [names[at] for at in generator.permutation(depth).tolist()]
            run[f"q{query}"] = dict(zip(names, scores.tolist(), strict=True))
    return sparse, dense


def loop(sparse_run: Run, dense_run: Run, alpha: float) -> Run:
    """The rule as it reads, passage by passage, ranked at the end."""
    fused: Run = {}
    for query, sparse in sparse_run.items():
        dense = dense_run[query]
        sparse_low, dense_low = min(sparse.values()), min(dense.values())
        union = sparse.keys() | dense.keys()
        scores = {name: alpha * sparse.get(name, sparse_low) + dense.get(name, dense_low) for name in union}
        fused[query] = dict(rank(scores))
    return fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=1000, help="passages a list")
    parser.add_argument("--corpus", type=int, default=100_000, help="passages that the lists are drawn from")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    sparse, dense = make_runs(args.queries, args.depth, args.corpus, seed=0)
    ways: dict[str, Callable[[], Any]] = {
        "loop over passages": lambda: loop(sparse, dense, ALPHA),
        "fuse": lambda: fuse(sparse, dense, ALPHA),
        "fuse, k=depth": lambda: fuse(sparse, dense, ALPHA, k=args.depth),
        "fuse, normalize": lambda: fuse(sparse, dense, ALPHA, normalize=True),
        "reciprocal_rank_fusion": lambda: reciprocal_rank_fusion([sparse, dense]),
    }
    found, expected = ways["fuse"](), ways["loop over passages"]()
    if found != expected or any(list(found[query]) != list(hits) for query, hits in expected.items()):
        raise SystemExit("fuse and the loop disagree")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(args.rounds):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            begun, computed = time.perf_counter(), time.process_time()
            ways[name]()
            times[name].append((time.perf_counter() - begun, time.process_time() - computed))
    print(f"{platform.machine()}, one thread; {args.queries} queries, two lists of {args.depth}, {args.rounds} rounds")
    print("| way | median s | fastest s | median CPU s |")
    print("|---|---:|---:|---:|")
    for name, measured in times.items():
        seconds, computing = zip(*measured, strict=True)
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {statistics.median(computing):.3f} |"
        )
    qrels = {query: {next(iter(hits)): 1} for query, hits in dense.items()}
    begun = time.perf_counter()
    tuned = tune_alpha(sparse, dense, qrels)
    print(f"\ntune_alpha: {time.perf_counter() - begun:.1f} s for {len(tuned.curve)} weights")


if __name__ == "__main__":
    main()
