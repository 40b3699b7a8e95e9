"""The arithmetic of the coupled loss, as pure functions of a student's and a teacher's score matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

KLDirection = Literal["forward", "reverse"]
Distance = Literal["cosine", "squared"]
Ranges = Mapping[str, tuple[Callable[[Any], Any], str]]  # of a setting: whether a value is in its range, and the range
# Beyond, scores overflow in float32 or gradients vanish.
_FACTOR = (lambda value: 1e-6 <= value <= 1e6), "a finite number greater than 0, from 1e-06 to 1e+06"
_WEIGHT = (lambda value: 0.0 <= value <= 1e6), "a finite number from 0 to 1e+06"
LOSS_SETTINGS: Ranges = {
    "temperature": _FACTOR,
    "student_temperature": _FACTOR,
    "hard_label_weight": (lambda value: 0.0 <= value <= 1.0, "a number from 0 to 1"),
    "distillation_weight": _WEIGHT,
    "margin_mse_weight": _WEIGHT,
    "student_divisor": _FACTOR,
    "embedding_weight": _WEIGHT,
    "embedding_distance": (lambda value: value in get_args(Distance), "'cosine' or 'squared'"),
    "student_scale": _FACTOR,
    "kl_direction": (lambda value: value in get_args(KLDirection), "'forward' or 'reverse'"),
    "candidates": (lambda value: value in ("in-batch", "own"), "'in-batch' or 'own'"),
    "mini_batch_size": (
        lambda value: type(value) is int and value >= 1,
        "a whole number, at least 1, or None for no gradient caching",
    ),
    "matryoshka_dims": (
        lambda value: isinstance(value, list) and value and all(type(d) is int and d > 0 for d in value),
        "a list of whole numbers above 0, such as [96, 192, 384]",
    ),
    "passage_bits": (
        lambda value: isinstance(value, list) and value and {*value} <= {32, 8, 1},
        "a list of 32, 8 and 1, such as [32, 1]",
    ),
    "query_bits": (lambda value: type(value) is int and 1 <= value <= 8, "a whole number from 1 to 8"),
    "self_coupled": (lambda value: len(value) == 2, "the weights of the pooled score and of MaxSim"),
}
_NEEDED = (  # None is no value of these
    "kl_direction", "candidates", "embedding_weight", "embedding_distance", "start", "shape", "until",
    "regularizer_warmup", "regularizer_warmup_shape",
)  # fmt: skip
NUMBERS = tuple(LOSS_SETTINGS)[:6]  # that may follow a schedule


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores `(queries, candidates)` with -inf where the bool mask is False; as they are without a mask."""
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is of half precision, else as it is."""
    # bfloat16 keeps 8 bits: score differences that matter are lost in a softmax over it.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_settings(settings: Mapping[str, Any], ranges: Ranges = LOSS_SETTINGS) -> None:
    """Refuse settings that are out of range, by name; None is not set."""
    for name, value in settings.items():
        fits, wanted = ranges.get(name, (lambda value: True, ""))
        try:
            wrong = not fits(value) if value is not None else name in _NEEDED
        except TypeError:  # compared with a number
            wrong = True
        if wrong:
            raise ValueError(f"{name}={value!r} must be {wanted}.")
    if settings.get("self_coupled") is not None and settings.get("mini_batch_size") is not None:
        raise ValueError(
            "self_coupled compares the token vectors of a whole batch: leave out mini_batch_size, or self_coupled."
        )


def _check_columns(shape: torch.Size, candidate_mask: Tensor | None, positive_index: Tensor) -> None:
    for name, tensor, wanted, dtype, what in (
        ("candidate_mask", candidate_mask, shape, torch.bool, "bool for each query and candidate"),
        ("positive_index", positive_index, shape[:1], torch.int64, "int64 column for each query, -1 without a label"),
    ):
        if tensor is not None and (tensor.shape != wanted or tensor.dtype != dtype):
            found = f"has shape {tuple(tensor.shape)} and is {tensor.dtype}"
            raise ValueError(f"{name} {found}: give one {what}, {tuple(wanted)}.")
    # Elsewhere reading values would make the host wait for the device at every step.
    if positive_index.device.type == "cpu" and ((positive_index < -1) | (positive_index >= shape[1])).any():
        raise ValueError(
            f"positive_index holds {positive_index.tolist()}: columns are 0 to {shape[1] - 1}, and -1 is no label."
        )


def coupled_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    temperature: float = 0.25,
    student_temperature: float = 1.0,
    hard_label_weight: float = 0.1,
    distillation_weight: float | None = None,
    margin_mse_weight: float = 0.0,
    student_divisor: float = 1.0,
    kl_direction: KLDirection = "forward",
    candidate_mask: Tensor | None = None,
    positive_index: Tensor | None = None,
    label_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of tightly-coupled distillation as a pure function of two score matrices.

    `hard_label_weight * -log P_student(positive) + distillation_weight * KL(P_teacher || P_student)`, the first
    averaged over labelled rows, the second over all rows. `P_teacher = softmax(teacher / temperature)`; the student's
    temperature divides its scores in the distillation part only, and there is no temperature-squared factor. MarginMSE
    is added with its own weight: for each labelled row the mean, over the candidates other than the positive, of
    `((s_positive - s_c) - (t_positive - t_c))^2`, averaged over labelled rows.

    Args:
        student_scores: `(queries, candidates)`, the student's raw scores (dot products).
        teacher_scores: `(queries, candidates)`, the teacher's raw scores; no gradient flows into them.
        temperature: divisor of the teacher's scores. The paper's 0.25 belongs to its own teacher.
        student_temperature: divisor of the student's scores in the distillation part.
        hard_label_weight: weight of the hard labels, from 0 to 1 (gamma of the paper).
        distillation_weight: weight of the teacher's scores; 1 - hard_label_weight when None.
        margin_mse_weight: weight of MarginMSE, which compares raw scores: no temperature, only `student_divisor`.
        student_divisor: divisor of the student's scores in every part, for a student whose scores are on another
            scale than the teacher's.
        kl_direction: "forward", KL(teacher || student), the paper's: the student covers all that the teacher finds
            likely; or "reverse", KL(student || teacher): it keeps to what the teacher finds likely.
        candidate_mask: `(queries, candidates)` bool, False for candidates that do not count. The loss of a row whose
            positive is masked out is infinite; a row without any candidate adds 0 to every sum.
        positive_index: `(queries,)` int64, the column of each row's positive; column i for row i when None; -1 for a
            row without a label, which takes part in the distillation only.
        label_weight: `(queries,)` float, weight of each row's hard label in their mean; equal weights when None.

    Returns:
        `{"hard_label": (), "distillation": ()}`, each already weighted, so that their sum is the loss; with a
        `margin_mse_weight` above 0 also "margin_mse".

    Raises:
        ValueError: shapes or types that do not fit, a setting or (on the CPU) a column outside its range.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2, equations 4 and 5. MarginMSE: Hofstätter et al., arXiv
    2010.02666, equation 8.
    """
    if student_scores.ndim != 2 or student_scores.shape != teacher_scores.shape:
        raise ValueError(
            "student_scores and teacher_scores must be two (queries, candidates) matrices of one shape, got "
            f"{tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}."
        )
    if positive_index is None:
        positive_index = torch.arange(len(student_scores), device=student_scores.device)
    _check_columns(student_scores.shape, candidate_mask, positive_index)
    check_settings(
        {
            "temperature": temperature,
            "student_temperature": student_temperature,
            "hard_label_weight": hard_label_weight,
            "distillation_weight": distillation_weight,
            "margin_mse_weight": margin_mse_weight,
            "student_divisor": student_divisor,
            "kl_direction": kl_direction,
        }
    )
    if distillation_weight is None:
        distillation_weight = 1.0 - hard_label_weight
    student_scores = at_least_float32(student_scores) / student_divisor
    teacher_scores = teacher_scores.detach().to(student_scores.dtype)
    margins = None
    if margin_mse_weight > 0:
        margins = _margin_mse(student_scores, teacher_scores, candidate_mask, positive_index)

    student_scores = masked(student_scores, candidate_mask)
    teacher_scores = masked(teacher_scores, candidate_mask)
    counts = torch.ones(len(student_scores), dtype=torch.bool, device=student_scores.device)
    if candidate_mask is not None:
        # A softmax over no candidate at all is nan: such rows keep finite scores here and are left out below.
        counts = candidate_mask.any(dim=1)
        student_scores = student_scores.masked_fill(~counts.unsqueeze(1), 0.0)
        teacher_scores = teacher_scores.masked_fill(~counts.unsqueeze(1), 0.0)

    teacher_log_p = torch.log_softmax(teacher_scores / temperature, dim=1)
    student_log_p = torch.log_softmax(student_scores / student_temperature, dim=1)
    if kl_direction == "forward":
        teacher_p = teacher_log_p.exp()
        # Where the teacher gives nothing (masked, or underflow) both logs may be -inf: 0 * (-inf - -inf) is nan.
        divergence = torch.where(teacher_p > 0, teacher_p * (teacher_log_p - student_log_p), 0.0)
    else:
        # The gradient flows through both factors: masked candidates must be gone before they meet.
        difference = student_log_p - teacher_log_p
        if candidate_mask is not None:
            difference = difference.masked_fill(~candidate_mask, 0.0)
        divergence = student_log_p.exp() * difference
    distillation = divergence.sum(dim=1).masked_fill(~counts, 0.0).mean()

    labelled = positive_index >= 0
    log_p = torch.log_softmax(student_scores, dim=1)
    positive_log_p = log_p.gather(1, positive_index.clamp(min=0).unsqueeze(1)).squeeze(1)
    weight = labelled.to(log_p.dtype) if label_weight is None else label_weight.to(log_p.dtype) * labelled
    # torch.where, not a product: an unlabelled row may hold -inf, and 0 * -inf is nan.
    hard_label = -(weight * torch.where(labelled & counts, positive_log_p, 0.0)).sum()
    hard_label = hard_label / weight.sum().masked_fill(weight.sum() == 0, 1.0)
    parts = {
        "hard_label": hard_label_weight * hard_label,
        "distillation": distillation_weight * distillation,
    }
    return parts if margins is None else {**parts, "margin_mse": margin_mse_weight * margins}


