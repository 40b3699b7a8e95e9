"""Lines of bytes to raw rows, and what is said of a row that can't be used."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class BadRow(ValueError):
    """A row that can't become a training row.

    Args:
        kind: the class of problem, under which skipped rows are counted, for instance "empty text".
        problem: what is wrong and the mend.
        column: where in the row, if it is one column.
    """

    def __init__(self, kind: str, problem: str, column: str | None = None) -> None:
        super().__init__(kind, problem, column)
        self.kind = kind
        self.problem = problem
        self.column = column

    def at(self, place: str) -> str:
        """The whole message for a place such as "file, line 3"."""
        column = f", column {self.column!r}" if self.column is not None else ""
        return f"{place}{column}: {self.problem}"


@dataclass
class SkippedRows:
    """What `skip_bad_rows=True` left out: how many rows of each kind, and the first of each.

    Args:
        counts: kind of problem to number of rows.
        examples: kind of problem to the message of the first row.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows left out."""
        return sum(self.counts.values())

    def add(self, kind: str, message: str) -> None:
        """Count one row."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.examples.setdefault(kind, message)

    def replace(self, other: SkippedRows) -> None:
        """Take over the figures of another."""
        self.counts, self.examples = dict(other.counts), dict(other.examples)

    def summary(self) -> str:
        """For people: one line in all, then one a kind; empty when nothing was left out."""
        if not self.counts:
            return ""
        lines = [f"{self.total:,} bad {'row was' if self.total == 1 else 'rows were'} left out"]
        for kind in sorted(self.counts, key=lambda kind: (-self.counts[kind], kind)):
            lines.append(f"  {kind}: {self.counts[kind]:,}; the first: {self.examples[kind]}")
        return "\n".join(lines)


def get(row: Mapping[str, Any], name: str) -> Any:
    """A row's value of a column that must be there."""
    if name not in row:
        raise BadRow(
            "missing column", f"column {name!r} is missing ({there_are(list(row))}); add it or remove the row"
        )
    return row[name]


def there_are(names: Sequence[str]) -> str:
    """The columns there are, for messages."""
    return f"there are: {', '.join(map(str, names)) or 'none'}"


def shown(value: Any) -> str:
    """A value for messages, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read a file line by line.

    Args:
        path: the file, plain or .gz.

    Yields:
        The number of the line, from 1, and its bytes without the line end (LF or CR LF). A byte order mark at the
        start of the file is dropped.

    Raises:
        ValueError: a truncated or damaged .gz; the message names the last line that was read.
        OSError: the file can't be read.
    """
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as raw:
            for number, line in enumerate(raw, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {number}: broken .gz ({error}); copy or download the file again"
        ) from error


def decode(line: bytes) -> str:
    """Decode one line.

    Args:
        line: without its line end.

    Raises:
        BadRow: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            "not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from None


def parse_tsv_line(line: bytes, names: Sequence[str]) -> dict[str, str]:
    """Parse one line of fields separated by tabs; there is no quoting.

    Args:
        line: without its line end.
        names: what the fields are.

    Returns:
        Name to field, each exactly as it stands in the line.

    Raises:
        BadRow: not UTF-8, or another number of fields.
    """
    fields = decode(line).split("\t")
    if len(fields) != len(names):
        raise BadRow(
            "wrong number of fields",
            f"{len(fields)} {'field' if len(fields) == 1 else 'fields'} where {len(names)} separated by tabs are "
            f"needed ({', '.join(names)}); remove stray tabs and line breaks from the texts",
        )
    return dict(zip(names, fields, strict=True))


def parse_json_line(line: bytes) -> dict[str, Any]:
    """Parse one line of JSONL.

    Args:
        line: without its line end.

    Returns:
        The object.

    Raises:
        BadRow: not UTF-8, not JSON, not an object, or a key that comes twice.
    """
    text = decode(line)
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise BadRow(
            "not a JSON object", f"a JSON {type(row).__name__} where an object is needed; write one object a line"
        )
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("repeated key", f"the key {twice!r} comes twice in one object; keep one of them")
    return row


def _constant(name: str) -> Any:
    raise BadRow("not JSON", f"not JSON ({name} is no JSON value); write null or leave the key out")
