"""Texts by id: collections and queries that id-only training data refer to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from tct_hf.data.beir_format import Records, prepare_corpus, read_records
from tct_hf.data.row_parsing import BadRow, byte_lines, parse_tsv_line

if TYPE_CHECKING:
    from datasets import Dataset

# What `collection=` and `queries=` take.
TextSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, str]]

TSV_SUFFIXES = (".tsv", ".txt")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def format_of(path: Path) -> str:
    """The suffix that says how a file is written, without .gz, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def file_key(path: Path) -> list[Any]:
    """What identifies a file's content without reading it: path, bytes, time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Texts:
    """Texts by id.

    Args:
        source: where they come from, for messages.
        dataset: columns id and text, both text, ids unique.
        key: JSON-ready, identifies the content.
    """

    source: str
    dataset: Dataset
    key: list[Any]

    def has_any(self, ids: Sequence[str]) -> bool:
        """Whether there is a text of one of these ids."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        wanted = pa.array(ids, pa.string())
        return any(pc.any(pc.is_in(part, value_set=wanted)).as_py() for part in self.dataset.data.column("id").chunks)


def open_texts(source: TextSource, what: str, setting: str, cache_dir: Path) -> Texts:
    """Open texts by id: checked and converted once, then memory-mapped.

    Args:
        source: a TSV file (id, text), a JSONL file of the BEIR layout (_id, title, text), a parquet file, each but
            parquet plain or .gz; a data set or a mapping; a Hub id "owner/name", "owner/name:configuration" or
            "owner/name:configuration:split".
        what: "passage" or "query", for messages.
        setting: the setting that named it, for messages.
        cache_dir: where the converted form is kept.

    Raises:
        FileNotFoundError: no such file or Hub data set.
        ValueError: a malformed line, an id that comes twice, or no text at all; with file and line.
        OSError: the cache can't be written, or the Hub not be reached.
    """
    if isinstance(source, Mapping):
        name = f"{setting} (a mapping)"
        digest = sha256()
        for text_id, text in source.items():
            digest.update(json.dumps([text_id, text]).encode())
        pairs = source
        return _prepare(lambda: _pairs(pairs, name), name, ["mapping", digest.hexdigest()], what, cache_dir)
    if not isinstance(source, (str, Path)):
        return _from_dataset(source, f"{setting} (a data set)", what, setting, cache_dir)
    path = Path(source)
    if not path.exists():
        return _from_hub(str(source), what, setting, cache_dir)
    if path.is_dir():
        raise ValueError(f"{setting}: {path} is a folder; give the file that holds the texts")
    suffix = format_of(path)
    key = [suffix, *file_key(path)]
    if suffix in TSV_SUFFIXES:
        return _prepare(lambda: read_tsv_texts(path), str(path), key, what, cache_dir)
    if suffix in JSON_SUFFIXES:
        records = lambda: read_records(path, title=True, allow_empty=True)  # noqa: E731
        return _prepare(records, str(path), key, what, cache_dir)
    if suffix == ".parquet":
        from tct_hf.data.sources import ParquetSource

        parquet = ParquetSource(path)
        names = _text_columns(parquet.names or [], str(path), setting)
        rows = lambda: _rows_to_records(parquet.rows(list(names)), parquet.place, names)  # noqa: E731
        return _prepare(rows, str(path), key, what, cache_dir)
    raise ValueError(
        f"{setting}: {path} ends in {suffix or 'nothing'}; known are {', '.join((*TSV_SUFFIXES, *JSON_SUFFIXES))} "
        "(plain or .gz) and .parquet"
    )


