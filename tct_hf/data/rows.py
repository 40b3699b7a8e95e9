"""Rows of lines, checks of their values, what is said of a bad one, and what a name stands for."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tct_hf.data.ids import is_utf8
from tct_hf.files import MADE_AGAIN, read_json

TSV_SUFFIXES = (".tsv", ".txt")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PICKLES = (".pkl", ".pickle", ".pt", ".bin", ".joblib")
# A Hub id has an owner: a bare word may be a column. A name that ends like a file is one, there or not.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INTEGER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
# float() takes 1_0, blanks and the digits of other scripts, too.
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FLOAT32_MAX = 3.4028234663852886e38
_FILES = (*TSV_SUFFIXES, *JSON_SUFFIXES, *PICKLES, ".parquet", ".csv", ".gz")
_SKIPPED_FILE = "skipped.json"
_GZIP = b"\x1f\x8b"
# First bytes of what is no file of lines, whatever its name.
_NO_LINES = {b"PAR1": ".parquet", b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"(\xb5/\xfd": ".zst"}
# Words that name columns, alone or together, such as "docno", "passage-id" and "query text"; not a letter alone.
_COLUMN = (
    r"query|queries|question|anchor|search|topic|user|positive|negative|pos|neg|hard|good|bad|passage|document|doc|corpus"
    r"|text|title|body|content|answer|response|context|sentence|premise|hypothesis|segment|key|value|name"
    r"|score|label|rank|rel|relevance|relevant|relevancy|grade|judge?ment|iteration|iter"
)
_ID = r"id|no|nr|num|number|index|key"
_COLUMNS = re.compile(rf"[\W_]*((?:[qpdu][\W_]?)?(?:{_COLUMN}|{_ID})s?(?:[_-]?\d+)?[\W_]*)+")
_OF_IDS = re.compile(rf".*(?:{_ID})s?[\W\d_]*")
_WORD = re.compile(r"[^\W\d_][^\W\d]*")


def is_hub_id(name: str) -> bool:
    """Whether a name is "owner/name", "owner/name:configuration" or "owner/name:configuration:split", and no path."""
    hub_id, _, _ = name.partition(":")
    is_id = _HUB_ID.fullmatch(hub_id) is not None and Path(hub_id).suffix.lower() not in _FILES
    return is_id and not Path(name).exists()


def is_score_file(name: str) -> bool:
    """Whether a setting names a file of scores, there or not, or a Hub table, rather than columns of the triples."""
    is_file = Path(name).is_file() or format_of(Path(name)) in _FILES or name.endswith(".gz")
    return is_file or name.startswith("irds:") or is_hub_id(name)


def format_of(path: Path) -> str:
    """The suffix that says how a file is written, without .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def file_key(path: Path) -> list[Any]:
    """What identifies a file's content without reading it: path, bytes, time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


class BadRow(ValueError):
    """A row that can't be used: the kind that it is counted under, the problem with its fix, and its column."""

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
    """What `skip_bad_rows=True` left out.

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

    def update(self, other: SkippedRows) -> None:
        """Add the figures of another."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
        self.examples = {**other.examples, **self.examples}

    def replace(self, other: SkippedRows) -> None:
        """Take over the figures of another."""
        self.counts, self.examples = dict(other.counts), dict(other.examples)

    def line(self) -> str:
        """In one line, without examples; empty when nothing was left out."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
        return f"bad rows left out: {kinds}" if kinds else ""

    def save(self, folder: Path) -> None:
        (folder / _SKIPPED_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SkippedRows:
        return cls(**read_json(folder / _SKIPPED_FILE, MADE_AGAIN))

    def summary(self) -> str:
        """For people: one line in all, then one a kind; empty when nothing was left out."""
        were = "row was" if self.total == 1 else "rows were"
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        lines = (f"\n  {kind}: {self.counts[kind]:,}; the first: {self.examples[kind]}" for kind in kinds)
        return f"{self.total:,} bad {were} left out{''.join(lines)}" if kinds else ""


def refuse_or_skip(skipped: SkippedRows | None, kind: str, message: str) -> None:
    """Count a flaw, or refuse it as a ValueError where nothing takes the counts."""
    if skipped is None:
        raise ValueError(message) from None
    skipped.add(kind, message)


def get(row: Mapping[str, Any], name: str) -> Any:
    """A column of a row; a BadRow where it is missing."""
    if name not in row:
        what = f"column {name!r} is missing ({there_are(list(row))})"
        raise BadRow("missing column", f"{what}; add it or remove the row")
    return row[name]


def as_text(value: Any, column: str, *, allow_empty: bool = False) -> str:
    """A value that must be text which UTF-8 can hold."""
    if value is None:
        raise BadRow("empty text", "no text (null); fill it in or remove the row", column)
    if not isinstance(value, str):
        raise BadRow("mixed types", f"holds {shown(value)} where text is needed; write it as text", column)
    if not allow_empty and (not value or value.isspace()):
        raise BadRow("empty text", "the text is empty; fill it in or remove the row", column)
    if not value.isascii() and not is_utf8(value):
        raise BadRow("not UTF-8", "half a surrogate pair; it is not text in any encoding", column)
    return value


def checked_texts(texts: Iterable[Any], what: str, first: int = 0) -> list[str]:
    """Texts that a tokenizer can take; a bad one is a ValueError with its number, counted from `first`."""
    return list(each_checked(texts, what, first))


def each_checked(texts: Iterable[Any], what: str, first: int = 0) -> Iterator[str]:
    """Texts as they are, any other value refused with its number, counted from `first`."""
    if isinstance(texts, (str, bytes, Mapping)):
        given = "a mapping" if isinstance(texts, Mapping) else "one string"
        raise ValueError(f"{what}: {given}; pass a list of texts")
    for number, text in enumerate(texts, first):
        try:
            yield as_text(text, "text", allow_empty=True)
        except BadRow as error:
            raise ValueError(f"{what}, number {number}: {error.problem}") from None


def as_id(value: Any, column: str) -> str:
    """A value that must be an id, text or an integer, as text."""
    if not isinstance(value, str):
        value = plain(value)
    if value is None:
        raise BadRow("empty id", "no id (null); fill it in or remove the row", column)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        fix = "write ids as text or integers"
        raise BadRow("mixed types", f"holds {shown(value)} where an id is needed; {fix}", column)
    text = str(value)
    if not text or text.isspace():
        raise BadRow("empty id", "the id is empty; fill it in or remove the row", column)
    if "\0" in text:
        raise BadRow("empty id", f"the id {text!r} holds a NUL character; remove it", column)
    return as_text(text, column)


def plain(value: Any) -> Any:
    """A number or a list instead of what numpy and torch hold them in."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_grade(value: Any) -> int:
    """A grade, which must be a whole number: 1 or 1.0, as text too."""
    value = plain(value)
    # int() takes 1_0 and the digits of other scripts, too.
    if isinstance(value, str) and (whole := _INTEGER.fullmatch(value.strip(" \t\r"))):
        return int(whole[1])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1 and abs(value) < 2**63:
        return int(value)
    raise BadRow("bad score", f"score {shown(value)} is not an integer; write 0, 1, 2, ...")


