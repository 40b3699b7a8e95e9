"""Texts by id: collections and queries of any source, checked, converted once, and looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from tct_hf.cache import prepared
from tct_hf.data.file_sources import ROWS_A_BATCH, LineSource, Source
from tct_hf.data.ids import SeenIds, find, hash_of
from tct_hf.data.rows import (
    BadRow,
    SkippedRows,
    as_id,
    as_text,
    first_lines,
    get,
    is_header,
    names_ids,
    refuse_or_skip,
    there_are,
)
from tct_hf.data.sources import MappingSource, open_source, rows_in_batches, write_rows

if TYPE_CHECKING:
    from datasets import Dataset

# What `collection=` and `queries=` take.
TextSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, str]]
# Id, title, text.
Record: TypeAlias = tuple[str, str, str]
# Id, text.
Passage: TypeAlias = tuple[str, str]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 2
TEXT_FIX = "fill it in, remove the line, or leave such rows out with skip_bad_rows"
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "title")])


@dataclass
class Texts:
    """Texts by id, of passages or queries."""

    source: str  # for messages
    dataset: Dataset  # columns id and text
    key: list[Any]  # JSON-ready, identifies the content
    _index: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # The index of millions of ids is made again where it is needed: cheaper than to send it to a worker.
        return {**self.__dict__, "_index": None}

    def get(self, ids: Sequence[str]) -> list[str | None]:
        if self._index is None:
            chunks = self.dataset.data.column("id").chunks
            hashes = np.fromiter((hash_of(name) for chunk in chunks for name in chunk.to_pylist()), np.uint64)
            order = np.argsort(hashes)
            self._index = hashes[order], order
        hashes, order = self._index
        at, there = find(hashes, map(hash_of, ids))
        rows = self.dataset[order[at].tolist()]
        found = zip(ids, rows["id"], rows["text"], there, strict=True)
        return [text if known and name == its else None for name, its, text, known in found]


def open_texts(
    source: TextSource, setting: str, cache_dir: str | Path | None, skipped: SkippedRows | None = None
) -> Texts:
    """Open texts by id, of what :func:`open_source` opens or a mapping: converted once, then memory-mapped."""
    opened, names = _opened(source, setting)
    what = "query" if setting == "queries" else "passage"
    dataset = prepare_corpus(opened, cache_dir, names=names, allow_empty=True, what=what, skipped=skipped)
    return Texts(opened.name, dataset.select_columns(["id", "text"]), opened.need_key())


def read_texts(source: TextSource, setting: str) -> Iterator[tuple[str, Record]]:
    """The place and the record of each text of a source that :func:`open_texts` takes."""
    opened, names = _opened(source, setting)
    return records_of(opened, names)


def _opened(source: TextSource, setting: str) -> tuple[Source, Sequence[str]]:
    """The raw rows, and the columns of id, text and perhaps title where they have other names."""
    if isinstance(source, Mapping):
        return MappingSource(lambda: ({"_id": name, "text": text} for name, text in source.items()), setting), ()
    opened = open_source(source, setting, _open_tsv)
    opened.need_key()
    names = opened.names
    if names is None:  # JSONL
        try:
            names = next((list(opened.parse(raw)) for _, raw in opened.raw()), [])
        except BadRow:  # said when it is read
            names = []
        if "_id" in names or not names:
            return opened, ()
    return opened, _text_columns(names, opened.name, setting)


def _open_tsv(path: Path) -> LineSource:
    first = next(iter(first_lines(path)), [])
    header = len(first) == 2 and is_header(first)
    if header and names_ids(first[1]) and not names_ids(first[0]):
        raise ValueError(f"{path}, line 1: {first} are other columns than id and text; put ids first")
    return LineSource(path, ("id", "text"), header=header)


def _text_columns(names: Sequence[str], source: str, setting: str) -> tuple[str, ...]:
    """(id, text) or (id, text, title): by name, else the one that ends in _id and the one that is left."""
    ids = [name for name in ("id", "_id") if name in names] or [name for name in names if name.endswith("_id")]
    rest = [name for name in names if name not in ids[:1]]
    texts = ["text"] if "text" in rest else rest
    if not ids or len(texts) != 1 or (len(ids) > 1 and "id" not in ids and "_id" not in ids):
        raise ValueError(f"{setting}: {source} has other columns ({there_are(names)}); name them id and text")
    title = ["title"] if "title" in rest and texts == ["text"] else []
    return (ids[0], texts[0], *title)


def records_of(
    source: Source,
    names: Sequence[str] = (),
    *,
    title: bool = True,
    allow_empty: bool = False,
    skipped: SkippedRows | None = None,
    fix: str = "fill it in or remove the line",
) -> Iterator[tuple[str, Record]]:
    """A source's texts, each with its place; `names` are its columns of _id, text and title if they differ."""
    id_name, text_name, title_name = (*names, "title")[:3] if names else ("_id", "text", "title")

    def read(row: Mapping[str, Any]) -> Record:
        name = as_id(get(row, id_name), id_name)
        text = as_text(get(row, text_name), text_name, allow_empty=True).strip()
        # A title may be null, as in data sets where only some have one.
        heading = row.get(title_name) if title else None
        heading = "" if heading is None else as_text(heading, title_name, allow_empty=True).strip()
        if not heading and not text and not allow_empty:
            raise BadRow("empty text", f"the text of {name!r} is empty; {fix}")
        return name, heading, text

    return source.read(read, names or None, skipped)


def joined(title: str, text: str) -> str:
    """The text that is searched: title and text joined by a space."""
    return f"{title} {text}" if title and text else title or text


