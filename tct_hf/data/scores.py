"""Scores of (query, passage) pairs by id, as distillation sets hold them: read once, then looked up on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.data.rows import BadRow, byte_lines, shown, there_are
from tct_hf.data.sources import LineSource, Source, open_source

if TYPE_CHECKING:
    from datasets import Dataset

# What `ScoreTable.open` takes.
ScoreSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, Mapping[str, float]]]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 2
_FLOAT32_MAX = 3.4028234663852886e38
_ROWS_A_BLOCK = 100_000
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
    named = f"{len(query_id)} {query_id}{passage_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(named, digest_size=8).digest(), "big")


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
        cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        if isinstance(source, Mapping):
            name, digest = "scores (a mapping)", sha256()
            for row in _mapped(source, name):
                digest.update(json.dumps(row).encode())
            key = list[Any](["mapping", digest.hexdigest()])
            rows: Any = lambda: _mapped(source, name)  # noqa: E731
        else:
            opened = open_source(source, "scores", lambda path: LineSource(path, _FIELDS, header=_has_header(path)))
            if opened.key is None:
                raise ValueError(f"{opened.name}: an IterableDataset, which can't be looked up by id: give a Dataset.")
            name, key = opened.name, [opened.key, sorted((columns or {}).items())]
            rows = lambda: _read(opened, columns or {})  # noqa: E731
        place = cache / f"scores-{sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:16]}"
        return cls(name, build_once(place, lambda staging: _build(staging, rows(), name)))

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
        wanted = np.array([pair_key(*pair) for pair in pairs], dtype=np.uint64)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = keys[at] == wanted
        return [float(score) if there else None for score, there in zip(scores[at], found, strict=True)]


def plain(value: Any) -> Any:
    """A number or a list instead of what numpy and torch hold them in."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_score(value: Any, what: str, place: str, fix: str) -> float:
    """A finite number that float32 can hold; another value is a ValueError that names its place and the fix."""
    if value is None:
        raise ValueError(f"{place}: {what} has no score (null): {fix}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{place}: the score of {what} is {shown(value)}, which is no number: {fix}")
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{place}: the score of {what} is {value}, which is not finite: {fix}")
    return float(value)


def _has_header(path: Path) -> bool:
    """The first line's last field is no number."""
    for _, line in byte_lines(path):
        try:
            float(line.split(b"\t")[-1])
        except ValueError:
            return True
        return False
    return False


def _read(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, str, float]]:
    unknown = sorted(columns.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(f"columns: {unknown[0]!r} is no field of a score table: name {', '.join(_FIELDS)}")
    names: list[str] | None = None
    for number, row in source.rows():
        place = source.place(number)
        if isinstance(row, BadRow):
            raise ValueError(row.at(place))
        if names is None:
            names = [_name(list(row), ours, columns, source.name) for ours in _FIELDS]
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"{place}: column {missing[0]!r} is missing ({there_are(list(row))}); add it")
        query, passage, score = (row[name] for name in names)
        query_id = _id(query, names[0], place)
        place = f"{place} (query {query_id!r})"
        if isinstance(passage, (list, tuple)) or isinstance(score, (list, tuple)):
            yield from _listed(query_id, passage, score, names, place)
            continue
        passage_id = _id(passage, names[1], place)
        if isinstance(source, LineSource) and source.names:
            try:
                score = float(score)
            except ValueError:
                raise ValueError(f"{place}: {score!r} is no score; write a number") from None
        yield query_id, passage_id, _checked(score, passage_id, names[2], place)


def _listed(
    query_id: str, passages: Any, scores: Any, names: Sequence[str], place: str
) -> Iterator[tuple[str, str, float]]:
    if not isinstance(passages, (list, tuple)) or not isinstance(scores, (list, tuple)):
        raise ValueError(f"{place}: {names[1]!r} and {names[2]!r} must both be lists, or both single values")
    if len(passages) != len(scores):
        raise ValueError(
            f"{place}: {len(passages)} passages in {names[1]!r} but {len(scores)} scores in {names[2]!r}: give "
            "one each"
        )
    for passage, score in zip(passages, scores, strict=True):
        passage_id = _id(passage, names[1], place)
        yield query_id, passage_id, _checked(score, passage_id, names[2], place)


def _checked(score: Any, passage_id: str, column: str, place: str) -> float:
    fix = "score the pair again, or remove it"
    return check_score(score, f"passage {passage_id!r}", f"{place}, column {column!r}", fix)


def _mapped(scores: Mapping[str, Mapping[str, float]], name: str) -> Iterator[tuple[str, str, float]]:
    for query_id, of_query in scores.items():
        place = f"{name} (query {query_id!r})"
        if not isinstance(of_query, Mapping):
            raise ValueError(f"{place}: holds {shown(of_query)} where {{passage id: score}} is needed")
        for passage_id, score in of_query.items():
            yield (
                _id(query_id, "query", place),
                _id(passage_id, "passage", place),
                check_score(plain(score), f"passage {passage_id!r}", place, "score the pair again, or remove it"),
            )


def _name(there: Sequence[str], ours: str, columns: Mapping[str, str], source: str) -> str:
    wanted = (columns[ours],) if ours in columns else _NAMES[ours]
    for name in wanted:
        if name in there:
            return name
    raise ValueError(
        f"{source}: column {wanted[0]!r} is missing ({there_are(there)}); name it with columns={{{ours!r}: ...}}"
    )


def _id(value: Any, column: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(
            f"{place}, column {column!r}: holds {shown(value)} where an id is needed: write text or integers"
        )
    return str(value)


def _build(staging: Path, rows: Iterator[tuple[str, str, float]], name: str) -> None:
    """Sort by key, in 20 bytes of memory a pair."""
    blocks = []
    while block := [(pair_key(query, passage), score) for query, passage, score in islice(rows, _ROWS_A_BLOCK)]:
        blocks.append(np.array(block, dtype=[("key", "<u8"), ("score", "<f4")]))
    if not blocks:
        raise ValueError(f"{name}: it holds no score; check the file")
    pairs = np.concatenate(blocks)
    blocks.clear()
    keys, first = np.unique(pairs["key"], return_index=True)
    scores = pairs["score"][first]
    its = scores[np.searchsorted(keys, pairs["key"])]
    if (differ := its != pairs["score"]).any():
        at = int(differ.argmax())
        raise ValueError(
            f"{name}: a pair of query and passage comes twice with different scores, such as {float(its[at]):g} and "
            f"{float(pairs['score'][at]):g}; keep one of them"
        )
    np.save(staging / "keys.npy", keys)
    np.save(staging / "scores.npy", scores)
