"""Where raw rows come from: files of lines, parquet, data sets in memory and on the Hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tct_hf.data.rows import (
    JSON_SUFFIXES,
    PICKLES,
    TSV_SUFFIXES,
    BadRow,
    byte_lines,
    file_key,
    format_of,
    is_hub_id,
    parse_json_line,
    parse_tsv_line,
)

if TYPE_CHECKING:
    from datasets import Dataset

Loaded = TypeVar("Loaded")

ROWS_A_BATCH = 1000
_BYTES_AT_ONCE = 1 << 20  # of each column of a parquet file


class Source(ABC):
    """Raw rows, read from the start each time they are asked for.

    Attributes:
        name: for messages.
        names: the columns, where they are known before a row is read.
        key: JSON-ready, identifies the content; None where nothing does.
    """

    name: str
    names: list[str] | None = None
    key: list[Any] | None = None
    unit = "row"

    @abstractmethod
    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        """The number of each row, and the row as it is stored; `columns` names those that are needed."""

    def parse(self, raw: Any) -> Mapping[str, Any]:
        """The content of a row as it is stored, or a BadRow."""
        return cast("Mapping[str, Any]", raw)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """The number and the content of each row; `columns` names those that are needed."""
        for number, raw in self.raw(columns):
            try:
                yield number, self.parse(raw)
            except BadRow as error:
                yield number, error

    def place(self, number: int) -> str:
        """ "file, line 3"."""
        return f"{self.name}, {self.unit} {number}"


class LineSource(Source):
    """A file of lines, plain or .gz: fields separated by tabs, or JSONL.

    Args:
        path: the file.
        fields: names of the fields, by position; None for JSONL.
        header: the first line is a header, and not a row.
    """

    unit = "line"

    def __init__(self, path: Path, fields: Sequence[str] | None = None, *, header: bool = False) -> None:
        self.path, self.name = path, str(path)
        self.names = None if fields is None else list(fields)
        self.header = header
        self.key = ["jsonl" if fields is None else "tsv", header, *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        for number, line in byte_lines(self.path):
            if number > self.header and (line.strip() if self.names is None else line):
                yield number, line

    def parse(self, raw: bytes) -> Mapping[str, Any]:
        return parse_json_line(raw) if self.names is None else parse_tsv_line(raw, self.names)


class ParquetSource(Source):
    """A parquet file, read a row group's part at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            self.names = list(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a whole parquet file ({error}); copy or download it again") from error
        self.key = ["parquet", *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            # By default all that has been read of the file stays in memory until its end.
            with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BYTES_AT_ONCE) as file:
                for batch in file.iter_batches(ROWS_A_BATCH, columns=columns):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{self.path}, after row {number}: {error}; write, copy or download the file again"
            ) from error


class DatasetSource(Source):
    """A `datasets.Dataset` or `IterableDataset`."""

    def __init__(self, dataset: Any, name: str) -> None:
        from datasets import Dataset

        self.name = name
        map_style = isinstance(dataset, Dataset)
        custom = map_style and dataset.format["type"] == "custom"
        # A format such as "torch" would give arrays for lists; a transform of the user's own makes the columns.
        self.dataset = dataset if custom or not map_style else dataset.with_format(None)
        self.names = None if custom else dataset.column_names
        self.key = ["dataset", dataset._fingerprint] if map_style else None

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = self.dataset
        if columns is not None and self.names is not None:
            dataset = dataset.select_columns(list(columns))
        number = 0
        # A streamed data set would give its own iterator only a part of the rows in a data loader's worker.
        for batch in dataset.iter(ROWS_A_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield number, dict(zip(batch, values, strict=True))
                number += 1


def open_source(given: Any, setting: str, tsv: Callable[[Path], LineSource]) -> Source:
    """Rows of a file, a Hub id ("owner/name:configuration:split") or a data set; `setting` names it in messages."""
    if not isinstance(given, (str, Path)):
        if not hasattr(given, "column_names") or isinstance(given, dict):
            raise ValueError(
                f"{setting}: a {type(given).__name__} can't be loaded; give a path, a Hub id, or a datasets.Dataset "
                "(Dataset.from_list makes one)"
            )
        return DatasetSource(given, f"{setting} (a data set)")
    path = Path(given)
    if is_hub_id(str(given)):
        hub_id, _, rest = str(given).partition(":")
        config, _, split = rest.partition(":")
        return DatasetSource(load_from_hub(hub_id, config or None, split or None), str(given))
    suffix = format_of(path)
    if suffix in PICKLES:
        raise ValueError(
            f"{setting}: {path}: a pickle, which may run code when it is read. Convert it where you trust it, to a "
            "parquet or JSONL file"
        )
    if path.is_dir():
        raise ValueError(f"{setting}: {path} is a folder; give the file")
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: {path}: no such file; give the right path")
    if suffix in JSON_SUFFIXES:
        return LineSource(path)
    if suffix == ".parquet":
        return ParquetSource(path)
    if suffix in TSV_SUFFIXES:
        return tsv(path)
    raise ValueError(
        f"{setting}: {path}: ends in {suffix or 'nothing'}; known are {', '.join((*TSV_SUFFIXES, *JSON_SUFFIXES))} "
        "(plain or .gz) and .parquet. Unpack archives first."
    )


def load_from_hub(
    hub_id: str,
    config: str | None = None,
    split: str | None = None,
    *,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset:
    """Load one split of a Hub data set, or of a folder in the Hub's layout; the only split when None."""
    from datasets import load_dataset

    options: dict[str, Any] = {"revision": revision} if revision else {}
    if streaming:
        options["streaming"] = True
    try:
        parts = reach(hub_id, lambda: load_dataset(hub_id, config, **options))
    except FileNotFoundError as error:
        if not Path(hub_id).is_dir():
            raise
        raise FileNotFoundError(
            f"{hub_id}: no data files that can be read ({error.__cause__}); a folder holds parquet or JSONL files in "
            "the Hub's layout, or corpus.jsonl, queries.jsonl and qrels/"
        ) from error
    source = f"{hub_id} ({config})" if config else hub_id
    there = ", ".join(map(str, parts))
    if split is None:
        if len(parts) != 1:
            raise ValueError(f"{source}: name one of its splits: {there}")
        return next(iter(parts.values()))
    if split not in parts:
        raise FileNotFoundError(f"{source}: no split {split!r}; splits there: {there}")
    return parts[split]


def reach(name: str, load: Callable[[], Loaded]) -> Loaded:
    """What `load` returns; its errors say the fix when the Hub has no such data set or can't be reached."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except FileNotFoundError as error:
        # DatasetNotFoundError is one of these; so is a local path that was mistyped and reads like a Hub id.
        raise FileNotFoundError(
            f"{name}: not a folder here, and not found on the Hub ({error}); check the name, or log in for a private "
            "data set"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{name}: {error}") from error
    except ConnectionError as error:
        raise OSError(
            f"{name}: not a folder here, and the Hub can't be reached ({error}); check the path or the network"
        ) from error


def write_rows(path: Path, schema: Any, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as an Arrow stream, in constant memory; their number."""
    count, rows = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, ROWS_A_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            count += len(batch)
    return count
