"""Training a sparse student: the loss against numpy, gradient caching, checkpoints, the log and the watch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
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
from tct_hf.training.collator import BATCH_KEY
from tests.train_helpers import logged, make_trainer, triples
from tests.training.test_score_losses import numpy_loss
from tests.warm_process import run_warm


@pytest.fixture
def student(sparse: Any) -> Any:
    return sparse


def one_batch(trainer: Any, rows: int = 8) -> tuple[Any, Any]:
    """A batch, and what the teacher says of it."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])
    inputs = dict(batch)
    rest = inputs.pop(BATCH_KEY)
    features, _ = trainer.collect_features(inputs)
    return batch, trainer.teacher_targets(features, rest, trainer.loss.loss)


@pytest.mark.parametrize(("candidates", "threshold"), [("in-batch", None), ("own", 100)])
def test_loss_is_numpys_over_encoded_texts(
    student: Any, teacher: Any, tmp_path: Path, candidates: str, threshold: int | None
) -> None:
    dataset = triples(8)
    settings = {"document_regularizer_weight": 0.02, "query_regularizer_weight": 0.03, "margin_mse_weight": 0.05}
    settings |= {"document_regularizer_threshold": threshold, "query_regularizer_threshold": threshold}
    trainer = make_trainer(tmp_path, student, teacher, dataset, candidates=candidates, student_divisor=3.0, **settings)
    batch, targets = one_batch(trainer)
    found = trainer.compute_loss(trainer.model, batch).item()

    queries = student.encode_query(dataset["query"]).to_dense().double().cpu().numpy()
    passages = [*dataset["positive"], *dataset["negative"]]
    documents = student.encode_document(passages).to_dense().double().cpu().numpy()
    colbert, mask = teacher.model, targets.mask.numpy()
    if candidates == "own":
        assert (mask.sum(1) == 2).all()
    parts = numpy_loss(
        queries @ documents.T,
        colbert.similarity(colbert.encode_query(dataset["query"]), colbert.encode_document(passages)).numpy(),
        temperature=1.0,
        student_temperature=2.0,  # of a sparse student that names none
        weight=0.1,
        margin_weight=0.05,
        divisor=3.0,
        mask=mask,
    )

    def flops(vectors: np.ndarray) -> float:
        counted = vectors if threshold is None else vectors * ((vectors > 0).sum(1, keepdims=True) > threshold)
        return float((counted.mean(0) ** 2).sum())

    assert found == pytest.approx(sum(parts) + 0.02 * flops(documents) + 0.03 * flops(queries), rel=1e-4)


def test_default_temperatures_are_two_at_the_teachers_scale(student: Any, teacher: Any, tmp_path: Path) -> None:
    scaled = ColBERTTeacher(teacher.model, training_scale=4.0)
    loss = make_trainer(tmp_path, student, scaled, triples(8), temperature=None).loss
    assert type(loss) is SpladeLoss and loss.loss.temperature == 0.5 and loss.loss.student_temperature == 2.0
    assert (loss.document_regularizer_weight, loss.query_regularizer_weight) == (3e-5, 5e-5)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    batch, _ = one_batch(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}


def test_cached_gradients_are_those_of_the_whole_batch(student: Any, teacher: Any, tmp_path: Path) -> None:
    settings = {"document_regularizer_weight": 0.02, "query_regularizer_weight": 0.03, "margin_mse_weight": 0.1}
    dataset = triples(8, negatives=2)
    whole = gradients(make_trainer(tmp_path, student, teacher, dataset, **settings))
    cached = make_trainer(tmp_path, student, teacher, dataset, mini_batch_size=3, **settings)
    assert type(cached.loss) is CachedSpladeLoss and cached.loss.loss.mini_batch_size is None
    found = gradients(cached)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_warm_up_and_schedules_reach_the_loss_at_every_step(
    student: Any, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"document_regularizer_weight": 0.4, "query_regularizer_weight": 0.8, "regularizer_warmup": 2}
    trainer = make_trainer(
        tmp_path, student, teacher, triples(32), max_steps=4, regularizer_warmup_shape="linear", **settings
    )
    seen: list[tuple[float, float, float]] = []
    compute, loss = trainer.compute_loss, trainer.loss

    def watched(*args: Any, **options: Any) -> Any:
        seen.append((loss.document_regularizer_weight, loss.query_regularizer_weight, loss.loss.temperature))
        return compute(*args, **options)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.add_callback(LossSchedule(loss, temperature=Schedule(4.0, 1.0)))
    trainer.train()
    expected = [(0.0, 0.0, 4.0), (0.2, 0.4, 3.0), (0.4, 0.8, 2.0), (0.4, 0.8, 1.0)]
    assert seen == [pytest.approx(step) for step in expected]
    assert logged(trainer, "temperature") == pytest.approx([4.0, 3.0, 2.0, 1.0])


LOADER = """
import json, sys
sys.modules["tct_hf"] = None  # an import of this package would fail
import torch
from sentence_transformers import SparseEncoder
model = SparseEncoder(sys.argv[1], device="cpu")
texts = json.loads(sys.argv[2])
torch.save([model.encode_query(texts).to_dense(), model.encode_document(texts).to_dense()], sys.argv[3])
"""


