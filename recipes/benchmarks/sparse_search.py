"""`SparseIndex` against scipy's sparse product: latency of exact search, one thread, one query at a time.

    OMP_NUM_THREADS=1 python recipes/benchmarks/sparse_search.py [--count 100000] [--queries 300]

Two draws of terms over a vocabulary of 30,522: every term alike, and by Zipf's law (the term of rank r in proportion
to 1 / (r + 10)), where the commonest are in three quarters of the passages and queries ask for them as often. Weights
are gamma distributed. The index is saved, loaded from disk mapped, and searched through `SparseIndex.search`, ids
included; scipy multiplies the query by the transposed passages (CSR by term, its fastest way) and numpy picks and
sorts the best 100. Both take every query in turn; every answer is compared, scores bit by bit. Wall and CPU time of
each query: on a busy machine they part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Clocks, clocked, options, processor, table
from scipy.sparse import csr_matrix

from tct_hf import SparseIndex

VOCABULARY = 30_522
K = 100


def draw(rows: int, nonzeros: int, law: str, generator: np.random.Generator, order: np.ndarray) -> csr_matrix:
    """Vectors of so many distinct terms each, drawn one after the other."""
    ranks = np.arange(VOCABULARY)
    share = np.ones(VOCABULARY) if law == "uniform" else 1 / (ranks + 10)
    bounds = np.cumsum(share / share.sum())
    terms = np.empty((rows, nonzeros), np.int32)
    for row in range(rows):
        found = np.zeros(0, np.int64)
        while len(found) < nonzeros:
            found = np.concatenate([found, np.searchsorted(bounds, generator.random(3 * nonzeros))])
            found = found[np.sort(np.unique(found, return_index=True)[1])]
        terms[row] = np.sort(order[np.minimum(found[:nonzeros], VOCABULARY - 1)])
    weights = generator.gamma(1.5, 0.4, terms.size).astype(np.float32) + 0.01
    return csr_matrix((weights, terms.ravel(), np.arange(rows + 1) * nonzeros), shape=(rows, VOCABULARY))


def by_scipy(query: csr_matrix, by_term: csr_matrix, ids: np.ndarray) -> tuple[list[str], np.ndarray]:
    found = query @ by_term
    rows, scores = found.indices, found.data
    if len(rows) > K:
        # All that equal the last one kept come along, for the ids to decide among.
        kept = scores >= np.partition(scores, -K)[-K]
        rows, scores = rows[kept], scores[kept]
    best = np.lexsort((rows, -scores))[:K]
    return ids[rows[best]].tolist(), scores[best]


def percentiles(times: list[Clocks], clock: int) -> str:
    return "{:.2f} / {:.2f}".format(*1000 * np.percentile([taken[clock] for taken in times], [50, 95]))


def measure(law: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    order = generator.permutation(VOCABULARY)
    passages = draw(args.count, args.nonzeros, law, generator, order)
    queries = draw(args.queries, args.terms, law, generator, order)
    names = [f"p{row:08d}" for row in range(args.count)]  # in the order of rows, so that ties are broken alike
    built, (seconds, _) = clocked(SparseIndex.build, passages, names)
    built.save(work / law)
    index = SparseIndex.load(work / law, mmap=True)
    by_term, ids = passages.T.tocsr(), np.array(names)
    ways = {
        "SparseIndex": lambda query: tuple(part[0] for part in index.search(query, K)),
        "scipy": lambda query: by_scipy(query, by_term, ids),
    }
    times: dict[str, list[Clocks]] = {name: [] for name in ways}
    for warm_up in range(10):
        for way in ways.values():
            way(queries[warm_up])
    different = 0
    for number in range(args.queries):
        answers = []
        for name in list(ways)[:: 1 if number % 2 else -1]:
            answer, taken = clocked(ways[name], queries[number])
            answers.append(answer)
            times[name].append(taken)
        (ids_a, scores_a), (ids_b, scores_b) = answers
        different += ids_a != ids_b or not np.array_equal(scores_a, scores_b)
    lengths = np.bincount(passages.indices, minlength=VOCABULARY)
    return {
        "law": law,
        "postings_a_query": int(lengths[queries.indices].sum() / args.queries),
        "longest_list": int(lengths.max()),
        "build_s": round(seconds, 2),
        "bytes_a_passage": round(sum(f.stat().st_size for f in (work / law).iterdir()) / args.count, 1),
        "wall_ms": {name: percentiles(taken, 0) for name, taken in times.items()},
        "cpu_ms": {name: percentiles(taken, 1) for name, taken in times.items()},
        "answers_that_differ": different,
    }


def main() -> None:
    args = options(
        __doc__,
        count=100_000,
        queries=300,
        nonzeros=(110, "terms of a passage"),
        terms=(25, "terms of a query"),
    ).parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        found = [measure(law, args, Path(work)) for law in ("uniform", "zipf")]
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average": [round(before, 1), round(os.getloadavg()[0], 1)],
        "python": platform.python_version(),
    }
    print(json.dumps({"settings": vars(args), "machine": machine, "measured": found}, indent=1))
    rows = []
    for one in found:
        for way, wall in one["wall_ms"].items():
            own = [one["answers_that_differ"], one["bytes_a_passage"]] if way == "SparseIndex" else ["", ""]
            rows.append([one["law"], f"{one['postings_a_query']:,}", way, wall, one["cpu_ms"][way], *own])
    table("terms | postings a query | way | p50 / p95 ms | CPU p50 / p95 ms | answers that differ | B a passage", rows)


if __name__ == "__main__":
    main()