def _margin_mse(
    student_scores: Tensor, teacher_scores: Tensor, candidate_mask: Tensor | None, positive_index: Tensor
) -> Tensor:
    """`()`, the mean over labelled rows of each row's mean squared difference of margins."""
    positive = positive_index.clamp(min=0).unsqueeze(1)
    counts = torch.ones_like(student_scores, dtype=torch.bool) if candidate_mask is None else candidate_mask
    labelled = (positive_index >= 0) & counts.gather(1, positive).squeeze(1)  # a row without candidates has no margins
    others = (counts & labelled.unsqueeze(1)).scatter(1, positive, False)
    # The difference of margins is the margin of differences. Masked scores may be nan: filled, not multiplied by 0.
    difference = (student_scores - teacher_scores).masked_fill(~counts, 0.0)
    squares = (difference.gather(1, positive) - difference).square().masked_fill(~others, 0.0)
    return (squares.sum(1) / others.sum(1).clamp(min=1)).sum() / (positive_index >= 0).sum().clamp(min=1)


def teacher_entropy(teacher_scores: Tensor, candidate_mask: Tensor, temperature: float) -> Tensor:
    """Entropy `(queries,)` in nats of the teacher's distribution over each row `(queries, candidates)`."""
    log_p = torch.log_softmax(masked(teacher_scores, candidate_mask) / temperature, dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


def device_shares(positive_index: Tensor, label_weight: Tensor | None) -> dict[str, Tensor]:
    """What turns this device's mean of each part into its share of the mean over all devices' rows.

    A distributed wrapper averages over the devices, however many rows each of them holds.
    """
    labelled = (positive_index >= 0).float()
    weight = labelled if label_weight is None else label_weight * labelled
    local = torch.stack([weight.sum(), labelled.sum(), torch.ones_like(labelled).sum()])
    shares = torch.ones_like(local)
    if get_world_size() > 1:
        total = local.clone()
        dist.all_reduce(total)
        shares = local * get_world_size() / total.masked_fill(total == 0, 1.0)
    return dict(zip(("hard_label", "margin_mse", "distillation", "embedding"), (*shares, shares[-1]), strict=True))
