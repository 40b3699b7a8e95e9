"""Raw rows of files, each with its place: lines, CSV, parquet."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tct_hf.data.ids import is_utf8
from tct_hf.data.rows import (
    BadRow,
    SkippedRows,
    byte_lines,
    file_key,
    parse_json_line,
    parse_tsv_line,
    refuse_or_skip,
)
from tct_hf.files import write_aside

T = TypeVar("T")

ROWS_A_BATCH = 1000
_BYTES_AT_ONCE = 1 << 20  # of each column of a parquet file
_BYTES_A_FIELD = 1 << 24  # of CSV: what is longer has a quote that isn't closed


class Source(ABC):
    """Raw rows, read from the start each time they are asked for."""

    name: str  # for messages
    names: list[str] | None = None  # the columns, where they are known before a row is read
    key: list[Any] | None = None  # JSON-ready, identifies the content, where something does
    unit = "row"

    @abstractmethod
    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        """The number of each row, and the row as it is stored; `columns` names those that are needed."""

    def parse(self, raw: Any) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", raw)

    def read(
        self,
        what: Callable[[Mapping[str, Any]], T],
        columns: Sequence[str] | None = None,
        skipped: SkippedRows | None = None,
    ) -> Iterator[tuple[str, T]]:
        """The place of each row and what is read of it; a BadRow is a ValueError with its place, or skipped."""
        for number, raw in self.raw(columns):
            try:
                found = what(self.parse(raw))
            except BadRow as error:
                refuse_or_skip(skipped, error.kind, error.at(self.place(number)))
            else:
                yield self.place(number), found

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"

    def need_key(self) -> list[Any]:
        """The key; refuses a source that can't be read twice."""
        if self.key is None:
            raise ValueError(f"{self.name}: an IterableDataset can't be looked up by id; give a Dataset or a file")
        return self.key


class LineSource(Source):
    """A file of lines, plain or .gz: fields separated by tabs, or JSONL without names of `fields`.

    `header` is the number of the line that is one; 0 for none.
    """

    unit = "line"

    def __init__(self, path: Path, fields: Sequence[str] | None = None, *, header: int = False) -> None:
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


class CsvSource(Source):
    """A file of fields separated by commas, named in its first line; each field is text as it stands."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.key = ["csv", *file_key(path)]
        header: Any = next(self._records(), (1, []))[1]
        if not all(header) or len({*header}) < len(header) or isinstance(header, str):
            raise ValueError(f"{path}, line 1: {header} are no names of columns; give each column a name of its own")
        self.names = header

    def _records(self) -> Iterator[tuple[int, Any]]:
        """The first line of each record, and its fields or what is wrong with them."""
        csv.field_size_limit(_BYTES_A_FIELD)
        lines = (line.decode("utf-8", "surrogateescape") + "\n" for _, line in byte_lines(self.path))
        records = csv.reader(lines, strict=True)
        while True:
            first = records.line_num + 1
            try:
                fields: Any = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                fields = str(error)
            why = fields if isinstance(fields, str) else f"{len(fields)} fields"
            whole = why is not fields and len(fields) == len(self.names or fields)
            if records.line_num > first and not whole:  # a quote that isn't closed has taken rows with it
                raise ValueError(f"{self.path}, line {first}: not CSV ({why}); close the quote that opens here")
            if fields:
                yield first, fields

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        return islice(self._records(), 1, None)

    def parse(self, raw: Any) -> Mapping[str, Any]:
        names = self.names or []
        if isinstance(raw, str):
            raise BadRow("not CSV", f"not CSV ({raw}); write texts with commas, quotes or line breaks in quotes")
        if len(raw) != len(names):
            need = f"{len(raw)} fields where {len(names)} are needed ({', '.join(names)})"
            raise BadRow("wrong number of fields", f"{need}; write texts with commas or line breaks in quotes")
        if not all(map(is_utf8, raw)):
            raise BadRow("not UTF-8", "not UTF-8; convert the file to UTF-8")
        return dict(zip(names, raw, strict=True))


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno:  # the system's, such as a missing file
        return error
    return ValueError(f"{path}: not a whole parquet file ({error}); copy or download it again, or write it anew")


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """A whole parquet file as an Arrow table, its checksums compared; a ValueError names a damaged one."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def write_parquet(path: Path, table: Any) -> None:
    """Write a parquet file with checksums, whole or not at all."""
    with write_aside(path) as aside:
        pq.write_table(table.replace_schema_metadata(None), aside, compression="zstd", write_page_checksum=True)


class ParquetSource(Source):
    """A parquet file, read a row group's part at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            self.names = list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        self.key = ["parquet", *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            # By default all that has been read of the file stays in memory until its end.
            with pq.ParquetFile(
                self.path, pre_buffer=False, buffer_size=_BYTES_AT_ONCE, page_checksum_verification=True
            ) as file:
                for batch in file.iter_batches(ROWS_A_BATCH, columns=columns):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{self.path}, after row {number}: {error}; write, copy or download the file again"
            ) from error
