"""The names of the columns of training rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

KNOWN = "known_positive_ids"
# Where passages have no ids: hashes of the texts that are positives of a row's query, in whichever row.
KNOWN_TEXTS = "known_positives"
# False in rows that are not judged: a teacher says what their passages are worth.
LABELLED = "labelled"
# A teacher's scores of a row's candidates, positive first.
SCORES = "scores"
_NUMBERED = "negative_[1-9][0-9]*"
TEXT = re.compile(rf"query|positives?|negatives?|{_NUMBERED}")
_ID = re.compile(rf"query_id|positive_ids?|negative_ids?|{_NUMBERED}_id|{KNOWN}|{LABELLED}")
# What no row may lack where its column is there.
IN_EVERY_ROW = re.compile(rf"(query|positive|negative|{_NUMBERED})(_id)?|{LABELLED}|label_weight")
_CANDIDATE = re.compile(rf"positive|negative|{_NUMBERED}")
# Ids and labels beside the texts, scores that a teacher may read (a list, or one a candidate), and mining's records.
_BESIDE = re.compile(
    rf"(query|positive|negative|{_NUMBERED})_id|{KNOWN}|{KNOWN_TEXTS}|{LABELLED}|label_weight|origin|scores|label"
    rf"|(positive|negative|{_NUMBERED})(_teacher)?_score"
)


def negative_columns(count: int) -> list[str]:
    """Names of so many negatives: negative, or negative_1 to negative_n."""
    return ["negative"] if count == 1 else [f"negative_{place + 1}" for place in range(count)]


def is_ours(name: str) -> bool:
    """Whether a column name has a meaning for training."""
    return bool(TEXT.fullmatch(name) or _ID.fullmatch(name))


def candidate_columns(names: Sequence[str], *, read: Collection[str] = ()) -> list[str]:
    """The candidate columns in the order of the score matrix, of all columns `names`, of which a teacher reads `read`.

    Raises:
        ValueError: a column is missing, unknown or numbered with a gap; says the fix.
    """
    known = {name for name in names if name == "query" or _CANDIDATE.fullmatch(name)}
    others = {*known, *read, "dataset_name"}
    wrong = [f"{name!r} is missing" for name in ("query", "positive") if name not in known]
    wrong += [f"{name!r} is not known" for name in names if name not in others and not _BESIDE.fullmatch(name)]
    if wrong:
        takes = (
            "query, positive, negative (or negative_1 to negative_n), ids as query_id, positive_id, negative_id ..."
        )
        raise ValueError(
            f"The data set has the columns {list(names)}, but {' and '.join(wrong)}. Training takes {takes}, "
            "known_positive_ids, labelled and label_weight: rename_column or remove_columns."
        )
    negatives = [name for name in names if name in known and name.startswith("negative")]
    wanted = ["negative"] if negatives == ["negative"] else [f"negative_{i}" for i in range(1, len(negatives) + 1)]
    if sorted(negatives) != sorted(wanted):
        fix = "name one negative, or several negative_1 to negative_n without a gap"
        raise ValueError(f"The negative columns are {negatives}: {fix}.")
    return ["positive", *wanted]
