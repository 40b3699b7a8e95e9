from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tct_hf import SkippedRows, load_triples
from tct_hf.data.near_duplicates import folded
from tct_hf.data.rows import BadRow, byte_lines, parse_json_line
from tests.rows import write

NAMES = ("query", "positive", "negative")

# Parsers of the tests' own, written apart from the package's: what they read is the right reading ------------------


def simple_decode(line: bytes) -> str | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return "".join(decoder.decode(line[at : at + 1]) for at in range(len(line))) + decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None


def simple_tsv(line: bytes) -> list[str] | None:
    """Three fields that are not blank, or None."""
    query, _, rest = line.partition(b"\t")
    positive, second, negative = rest.partition(b"\t")
    fields = [simple_decode(part) for part in (query, positive, negative)]
    good = second and b"\t" not in negative and all(part and part.strip() for part in fields)
    return fields if good else None  # type: ignore[return-value]


def simple_json(line: bytes) -> Any:
    """RFC 8259 by the standard library; keys must be unique. None for what is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise ValueError

    try:
        return json.loads(simple_decode(line) or "", object_pairs_hook=unique, parse_constant=refuse)
    except ValueError:
        return None


def simple_json_row(line: bytes) -> list[str] | None:
    """query, positive and negative of one object, or None."""
    row = simple_json(line)
    other = r"negative_[1-9][0-9]*|negatives|positives|(query|positive|negative)_ids?"
    if not isinstance(row, dict) or any(name not in row for name in NAMES) or any(re.fullmatch(other, k) for k in row):
        return None
    fields = [row[name] for name in NAMES]
    good = all(isinstance(part, str) and part.strip() and not re.search("[\ud800-\udfff]", part) for part in fields)
    return fields if good else None


def simple_lines(data: bytes) -> list[bytes]:
    return [line[:-1] if line.endswith(b"\r") else line for line in data.split(b"\n")]


# Mutations ---------------------------------------------------------------------------------------------------------

PIECES = [b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b'"', b"\\", b"{", b"}",
          b",", b":", b" ", b"\\ud800", b"\\u0000", b"3", b"null", b"NaN", b"[", b"]", b"\xef\xbb\xbf", b"\xc2\x85",
          b'"negative": "x", ', b'"negative_1": 1, ', b"-", b"0", b"1e5", b"\x0b", b"\xe2\x80\xa8", b""]  # fmt: skip


def mutate(line: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(line) + 1)
        action = draw.randrange(5)
        if action == 0:
            line = line[:at] + draw.choice(PIECES) + line[at:]
        elif action == 1:
            line = line[:at] + line[at + draw.randint(1, 4) :]
        elif action == 2:
            line = line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
        elif action == 3:
            line = line[:at] + line[draw.randrange(len(line) + 1) :]
        else:
            line = line[:at] + draw.choice(PIECES) + line[at + 1 :]
    return line


WORDS = ["is", "the", "näive", "東京", "😀", "tower,", '"quoted"', "back\\slash", "12", "a/b", "o'clock", "null"]


def texts(draw: random.Random) -> list[str]:
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(3)]


def tsv_line(draw: random.Random) -> bytes:
    return "\t".join(texts(draw)).encode()


def json_line(draw: random.Random) -> bytes:
    return json.dumps(dict(zip(NAMES, texts(draw), strict=True)), ensure_ascii=draw.random() < 0.5).encode()


@pytest.mark.parametrize(
    ("name", "made", "simple", "count"),
    [("t.tsv", tsv_line, simple_tsv, 3_000), ("t.jsonl", json_line, simple_json_row, 2_000)],
)
def test_mutated_lines_of_triples_are_read_right_or_refused(
    tmp_path: Path, name: str, made: Callable, simple: Callable, count: int
) -> None:
    draw = random.Random(1)
    data = b"\n".join([made(draw), *(mutate(made(draw), draw) for _ in range(count))]) + b"\n"
    rows = [simple(line) for line in simple_lines(data) if (line.strip() if "json" in name else line)]
    right = [tuple(row) for row in rows if row is not None]
    assert 0.1 * count < len(right) < 0.9 * count  # both happen, or the test would show nothing
    right = [row for row in right if len(set(map(folded, row))) == 3]
    skipped = SkippedRows()
    loaded = load_triples(write(tmp_path / name, data), skip_bad_rows=True, skipped=skipped)
    assert list(zip(*(loaded[name][:] for name in NAMES), strict=True)) == right
    assert skipped.total == len(rows) - len(right)


def test_what_is_no_json_object_is_refused_by_kind() -> None:
    for line, kind in (
        (b'{"a": 1, "a": 2}', "repeated key"),
        (b'{"a": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'"text"', "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ):
        with pytest.raises(BadRow) as caught:
            parse_json_line(line)
        assert caught.value.kind == kind


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "lines.tsv"
    path.write_bytes("\ufeffa\r\nb\rc\x0b\u2028d\n\ne".encode())
    assert [line.decode() for _, line in byte_lines(path)] == ["a", "b\rc\x0b\u2028d", "", "e"]
