"""What the processes of a run tell one another of a batch, which may be of another size on each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor

from tct_hf.batches import pad_tokens

Similarity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sizes_of_all(size: int, device: torch.device) -> list[int]:
    """A number of every process, in rank order; this one's alone where there are no others."""
    if get_world_size() == 1:
        return [size]
    sizes: list[int] = all_gather(torch.tensor([size], device=device)).tolist()
    return sizes


def gather_rows(rows: Tensor, sizes: list[int], *, with_grad: bool = False) -> Tensor:
    """The rows of all processes, in rank order.

    Args:
        rows: `(rows, ...)` of this process, alike in all but the first dimension.
        sizes: rows of every process, of :func:`sizes_of_all`.
        with_grad: gradients flow back to the process that a row came from.

    Returns:
        `(all rows, ...)`. A process with fewer rows than others sends padding, which is left out here.
    """
    if get_world_size() == 1:
        return rows
    gather = all_gather_with_grad if with_grad else all_gather
    most = max(sizes)
    if min(sizes) == most:
        return gather(rows)
    padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
    gathered = gather(torch.cat([rows, padding]))
    return torch.cat([part[:size] for part, size in zip(gathered.split(most), sizes, strict=True)])


def score_where_the_passages_are(
    queries: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor, columns: int, similarity: Similarity
) -> Tensor:
    """The score matrix of this process's queries against the passages of all processes.

    Query tokens travel, passages stay: every process scores all queries against its own passages and sends each block
    of scores to where its queries came from. A query of 36 tokens of 128 dimensions takes 9 kB in bfloat16 and its
    scores 4 bytes a candidate. The other way, gathering passage tokens, takes 256 bytes for every token of every
    candidate: with one negative, 64 queries a process and 60 tokens a passage 31 kB a query in place of 10 kB, and
    more with every negative and every token. Scores grow with the queries a process: by these figures the two are
    equal at 2,700 of them, and only above that, or where passages are shorter than queries, would passages be cheaper.

    Args:
        queries: `(rows, tokens, dim)` token vectors, sent in their own type.
        query_mask: `(rows, tokens)` bool.
        passages: `(columns * rows, tokens, dim)`, all of the first column first.
        passage_mask: `(columns * rows, tokens)` bool.
        columns: candidate columns.
        similarity: MaxSim of queries, passages and their masks.

    Returns:
        `(rows, candidates)`: all positives in rank order, then all first negatives, and so on.
    """
    device = queries.device
    rows = len(queries)
    shapes = sizes_of_all(queries.shape[1], device)
    sizes = sizes_of_all(rows, device)
    width = max(shapes)
    # As bytes: not every backend sends bfloat16.
    everyones = gather_rows(pad_tokens(queries, width).contiguous().view(torch.uint8), sizes).view(queries.dtype)
    mask = gather_rows(pad_tokens(query_mask, width).to(torch.uint8), sizes).bool()
    block = similarity(everyones, passages, mask, passage_mask).contiguous()  # (all queries, columns * rows)
    received = block.new_empty(rows * columns * sum(sizes))
    dist.all_to_all_single(
        received,
        block.flatten(),
        [rows * columns * size for size in sizes],
        [size * columns * rows for size in sizes],
    )
    parts = [
        part.view(rows, columns, size)
        for part, size in zip(received.split([rows * columns * size for size in sizes]), sizes, strict=True)
    ]
    return torch.cat(parts, dim=2).flatten(1)


def first_row(sizes: list[int]) -> int:
    """Where this process's rows begin among those of all."""
    return sum(sizes[: get_rank()])


def own_places(queries: int, columns: int, device: torch.device, *, gather: bool) -> tuple[Tensor, int]:
    """Where the candidates of this process's own rows stand in the score matrix.

    Args:
        queries: rows of this process.
        columns: candidate columns.
        device: of the result.
        gather: the matrix has the candidates of all processes.

    Returns:
        `(queries, columns)` int64, and how many candidates there are in all.
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
