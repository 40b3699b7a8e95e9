"""What an index refuses: numbers of passages, models that did not build it, ids, and lists of postings."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

from tct_hf.data.ids import is_utf8


def check_k(k: int) -> int:
    """A number of passages a query, of any integer type; refused where it is below 1 or no whole number."""
    try:
        number = operator.index(k)
    except TypeError:
        raise ValueError(f"k: {k!r} is not a whole number; ask for at least one passage") from None
    if number < 1:
        raise ValueError(f"k: {k} is below 1; ask for at least one passage")
    return number


def check_model(where: str | Path, built_by: Mapping[str, Any] | None, model: Mapping[str, Any]) -> None:
    """Refuse a model that did not build an index; both as "model" in what `describe_model` gives.

    They must agree by weights where both are known, otherwise by id, and in all parts of the encoding that both name.
    """
    if not built_by:
        raise ValueError(
            f"{where}: does not say which model built it, so that it can't be compared with "
            f"{model.get('id')!r}; build it again with built_by, or load it without model"
        )
    by = "weights_sha256" if built_by.get("weights_sha256") and model.get("weights_sha256") else "id"
    before, now = built_by.get("encoding") or {}, model.get("encoding") or {}
    others = [part for part in before if part in now and before[part] != now[part]]
    if built_by.get(by) != model.get(by):
        names = [f"{one.get('id')!r} (weights {str(one.get('weights_sha256'))[:12]})" for one in (built_by, model)]
        wrong = f"built by {names[0]}, but queries would be encoded by {names[1]}"
    elif others:
        wrong = f"built by {built_by.get('id')!r} with another {', '.join(others)} than {model.get('id')!r} has"
    else:
        return
    raise ValueError(
        f"{where}: {wrong}: their vectors don't compare; encode queries with the model that built it, or build the "
        "index again with the other"
    )


def described(model: Any) -> Mapping[str, Any]:
    """A model in the words of `check_model`."""
    from tct_hf.retrieval.encode_corpus import describe_model  # torch: an index can be searched without

    found: Mapping[str, Any] = describe_model(model)["model"]
    return found


def check_ids(ids: Sequence[str], count: int, what: str) -> None:
    """Refuse passage ids that do not name `count` things, one or more, each once; `what` is for the message."""
    if len(ids) != count:
        raise ValueError(f"ids: {len(ids)} ids for {count} {what}; pass one id for each")
    if not count:
        raise ValueError(f"{what}: nothing to index; pass at least one passage")
    seen: set[str] = set()
    for at, passage_id in enumerate(ids):
        if not isinstance(passage_id, str):
            raise ValueError(f"ids: number {at} is {passage_id!r}, not a string; convert ids with str")
        if not is_utf8(passage_id):
            raise ValueError(
                f"ids: {passage_id!r} (number {at}) has a lone surrogate, which no file can hold as UTF-8; rename it"
            )
        if passage_id in seen:
            raise ValueError(f"ids: {passage_id!r} comes twice (again at number {at}); make ids unique")
        seen.add(passage_id)


def check_lists(lists: Iterable[np.ndarray], passages: int, verify: bool) -> None:
    """Refuse inverted lists that compiled search would leave its arrays with, as those of a forged index.

    Args:
        lists: weights `(postings,)`, finite and not negative; rows `(postings,)`, rising within a list; and starts
            `(terms + 1,)`, where each term's list begins.
        passages: rows in all.
        verify: look at every posting.
    """
    weights, rows, starts = lists
    if (
        any(array.dtype.kind not in kinds for array, kinds in ((weights, "f"), (rows, "iu"), (starts, "i")))
        or not (passages and starts.ndim == rows.ndim == 1 and rows.shape == weights.shape and len(starts) > 1)
        or (starts[0], starts[-1]) != (0, len(rows))
        or (np.diff(starts) < 0).any()
    ):
        raise ValueError(f"its arrays are not the lists of {passages} passages")
    if verify:
        matrix = csc_matrix((weights, rows, starts), (passages, len(starts) - 1))
        matrix.check_format(full_check=True)
        if not (matrix.has_canonical_format and (np.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError("rows that don't rise, or a weight that is negative, NaN or infinite")
