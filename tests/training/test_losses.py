"""The loss over a student: its embeddings, gradient caching, slices, its report, its settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim
from torch import Tensor

from tct_hf import TeacherTargets, TightlyCoupledLoss, build_student
from tct_hf import batches as batching
from tests.models import tiny_bert
from tests.training.test_score_losses import numpy_loss

QUERIES = [
    "what is dense",
    "the teacher",
    "tokens",
    "student of a query",
    "of the passage",
    "retrieval",
    "distillation",
]


def passages(column: int) -> list[str]:
    return [" ".join(["the passage of tokens"] * (1 + (3 * i + column) % 5)) + f" {i} {column}" for i in range(7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("student"), seed=11)


@pytest.fixture
def student(base: Path) -> SentenceTransformer:
    return build_student(str(base), encoding="tct", document_length=64).train()


def features(student: SentenceTransformer, negatives: int) -> list[dict[str, Any]]:
    columns = [(QUERIES, "query"), *((passages(column), "document") for column in range(1 + negatives))]
    return [student.preprocess(texts, prompt=student.prompts[task], task=task) for texts, task in columns]


def targets(negatives: int, *, seed: int = 0) -> TeacherTargets:
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 7 * (1 + negatives))
    mask = torch.rand(shape, generator=generator) < 0.8
    mask.fill_diagonal_(True)
    index = torch.arange(7)
    index[2] = -1
    return TeacherTargets(scores=torch.randn(shape, generator=generator) * 3, mask=mask, positive_index=index)


def total(loss: dict[str, Tensor] | Tensor) -> Tensor:
    return torch.stack(list(loss.values())).sum() if isinstance(loss, dict) else loss


def gradients(student: SentenceTransformer, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def embeddings(student: SentenceTransformer, negatives: int) -> list[np.ndarray]:
    encoded = [student.encode_query(QUERIES)]
    return encoded + [student.encode_document(passages(column)) for column in range(1 + negatives)]


@pytest.mark.parametrize("padding", [0, 40])
def test_passes_of_like_length_change_neither_loss_nor_gradients(
    student: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    loss = TightlyCoupledLoss(student, temperature=0.7)
    widths: list[int] = []
    hook = student.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0]["input_ids"].shape[1]))
    results = []
    for limit in (10**9, padding):
        monkeypatch.setattr(batching, "CPU_PADDING", limit)
        widths.clear()
        value = total(loss(features(student, 2), targets(2)))
        results.append((value.item(), gradients(student, value), len(widths)))
    hook.remove()
    (whole, whole_gradients, one_pass), (value, found, many) = results
    assert one_pass == 2 < many  # queries, passages
    assert value == pytest.approx(whole, abs=1e-6)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_module_scores_dot_products_of_the_columns_in_order(student: SentenceTransformer, negatives: int) -> None:
    loss = TightlyCoupledLoss(student, temperature=0.7, student_temperature=1.5, hard_label_weight=0.3)
    labels = targets(negatives)
    parts = loss(features(student, negatives), labels)
    assert isinstance(parts, dict)
    queries, *columns = embeddings(student, negatives)
    expected = numpy_loss(
        queries.astype(np.float64) @ np.concatenate(columns).astype(np.float64).T,
        labels.scores.numpy(),
        temperature=0.7,
        student_temperature=1.5,
        weight=0.3,
        mask=labels.mask.numpy(),
        positive=labels.positive_index.tolist(),
    )
    assert (parts["hard_label"].item(), parts["distillation"].item()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_matryoshka_is_the_mean_of_the_losses_of_sliced_embeddings(student: SentenceTransformer) -> None:
    labels = targets(1)
    found = TightlyCoupledLoss(student, temperature=1.0, matryoshka_dims=[32, 4, 16])(features(student, 1), labels)
    queries, *columns = embeddings(student, 1)
    expected = [
        numpy_loss(
            queries[:, :d].astype(np.float64) @ np.concatenate(columns)[:, :d].astype(np.float64).T,
            labels.scores.numpy(),
            temperature=1.0,
            student_temperature=1.0,
            weight=0.1,
            mask=labels.mask.numpy(),
            positive=labels.positive_index.tolist(),
        )
        for d in (4, 16, 32)
    ]
    assert found["hard_label"].item() == pytest.approx(np.mean([hard for hard, _ in expected]), rel=1e-4)
    assert found["distillation"].item() == pytest.approx(np.mean([soft for _, soft in expected]), rel=1e-4)


def by_hand(student: SentenceTransformer, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two queries, four candidates. The student's scores are (2, 0, 0, 1) and (0, 1, 3, 0); row 1 masks the third."""
    queries = torch.eye(2)
    columns = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])]
    labels = TeacherTargets(
        scores=torch.tensor([[0.0, 0.0, 0.0, 2 * math.log(3)], [0.0, 0.0, 9.0, -1e9]]),
        mask=torch.tensor([[True, True, True, True], [True, True, False, True]]),
        positive_index=torch.tensor([0, -1]),
    )
    parts = TightlyCoupledLoss(student, temperature=2.0, **settings).compute_loss_from_embeddings(
        [queries, *columns], labels
    )
    return parts, labels.report