def test_a_checkpoint_loads_as_a_stock_sparse_encoder_and_holds_no_token(
    student: Any, teacher: Any, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "hub_token": "hf_secret"}
    make_trainer(tmp_path / "run", student, teacher, triples(16), **saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "training_args.bin").exists()
    (tmp_path / "load.py").write_text(LOADER)
    texts = ["what is dense", "the teacher " * 60]
    words = [str(tmp_path / "load.py"), str(checkpoint), json.dumps(texts), str(tmp_path / "vectors.pt")]
    done = run_warm(words, env={**os.environ})
    assert done.returncode == 0, done.stderr
    for found, encode in zip(
        torch.load(tmp_path / "vectors.pt"), (student.encode_query, student.encode_document), strict=True
    ):
        torch.testing.assert_close(found, encode(texts).to_dense().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [None, 4])
def test_a_student_that_collapses_is_stopped_with_the_fix(
    student: Any, teacher: Any, tmp_path: Path, size: int | None
) -> None:
    settings = {"document_regularizer_weight": 10.0, "regularizer_warmup": 0, "learning_rate": 2e-2}
    trainer = make_trainer(tmp_path, student, teacher, triples(32), max_steps=200, mini_batch_size=size, **settings)
    with pytest.raises(CollapsedStudent, match=r"active dimensions.*document_regularizer_weight=10\.0"):
        trainer.train()
    assert trainer.state.global_step < 40


@pytest.mark.parametrize("size", [None, 3])
def test_queries_without_inference_are_trained_and_saved(
    student: Any, teacher: Any, tmp_path: Path, size: int | None
) -> None:
    table = SparseStaticEmbedding(tokenizer=student.tokenizer)
    torch.nn.init.ones_(table.weight)
    router = Router.for_query_document(query_modules=[table], document_modules=list(student))
    free = SparseEncoder(modules=[router], similarity_fn_name="dot")
    settings = {"save_strategy": "steps", "save_steps": 2, "query_regularizer_weight": None, "mini_batch_size": size}
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
    with pytest.raises(ValueError, match=r"margin_mse_weight is 0\.5: set them to 1 and 0"):
        make_trainer(tmp_path, student, NoTeacher(), triples(8), hard_label_weight=1.0, margin_mse_weight=0.5)
    trainer = make_trainer(tmp_path, student, NoTeacher(), triples(8), hard_label_weight=1.0)
    trainer.train()
    assert "teacher_entropy" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["distillation"] == 0.0


def test_a_model_or_a_loss_of_the_other_kind_is_refused(
    models: Path, student: Any, teacher: Any, tmp_path: Path
) -> None:
    dense = SentenceTransformer(str(models / "student"), device="cpu")
    args = SparseTCTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="trains a SparseEncoder, got SentenceTransformer: build one with build_spl"):
        SparseTCTTrainer(dense, teacher, args, train_dataset=triples(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"trains a SentenceTransformer, got SparseEncoder.*SparseTCTTrainer"):
        TCTTrainer(student, teacher, train_dataset=triples(8))  # type: ignore[arg-type]
    ranking, cached = SparseMultipleNegativesRankingLoss(student), TightlyCoupledLoss(student, mini_batch_size=2)
    for loss, message in (
        (TightlyCoupledLoss(student), "TightlyCoupledLoss: a SparseTCTTrainer needs a SpladeLoss"),
        (SpladeLoss(student, ranking, 0.1), "SpladeLoss of a SparseMultipleNegativesRankingLoss: a SparseTCTTrainer"),
        (SpladeLoss(student, cached, 0.1), r"no effect inside another loss.*CachedSpladeLoss"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student, teacher, triples(8), loss=loss)


def test_three_empty_steps_in_a_row_are_a_collapse(student: Any, teacher: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(8))
    for queries, passages in ((0.5, 9.0), (0.9, 9.0), (1.0, 1.0), (9.0, 0.9), (0.5, 9.0)):
        trainer.refuse_collapse(queries, passages)
    with pytest.raises(CollapsedStudent, match=r"20 active dimensions a query and 0\.125 a passage.* now temp"):
        trainer.refuse_collapse(20.0, 0.125)


def test_the_watch_takes_one_figure_a_step_of_accumulated_batches(
    student: Any, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(SparseTCTTrainer, "refuse_collapse", lambda self, queries, passages: seen.append(passages))
    trainer = make_trainer(tmp_path, student, teacher, triples(32), gradient_accumulation_steps=2)
    trainer.train()
    assert seen == pytest.approx(logged(trainer, "document_active_dims"), abs=1e-3) and len(seen) == 2


def test_a_splade_loss_of_ones_own_is_taken_with_the_warm_up_of_the_arguments(
    student: Any, teacher: Any, tmp_path: Path
) -> None:
    loss = SpladeLoss(student, TightlyCoupledLoss(student, temperature=1.0), document_regularizer_weight=0.1)
    trainer = make_trainer(tmp_path, student, teacher, triples(32), max_steps=4, loss=loss, regularizer_warmup=2)
    trainer.train()
    assert trainer.loss is loss
    assert logged(trainer, "document_regularizer_loss")[0] == 0.0 and loss.document_regularizer_weight == 0.1
    assert loss.query_regularizer_weight is None
    assert "query_regularizer_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"document_regularizer_weight": -1.0}, "document_regularizer_weight must be"),
        ({"document_regularizer_threshold": 1.5}, "must be a whole number of dimensions, 0 or more"),
        ({"regularizer_warmup": 1.5}, "regularizer_warmup=1.5 must be a share"),
        ({"regularizer_warmup_shape": "cubic"}, "regularizer_warmup_shape='cubic'"),
        ({"matryoshka_dims": [8, 16]}, "matryoshka_dims is for dense students"),
    ],
)
def test_arguments_out_of_their_range_are_refused(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTCTTrainingArguments(output_dir=str(tmp_path), **setting)
