"""The names that columns of training rows go by."""

from __future__ import annotations

import re
from collections.abc import Mapping

KNOWN = "known_positive_ids"
# False in rows that nobody has judged: a teacher says what their passages are worth.
LABELLED = "labelled"
# A teacher's scores of a row's candidates, positive first.
SCORES = "scores"
# Names that mean something here, each to the form it has in the output; lists are spread over numbered columns.
TEXT = re.compile(r"query|positive|positives|negative|negatives|negative_[1-9][0-9]*")
_ID = re.compile(r"query_id|positive_id|positive_ids|negative_id|negative_ids|negative_[1-9][0-9]*_id|" + KNOWN)


def is_ours(name: str) -> bool:
    """Whether a column name has a meaning for training."""
    return name == LABELLED or bool(TEXT.fullmatch(name) or _ID.fullmatch(name))


def check_mapping(columns: Mapping[str, str | None]) -> None:
    """Refuse a mapping to names that training does not know.

    Args:
        columns: our name to the source's.

    Raises:
        ValueError: with the names there are.
    """
    for name in columns:
        if not is_ours(name):
            raise ValueError(
                f"columns: {name!r} is no column of training; write {{ours: theirs}} with query, positive, negative, "
                f"negatives (a list), negative_1 ..., query_id, positive_id, negative_id, negative_ids, {KNOWN}, "
                f"{LABELLED}"
            )
