r"""Vectors of one length that is learned: cosine times a scale, in stock sentence-transformers modules.

Normalize makes every vector 1 long, and Dense, whose weight is `s` times the identity and has no bias, makes it `s`
long: a score is `s * s * cosine`. No stock module holds a single number, so that the matrix is what plain
`SentenceTransformer(path)` loads; it costs a product of `dim * dim` a text. Training moves `s` alone.

Its learning rate is the encoder's, by which it hardly moves; the training argument
`learning_rate_mapping={r"\.3\.linear\.weight": 1e-2}` gives it one of its own (3 is the place of Dense).
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
    """The modules after the pooling of a student whose scores are `scale * cosine`.

    Args:
        dim: of the vectors.
        scale: of the scores before training; vectors are `sqrt(scale)` long.

    Raises:
        ValueError: a scale that is not a finite number greater than 0.
    """
    if isinstance(scale, bool) or not 0.0 < scale < float("inf"):
        raise ValueError(
            f"scale={scale!r}: give a finite number greater than 0, such as 20.0, or None for vectors as pooled."
        )
    weight = torch.eye(dim) * math.sqrt(scale)
    return [Normalize(), Dense(dim, dim, bias=False, activation_function=nn.Identity(), init_weight=weight)]


def is_multiple_of_identity(weight: Tensor) -> bool:
    """Whether a matrix is one number times the identity, exactly."""
    square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    return square and torch.equal(weight, torch.diag(weight[0, 0].expand(len(weight))))


def length_of(modules: Sequence[Any]) -> Tensor | None:
    """The weight that makes all vectors one length, None where the modules don't end so.

    Args:
        modules: of a student, or the student.

    Returns:
        `(dim, dim)`, `s` times the identity.
    """
    ends = list(modules)[-2:]
    if [type(module) for module in ends] != [Normalize, Dense]:
        return None
    before, last = ends
    plain = not last.bias and not last.use_residual and isinstance(last.activation_function, nn.Identity)
    names = {before.module_input_name, before.module_output_name, last.module_input_name, last.module_output_name}
    if not plain or names != {"sentence_embedding"} or not is_multiple_of_identity(last.linear.weight.detach()):
        return None
    return last.linear.weight


def _uniform(gradient: Tensor) -> Tensor:
    # The nearest multiple of the identity: every element of the diagonal then takes the same step of the optimiser.
    return torch.diag(gradient.diagonal().mean().expand(len(gradient)))


def keep_scalar(student: Any) -> None:
    """Let training move a student's learned scale and nothing else of its matrix; called again it changes nothing.

    The gradient is replaced where it is made, before it is accumulated or averaged over devices. An optimiser that
    treats equal elements equally (SGD, Adam, AdamW, Adafactor and most others) keeps the matrix exact.

    Args:
        student: with a learned scale; any other model is left alone.
    """
    weight = length_of(getattr(student, "_orig_mod", student))
    if weight is not None and weight.requires_grad and _uniform not in (weight._backward_hooks or {}).values():
        weight.register_hook(_uniform)
