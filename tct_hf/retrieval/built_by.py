"""Which model an index was built by, and whether another one may search it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def check_model(where: str | Path, built_by: Mapping[str, Any] | None, model: Mapping[str, Any]) -> None:
    """Refuse a model that did not build an index.

    Args:
        where: the index, for the message.
        built_by: "id" and "weights_sha256" of the model that did, and "encoding", a digest of each part of how it
            encodes: "model" in what `describe_model` gives.
        model: the same of the model to encode queries with.

    Raises:
        ValueError: they differ: by weights where both are known, otherwise by id, or in a part of the encoding that
            both name; says which.
    """
    if not built_by:
        raise ValueError(
            f"{where}: does not say which model built it, so that it can't be compared with "
            f"{model.get('id')!r}; build it again with built_by, or load it without model"
        )
    by = "weights_sha256" if built_by.get("weights_sha256") and model.get("weights_sha256") else "id"
    if built_by.get(by) != model.get(by):
        names = [f"{one.get('id')!r} (weights {str(one.get('weights_sha256'))[:12]})" for one in (built_by, model)]
        raise ValueError(
            f"{where}: built by {names[0]}, but queries would be encoded by {names[1]}: their vectors don't "
            "compare; encode queries with the first, or build the index again with the second"
        )
    before, now = built_by.get("encoding") or {}, model.get("encoding") or {}
    if others := [part for part in before if part in now and before[part] != now[part]]:
        raise ValueError(
            f"{where}: built by {built_by.get('id')!r} with another {', '.join(others)} than {model.get('id')!r} has, "
            "whose weights are the same: their vectors don't compare; load the model as it was, or encode the "
            "passages and build the index again"
        )


def described(model: SentenceTransformer | SparseEncoder) -> Mapping[str, Any]:
    """A model in the words of `check_model`."""
    from tct_hf.retrieval.encode import describe_model

    found: Mapping[str, Any] = describe_model(model)["model"]
    return found
