"""What the fields of a file of triples are: texts or ids, by its first lines and what they can be looked up in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tct_hf.data.row_parsing import BadRow, byte_lines, decode
from tct_hf.data.sources import TsvSource

# First lines that are recognised as a header, whatever the columns are used for; so is one of nothing but id columns.
_HEADERS = (
    ("query", "positive", "negative"),
    ("anchor", "positive", "negative"),
    ("query", "pos", "neg"),
)
_ID_NAME = re.compile(r"(q|p|(query|pos|neg|passage|doc|corpus)[_-]?|(positive|negative)([_-]?[0-9]+)?[_-]?)id[+-]?")


def open_tsv(
    path: Path,
    columns: Mapping[str, str | None] | None,
    *,
    has_queries: bool,
    has_passages: bool,
    num_negatives: int | None,
) -> TsvSource:
    """Open a file of triples; fields go by position, or with `columns` by the header that the file then must have.

    Args:
        path: the file, plain or .gz.
        columns: our name to the header's.
        has_queries: queries stand there as ids.
        has_passages: passages stand there as ids.
        num_negatives: fields after the positive, 1 when None.

    Raises:
        ValueError: an empty file, a header with equal names, or ids that there are no texts for.
    """
    lines = _first_lines(path)
    first = lines[0]
    if any(theirs is not None for theirs in (columns or {}).values()):
        if len(set(first)) != len(first):
            raise ValueError(f"{path}, line 1: columns= needs a header, and this one has equal names: {first}")
        return TsvSource(path, first, header=True)
    count = 1 if num_negatives is None else num_negatives
    numbered = ["negative"] if count == 1 else [f"negative_{place + 1}" for place in range(count)]
    suffix = "_id" if has_passages else ""
    names = ["query_id" if has_queries else "query", *(f"{name}{suffix}" for name in ("positive", *numbered))]
    lower = tuple(field.strip().lower() for field in first)
    of_ids = bool(lower) and all(_ID_NAME.fullmatch(field) for field in lower)
    header = of_ids or lower in _HEADERS or first == names
    # Numbers are taken for ids in the first line with data; it shows what the others are.
    numbers = len(lines) > header and len(lines[header]) == len(names) and all(map(str.isdigit, lines[header]))
    lacks = [name for name, there in (("queries", has_queries), ("collection", has_passages)) if not there]
    if lacks and (of_ids or numbers):
        shown, what = (first, "are names of ids") if of_ids else (lines[header], "look like ids")
        raise ValueError(
            f"{path}, line {1 if of_ids else header + 1}: {shown} {what}, not texts; pass "
            f"{' and '.join(f'{name}=' for name in lacks)} with their texts"
            + ("; remove this line if they are texts" if of_ids else "")
        )
    return TsvSource(path, names, header=header)


def _first_lines(path: Path) -> list[list[str]]:
    """The fields of the first two lines; none where a line can't be read, which is said when its turn comes."""
    found: list[list[str]] = []
    for _, line in byte_lines(path):
        try:
            found.append(decode(line).split("\t"))
        except BadRow:
            found.append([])
        if len(found) == 2:
            break
    if not found:
        raise ValueError(f"{path}: no row to train on; it is empty")
    return found