def as_score(value: Any, what: str, column: str) -> float:
    """The score of `what`, a finite number that float32 can hold, as text too."""
    value = plain(value)
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    fix = "score it again, or remove it"
    if value is None:
        raise BadRow("bad score", f"{what} has no score (null): {fix}", column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("bad score", f"the score of {what} is {shown(value)}, which is no number: {fix}", column)
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise BadRow("bad score", f"the score of {what} is {value}, which is not finite: {fix}", column)
    return float(value)


def there_are(names: Sequence[str]) -> str:
    """Names that there are, for messages."""
    return f"there are: {', '.join(map(str, names)) or 'none'}"


def shown(value: Any) -> str:
    """A value for messages, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line of a file, plain or gzip, without line end and byte order mark.

    A ValueError says of a broken gzip file the last line that was read, and what is no lines by its first bytes.
    """
    number = 0
    with path.open("rb") as raw:
        start = raw.read(6)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: UTF-16 by its byte order mark; convert the file to UTF-8")
    for magic, suffix in _NO_LINES.items():
        if start.startswith(magic):
            fix = "name it so" if suffix == ".parquet" else "unpack it first"
            raise ValueError(f"{path}: by its content a {suffix} file, and no lines of text; {fix}")
    try:
        with gzip.open(path) if start.startswith(_GZIP) else path.open("rb") as raw:
            for number, line in enumerate(raw, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = "copy or download the file again"
        raise ValueError(f"{path}, after line {number}: broken .gz ({error}); {fix}") from error


def decode(line: bytes) -> str:
    """The text of one line; a BadRow where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        raise BadRow("not UTF-8", why) from None


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The place ("file, line 3") and the text of each line of a file."""
    for number, line in byte_lines(path):
        place = f"{path}, line {number}"
        try:
            yield place, decode(line)
        except BadRow as error:
            raise ValueError(error.at(place)) from None


def first_lines(path: Path) -> list[list[str]]:
    """The fields, separated by tabs, of the first two lines of a file; what can't be read there is said later."""
    return [line.decode(errors="replace").split("\t") for _, line in islice(byte_lines(path), 2)]


def is_header(fields: Sequence[str], unlike: bool = False) -> bool:
    """Whether a first line names its columns in usual words; in any words if no field can be what its column holds."""
    names = [field.lower().strip(" #\"'") for field in fields]
    if len({*names}) < len(names) or max(map(len, names)) > 40:
        return False
    return all(map(_COLUMNS.fullmatch, names)) or (unlike and all(map(_WORD.fullmatch, names)))


def names_ids(field: str) -> bool:
    """Whether the name of a field says that it holds ids."""
    return _OF_IDS.fullmatch(field.lower().strip(" #\"'")) is not None


def parse_tsv_line(line: bytes, names: Sequence[str]) -> dict[str, str]:
    """The fields of a line by `names`; a BadRow where their number differs."""
    fields = decode(line).split("\t")
    if len(fields) != len(names):
        need = f"{len(fields)} fields where {len(names)} separated by tabs are needed ({', '.join(names)})"
        raise BadRow("wrong number of fields", f"{need}; remove stray tabs and line breaks from the texts")
    return dict(zip(names, fields, strict=True))


def parse_json_line(line: bytes) -> dict[str, Any]:
    """The object of a line; a BadRow where it is none."""
    text = decode(line)
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        what = type(row).__name__
        raise BadRow("not a JSON object", f"a JSON {what} where an object is needed; write one object a line")
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