def prepare_corpus(
    source: Source,
    cache_dir: str | Path | None = None,
    *,
    names: Sequence[str] = (),
    allow_empty: bool = False,
    what: str = "passage",
    skipped: SkippedRows | None = None,
) -> Dataset:
    """Convert texts once, in constant memory, and open the converted form: memory-mapped id, text, title.

    Bad records and repeated ids are refused, or left out and added to `skipped`.
    """
    from datasets import Dataset

    left_out = None if skipped is None else SkippedRows()

    def records() -> Iterator[tuple[str, Record]]:
        return records_of(source, names, allow_empty=allow_empty, skipped=left_out, fix=TEXT_FIX)

    def unique() -> Iterator[dict[str, str]]:
        seen, every = SeenIds(), records()
        while batch := list(islice(every, ROWS_A_BATCH)):
            ids = [name for _, (name, _, _) in batch]
            again = set(seen.add(ids))
            for at, (place, (name, title, text)) in enumerate(batch):
                if at not in again:
                    yield {"id": name, "text": joined(title, text), "title": title}
                    continue
                message = f"{place}: {what} id {name!r} was used before"
                if left_out is None:
                    first = next(where for where, (other, _, _) in records() if other == name)
                    message += f", in {first}; make ids unique, or leave such rows out with skip_bad_rows"
                refuse_or_skip(left_out, "repeated id", message)

    def build(staging: Path) -> None:
        if not write_rows(staging / "corpus.arrow", _SCHEMA, unique()):
            raise ValueError(f"{source.name}: no {what} in it; write one JSON object with _id, title and text a line")
        if left_out is not None:
            left_out.save(staging)

    key = [_FORMAT, source.key, list(names), allow_empty, *([] if skipped is None else ["skip"])]
    folder = prepared("beir", key, build, cache_dir)
    if skipped is not None:
        skipped.update(SkippedRows.load(folder))
    return Dataset.from_file(str(folder / "corpus.arrow"))


def add_texts(rows: Sequence[dict[str, Any]], columns: Mapping[str, Texts]) -> list[BadRow | None]:
    """Add the texts of ids (positive_id) to rows (positive), in place; for each row None, or its error."""
    errors: list[BadRow | None] = [None] * len(rows)
    for column, texts in columns.items() if rows else ():
        for at, text in enumerate(texts.get([row[column] for row in rows])):
            row, bad = rows[at], None
            if text is None:
                fix = "add it, or remove the row"
                bad = BadRow("unknown id", f"{row[column]!r} is not in {texts.source}; {fix}", column)
            elif not text or text.isspace():
                bad = BadRow("empty text", f"{row[column]!r} has no text in {texts.source}; fill it in", column)
            errors[at] = errors[at] or bad
            row[column.removesuffix("_id")] = text
    return errors


def checked_passages(corpus: Iterable[Mapping[str, Any]], allow_empty: bool, first: int = 0) -> Iterator[Passage]:
    """Id and text of each passage of a corpus, read once; a bad one is a ValueError with its number and id."""
    for number, row in enumerate(rows_in_batches(corpus, ("id", "text")), first):
        if not isinstance(row, Mapping):
            raise ValueError(f"corpus, passage number {number} is a {type(row).__name__}: give rows of id and text.")
        try:
            name, text = as_id(get(row, "id"), "id"), as_text(get(row, "text"), "text", allow_empty=True)
        except BadRow as error:
            raise ValueError(error.at(f"corpus, passage number {number} (id {row.get('id')!r})")) from None
        if not allow_empty and not text.strip():
            fix = "leave it out, or pass allow_empty=True"
            raise ValueError(f"corpus: passage {name!r} (number {number}) has no words: {fix}.")
        yield name, text


def passage_shards(passages: Iterator[Passage], size: int) -> Iterator[list[Passage]]:
    """Consecutive passages, so many at a time; refuses an id that comes twice, in 16 bytes of memory an id."""
    seen, count = SeenIds(), 0
    while shard := list(islice(passages, size)):
        refuse_repeated(seen, [passage_id for passage_id, _ in shard], count)
        count += len(shard)
        yield shard


def refuse_repeated(seen: SeenIds, ids: Sequence[str], count: int) -> None:
    """Take the ids of the next passages, after so many; a ValueError names one that came before."""
    if again := seen.add(ids):
        raise ValueError(f"corpus: two passages have the id {ids[again[0]]!r} (again at number {count + again[0]}).")


def job_shards(
    corpus: Iterable[Mapping[str, Any]], size: int, job: tuple[int, int], allow_empty: bool
) -> Iterator[list[Passage] | range]:
    """The shards of one of several jobs, and the first of all; of others the numbers of their rows.

    Those rows a data set doesn't read; another iterable is read to its end.
    """
    index, jobs = job
    for number, (numbers, read) in enumerate(_row_blocks(corpus, size)):
        own = number == 0 or number % jobs == index
        yield list(checked_passages(read(), allow_empty, numbers.start)) if own else numbers


def _row_blocks(corpus: Any, size: int) -> Iterator[tuple[range, Callable[[], Any]]]:
    """Consecutive row numbers, so many at a time, with what reads their rows."""
    if hasattr(corpus, "select"):
        for start in range(0, len(corpus), size):
            rows = range(start, min(start + size, len(corpus)))
            yield rows, partial(corpus.select, rows)
        return
    rest, start = rows_in_batches(corpus, ("id", "text")), 0
    while block := list(islice(rest, size)):
        yield range(start, start + len(block)), partial(iter, block)
        start += len(block)
