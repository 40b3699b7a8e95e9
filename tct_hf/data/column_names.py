"""The names that columns of training rows go by."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

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


_CANDIDATE = re.compile(r"positive|negative|negative_[1-9][0-9]*")


_IDENTIFIER = re.compile(
    r"query_id|(positive|negative|negative_[1-9][0-9]*)_id|known_positive_ids|labelled|label_weight"
)


# Scores that a teacher may read (a list, or one a candidate), and what mining records of a row.
_RECORD = re.compile(r"origin|scores|label|(positive|negative|negative_[1-9][0-9]*)(_teacher)?_score")


def candidate_columns(names: Sequence[str], *, read: Collection[str] = ()) -> list[str]:
    """The candidate columns of a data set in the order of the score matrix: positive, then the negatives.

    Args:
        names: all columns of the data set.
        read: those of other names that the teacher reads.

    Returns:
        `["positive", "negative"]`, or `["positive", "negative_1", ..., "negative_n"]`, n >= 0.

    Raises:
        ValueError: a column is missing, unknown or numbered with a gap, with the mend.
    """
    known = {name for name in names if name == "query" or _CANDIDATE.fullmatch(name)}
    others = {*read, "dataset_name"}
    unknown = [
        name
        for name in names
        if name not in known | others and not _IDENTIFIER.fullmatch(name) and not _RECORD.fullmatch(name)
    ]
    missing = [name for name in ("query", "positive") if name not in known]
    if missing or unknown:
        raise ValueError(
            f"The data set has the columns {list(names)}, but "
            + " and ".join(
                [f"{name!r} is missing" for name in missing] + [f"{name!r} is not known" for name in unknown]
            )
            + ". Training takes query, positive, negative (or negative_1 to negative_n), and ids as query_id, "
            "positive_id, negative_id (or negative_1_id ...), known_positive_ids, labelled and label_weight: "
            "rename_column or remove_columns."
        )
    negatives = [name for name in names if name in known and name.startswith("negative")]
    wanted = ["negative"] if negatives == ["negative"] else [f"negative_{i + 1}" for i in range(len(negatives))]
    if sorted(negatives) != sorted(wanted):
        raise ValueError(
            f"The negative columns are {negatives}: name one negative, or several negative_1 to negative_n without a "
            "gap."
        )
    return ["positive", *wanted]
