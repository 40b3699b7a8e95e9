"""Files in the formats of MS MARCO's passage ranking task, of any collection; what an experiment on them leaves."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.models import WORDS

SPLITS = ("train", "dev", "dev.small", "dl19", "dl20")
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


def write_passage_files(
    folder: Path,
    passages: Sequence[str],
    queries: Mapping[str, Sequence[tuple[str, int]]],
    *,
    triples: int = 3,
    seed: int = 0,
) -> Path:
    """Write a collection as its publisher would.

    Args:
        folder: is made.
        passages: texts; a passage's id is its place.
        queries: of train, dev.small, and so on: text and the passage that answers it. The whole of dev has those of
            dev.small too. Those of DL also get passages of lower grades, and queries without judgements.
        triples: of each train query.
        seed: of negatives and grades.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text("".join(f"{row}\t{text}\n" for row, text in enumerate(passages)))
    numbers = iter(range(100_000, 10_000_000))
    numbered = {name: [(next(numbers), *pair) for pair in found] for name, found in queries.items()}
    numbered["dev"] = [*numbered["dev.small"], *numbered["dev"]]
    for name, found in numbered.items():
        unjudged = [(next(numbers), f"not judged {number}") for number in range(3)] if name[:2] == "dl" else []
        lines = [f"{query}\t{text}\n" for query, text in [*((q, text) for q, text, _ in found), *unjudged]]
        (folder / QUERIES[name]).write_text("".join(lines))
        if name[:2] == "dl":
            judged = [
                (query, passage, grade)
                for query, _, positive in found
                for passage, grade in {
                    **{other: draw.randint(0, 1) for other in draw.sample(range(len(passages)), 4)},
                    positive: draw.randint(2, 3),
                }.items()
            ]
            (folder / QRELS[name]).write_text("".join(f"{q} 0 {p} {grade}\n" for q, p, grade in judged))
        else:
            (folder / QRELS[name]).write_text("".join(f"{q}\t0\t{p}\t1\n" for q, _, p in found))
    rows = []
    for query, text, positive in numbered["train"]:
        for _ in range(triples):
            negative = draw.randrange(len(passages) - 1)
            rows.append((query, text, positive, negative + (negative >= positive)))
    draw.shuffle(rows)
    lines = [f"{text}\t{passages[p]}\t{passages[n]}\n" for _, text, p, n in rows]
    (folder / "triples.train.small.tsv").write_text("".join(lines))
    return folder


def write_few(folder: Path, *, passages: int = 80, train: int = 30, others: int = 6) -> Path:
    """A small one of random words; each query is a few words of its passage."""
    draw = random.Random(3)
    words = [*WORDS[4:], *(f"{a}{b}" for a in "bcdf" for b in "xyz123")]
    texts = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(passages)]

    def some(count: int) -> list[tuple[str, int]]:
        rows = [draw.randrange(passages) for _ in range(count)]
        return [(" ".join(draw.sample(texts[row].split(), 3)), row) for row in rows]

    return write_passage_files(folder, texts, {name: some(train if name == "train" else others) for name in SPLITS})


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
    for file in folder.rglob("report.json"):
        found[str(file.relative_to(folder))] = without_times(json.loads(file.read_text()))
    return found


def without_times(value: object) -> object:
    timed = re.compile("second|latency|throughput|_ms|per_s|timed|time|load_average|notes|environment|date")
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not timed.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value
