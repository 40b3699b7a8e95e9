"""Several teachers as one, against numpy: sums, normalisation, the mixture of own and in-batch candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tct_hf import NoTeacher, Teacher, TeacherEnsemble
from tct_hf.batches import spread_own
from tests.train_helpers import score


class Fixed(Teacher):
    """Says what it is told."""

    def __init__(self, scores: np.ndarray, covers: Literal["own", "in-batch"], scale: float = 1.0) -> None:
        self.scores = torch.tensor(scores, dtype=torch.float64)
        self.covers = covers
        self.training_scale = scale

    def collate(self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Any) -> dict[str, Any]:
        return {"scores": self.scores}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        scores = inputs["scores"].float()
        return spread_own(scores, gather=gather) if self.covers == "own" else scores


def said(ensemble: TeacherEnsemble, queries: int = 3, columns: int = 2) -> np.ndarray:
    found: Tensor = score(ensemble, ["q"] * queries, [["p"] * queries] * columns)
    return found.double().numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def normal(x: np.ndarray, how: str, scale: float) -> np.ndarray:
    if how == "none":
        return x
    if how == "softmax":
        return log_softmax(scale * x)
    return np.stack([(row - row.mean()) / row.std() if row.std() > 0 else 0 * row for row in x])


QUERIES, COLUMNS = 3, 2
PLACES = np.array([[0, 3], [1, 4], [2, 5]])
DRAW = np.random.default_rng(0)
WHOLE, OTHER = DRAW.normal(0, 5, (QUERIES, 6)), DRAW.normal(2, 1, (QUERIES, 6))
OWN, MORE = DRAW.normal(0, 3, (QUERIES, COLUMNS)), DRAW.normal(1, 2, (QUERIES, COLUMNS))


@pytest.mark.parametrize("how", ["standard", "softmax"])
def test_teachers_of_one_kind_are_summed_by_weight(how: Any) -> None:
    whole = TeacherEnsemble([(Fixed(WHOLE, "in-batch", 2.0), 3.0), (Fixed(OTHER, "in-batch"), 1.0)], normalize=how)
    expected = 0.75 * normal(WHOLE, how, 2.0) + 0.25 * normal(OTHER, how, 1.0)
    assert whole.covers == "in-batch" and whole.training_scale == 1.0
    np.testing.assert_allclose(said(whole), expected, atol=1e-5)
    own = TeacherEnsemble({Fixed(OWN, "own"): 1.0, Fixed(MORE, "own", 0.5): 1.0}, normalize=how)
    expected = np.zeros((QUERIES, 6))
    np.put_along_axis(expected, PLACES, 0.5 * normal(OWN, how, 1.0) + 0.5 * normal(MORE, how, 0.5), axis=1)
    assert own.covers == "own"
    np.testing.assert_allclose(said(own), expected, atol=1e-5)


@pytest.mark.parametrize("how", ["standard", "softmax"])
def test_in_a_mixture_the_batch_says_how_much_own_candidates_have_and_all_how_it_is_shared(how: Any) -> None:
    parts = [(Fixed(OWN, "own", 2.0), 2.0), (Fixed(WHOLE, "in-batch", 0.5), 1.5), (Fixed(OTHER, "in-batch"), 0.5)]
    mixed = TeacherEnsemble(parts, normalize=how)
    assert mixed.covers == "in-batch"
    found = said(mixed)
    batch = log_softmax(0.75 * 0.5 * WHOLE + 0.25 * OTHER)
    own, whole, other = OWN, *(np.take_along_axis(x, PLACES, axis=1) for x in (WHOLE, OTHER))
    inside = 0.5 * normal(own, how, 2.0) + 0.375 * normal(whole, how, 0.5) + 0.125 * normal(other, how, 1.0)
    together = np.log(np.exp(np.take_along_axis(batch, PLACES, axis=1)).sum(1, keepdims=True))
    np.put_along_axis(batch, PLACES, together + log_softmax(inside), axis=1)
    np.testing.assert_allclose(found, batch, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1.0, atol=1e-6)  # still a distribution


def test_without_normalisation_weighted_scores_are_the_logits_and_weights_may_be_set_later() -> None:
    whole = [(Fixed(WHOLE, "in-batch", 2.0), 3.0), (Fixed(OTHER, "in-batch"), 0.0)]
    sums = TeacherEnsemble(whole, normalize="none")
    assert sums.weights == [3.0, 0.0] and sums.training_scale == 1.0
    np.testing.assert_allclose(said(sums), 3 * WHOLE, rtol=1e-6)
    sums.weights = [0.5, -2.0]
    np.testing.assert_allclose(said(sums), 0.5 * WHOLE - 2 * OTHER, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(said(sums), 0.5 * WHOLE - 2 * OTHER, rtol=1e-5, atol=1e-5)
    own = TeacherEnsemble([(Fixed(OWN, "own"), 2.0), (Fixed(MORE, "own"), 0.5)], normalize="none")
    found = np.take_along_axis(said(own), PLACES, axis=1)
    np.testing.assert_allclose(found, 2 * OWN + 0.5 * MORE, rtol=1e-5)


def test_without_normalisation_own_candidates_share_what_the_batch_gives_them() -> None:
    parts = [(Fixed(WHOLE, "in-batch", 7.0), 0.3), (Fixed(OWN, "own"), 0.6), (Fixed(OTHER, "in-batch"), 1.5)]
    found = np.exp(said(TeacherEnsemble(parts, normalize="none")))
    logits = 0.3 * WHOLE + 1.5 * OTHER
    for row in range(QUERIES):
        batch = np.exp(logits[row]) / np.exp(logits[row]).sum()
        share = np.exp(logits[row, PLACES[row]] + 0.6 * OWN[row])
        batch[PLACES[row]] = batch[PLACES[row]].sum() * share / share.sum()
        np.testing.assert_allclose(found[row], batch, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(10**6), 10**6).map(lambda x: x / 100), min_size=4, max_size=4),
    st.integers(1, 10**5).map(lambda x: x / 100),
    st.integers(-1000, 1000).map(float),
)
def test_standard_scores_do_not_know_scale_and_shift(row: list[float], scale: float, shift: float) -> None:
    scores = np.array([row], dtype=np.float64)
    one = said(TeacherEnsemble({Fixed(scores, "in-batch"): 1.0}), 1, 4)
    assert np.isfinite(one).all() and abs(one.mean()) < 1e-3
    assert one.std() == 0 or one.std() == pytest.approx(1.0, abs=1e-3)
    if scores.std() > 1e-2 * (np.abs(scores).max() + abs(shift / scale)):
        other = said(TeacherEnsemble({Fixed(scale * scores + shift, "in-batch"): 1.0}), 1, 4)
        np.testing.assert_allclose(other, one, atol=2e-2)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({}, "needs at least one teacher"),
        ({NoTeacher(): 0.0}, "weight of a NoTeacher is 0.0"),
        ({NoTeacher(): math.nan}, "weight of a NoTeacher is nan"),
        ([("colbert", 1.0)], "holds teachers, no str"),
        ({TeacherEnsemble({NoTeacher(): 1.0}): 1.0}, "go into one list"),
    ],
)
def test_what_is_no_ensemble_is_refused(teachers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble(teachers)
    with pytest.raises(ValueError, match='must be "standard", "softmax" or "none"'):
        TeacherEnsemble({NoTeacher(): 1.0}, normalize="rank")  # type: ignore[arg-type]
