"""A collection as a run uses it: one corpus, the queries and judgements of each split, and training triples."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from tct_hf.retrieval.sparse import BM25Index

BUILTIN = "builtin"
AUTO = "auto"


@dataclass(frozen=True)
class Split:
    """Queries of a split, query id to text, and their judgements, query id to passage id to grade."""

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass
class Collection:
    """A corpus with its splits.

    Args:
        name: to be shown.
        corpus: columns id and text.
        splits: by the name of their use: "train", "test" and, where there is one, "dev".
        fingerprint: JSON-ready, says which texts and judgements results belong to.
    """

    name: str
    corpus: Dataset
    splits: dict[str, Split]
    fingerprint: dict[str, Any]
    _index: BM25Index | None = None

    def bm25(self) -> BM25Index:
        """The BM25 index of the corpus, built once."""
        if self._index is None:
            from tct_hf.retrieval.sparse import BM25Index

            self._index = BM25Index.build(self.corpus["text"], self.corpus["id"])
        return self._index

    def triples(self, *, num_negatives: int, depth: int, seed: int) -> Dataset:
        """Training triples with BM25 negatives that are no known positives; see `bm25_triples`."""
        from tct_hf.data.negatives import bm25_triples

        train = self.splits["train"]
        return bm25_triples(
            self.corpus,
            train.queries,
            train.qrels,
            num_negatives=num_negatives,
            depth=depth,
            seed=seed,
            index=self.bm25(),
        )

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(split.queries):,} {name}" for name, split in self.splits.items()]
        without = "" if "dev" in self.splits else " (no dev split)"
        return f"{self.name}: {len(self.corpus):,} passages; queries: {', '.join(parts)}{without}"


def load_collection(
    source: str, *, packages: Sequence[str] = (), test_split: str = "test", dev_split: str | None = AUTO
) -> Collection:
    """Load the built-in corpus, or a BEIR folder or Hub data set, with the splits of a training run.

    Args:
        source: "builtin", a folder or a Hub id.
        packages: of the built-in corpus.
        test_split: the split to report.
        dev_split: the split to compare models on; "auto": "dev" where the built-in corpus or the folder has it; or
            None.

    Returns:
        The collection.

    Raises:
        ValueError, FileNotFoundError: as `builtin_corpus` and `load_beir`; or dev and test are one split.
    """
    if dev_split == AUTO:
        there = source == BUILTIN or any((Path(source) / "qrels").glob("dev.tsv*"))
        dev_split = "dev" if there else None
    names = {"train": "train", "dev": dev_split, "test": test_split}
    if dev_split == test_split:
        raise ValueError(
            f"dev_split and test_split are both {test_split!r}: models must not be chosen on the queries that are "
            "reported. Name another dev_split, or none."
        )
    loaded = {use: _load(source, packages, split) for use, split in names.items() if split is not None}
    corpus = loaded["train"][0]
    splits = {use: Split(queries, qrels) for use, (_, queries, qrels) in loaded.items()}
    if source == BUILTIN:
        from tct_hf.data.builtin import builtin_fingerprint

        return Collection("built-in API docs", corpus, splits, builtin_fingerprint(packages=packages))
    return Collection(source, corpus, splits, _fingerprint(corpus, splits))


def _load(source: str, packages: Sequence[str], split: str) -> tuple[Any, dict[str, str], dict[str, dict[str, int]]]:
    if source == BUILTIN:
        from tct_hf.data.builtin import builtin_corpus

        return builtin_corpus(split, packages=packages)
    from tct_hf.data.beir import load_beir

    return load_beir(source, split)


def _fingerprint(corpus: Dataset, splits: dict[str, Split]) -> dict[str, Any]:
    digest = sha256()
    for batch in corpus.iter(1000):
        for passage_id, text in zip(batch["id"], batch["text"], strict=True):
            digest.update(f"{passage_id}\0{text}\0".encode())
    for use, split in splits.items():
        digest.update(f"{use}\0{sorted(split.queries.items())}\0{sorted(split.qrels.items())}".encode())
    counts = {use: len(split.queries) for use, split in splits.items()}
    return {"sha256": digest.hexdigest(), "passages": len(corpus), "queries": counts}
