"""Texts of similar length go through an encoder together; rows are gathered across the devices of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import all_gather, get_rank, get_world_size
from torch import Tensor

Features = Mapping[str, Any]
Similarity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# How many tokens of padding a pass may hold before it pays to start another. On the CPU, 64 to 256 take the same time
# for a 6-layer MiniLM on 64 passages of up to 154 tokens, half that of one padded pass. Accelerators wait for the
# launch of a pass's kernels, which costs the time of some thousands of tokens: an estimate, not a measurement.
CPU_PADDING = 128
ACCELERATOR_PADDING = 4096


def padding_of(device: torch.device) -> int:
    """Tokens of padding that a pass may hold on a device."""
    return CPU_PADDING if device.type == "cpu" else ACCELERATOR_PADDING


def pad_tokens(tensor: Tensor, width: int) -> Tensor:
    """`(rows, tokens, ...)` with zeros after the last token, up to a width."""
    padding = [0, 0] * (tensor.ndim - 2) + [0, width - tensor.shape[1]]
    return torch.nn.functional.pad(tensor, padding)


def take(value: Any, rows: Tensor, width: int) -> Any:
    """Some rows of a `(rows, tokens)` tensor, cut to a width; anything else unchanged."""
    return value[rows, :width] if isinstance(value, Tensor) and value.ndim == 2 else value


def stack_columns(columns: Sequence[Features]) -> dict[str, Any] | None:
    """One padded batch of all columns' rows, or None where a tensor is not `(rows, tokens)` like the others."""

    def tensors(column: Features) -> dict[str, Tensor]:
        # prompt_length holds for every row, in whatever form it comes.
        return {key: value for key, value in column.items() if isinstance(value, Tensor) and key != "prompt_length"}

    keys = tensors(columns[0]).keys()
    for column in columns:
        shape = column["attention_mask"].shape if "attention_mask" in column else None
        found = tensors(column)
        if found.keys() != keys or any(tensor.shape != shape or tensor.ndim != 2 for tensor in found.values()):
            return None
    width = max(column["attention_mask"].shape[1] for column in columns)
    return {**columns[0], **{key: torch.cat([pad_tokens(column[key], width) for column in columns]) for key in keys}}


def token_lengths(features: Features) -> list[int]:
    """Where each row's last token ends, at least 1. Padding on the left counts: cutting it would move positions."""
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


