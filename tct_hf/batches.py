"""Texts of like length go through an encoder together, so that padding is not computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Features = Mapping[str, Any]

# How many tokens of padding a pass may hold before it pays to start another. On the CPU: 64 to 256 are alike for a
# 6-layer MiniLM on 64 passages of up to 154 tokens, and half the time of one padded pass. Accelerators wait for the
# launch of a pass's kernels, which costs the time of some thousands of tokens: an estimate, not a measurement.
CPU_PADDING = 128
ACCELERATOR_PADDING = 4096


def check_mini_batch_size(size: object) -> None:
    """Refuse a number of rows that no batch can be cut into; None cuts nothing."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(
            f"mini_batch_size must be a whole number, at least 1, or None for no gradient caching; got {size!r}."
        )


def padding_of(device: torch.device) -> int:
    """Tokens of padding that a pass may hold on a device."""
    return CPU_PADDING if device.type == "cpu" else ACCELERATOR_PADDING


def pad_tokens(tensor: Tensor, width: int) -> Tensor:
    """`(rows, tokens, ...)` with zeros after the last token, up to a width."""
    padding = [0, 0] * (tensor.ndim - 2) + [0, width - tensor.shape[1]]
    return torch.nn.functional.pad(tensor, padding)


def take(value: Any, rows: Tensor, width: int) -> Any:
    """Some rows of a `(rows, tokens)` tensor, cut to a width; anything else as it is."""
    return value[rows, :width] if isinstance(value, Tensor) and value.ndim == 2 else value


def stack_columns(columns: Sequence[Features]) -> dict[str, Any] | None:
    """One padded batch of all columns' rows, or None where a tensor is not `(rows, tokens)` like the others."""
    merged = dict(columns[0])
    # Says the same of every row, in whatever form it comes.
    keys = [key for key, value in merged.items() if isinstance(value, Tensor) and key != "prompt_length"]
    for column in columns:
        tensors = [value for key, value in column.items() if isinstance(value, Tensor) and key != "prompt_length"]
        shape = column["attention_mask"].shape if "attention_mask" in column else None
        if len(tensors) != len(keys) or any(key not in column for key in keys):
            return None
        if any(tensor.shape != shape or tensor.ndim != 2 for tensor in tensors):
            return None
    width = max(column["attention_mask"].shape[1] for column in columns)
    return merged | {key: torch.cat([pad_tokens(column[key], width) for column in columns]) for key in keys}


def token_lengths(features: Features) -> list[int]:
    """Up to where each row has tokens, at least 1. Padding on the left counts: cutting it would move positions."""
    used = features["attention_mask"].bool()
    if "query_expansion_positions" in features:  # scored, though the encoder may not attend to them
        used = used | features["query_expansion_positions"].bool()
    ends = used * torch.arange(1, used.shape[1] + 1, device=used.device)
    return ends.amax(1).clamp(min=1).tolist()


def passes(lengths: Sequence[int], budget: int, padding: int) -> list[list[int]]:
    """Rows sorted by length and cut into passes of at most `budget` tokens, `padding` of them padding.

    A single row may be longer than the budget.
    """
    made: list[list[int]] = []
    real = 0  # tokens of the last pass without its padding
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        longest = lengths[row]  # of the pass, were this row in it
        padded = (len(made[-1]) + 1) * longest if made else 0
        if not made or padded > budget or padded - real - longest > padding:
            made.append([])
            real = 0
        made[-1].append(row)
        real += longest
    return made


def parts_of_like_length(merged: Features, budget: int | None = None) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Cut a padded batch into passes.

    Args:
        merged: of :func:`stack_columns`.
        budget: tokens a pass may hold; None for no limit but padding.

    Yields:
        Row numbers `(rows,)` and the features of these rows, cut to the longest of them.
    """
    lengths = token_lengths(merged)
    device = merged["attention_mask"].device
    for rows in passes(lengths, budget or len(lengths) * max(lengths), padding_of(device)):
        index = torch.tensor(rows, device=device)
        width = max(lengths[row] for row in rows)
        yield index, {key: take(value, index, width) for key, value in merged.items()}
