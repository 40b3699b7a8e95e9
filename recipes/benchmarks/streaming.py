"""Rows a second and resident memory of streamed triples, from the first row to the last.

    python recipes/benchmarks/streaming.py [--rows 5000000] [--kinds text ids parquet] [--buffer 10000]

One process, one thread. Rows like MS MARCO's (short texts) are written to a temporary folder: text triples as TSV, id
triples as TSV with a collection and queries to look them up in, text triples as parquet. Each kind is read through
`load_triples(..., streaming=True)` and its shuffle buffer in a process of its own, and every row is counted. Memory is
the process's resident set, and the part of it that is its own (anonymous: without the pages of
memory-mapped files, which the system takes back when it needs them). Growth is from 1 % to the end.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import memory_of, options, processor

KINDS = ("text", "ids", "parquet")
TEXT = "what is the of a retrieval dense passage query teacher student token index vector rank learn"
WORDS = TEXT.split()
QUERIES = 50_000
SHOWN = (0.01, 0.25, 0.5, 0.75, 1.0)


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def write(folder: Path, kind: str, rows: int, passages: int) -> None:
    draw = random.Random(0)
    if kind == "ids":
        for name, count, words in (("collection", passages, 30), ("queries", QUERIES, 6)):
            with (folder / f"{name}.tsv").open("w") as file:
                file.writelines(f"{i}\t{text(draw, words)}\n" for i in range(count))
        with (folder / "ids.tsv").open("w") as file:
            for _ in range(rows):
                positive, negative = draw.sample(range(passages), 2)
                file.write(f"{draw.randrange(QUERIES)}\t{positive}\t{negative}\n")
        return
    parts = [text(draw, 10) for _ in range(10_000)]  # drawing every word of every row would take longer than reading
    if kind == "text":
        with (folder / "text.tsv").open("w") as file:
            for i in range(rows):
                file.write(f"{i} {draw.choice(parts)}\t{draw.choice(parts)} {i}\t{draw.choice(parts)} {i} {i}\n")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("query", "positive", "negative")
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(folder / "parquet.parquet", schema) as writer:
        for start in range(0, rows, 100_000):
            count = min(100_000, rows - start)
            columns = [[f"{name} {start + i} {draw.choice(parts)}" for i in range(count)] for name in names]
            writer.write_table(pa.table(columns, schema=schema))


def memory() -> tuple[float, float]:
    """MiB resident, and of these anonymous."""
    return memory_of("VmRSS"), memory_of("RssAnon")


def measure(folder: Path, kind: str, rows: int, buffer: int) -> None:
    from tct_hf import load_triples

    path = folder / (f"{kind}.parquet" if kind == "parquet" else f"{kind}.tsv")
    texts = {"collection": folder / "collection.tsv", "queries": folder / "queries.tsv"} if kind == "ids" else {}
    stream = load_triples(path, streaming=True, cache_dir=folder / "cache", **texts)
    stream = stream.shuffle(seed=0, buffer_size=buffer)
    marks = {max(1, int(rows * share)): share for share in SHOWN}
    begun, computed, found, count = time.perf_counter(), time.process_time(), {}, 0
    for count, _ in enumerate(stream, start=1):
        if count in marks:
            found[marks[count]] = memory()
            rate = count / (time.process_time() - computed)
            print(f"  {kind}: {count:,} rows, {memory()[0]:.0f} MiB, {rate:,.0f} a CPU second", file=sys.stderr)
    seconds, computing = time.perf_counter() - begun, time.process_time() - computed
    if count != rows:
        raise SystemExit(f"{kind}: {count:,} rows of {rows:,}")
    first, last = found[SHOWN[0]], found[SHOWN[-1]]
    cells = " | ".join(f"{found[share][0]:.0f} ({found[share][1]:.0f})" for share in SHOWN)
    growth = f"{last[0] - first[0]:+.0f} ({last[1] - first[1]:+.0f})"
    size = path.stat().st_size / 2**20
    print(
        f"| {kind} | {count:,} | {size:,.0f} | {rows / seconds:,.0f} | {rows / computing:,.0f} | {cells} | {growth} |",
        flush=True,
    )


def main() -> None:
    parser = options(
        __doc__,
        rows=5_000_000,
        buffer=(10_000, "rows of the shuffle buffer"),
        passages=(200_000, "of the collection that ids are looked up in"),
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--read", help=argparse.SUPPRESS)  # a folder that was written: measure in this process
    args = parser.parse_args()
    if args.read is not None:
        measure(Path(args.read), args.kinds[0], args.rows, args.buffer)
        return
    print(f"{processor()}, one thread; shuffle buffer of {args.buffer:,} rows; MiB resident (own)")
    print("| kind | rows | file MiB | rows/s | rows a CPU s | 1 % | 25 % | 50 % | 75 % | 100 % | growth |")
    print("|---" + "|---:" * 10 + "|", flush=True)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), kind, args.rows, args.passages)
            words = ["--read", folder, "--kinds", kind, "--rows", str(args.rows), "--buffer", str(args.buffer)]
            subprocess.run([sys.executable, __file__, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
