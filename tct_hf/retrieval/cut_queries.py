"""The queries that a model reads only a part of, and the warning of them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from tct_hf.encoding.routes import prompt_of, route_of

logger = logging.getLogger(__name__)


def query_slots(model: Any) -> int | None:
    """Tokens that a query keeps, special tokens and prompt included; None where nothing is cut."""
    first = route_of(model, "query")[0]
    expansion = getattr(first, "query_expansion", None)
    if expansion:
        return int(expansion["length"]) if expansion["strategy"] == "fixed" else None
    slots = getattr(first, "query_length", None) or getattr(first, "max_seq_length", None)
    return None if slots is None or math.isinf(slots) else int(slots)


def filled_rows(model: Any, features: Mapping[str, Any]) -> list[int]:
    """Rows of tokenised queries whose text fills all slots: those that may have been cut."""
    expanded, mask = features.get("query_expansion_positions"), features.get("attention_mask")
    slots = query_slots(model)
    if slots is None or mask is None or mask.ndim != 2:
        return []
    used = mask.sum(dim=1) if expanded is None else (~expanded).sum(dim=1)
    return (used >= slots).nonzero().flatten().tolist()


# Tokenizers to those that cut nothing: asked for that, a model's own would not cut in other threads, either.
_uncut: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# Warnings that were given; each is given once in a process.
_said: set[str] = set()


def say_cut_queries(
    model: Any,
    queries: Sequence[str],
    total: int,
    *,
    beside: int | None = None,
    fix: str = "build the student with a larger query_length",
) -> bool:
    """Warn of those queries, of so many in all, that are longer than their slots; whether there were any.

    `beside`: the slots of a query that is read together with a long passage.
    """
    slots, tokenizer = beside or query_slots(model), getattr(model, "tokenizer", None)
    if slots is None or not queries or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return False
    prompt = prompt_of(model, "query") or ""
    if tokenizer not in _uncut:
        _uncut[tokenizer] = copy.deepcopy(tokenizer)
    tokens = _uncut[tokenizer]([prompt + text for text in queries], verbose=False)["input_ids"]
    cut = [text for text, ids in zip(queries, tokens, strict=True) if len(ids) > slots]
    if cut:
        said = (
            f"Longer than the {slots} tokens that are read of a query{' beside a long passage' if beside else ''}, "
            f"and cut: {len(cut):,} of {total:,} queries (first {cut[0][:60]!r}). Those that differ only after that "
            "are the same to the model: shorten them, or "
        )
        if said not in _said:  # models of one kind say the same of the same queries
            _said.add(said)
            logger.warning(f"{said}{fix}.")
    return bool(cut)
