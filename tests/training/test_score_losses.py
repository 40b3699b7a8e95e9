"""The loss as a function of two matrices, against plain numpy in float64 and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tct_hf import coupled_loss
from tests.train_helpers import log_softmax, numpy_loss


def case(
    seed: int, queries: int, negatives: int, *, masked: bool, indexed: bool, empty: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[int] | None]:
    rng = np.random.default_rng(seed)
    candidates = queries * (1 + negatives)
    student = rng.normal(0, 4, (queries, candidates))
    teacher = rng.normal(10, 3, (queries, candidates))
    positive = [int(c) for c in rng.integers(-1, candidates, queries)] if indexed else None
    mask = None
    if masked:
        mask = rng.random((queries, candidates)) < 0.7
        for i in range(queries):
            mask[i, i if positive is None else max(positive[i], 0)] = True
        if empty:
            mask[int(rng.integers(queries))] = False
    return student, teacher, mask, positive


def tensors(mask: np.ndarray | None, positive: list[int] | None) -> dict[str, Any]:
    return {
        "candidate_mask": None if mask is None else torch.from_numpy(mask),
        "positive_index": None if positive is None else torch.tensor(positive),
    }


@settings(max_examples=150, deadline=None)
@given(
    made=st.fixed_dictionaries(
        {"seed": st.integers(0, 2**32 - 1), "queries": st.integers(2, 17), "negatives": st.integers(1, 5)}
        | dict.fromkeys(("masked", "indexed", "empty"), st.booleans())
    ),
    temperature=st.floats(0.05, 20),
    student_temperature=st.floats(0.05, 20),
    weight=st.floats(0, 1),
    margin_weight=st.just(0.0) | st.floats(0.01, 10),
    divisor=st.just(1.0) | st.floats(0.1, 30),
    reverse=st.booleans(),
)
def test_loss_equals_an_independent_numpy_version(
    made: dict[str, Any], weight: float, margin_weight: float, divisor: float, reverse: bool, **temperatures: float
) -> None:
    student, teacher, mask, positive = case(**made)
    theirs = {"weight": weight, "margin_weight": margin_weight, "divisor": divisor, "reverse": reverse, **temperatures}
    ours: dict[str, Any] = {"hard_label_weight": weight, "margin_mse_weight": margin_weight, **temperatures}
    ours |= {"student_divisor": divisor, "kl_direction": "reverse" if reverse else "forward"}
    # A logit is rounded by its size times eps, and low temperatures make large ones.
    logits = max(
        np.abs(student).max() / divisor / min(1.0, temperatures["student_temperature"]),
        np.abs(teacher).max() / temperatures["temperature"],
    )
    for dtype, least in ((np.float64, 1e-10), (np.float32, 1e-5)):
        tolerance = max(least, 4 * float(np.finfo(dtype).eps) * logits)
        s, t = student.astype(dtype), teacher.astype(dtype)
        expected = numpy_loss(s, t, mask=mask, positive=positive, **theirs)  # type: ignore[arg-type]
        parts = coupled_loss(torch.from_numpy(s), torch.from_numpy(t), **ours, **tensors(mask, positive))
        assert list(parts) == ["hard_label", "distillation", "margin_mse"][: len(expected)]
        assert [part.item() for part in parts.values()] == pytest.approx(expected, rel=tolerance, abs=tolerance)


MORE: dict[str, Any] = {"margin_mse_weight": 0.5, "student_divisor": 3.0, "kl_direction": "reverse"}
every_part = pytest.mark.parametrize("more", [{}, MORE], ids=["the paper's", "all parts"])


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@every_part
def test_gradient_equals_finite_differences(masked: bool, indexed: bool, more: dict[str, Any]) -> None:
    student, teacher, mask, positive = case(3, 4, 2, masked=masked, indexed=indexed, empty=masked)
    if positive is not None:
        positive[1] = -1
    given = {"temperature": 2.0, "student_temperature": 1.5, "hard_label_weight": 0.4, **more}
    told = torch.from_numpy(teacher).requires_grad_()

    def loss(scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(coupled_loss(scores, told.detach(), **given, **tensors(mask, positive)).values())

    scores = torch.from_numpy(student / 4).requires_grad_()
    assert torch.autograd.gradcheck(loss, (scores,))
    total(coupled_loss(scores, told, **given, **tensors(mask, positive))).backward()
    assert told.grad is None and scores.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@every_part
def test_extreme_scores_stay_finite(dtype: torch.dtype, more: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    student = ((torch.rand(6, 12, generator=generator) - 0.5) * 2e4).to(dtype).requires_grad_()
    teacher = ((torch.rand(6, 12, generator=generator) - 0.5) * 2e4).to(dtype)
    mask = torch.rand(6, 12, generator=generator) < 0.6
    mask.fill_diagonal_(True)
    mask[4] = False
    parts = coupled_loss(student, teacher, temperature=0.05, student_temperature=0.1, candidate_mask=mask, **more)
    total(parts).backward()
    assert all(torch.isfinite(part) for part in parts.values())
    assert student.grad is not None and torch.isfinite(student.grad).all()


@every_part
def test_masked_candidate_has_no_influence_and_no_gradient(more: dict[str, Any]) -> None:
    student, teacher, mask, _ = case(9, 5, 2, masked=True, indexed=False)
    keep = torch.from_numpy(mask)
    first = torch.from_numpy(student).requires_grad_()
    parts = coupled_loss(first, torch.from_numpy(teacher), candidate_mask=keep, **more)
    total(parts).backward()
    assert first.grad is not None and (first.grad[~keep] == 0).all()
    for wild in (1e6, float("inf"), float("nan")):
        second = first.detach().masked_fill(~keep, wild).requires_grad_()
        other = coupled_loss(second, torch.from_numpy(teacher).masked_fill(~keep, wild), candidate_mask=keep, **more)
        assert {name: value.item() for name, value in other.items()} == {n: v.item() for n, v in parts.items()}
        total(other).backward()
        assert second.grad is not None and torch.equal(second.grad, first.grad)


def test_half_precision_scores_are_compared_in_float32() -> None:
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16() * 10
    half, full = coupled_loss(student, teacher), coupled_loss(student.float(), teacher.float())
    assert all(part.dtype == torch.float32 for part in half.values())
    assert {k: v.item() for k, v in half.items()} == {k: v.item() for k, v in full.items()}


def test_margins_of_a_row_by_hand_and_other_parts_unchanged() -> None:
    student = torch.tensor([[5.0, 3.0, 1.0, 9.0]], dtype=torch.float64)
    teacher = torch.tensor([[20.0, 19.0, 10.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    parts = coupled_loss(student, teacher, margin_mse_weight=0.5, candidate_mask=mask)
    assert parts["margin_mse"].item() == 0.5 * ((2 - 1) ** 2 + (4 - 10) ** 2) / 2
    without = coupled_loss(student, teacher, candidate_mask=mask)
    assert without == {name: parts[name] for name in ("hard_label", "distillation")}


SCORES = torch.zeros(3, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_scores": torch.zeros(3, 5)}, r"one shape, got \(3, 6\) and \(3, 5\)"),
        ({"positive_index": torch.tensor([0, 1])}, r"positive_index has shape \(2,\) and is torch.int64"),
        ({"positive_index": torch.zeros(3)}, "is torch.float32: give one int64 column"),
        ({"positive_index": torch.tensor([0, -2, 1])}, r"positive_index holds \[0, -2, 1\]: columns are 0 to 5"),
        ({"positive_index": torch.tensor([0, 6, 1])}, r"positive_index holds \[0, 6, 1\]"),
        ({"candidate_mask": torch.ones(3, 6)}, r"candidate_mask has shape \(3, 6\) and is torch.float32"),
        ({"candidate_mask": torch.ones(3, 5, dtype=torch.bool)}, r"candidate_mask has shape \(3, 5\)"),
        ({"temperature": 0.0}, r"^temperature=0.0 must be a finite number greater than 0"),
        ({"student_temperature": math.nan}, "student_temperature=nan"),
        ({"hard_label_weight": 1.01}, "hard_label_weight=1.01"),
        ({"margin_mse_weight": math.inf}, "margin_mse_weight=inf"),
        ({"student_divisor": 0.0}, "student_divisor=0.0"),
        ({"kl_direction": "backward"}, "kl_direction='backward' must be 'forward' or 'reverse'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    given = {"student_scores": SCORES, "teacher_scores": SCORES, **arguments}
    with pytest.raises(ValueError, match=message):
        coupled_loss(given.pop("student_scores"), given.pop("teacher_scores"), **given)


def test_hard_labels_are_averaged_with_the_weights_of_their_rows() -> None:
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    settings: dict[str, Any] = {"hard_label_weight": 0.5, "positive_index": torch.tensor([0, 4, -1])}
    parts = coupled_loss(student, teacher, label_weight=torch.tensor([1.0, 0.25, 0.7]), **settings)
    rows = [-log_softmax(student[row].double().numpy())[column] for row, column in ((0, 0), (1, 4))]
    assert parts["hard_label"].item() == pytest.approx(0.5 * (1.0 * rows[0] + 0.25 * rows[1]) / 1.25, rel=1e-5)
    torch.testing.assert_close(parts["distillation"], coupled_loss(student, teacher, **settings)["distillation"])
    assert coupled_loss(student, teacher, label_weight=torch.zeros(3), **settings)["hard_label"].item() == 0.0
