"""Scores as an index of one byte or one bit a component computes them, with gradients that pass straight through."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 32  # bits of a component that is no code


def coded_scores(queries: Tensor, passages: Tensor, passage_bits: int, query_bits: int | None = None) -> Tensor:
    """The score matrix `(queries, candidates)` that Faiss computes from codes of these vectors.

    The gradient is that of dot products with what the codes stand for; rounding itself passes it on unchanged. Ranges
    and centre, which an index takes from its corpus, are those of the passages given.

    Args:
        queries: `(queries, dim)` float.
        passages: `(candidates, dim)` float.
        passage_bits: 8, the 256 levels between the least and the greatest value of each component (Faiss's SQ8); 1,
            signs around the mean of all passages, and two numbers a passage (its RaBitQ); 32, as they are.
        query_bits: bits, 1 to 8, that a component of a query is rounded to, between the least and the greatest of
            its difference from that mean; as they are when None. Of Faiss's indexes RaBitQ has 4, RaBitQfs 8.

    Source: Gao and Long, arXiv 2405.12497, without its random rotation, as Faiss computes it.
    """
    centre, rounded = passages.detach().mean(dim=0), queries
    if query_bits is not None:
        away = queries - centre
        least = away.amin(dim=1, keepdim=True)
        step = (away.amax(dim=1, keepdim=True) - least) / (2**query_bits - 1)
        level = ((away - least) / step.clamp(min=1e-12)).round()
        rounded = _through(queries, centre + least + level * step)
    if passage_bits == 1:
        away = passages - centre
        length = away.square().sum(dim=1, keepdim=True) / away.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)
        coded = _through(away, torch.where(away > 0, length, -length))
        # What query and passage have in common with the centre counts whole: the code holds it as a number.
        return (rounded - centre) @ coded.T + (queries @ centre)[:, None] + away @ centre
    if passage_bits == 8:
        least = passages.amin(dim=0)
        span = passages.amax(dim=0) - least
        level = ((passages - least) / span.clamp(min=1e-12) * 255).floor()
        passages = _through(passages, least + (level + 0.5) / 255 * span)
    return rounded @ passages.T


def _through(values: Tensor, coded: Tensor) -> Tensor:
    """The coded values, whose gradient goes to the values."""
    return values + (coded - values).detach()
