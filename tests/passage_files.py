"""Files in the formats of MS MARCO's passage ranking task, of any collection."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
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
    """A small collection of random words; each query is a few words of its passage."""
    draw = random.Random(3)
    words = [*WORDS[4:], *(f"{a}{b}" for a in "bcdf" for b in "xyz123")]
    texts = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(passages)]
    parts = {}
    for name in QUERIES:
        rows = [draw.randrange(passages) for _ in range(30 if name == "train" else 6)]
        parts[name] = [(" ".join(draw.sample(texts[row].split(), 3)), row) for row in rows]
    return write_passage_files(folder, texts, parts)


def write_passage_files(
    folder: Path, texts: Sequence[str], parts: Mapping[str, Sequence[tuple[str, int]]], *, triples: int = 3
) -> Path:
    """A collection as its publisher would write it, of queries by split, each with the row of its passage.

    The whole of dev has the queries of dev.small too. Those of DL also have passages of lower grades, and queries
    without judgements. Each train query has some `triples`.
    """
    draw, passages, numbers = random.Random(3), len(texts), iter(range(100_000, 10_000_000))
    asked = {name: [(next(numbers), text, row) for text, row in found] for name, found in parts.items()}
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
    made = [
        (text, texts[positive], texts[(positive + draw.randrange(1, passages)) % passages])
        for _, text, positive in asked["train"]
        for _ in range(triples)
    ]
    write("triples.train.small.tsv", draw.sample(made, len(made)))
    return folder
