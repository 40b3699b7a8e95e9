"""Columns that hold passages as objects, a list of {docid, title, text} a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tct_hf.data.row_parsing import BadRow, get, shown

# What the ids inside such a column are called once they are taken out of it.
IDS_OF = "[].id"
_ID_KEYS = ("docid", "_id", "id")


def is_passages(value: Any) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, dict) for item in value)


def split_passages(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Take lists of passages apart into lists of texts and of ids.

    Args:
        row: the source's.
        columns: those that hold lists of objects.

    Returns:
        The row with texts (title and text, joined by a space) in these columns, and ids in columns of their names
        with `IDS_OF`; an id is None where there is none.

    Raises:
        BadRow: another type, or a passage without text.
    """
    flat = dict(row)
    for name in columns:
        value = get(row, name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
            raise BadRow("mixed types", f"holds {shown(value)} where a list of objects is needed", name)
        for place, item in enumerate(value):
            if "text" not in item:
                raise BadRow("missing column", "a passage without the key 'text'; add it", f"{name}[{place}]")
        flat[name] = [_joined(item["text"], item.get("title")) for item in value]
        flat[name + IDS_OF] = [next((item[key] for key in _ID_KEYS if key in item), None) for item in value]
    return flat


def _joined(text: Any, title: Any) -> Any:
    if isinstance(title, str) and isinstance(text, str):
        return " ".join(part.strip() for part in (title, text) if part.strip())
    return text
