"""Time of fusing two runs: `fuse`, plain and normalised, and `reciprocal_rank_fusion`, against a loop over passages.

    python recipes/benchmarks/fusion.py [--queries 1000] [--depth 1000] [--corpus 100000] [--rounds 7]

One thread. Every query has two lists of `depth` passages; half of what one list holds is in the other. All ways take
turns in every round and give the same run: the loop's result is compared with that of `fuse` first. Runs are plain
dictionaries before and after, so that the figures hold what a caller waits for. CPU time is shown beside the wall
clock's: they part where other programs compete for the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import median, options, processor, table, take_turns

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
    args = options(
        __doc__,
        queries=1000,
        depth=(1000, "passages a list"),
        corpus=(100_000, "passages that the lists are drawn from"),
        rounds=7,
    ).parse_args()
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
    times, _ = take_turns(ways, args.rounds)
    print(f"{processor()}, one thread; {args.queries} queries, two lists of {args.depth}, {args.rounds} rounds")
    cells = ([median(taken), min(taken)[0], median(taken, 1)] for taken in times.values())
    rows = ([name, *(f"{one:.3f}" for one in row)] for name, row in zip(times, cells, strict=True))
    table("way | median s | fastest s | median CPU s", rows)
    qrels = {query: {next(iter(hits)): 1} for query, hits in dense.items()}
    begun = time.perf_counter()
    tuned = tune_alpha(sparse, dense, qrels)
    print(f"\ntune_alpha: {time.perf_counter() - begun:.1f} s for {len(tuned.curve)} weights")


if __name__ == "__main__":
    main()
