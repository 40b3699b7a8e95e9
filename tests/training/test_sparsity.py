"""The regulariser, its warm-up and the watch over active dimensions, against numpy and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss
from torch import nn

from tct_hf.training.sparse import FlopsOfAllDevices, RegularizerWarmup


def vectors(seed: int, texts: int, dims: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(-0.5, 1.0, (texts, dims)), 0.0)


@given(
    seed=st.integers(0, 2**32 - 1),
    texts=st.integers(1, 9),
    dims=st.integers(1, 30),
    threshold=st.none() | st.integers(0, 20),
)
def test_flops_are_the_squared_mean_weights_of_texts_above_the_threshold(
    seed: int, texts: int, dims: int, threshold: int | None
) -> None:
    weights = vectors(seed, texts, dims)
    expected = 0.0
    for column in range(dims):
        counted = [row[column] for row in weights if threshold is None or sum(row > 0) > threshold]
        expected += (sum(counted) / texts) ** 2
    model: Any = None
    found = FlopsOfAllDevices(model, threshold).compute_loss_from_embeddings(torch.from_numpy(weights))
    stock = FlopsLoss(model, threshold).compute_loss_from_embeddings(torch.from_numpy(weights))
    assert found.item() == pytest.approx(expected, rel=1e-12) == stock.item()


def test_flops_of_half_precision_are_added_in_float32() -> None:
    weights = torch.from_numpy(vectors(0, 8, 300)).bfloat16()
    model: Any = None
    found = FlopsOfAllDevices(model).compute_loss_from_embeddings(weights)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(float((weights.double().mean(0) ** 2).sum()), rel=1e-6)


class Part(nn.Module):
    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> torch.Tensor:
        return torch.zeros(())


def warmed(steps: int, *, query: float | None = 4.0, **settings: Any) -> list[tuple[float, float | None]]:
    model: Any = nn.Identity()
    loss = SpladeLoss(model, Part(), document_regularizer_weight=2.0, query_regularizer_weight=query)
    warmup = RegularizerWarmup(loss, **settings)
    state: Any = SimpleNamespace(max_steps=steps, global_step=0)
    nothing: Any = None
    warmup.on_train_begin(nothing, state, nothing)
    found = []
    for state.global_step in range(steps):
        warmup.on_step_begin(nothing, state, nothing)
        found.append((loss.document_regularizer_weight, loss.query_regularizer_weight))
    return found


def test_warm_up_goes_over_a_share_or_a_number_of_steps_or_is_left_out() -> None:
    assert warmed(8, warmup=0.5, shape="quadratic") == [(2 * s, 4 * s) for s in (0, 1 / 16, 1 / 4, 9 / 16, 1, 1, 1, 1)]
    assert warmed(5, warmup=2, shape="linear") == [(2 * s, 4 * s) for s in (0, 0.5, 1, 1, 1)]
    assert warmed(2, warmup=0.0, shape="linear") == [(2.0, 4.0)] * 2
    assert warmed(3, query=None, warmup=2, shape="linear") == [(0.0, None), (1.0, None), (2.0, None)]