def read_tsv_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Read a file of ids and texts, as MS MARCO's collection.tsv and queries.tsv.

    Args:
        path: the file, plain or .gz.

    Yields:
        ("file, line n", id, text).

    Raises:
        ValueError: a malformed line, or a broken .gz.
    """
    for number, line in byte_lines(path):
        if not line:
            continue
        place = f"{path}, line {number}"
        try:
            row = parse_tsv_line(line, ("id", "text"))
            if not row["id"].strip():
                raise BadRow("empty id", "the id is empty; fill it in or remove the line")
        except BadRow as error:
            raise ValueError(error.at(place)) from None
        yield place, row["id"], row["text"]


def _pairs(texts: Mapping[str, str], name: str) -> Iterator[tuple[str, str, str]]:
    for text_id, text in texts.items():
        if not isinstance(text_id, str) or not isinstance(text, str) or not text_id:
            raise ValueError(f"{name}: {text_id!r}: {text!r}; ids and texts must be strings, and ids not empty")
        yield f"{name}, {text_id!r}", text_id, text


def _prepare(records: Callable[[], Records], name: str, key: Sequence[Any], what: str, cache_dir: Path) -> Texts:
    def without_nul() -> Records:
        # The index of ids is a numpy array of fixed width, which drops NULs at the end of an id.
        for place, text_id, text in records():
            if "\0" in text_id:
                raise ValueError(f"{place}: the id {text_id!r} holds a NUL character; remove it")
            yield place, text_id, text

    dataset = prepare_corpus(without_nul, name, cache_dir, ["texts", *key], what=what)
    return Texts(name, dataset, list(key))


def _from_hub(source: str, what: str, setting: str, cache_dir: Path) -> Texts:
    from tct_hf.data.sources import load_from_hub

    hub_id, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    if not HUB_ID.fullmatch(hub_id) or format_of(Path(hub_id)):
        raise FileNotFoundError(f"{setting}: {source}: no such file; give the right path")
    return _from_dataset(load_from_hub(hub_id, config or None, split or None), source, what, setting, cache_dir)


def _from_dataset(dataset: Any, name: str, what: str, setting: str, cache_dir: Path) -> Texts:
    from datasets import Dataset

    from tct_hf.data.sources import DatasetSource

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{setting}: a {type(dataset).__name__}, which can't be looked up by id; give a file, a datasets.Dataset "
            "with id and text, or a mapping"
        )
    source = DatasetSource(dataset, name)
    names = _text_columns(dataset.column_names, name, setting)
    return _prepare(
        lambda: _rows_to_records(source.rows(list(names)), source.place, names),
        name,
        source.key or [],
        what,
        cache_dir,
    )


def _text_columns(names: Sequence[str], source: str, setting: str) -> tuple[str, ...]:
    """(id, text) or (id, text, title): by name, else the one that ends in _id and the one that is left."""
    ids = [name for name in ("id", "_id") if name in names] or [name for name in names if name.endswith("_id")]
    rest = [name for name in names if name not in ids[:1]]
    texts = ["text"] if "text" in rest else rest
    if not ids or len(texts) != 1 or (len(ids) > 1 and "id" not in ids and "_id" not in ids):
        raise ValueError(
            f"{setting}: {source} has the columns {', '.join(names)}; name them id and text (and title, if there is "
            "one)"
        )
    title = ["title"] if "title" in rest and texts == ["text"] else []
    return (ids[0], texts[0], *title)


def _rows_to_records(
    rows: Iterator[tuple[int, Any]], place: Callable[[int], str], names: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    from tct_hf.data.beir_format import check_record

    for number, row in rows:
        record = dict(zip(("_id", "text", "title"), (row[name] for name in names), strict=False))
        where = place(number)
        yield check_record(record, where, title=len(names) == 3, allow_empty=True)


class TextJoin:
    """Fills in the texts of ids, batch by batch.

    Args:
        columns: id column to where its texts are, for instance {"positive_id": passages}. The text goes to the
            column of the same name without "_id".
    """

    def __init__(self, columns: Mapping[str, Texts]) -> None:
        self._columns = dict(columns)
        self._transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The index of millions of ids is made again where it is needed: cheaper than to send it to a worker.
        return {"_columns": self._columns, "_transform": None}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[BadRow | None]:
        """Add the texts to the rows, in place.

        Args:
            rows: with the id columns.

        Returns:
            For each row None, or what is wrong with it: an id that is not there, or that has no text.
        """
        if not self._columns or not rows:
            return [None] * len(rows)
        errors: list[BadRow | None] = [None] * len(rows)
        good = []
        for at, row in enumerate(rows):
            # resolve_ids takes such text for a list of ids.
            column = next((name for name in self._columns if row[name][0] == "["), None)
            if column is None:
                good.append(at)
            else:
                errors[at] = self._unknown(column, row[column])
        for at, error in zip(good, self._resolve([rows[at] for at in good]), strict=True):
            errors[at] = error
        return errors

    def _resolve(self, rows: Sequence[dict[str, Any]]) -> list[BadRow | None]:
        if not rows:
            return []
        if self._transform is None:
            from sentence_transformers.util import resolve_ids

            self._transform = resolve_ids(
                {name: (texts.dataset, "id", "text") for name, texts in self._columns.items()}, keep_columns=()
            )
        try:
            found = self._transform({name: [row[name] for row in rows] for name in self._columns})
        except KeyError as error:
            if len(rows) > 1:
                # Halves, until the rows that are to blame stand alone.
                middle = len(rows) // 2
                return [*self._resolve(rows[:middle]), *self._resolve(rows[middle:])]
            for name in self._columns:
                if str(error.args[0]).startswith(f"ID {rows[0][name]!r} from input column {name!r}"):
                    return [self._unknown(name, rows[0][name])]
            return [BadRow("unknown id", str(error.args[0]))]
        errors: list[BadRow | None] = [None] * len(rows)
        for name, texts in self._columns.items():
            out = name.removesuffix("_id")
            for at, text in enumerate(found[out]):
                rows[at][out] = text
                if not text or text.isspace():
                    errors[at] = errors[at] or BadRow(
                        "empty text", f"{rows[at][name]!r} has no text in {texts.source}; fill it in", name
                    )
        return errors

    def _unknown(self, column: str, text_id: str) -> BadRow:
        return BadRow(
            "unknown id", f"{text_id!r} is not in {self._columns[column].source}; add it, or remove the row", column
        )
