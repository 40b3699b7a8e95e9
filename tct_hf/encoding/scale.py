r"""Vectors of one length that is learned: cosine times a scale, in stock sentence-transformers modules.

Normalize makes every vector 1 long, and Dense, whose weight is `s` times the identity and has no bias, makes it `s`
long: a score is `s * s * cosine`. No stock module holds a single number, so the matrix is what plain
`SentenceTransformer(path)` loads; it costs a product of `dim * dim` a text. Training moves `s` alone.

Its learning rate is the encoder's, with which it hardly moves; the training argument
`learning_rate_mapping={r"\.3\.linear\.weight": 1e-2}` gives it one of its own (3 is the position of Dense).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn


def scale_modules(dim: int, scale: float) -> list[Module]:
    """The modules after the pooling of a student whose scores are `scale * cosine`, of vectors `sqrt(scale)` long."""
    if isinstance(scale, bool) or not 0.0 < scale < float("inf"):
        raise ValueError(
            f"scale={scale!r}: give a finite number greater than 0, such as 20.0, or None for vectors as pooled."
        )
    weight = torch.eye(dim) * math.sqrt(scale)
    return [Normalize(), Dense(dim, dim, bias=False, activation_function=nn.Identity(), init_weight=weight)]


def length_of(modules: Sequence[Any]) -> Tensor | None:
    """The weight that makes all vectors of a student (or of its modules) one length.

    Returns:
        `(dim, dim)`, exactly `s` times the identity; None where the last modules are no learned scale.
    """
    ends = list(modules)[-2:]
    if [type(module) for module in ends] != [Normalize, Dense]:
        return None
    before, last = ends
    plain = not last.bias and not last.use_residual and isinstance(last.activation_function, nn.Identity)
    names = {before.module_input_name, before.module_output_name, last.module_input_name, last.module_output_name}
    weight = last.linear.weight
    scalar = weight.shape[0] == weight.shape[1] and torch.equal(weight, _diagonal(weight[0, 0], len(weight)))
    return weight if plain and scalar and names == {"sentence_embedding"} else None


def _diagonal(value: Tensor, size: int) -> Tensor:
    return torch.diag(value.detach().expand(size))


def _uniform(gradient: Tensor) -> Tensor:
    # The nearest multiple of the identity: every element of the diagonal then takes the same step of the optimizer.
    return _diagonal(gradient.diagonal().mean(), len(gradient))


def keep_scalar(student: Any) -> None:
    """Let training move a student's learned scale and nothing else of its matrix; a second call changes nothing.

    The gradient is replaced where it is made, before it is accumulated or averaged over devices. An optimizer that
    treats equal elements equally (SGD, Adam, AdamW, Adafactor and most others) keeps the matrix exact. A model without
    a learned scale stays unchanged.
    """
    weight = length_of(getattr(student, "_orig_mod", student))
    if weight is not None and weight.requires_grad and _uniform not in (weight._backward_hooks or {}).values():
        weight.register_hook(_uniform)
