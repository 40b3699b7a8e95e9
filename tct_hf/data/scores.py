"""Scores of (query, passage) pairs by id, as distillation sets hold them: read once, then looked up on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from tct_hf.cache import prepared
from tct_hf.data.file_sources import LineSource, Source
from tct_hf.data.ids import find, hash_of
from tct_hf.data.rows import NUMBER, BadRow, as_id, as_score, first_lines, get, is_header, there_are
from tct_hf.data.sources import of_pairs, open_source

if TYPE_CHECKING:
    from datasets import Dataset

# What `ScoreTable.open` takes.
ScoreSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Mapping[str, float]]]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 3
_FILES = ("keys", "scores")  # sorted, unsigned 64 bits; float32
_FIELDS = ("query_id", "passage_id", "score")
# What published sets call them.
_NAMES = {
    "query_id": ("query_id", "query-id", "qid", "query"),
    "passage_id": (
        *("passage_id", "corpus_id", "corpus-id", "doc_id", "document_id", "docid", "pid", "passage"),
        *("passage_ids", "corpus_ids", "doc_ids", "document_ids", "docids", "pids"),
    ),
    "score": ("score", "scores", "label"),
}


def pair_key(query_id: str, passage_id: str) -> int:
    """What a pair of ids is known by: 64 bits. Two pairs of 100 million share one with a probability of 1 in 3,700."""
    return hash_of(f"{len(query_id)} {query_id}{passage_id}")


class ScoreTable:
    """Scores by query and passage id: 12 bytes a pair, memory-mapped."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._arrays: list[np.ndarray] | None = None

    @classmethod
    def open(cls, source: ScoreSource, *, cache_dir: str | Path | None = None) -> ScoreTable:
        """Read and check a table once for each content; later calls find it prepared.

        Args:
            source: a file of rows (query id, passage id, score): .parquet, JSONL, or TSV with or without a header; a
                Hub id "owner/name:configuration:split"; a data set; or {query id: {passage id: score}}. A row may
                also hold lists of passage ids and their scores.
            cache_dir: where the prepared form is kept; by default `default_cache_dir()`.
        """
        opened: Source
        if isinstance(source, Mapping):
            opened = of_pairs(source, "scores", _FIELDS)
        else:
            opened = open_source(source, "scores", _open_tsv)
        folder = prepared("scores", [_FORMAT, opened.need_key()], lambda staging: _build(staging, opened), cache_dir)
        return cls(opened.name, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a memory map would be copied into every worker

    def _open(self) -> list[np.ndarray]:
        self._arrays = self._arrays or [np.load(self.folder / f"{one}.npy", mmap_mode="r") for one in _FILES]
        return self._arrays

    def get(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """The score of each (query id, passage id); None where there is none."""
        keys, scores = self._open()
        at, found = find(keys, (pair_key(*pair) for pair in pairs))
        return [float(score) if there else None for score, there in zip(scores[at], found, strict=True)]


def _open_tsv(path: Path) -> LineSource:
    """Lines of query id, passage id and score; by a header's own order where it has the usual names."""
    first = next(iter(first_lines(path)), [""])
    header = NUMBER.fullmatch(first[-1]) is None and is_header(first, unlike=True)
    usual = header and all(any(name in first for name in names) for names in _NAMES.values())
    return LineSource(path, first if usual else _FIELDS, header=header)


def _pairs(source: Source) -> Iterator[tuple[int, float]]:
    """Key and score of each pair of a source's rows, of which the first says which of the usual names it has."""
    columns: list[str] = []

    def read(row: Mapping[str, Any]) -> list[tuple[int, float]]:
        if not columns:
            columns.extend(_column(source.name, list(row), names) for names in _NAMES.values())
        query, passages, scores = (get(row, name) for name in columns)
        query_id = as_id(query, columns[0])
        lists = [isinstance(value, (list, tuple)) for value in (passages, scores)]
        if lists[0] != lists[1]:
            raise BadRow("mixed types", "{1!r} and {2!r} must both be lists, or both single values".format(*columns))
        if not lists[0]:
            passages, scores = [passages], [scores]
        if len(passages) != len(scores):
            counts = f"{len(passages)} passages in {columns[1]!r} but {len(scores)} scores in {columns[2]!r}"
            raise BadRow("different lengths", f"{counts} of query {query_id!r}: give one each")
        found = []
        for passage, score in zip(passages, scores, strict=True):
            passage_id = as_id(passage, columns[1])
            what = f"passage {passage_id!r} of query {query_id!r}"
            found.append((pair_key(query_id, passage_id), as_score(score, what, columns[2])))
        return found

    return chain.from_iterable(found for _, found in source.read(read))


def _column(source: str, there: Sequence[str], names: Sequence[str]) -> str:
    found = next((name for name in names if name in there), None)
    if found is None:
        raise ValueError(f"{source}: column {names[0]!r} is missing ({there_are(there)}); name it so")
    return found


def _build(staging: Path, source: Source) -> None:
    """Sort by key, in 20 bytes of memory a pair."""
    pairs = np.fromiter(_pairs(source), dtype=[("key", "<u8"), ("score", "<f4")])
    if not len(pairs):
        raise ValueError(f"{source.name}: it holds no score; check the file")
    keys, first = np.unique(pairs["key"], return_index=True)
    scores = pairs["score"][first]
    its = scores[np.searchsorted(keys, pairs["key"])]
    if (differ := its != pairs["score"]).any():
        at = int(differ.argmax())
        both = f"{float(its[at]):g} and {float(pairs['score'][at]):g}"
        what = "a pair of query and passage comes twice with different scores, such as"
        raise ValueError(f"{source.name}: {what} {both}; keep one of them")
    np.save(staging / "keys.npy", keys)
    np.save(staging / "scores.npy", scores)
