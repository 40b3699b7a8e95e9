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
from tct_hf.data.rows import BadRow, as_id, as_score, first_lines, get, is_header, plain, shown, there_are
from tct_hf.data.sources import MappingSource, open_source

if TYPE_CHECKING:
    from datasets import Dataset

# What `ScoreTable.open` takes.
ScoreSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Mapping[str, float]]]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 3
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
    """Scores by query and passage id: 12 bytes a pair, memory-mapped.

    Args:
        name: for messages.
        folder: the prepared form, `keys.npy` (sorted, unsigned 64 bits) and `scores.npy` (float32).
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(
        cls,
        source: ScoreSource,
        *,
        columns: Mapping[str, str] | None = None,
        cache_dir: str | Path | None = None,
    ) -> ScoreTable:
        """Read and check a table once for each content, in constant memory; later calls find it prepared.

        Args:
            source: a file of rows (query id, passage id, score): .parquet, JSONL, or TSV with or without a header
                (the last two plain or .gz); a Hub id "owner/name", "owner/name:configuration" or
                "owner/name:configuration:split"; a data set; or {query id: {passage id: score}}. A row may also hold
                lists of passage ids and their scores.
            columns: query_id, passage_id and score to the source's names, where it has others than the usual ones.
            cache_dir: where the prepared form is kept; by default `default_cache_dir()`.

        Raises:
            FileNotFoundError: no such file or Hub data set.
            ValueError: a pickle, a row with a missing, misaligned or not finite score, a pair that comes twice with
                different scores, or no score at all; with the row, the query id and the fix.
            OSError: the cache can't be written, or the Hub not be reached.
        """
        opened: Source
        if isinstance(source, Mapping):
            opened = MappingSource(lambda: _of_mapping(source), "scores")
        else:
            opened = open_source(source, "scores", _open_tsv)
        key = [_FORMAT, opened.need_key(), sorted((columns or {}).items())]
        folder = prepared("scores", key, lambda staging: _build(staging, opened, columns or {}), cache_dir)
        return cls(opened.name, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a memory map would be copied into every worker

    def __len__(self) -> int:
        return len(self._open_arrays()[0])

    def _open_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self._arrays is None:
            keys, scores = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("keys", "scores"))
            self._arrays = keys, scores
        return self._arrays

    def get(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """The score of each (query id, passage id); None where there is none."""
        keys, scores = self._open_arrays()
        at, found = find(keys, (pair_key(*pair) for pair in pairs))
        return [float(score) if there else None for score, there in zip(scores[at], found, strict=True)]


def _of_mapping(scores: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    for query_id, of_query in scores.items():
        if not isinstance(of_query, Mapping):
            raise ValueError(
                f"scores (query {query_id!r}): holds {shown(of_query)} where {{passage id: score}} is needed"
            )
        values = [plain(score) for score in of_query.values()]
        yield {"query_id": query_id, "passage_id": list(of_query), "score": values}


def _open_tsv(path: Path) -> LineSource:
    """Lines of query id, passage id and score; by a header's own order where it has the usual names."""
    first = next(iter(first_lines(path)), [""])
    header = isinstance(_number(first[-1]), str) and is_header(first, unlike=True)
    usual = header and all(any(name in first for name in names) for names in _NAMES.values())
    return LineSource(path, first if usual else _FIELDS, header=header)


class _Reader:
    """Pairs and scores of a source's rows, of which the first says which of the usual names it has."""

    def __init__(self, source: Source, columns: Mapping[str, str]) -> None:
        self.source, self.columns = source, columns
        self.names: list[str] | None = None
        if unknown := sorted(columns.keys() - set(_FIELDS)):
            raise ValueError(f"columns: {unknown[0]!r} is no field of a score table: name {', '.join(_FIELDS)}")

    def _name(self, there: Sequence[str], ours: str) -> str:
        wanted = (self.columns[ours],) if ours in self.columns else _NAMES[ours]
        for name in wanted:
            if name in there:
                return name
        fix = f"name it with columns={{{ours!r}: ...}}"
        raise ValueError(f"{self.source.name}: column {wanted[0]!r} is missing ({there_are(there)}); {fix}")

    def __call__(self, row: Mapping[str, Any]) -> list[tuple[int, float]]:
        """Key and score of each pair of a row."""
        if self.names is None:
            self.names = [self._name(list(row), ours) for ours in _FIELDS]
        query, passages, scores = (get(row, name) for name in self.names)
        query_id = as_id(query, self.names[0])
        lists = [isinstance(value, (list, tuple)) for value in (passages, scores)]
        _, of_passages, of_scores = map(repr, self.names)
        if lists[0] != lists[1]:
            raise BadRow("mixed types", f"{of_passages} and {of_scores} must both be lists, or both single values")
        if not lists[0]:
            passages, scores = [passages], [scores]
        if len(passages) != len(scores):
            counts = f"{len(passages)} passages in {of_passages} but {len(scores)} scores in {of_scores}"
            raise BadRow("different lengths", f"{counts} of query {query_id!r}: give one each")
        found = []
        for passage, score in zip(passages, scores, strict=True):
            passage_id = as_id(passage, self.names[1])
            if self.source.only_text:
                score = _number(score)
            what = f"passage {passage_id!r} of query {query_id!r}"
            found.append((pair_key(query_id, passage_id), as_score(score, what, self.names[2])))
        return found


def _number(text: str) -> Any:
    # float() takes 1_0, blanks and the digits of other scripts, too.
    try:
        return float(text) if text.isascii() and "_" not in text and text == text.strip() else text
    except ValueError:
        return text


def _build(staging: Path, source: Source, columns: Mapping[str, str]) -> None:
    """Sort by key, in 20 bytes of memory a pair."""
    pairs_of = chain.from_iterable(found for _, found in source.read(_Reader(source, columns)))
    pairs = np.fromiter(pairs_of, dtype=[("key", "<u8"), ("score", "<f4")])
    if not len(pairs):
        raise ValueError(f"{source.name}: it holds no score; check the file")
    keys, first = np.unique(pairs["key"], return_index=True)
    scores = pairs["score"][first]
    its = scores[np.searchsorted(keys, pairs["key"])]
    if (differ := its != pairs["score"]).any():
        at = int(differ.argmax())
        raise ValueError(
            f"{source.name}: a pair of query and passage comes twice with different scores, such as "
            f"{float(its[at]):g} and {float(pairs['score'][at]):g}; keep one of them"
        )
    np.save(staging / "keys.npy", keys)
    np.save(staging / "scores.npy", scores)
