"""Sparse students: loss and regularisers against numpy, gradient caching, warm-up, checkpoints and the watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    FlopsLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from tct_hf import (
    ColBERTTeacher,
    CollapsedStudent,
    LossSchedule,
    NoTeacher,
    Schedule,
    SparseTCTTrainer,
    SparseTCTTrainingArguments,
    TCTTrainer,
    TightlyCoupledLoss,
)
from tct_hf.training.sparse_trainer import FlopsOfAllDevices
from tests.train_helpers import EVERY_STEP, batch_and_targets, logged, make_trainer, reference_of_batch, triples


@pytest.fixture
def student(sparse: Any) -> Any:
    return sparse


@pytest.mark.parametrize(("candidates", "threshold"), [("in-batch", None), ("own", 100)])
def test_the_loss_is_numpys(
    student: Any, trainer_of: Any, teacher: Any, candidates: str, threshold: int | None
) -> None:
    rows = triples(8)
    settings: dict[str, Any] = {"margin_mse_weight": 0.05, "student_divisor": 3.0, "candidates": candidates}
    for side, weight in (("document", 0.02), ("query", 0.03)):
        settings |= {f"{side}_regularizer_weight": weight, f"{side}_regularizer_threshold": threshold}
    trainer = trainer_of(rows, **settings)
    found = trainer.compute_loss(trainer.model, batch_and_targets(trainer)[0]).item()
    given = {"temperature": 1.0, "student_temperature": 2.0, "weight": 0.1}  # of a sparse student that names none
    given |= {"margin_weight": 0.05, "divisor": 3.0}
    parts = reference_of_batch(student, teacher, rows, own_only=candidates == "own", **given)

    def flops(vectors: Any) -> float:
        dense = vectors.to_dense().double().cpu().numpy()
        counted = dense if threshold is None else dense * ((dense > 0).sum(1, keepdims=True) > threshold)
        return float((counted.mean(0) ** 2).sum())

    of_passages = flops(student.encode_document([*rows["positive"], *rows["negative"]]))
    expected = sum(parts) + 0.02 * of_passages + 0.03 * flops(student.encode_query(rows["query"]))
    assert found == pytest.approx(expected, rel=1e-4)


def test_default_temperatures_are_two_at_the_teachers_scale(student: Any, teacher: Any, tmp_path: Path) -> None:
    scaled = ColBERTTeacher(teacher.model, training_scale=4.0)
    loss = make_trainer(tmp_path, student, scaled, triples(8), temperature=None).loss
    assert type(loss) is SpladeLoss and loss.loss.temperature == 0.5 and loss.loss.student_temperature == 2.0


def test_cached_gradients_are_those_of_the_whole_batch(student: Any, trainer_of: Any) -> None:
    def gradients(**settings: Any) -> dict[str, torch.Tensor]:
        settings |= {"document_regularizer_weight": 0.02, "query_regularizer_weight": 0.03, "margin_mse_weight": 0.1}
        trainer = trainer_of(triples(8, negatives=2), **settings)
        if settings.get("mini_batch_size"):
            assert type(trainer.loss) is CachedSpladeLoss and trainer.loss.loss.mini_batch_size is None
        student.zero_grad()
        trainer.compute_loss(trainer.model, batch_and_targets(trainer)[0]).backward()
        return {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}

    student.double()  # in float32 the two orders of adding differ more on some processors
    torch.testing.assert_close(gradients(mini_batch_size=3), gradients(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("warmup", "shape", "shares"),
    [(2, "linear", [0.0, 0.5, 1.0, 1.0]), (0.5, "quadratic", [0.0, 0.25, 1.0, 1.0]), (0, "linear", [1.0] * 4)],
)
def test_warm_up_and_schedules_reach_the_loss_at_every_step(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch, warmup: float, shape: str, shares: list[float]
) -> None:
    settings: dict[str, Any] = {"document_regularizer_weight": 0.4, "query_regularizer_weight": 0.8}
    settings |= {"regularizer_warmup": warmup, "regularizer_warmup_shape": shape, "max_steps": 4}
    trainer = trainer_of(triples(32), **settings)
    seen: list[tuple[float, float, float]] = []
    compute, loss = trainer.compute_loss, trainer.loss

    def watched(*args: Any, **options: Any) -> Any:
        seen.append((loss.document_regularizer_weight, loss.query_regularizer_weight, loss.loss.temperature))
        return compute(*args, **options)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.add_callback(LossSchedule(loss, temperature=Schedule(4.0, 1.0)))
    trainer.train()
    expected = [(0.4 * share, 0.8 * share, 4.0 - step) for step, share in enumerate(shares)]
    assert seen == [pytest.approx(step) for step in expected]
    assert logged(trainer, "temperature") == pytest.approx([4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("size", [None, 4])
def test_a_student_that_collapses_is_stopped_with_the_fix(trainer_of: Any, size: int | None) -> None:
    settings = {"document_regularizer_weight": 10.0, "regularizer_warmup": 0, "learning_rate": 2e-2}
    trainer = trainer_of(triples(32), max_steps=200, mini_batch_size=size, **settings)
    with pytest.raises(CollapsedStudent, match=r"active dimensions.*document_regularizer_weight=10\.0"):
        trainer.train()
    assert trainer.state.global_step < 40


@pytest.mark.parametrize("size", [None, 3])
def test_queries_without_inference_are_trained(student: Any, teacher: Any, tmp_path: Path, size: int | None) -> None:
    table = SparseStaticEmbedding(tokenizer=student.tokenizer)
    torch.nn.init.ones_(table.weight)
    router = Router.for_query_document(query_modules=[table], document_modules=list(student))
    free = SparseEncoder(modules=[router], similarity_fn_name="dot")
    settings = {**EVERY_STEP, "query_regularizer_weight": None, "mini_batch_size": size}
    trainer = make_trainer(tmp_path / "run", free, teacher, triples(16), **settings)
    trainer.train()
    assert logged(trainer, "query_active_dims")[0] < 10 < logged(trainer, "document_active_dims")[0]
    assert not torch.equal(table.weight, torch.ones_like(table.weight))
    loaded = SparseEncoder(str(tmp_path / "run" / "checkpoint-2"), device="cpu")
    for side in ("encode_query", "encode_document"):
        found, expected = (getattr(model, side)(["the teacher"]).to_dense() for model in (loaded, free))
        assert torch.equal(found, expected)


def test_hard_labels_alone_train_a_sparse_student_without_a_teacher(student: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no teacher to distil"):
        make_trainer(tmp_path, student, NoTeacher(), triples(8))
    with pytest.raises(ValueError, match=r"margin_mse_weight 0\.5: set them to 1, None and 0"):
        make_trainer(tmp_path, student, NoTeacher(), triples(8), hard_label_weight=1.0, margin_mse_weight=0.5)
    trainer = make_trainer(tmp_path, student, NoTeacher(), triples(8), hard_label_weight=1.0)
    trainer.train()
    assert logged(trainer, "teacher_entropy") == [] and logged(trainer, "distillation") == [0.0]


def test_a_model_of_the_other_kind_is_refused(models: Path, student: Any, teacher: Any, tmp_path: Path) -> None:
    dense = SentenceTransformer(str(models / "student"), device="cpu")
    args = SparseTCTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="trains a SparseEncoder, got SentenceTransformer: build one with build_spl"):
        SparseTCTTrainer(dense, teacher, args, train_dataset=triples(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"trains a SentenceTransformer, got SparseEncoder.*SparseTCTTrainer"):
        TCTTrainer(student, teacher, train_dataset=triples(8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TightlyCoupledLoss, "TightlyCoupledLoss: a SparseTCTTrainer needs a SpladeLoss"),
        (
            lambda student: SpladeLoss(student, SparseMultipleNegativesRankingLoss(student), 0.1),
            "SpladeLoss of a SparseMultipleNegativesRankingLoss: a SparseTCTTrainer",
        ),
        (
            lambda student: SpladeLoss(student, TightlyCoupledLoss(student, mini_batch_size=2), 0.1),
            r"no effect inside another loss.*CachedSpladeLoss",
        ),
    ],
)
def test_a_loss_of_another_kind_is_refused(student: Any, trainer_of: Any, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(triples(8), loss=make(student))


def test_three_empty_steps_in_a_row_are_a_collapse(trainer_of: Any) -> None:
    trainer = trainer_of(triples(8))
    for queries, passages in ((0.5, 9.0), (0.9, 9.0), (1.0, 1.0), (9.0, 0.9), (0.5, 9.0)):
        trainer.refuse_collapse(queries, passages)
    with pytest.raises(CollapsedStudent, match=r"20 active dimensions a query and 0\.125 a passage.* now temp"):
        trainer.refuse_collapse(20.0, 0.125)


def test_accumulated_batches_are_watched_as_one_step(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(SparseTCTTrainer, "refuse_collapse", lambda self, queries, passages: seen.append(passages))
    trainer = trainer_of(triples(32), gradient_accumulation_steps=2)
    trainer.train()
    assert seen == pytest.approx(logged(trainer, "document_active_dims"), abs=1e-3) and len(seen) == 2


def test_a_splade_loss_of_ones_own_is_taken_with_the_warm_up_of_the_arguments(student: Any, trainer_of: Any) -> None:
    loss = SpladeLoss(student, TightlyCoupledLoss(student, temperature=1.0), document_regularizer_weight=0.1)
    trainer = trainer_of(triples(32), max_steps=4, loss=loss, regularizer_warmup=2)
    trainer.train()
    assert trainer.loss is loss
    assert logged(trainer, "document_regularizer_loss")[0] == 0.0 and loss.document_regularizer_weight == 0.1
    assert loss.query_regularizer_weight is None and logged(trainer, "query_regularizer_loss") == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"document_regularizer_weight": -1.0}, "document_regularizer_weight=-1.0 must be"),
        ({"document_regularizer_threshold": 1.5}, "must be a whole number of dimensions, 0 or more"),
        ({"regularizer_warmup": 1.5}, "regularizer_warmup=1.5 must be a share"),
        ({"regularizer_warmup_shape": "cubic"}, "regularizer_warmup_shape='cubic'"),
        ({"matryoshka_dims": [8, 16]}, "matryoshka_dims=.* must be left out"),
        ({"passage_bits": [1]}, "passage_bits=.* must be left out"),
    ],
)
def test_arguments_out_of_their_range_are_refused(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTCTTrainingArguments(output_dir=str(tmp_path), **setting)


def vectors(seed: int, texts: int, dims: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(-0.5, 1.0, (texts, dims)), 0.0)


@given(
    seed=st.integers(0, 2**32 - 1),
    texts=st.integers(1, 9),
    dims=st.integers(1, 30),
    threshold=st.none() | st.integers(0, 20),
)
def test_flops_are_squared_mean_weights_above_the_threshold(
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