def test_report_holds_the_parts_the_entropy_and_the_agreement(student: SentenceTransformer) -> None:
    parts, report = by_hand(student, hard_label_weight=0.5)
    assert set(report) == {"hard_label", "distillation", "teacher_entropy", "top_agreement"}
    assert not any(value.requires_grad for value in report.values())
    hard = math.log(math.exp(2) + 2 + math.e) - 2
    assert report["hard_label"].item() == parts["hard_label"].item() == pytest.approx(0.5 * hard, rel=1e-6)
    assert report["distillation"].item() == parts["distillation"].item()
    # Row 0: probabilities 1/6, 1/6, 1/6, 1/2. Row 1: 1/2, 1/2, and a third that has underflowed.
    entropy = (0.5 * math.log(6) + 0.5 * math.log(2) + math.log(2)) / 2
    assert report["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-6)
    # Row 0: student's top is 0, the teacher's is 3. Row 1: 1 and (a tie of 0 and 1, first) 0.
    assert report["top_agreement"].item() == 0.0


def test_scores_are_float32_under_autocast(student: SentenceTransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(7, 32, generator=generator) * 5 for _ in range(3)]
    loss = TightlyCoupledLoss(student, temperature=1.0)
    plain = loss.compute_loss_from_embeddings(vectors, targets(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss.compute_loss_from_embeddings(vectors, targets(1))
    assert {k: v.item() for k, v in mixed.items()} == {k: v.item() for k, v in plain.items()}


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_teacher_matrix_of_another_shape_is_refused_with_both_shapes(
    student: SentenceTransformer, mini_batch_size: int | None
) -> None:
    loss = TightlyCoupledLoss(student, mini_batch_size=mini_batch_size)
    with pytest.raises(ValueError, match=r"\(7, 7\).*\(7, 14\)"):
        loss(features(student, 1), targets(0))


def embedding_model(base: Path, *modules: Any, similarity: str) -> SentenceTransformer:
    bare = SentenceTransformer(str(base), device="cpu")
    return SentenceTransformer(modules=[*bare, *modules], similarity_fn_name=similarity, device="cpu").train()


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize(("ends", "similarity"), [([Normalize()], "cosine"), ([Normalize()], "dot"), ([], "cosine")])
def test_hard_labels_alone_are_stocks_ranking_loss_of_cosines_times_20(
    base: Path, ends: list[Any], similarity: str, mini_batch_size: int | None
) -> None:
    student = embedding_model(base, *ends, similarity=similarity)
    columns = features(student, 1)
    stock = MultipleNegativesRankingLoss(student, scale=20.0, similarity_fct=cos_sim)([dict(c) for c in columns], None)
    loss = TightlyCoupledLoss(student, hard_label_weight=1.0, mini_batch_size=mini_batch_size)
    assert loss.get_config_dict()["student_scale"] == 20.0
    shape = (7, 14)
    labels = TeacherTargets(torch.zeros(shape), torch.ones(shape, dtype=torch.bool), torch.arange(7))
    found = total(loss(columns, labels))
    assert found.item() == pytest.approx(stock.item(), abs=1e-5)
    wanted, ours = gradients(student, stock), gradients(student, found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-3)


def test_slices_of_a_cosine_students_embeddings_are_normalised(base: Path) -> None:
    student = embedding_model(base, similarity="cosine")
    labels = targets(1)
    parts = TightlyCoupledLoss(student, temperature=0.7, student_scale=5.0, matryoshka_dims=[8, 32])(
        features(student, 1), labels
    )
    queries, *columns = embeddings(student, 1)
    wanted = 0.0
    for d in (8, 32):
        q, p = (v[:, :d] / np.linalg.norm(v[:, :d], axis=1, keepdims=True) for v in (queries, np.concatenate(columns)))
        expected = numpy_loss(
            5.0 * q.astype(np.float64) @ p.astype(np.float64).T,
            labels.scores.numpy(),
            temperature=0.7,
            student_temperature=1.0,
            weight=0.1,
            mask=labels.mask.numpy(),
            positive=labels.positive_index.tolist(),
        )
        wanted += sum(expected) / 2
    assert total(parts).item() == pytest.approx(wanted, abs=1e-5)


def test_a_student_of_dot_products_and_a_learned_scale_are_taken_as_they_are(base: Path) -> None:
    scaled = build_student(str(base), encoding="tct", document_length=64, scale=9.0)
    for student in (embedding_model(base, similarity="dot"), scaled):
        assert TightlyCoupledLoss(student).student_scale == 1.0
    wrong: Any
    for wrong, message in (
        ({"student_scale": 0}, "student_scale=0"),
        ({"matryoshka_dims": [16, 33]}, "33 is not between 1 and the embedding's 32"),
    ):
        with pytest.raises(ValueError, match=message):
            TightlyCoupledLoss(scaled, **wrong)