def parts_of_similar_length(
    merged: Features, budget: int | None = None, padding: int | None = None
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Cut a padded batch into passes of at most `budget` tokens, `padding` of them padding (None: by its device).

    Yields:
        Row numbers `(rows,)` and the features of these rows, cut to the longest of them.
    """
    lengths = token_lengths(merged)
    device = merged["attention_mask"].device
    for rows in passes(lengths, budget or len(lengths) * max(lengths), padding or padding_of(device)):
        index = torch.tensor(rows, device=device)
        width = max(lengths[row] for row in rows)
        yield index, {key: take(value, index, width) for key, value in merged.items()}


def in_parts(
    merged: Features, forward: Callable[[dict[str, Any]], Sequence[Tensor]], budget: int | None = None
) -> list[Tensor]:
    """What a forward pass makes of a padded batch, in passes of :func:`parts_of_similar_length`.

    Returns:
        Each tensor `(rows, ...)` of `forward`, the rows in their order, the second dimension padded with zeros.
    """
    rows, made = zip(*[(rows, forward(part)) for rows, part in parts_of_similar_length(merged, budget)], strict=True)
    back = torch.cat(rows).argsort()
    return [torch.cat(pad_alike(parts))[back] for parts in zip(*made, strict=True)]


def pad_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`(rows, tokens, ...)` tensors padded with zeros to the widest; those of one dimension as they are."""
    if tensors[0].ndim == 1:
        return list(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    return [tensor if tensor.shape[1] == width else pad_tokens(tensor, width) for tensor in tensors]


def sizes_of_all(size: int, device: torch.device) -> list[int]:
    """One number from every process, in rank order."""
    if get_world_size() == 1:
        return [size]
    return all_gather(torch.tensor([size], device=device)).tolist()


def gather_rows(rows: Tensor, sizes: list[int], *, with_grad: bool = False) -> Tensor:
    """The rows of all processes, in rank order.

    Args:
        rows: `(rows, ...)` of this process; only the first dimension may differ between processes.
        sizes: rows of every process, from :func:`sizes_of_all`.
        with_grad: gradients flow back to the process that a row came from.

    Returns:
        `(all rows, ...)`. A process with fewer rows than others sends padding, which is left out here.
    """
    if get_world_size() == 1:
        return rows
    most = max(sizes)
    if min(sizes) == most:
        return all_gather(rows, with_grad=with_grad)
    padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
    gathered = all_gather(torch.cat([rows, padding]), with_grad=with_grad)
    return torch.cat([part[:size] for part, size in zip(gathered.split(most), sizes, strict=True)])


def score_where_the_passages_are(
    queries: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor, columns: int, similarity: Similarity
) -> Tensor:
    """The score matrix of this process's queries against the passages of all processes.

    Query tokens travel, passages stay: every process scores all queries against its own passages and sends each block
    of scores to the process its queries came from. With one negative, 64 queries a process and 60 tokens a passage,
    that is 10 kB a query instead of the 31 kB of gathering passage tokens, and the gap grows with every negative and
    token. Passages would be cheaper to send only above 2,700 queries a process, or if they were shorter than queries.

    Args:
        queries: `(rows, tokens, dim)` token vectors, sent in their own type.
        query_mask: `(rows, tokens)` bool.
        passages: `(columns * rows, tokens, dim)`, all of the first column first.
        passage_mask: `(columns * rows, tokens)` bool.
        columns: number of candidate columns.
        similarity: MaxSim of queries, passages and their masks.

    Returns:
        `(rows, candidates)`: all positives in rank order, then all first negatives, and so on.
    """
    rows = len(queries)
    width = max(sizes_of_all(queries.shape[1], queries.device))
    sizes = sizes_of_all(rows, queries.device)
    # As bytes: not every backend sends bfloat16.
    everyones = gather_rows(pad_tokens(queries, width).contiguous().view(torch.uint8), sizes).view(queries.dtype)
    mask = gather_rows(pad_tokens(query_mask, width).to(torch.uint8), sizes).bool()
    block = similarity(everyones, passages, mask, passage_mask).contiguous()  # (all queries, columns * rows)
    received = block.new_empty(rows * columns * sum(sizes))
    own = [rows * columns * size for size in sizes]
    dist.all_to_all_single(received, block.flatten(), own, own)
    parts = [part.view(rows, columns, size) for part, size in zip(received.split(own), sizes, strict=True)]
    return torch.cat(parts, dim=2).flatten(1)


def texts_of_all(columns: Sequence[Sequence[str]], *, gather: bool) -> list[str]:
    """The candidates' texts in the order of the score matrix; of all processes with `gather`."""
    of_all: list[Any] = [columns]
    if gather and get_world_size() > 1:
        of_all = [None] * get_world_size()
        dist.all_gather_object(of_all, columns)
    return [text for parts in zip(*of_all, strict=True) for part in parts for text in part]


def first_row(sizes: list[int]) -> int:
    """Position of this process's first row among the rows of all processes."""
    return sum(sizes[: get_rank()])


def own_places(queries: int, columns: int, device: torch.device, *, gather: bool) -> tuple[Tensor, int]:
    """Columns of the score matrix that hold the candidates of this process's own rows.

    Returns:
        `(queries, columns)` int64, and the number of all candidates.
    """
    sizes = sizes_of_all(queries, device) if gather else [queries]
    rows = torch.arange(queries, device=device) + (first_row(sizes) if gather else 0)
    return rows[:, None] + sum(sizes) * torch.arange(columns, device=device), sum(sizes) * columns


def spread_own(scores: Tensor, *, gather: bool) -> Tensor:
    """The score matrix of a teacher that knows a query's own candidates only.

    Args:
        scores: `(queries, columns)`.
        gather: the matrix has the candidates of all processes.

    Returns:
        `(queries, candidates)`: the scores in their places, zeros elsewhere.
    """
    queries, columns = scores.shape
    places, candidates = own_places(queries, columns, scores.device, gather=gather)
    return scores.new_zeros(queries, candidates).scatter_(1, places, scores)
