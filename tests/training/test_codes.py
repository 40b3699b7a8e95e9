"""Scores of codes as Faiss computes them, and the loss through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from tct_hf import DenseIndex, TeacherTargets, TightlyCoupledLoss, build_student, coupled_loss
from tct_hf.training.codes import coded_scores
from tests.models import tiny_bert


def vectors(rows: int, dim: int = 24) -> Tensor:
    """Vectors that share a direction, as those of texts do."""
    random = np.random.default_rng(rows)
    return torch.from_numpy((random.normal(size=(rows, dim)) + 0.5).astype(np.float32))


def faiss_scores(factory: str, queries: Tensor, passages: Tensor, query_bits: int | None) -> np.ndarray:
    index: Any = faiss.index_factory(passages.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(passages.numpy())
    index.add(passages.numpy())
    if factory.startswith("RaBitQ"):
        index.qb = query_bits or 0
    values, rows = index.search(queries.numpy(), len(passages))
    return np.take_along_axis(values, rows.argsort(1), 1)


@pytest.mark.parametrize(
    ("factory", "bits", "query_bits"), [("SQ8", 8, None), ("RaBitQ", 1, None), ("RaBitQ", 1, 4), ("RaBitQ", 1, 1)]
)
def test_scores_of_codes_are_those_of_faiss(factory: str, bits: int, query_bits: int | None) -> None:
    queries, passages = vectors(7), vectors(90)
    found = coded_scores(queries, passages, bits, query_bits).numpy()
    np.testing.assert_allclose(found, faiss_scores(factory, queries, passages, query_bits), atol=2e-4)
    assert abs(found - (queries @ passages.T).numpy()).max() > 0.01


@pytest.mark.parametrize(("factory", "bits", "query_bits"), [("SQ8", 8, None), ("RaBitQ", 1, 4)])
def test_a_dense_index_ranks_by_them(factory: str, bits: int, query_bits: int | None) -> None:
    queries, passages = vectors(7), vectors(90)
    index = DenseIndex.build(passages.numpy(), [str(row) for row in range(90)], factory)
    ids, scores = index.search(queries.numpy(), 90)
    expected = coded_scores(queries, passages, bits, query_bits)
    for row, (names, values) in enumerate(zip(ids, scores, strict=True)):
        np.testing.assert_allclose(values, expected[row][[int(name) for name in names]], atol=2e-4)


@pytest.mark.parametrize(("factory", "bits"), [("SQ8", 8), ("RaBitQ", 1)])
def test_gradients_are_those_of_products_with_what_the_codes_stand_for(factory: str, bits: int) -> None:
    queries, passages = vectors(7).requires_grad_(), vectors(90).requires_grad_()
    weights = vectors(630, 1).reshape(7, 90)
    (weights * coded_scores(queries, passages, bits, None)).sum().backward()
    index: Any = faiss.index_factory(24, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(passages.detach().numpy())
    index.add(passages.detach().numpy())
    decoded = torch.from_numpy(index.reconstruct_n(0, 90))
    torch.testing.assert_close(queries.grad, weights @ decoded, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(passages.grad, weights.T @ queries.detach(), atol=1e-3, rtol=1e-4)


def test_equal_passages_and_constant_components_give_finite_scores_and_gradients() -> None:
    queries, passages = torch.zeros(2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    for bits in (32, 8, 1):
        scores = coded_scores(queries, passages, bits, 4)
        torch.testing.assert_close(scores, torch.zeros(2, 3))
        scores.sum().backward()
    assert torch.isfinite(torch.cat([queries.grad, passages.grad])).all()  # type: ignore[list-item]


def test_the_loss_is_the_mean_over_sizes_and_bits(tmp_path: Path) -> None:
    student = build_student(str(tiny_bert(tmp_path, seed=11)), encoding="tct")
    queries, columns = vectors(7), [vectors(7) + 1, vectors(7) * 2]
    teacher = TeacherTargets(vectors(98, 1).reshape(7, 14), torch.ones(7, 14, dtype=torch.bool), torch.arange(7))
    loss = TightlyCoupledLoss(student, matryoshka_dims=[4, 24], passage_bits=[32, 8, 1], query_bits=4)
    found = loss.compute_loss_from_embeddings([queries, *columns], teacher)
    parts = [
        coupled_loss(coded_scores(queries[:, :size], torch.cat(columns)[:, :size], bits, 4), teacher.scores)
        for size in (4, 24)
        for bits in (32, 8, 1)
    ]
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean())
