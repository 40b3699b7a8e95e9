"""Files in the formats of MS MARCO's passage ranking task, of any collection; what an experiment on them leaves."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.models import WORDS

QUERIES = {
    "train": "queries.train.tsv",
    "dev": "queries.dev.tsv",
    "dev.small": "queries.dev.small.tsv",
    "dl19": "msmarco-test2019-queries.tsv",
    "dl20": "msmarco-test2020-queries.tsv",
}
QRELS = {
    "train": "qrels.train.tsv",
    "dev": "qrels.dev.tsv",
    "dev.small": "qrels.dev.small.tsv",
    "dl19": "2019qrels-pass.txt",
    "dl20": "2020qrels-pass.txt",
}


def write_few(folder: Path, *, passages: int = 80) -> Path:
    """A small collection of random words, as its publisher would write it; each query is a few words of its passage.

    The whole of dev has the queries of dev.small too. Those of DL also have passages of lower grades, and queries
    without judgements.
    """
    draw = random.Random(3)
    words = [*WORDS[4:], *(f"{a}{b}" for a in "bcdf" for b in "xyz123")]
    texts = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(passages)]
    rows = {name: [draw.randrange(passages) for _ in range(30 if name == "train" else 6)] for name in QUERIES}
    numbers = iter(range(100_000, 10_000_000))
    asked = {
        name: [(next(numbers), " ".join(draw.sample(texts[row].split(), 3)), row) for row in found]
        for name, found in rows.items()
    }
    asked["dev"] = [*asked["dev.small"], *asked["dev"]]
    folder.mkdir(parents=True)

    def write(name: str, lines: Iterable[tuple[Any, ...]], separator: str = "\t") -> None:
        (folder / name).write_text("".join(f"{separator.join(map(str, line))}\n" for line in lines))

    write("collection.tsv", enumerate(texts))
    for name, found in asked.items():
        queries = [(query, text) for query, text, _ in found]
        if name[:2] == "dl":
            write(QUERIES[name], [*queries, *((next(numbers), f"not judged {number}") for number in range(3))])
            lower = {query: {p: draw.randint(0, 1) for p in draw.sample(range(passages), 4)} for query, _ in queries}
            judged = [
                (query, 0, passage, grade)
                for query, _, positive in found
                for passage, grade in {**lower[query], positive: draw.randint(2, 3)}.items()
            ]
            write(QRELS[name], judged, " ")
        else:
            write(QUERIES[name], queries)
            write(QRELS[name], [(query, 0, positive, 1) for query, _, positive in found])
    triples = [
        (text, texts[positive], texts[(positive + draw.randrange(1, passages)) % passages])
        for _, text, positive in asked["train"]
        for _ in range(3)
    ]
    write("triples.train.small.tsv", draw.sample(triples, len(triples)))
    return folder


def results(folder: Path) -> dict[str, object]:
    """What must not depend on how the steps went: weights, vectors, triples, runs, figures; not what is timed."""
    kinds = (
        "*.trec",
        "model.safetensors",
        "triples.*",
        "metrics.json",
        "*.jsonl",
        "*.npy",
        "*.parquet",
        "counts.json",
    )
    found: dict[str, object] = {
        str(file.relative_to(folder)): file.read_bytes() for kind in kinds for file in folder.rglob(kind)
    }
    reports = {str(file.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("report.json")}
    return found | {name: without_times(report) for name, report in reports.items()}


def without_times(value: object) -> object:
    timed = re.compile("second|latency|throughput|_ms|per_s|timed|time|load_average|notes|environment|date")
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not timed.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value
