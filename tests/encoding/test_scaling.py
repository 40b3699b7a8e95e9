"""A learned scale stays one number, whatever trains it, and stock sentence-transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from tct_hf import build_student, save_student
from tct_hf.encoding.encoders import keep_scalar, length_of, scale_modules
from tests.train_helpers import PASSAGES, QUERIES, make_models, make_trainer, triples

FAST = {"learning_rate_mapping": {r"\.3\.linear\.weight": 0.1}}  # so that a few steps show


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A student without a scale, and a teacher."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def teacher(models: tuple[Any, Any]) -> Any:
    return models[1]


@pytest.fixture
def student(models: tuple[Any, Any]) -> SentenceTransformer:
    return build_student(models[0][0].model.name_or_path, encoding="tct", document_length=64, scale=20.0).to("cpu")


def length(student: Any) -> float:
    weight = length_of(student)
    assert weight is not None
    return float(weight[0, 0].detach())


def test_scores_begin_as_the_scale_times_cosine(student: Any, models: tuple[Any, Any]) -> None:
    plain = models[0].to("cpu")
    queries, passages = (v.astype(np.float64) for v in (plain.encode_query(QUERIES), plain.encode(PASSAGES)))
    queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
    found = student.encode_query(QUERIES) @ student.encode(PASSAGES).T
    np.testing.assert_allclose(found, 20.0 * queries @ passages.T, rtol=1e-5)
    assert length(student) == pytest.approx(20.0**0.5)


def test_the_gradient_is_that_of_the_one_number_on_the_diagonal(student: SentenceTransformer) -> None:
    keep_scalar(student)
    weight = student[3].linear.weight

    def scores() -> torch.Tensor:
        vectors = student(student.preprocess(PASSAGES, prompt="[D] ", task="document"))["sentence_embedding"].double()
        return (vectors @ vectors.T).square().sum()

    def score(s: float) -> float:
        with torch.no_grad():
            weight.copy_(torch.eye(32) * s)
            return float(scores())

    by_differences = (score(3.01) - score(2.99)) / 0.02
    score(3.0)
    scores().backward()
    expected = torch.eye(32) * by_differences / 32  # of equal parts of the number's own derivative
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("optim", "settings"),
    [
        ("adamw_torch_fused", {"bf16": True}),
        ("adafactor", {"gradient_accumulation_steps": 2}),
        ("adamw_torch", {"mini_batch_size": 3}),
        ("sgd", {"matryoshka_dims": [8, 32], "weight_decay": 0.5}),
    ],
)
def test_after_training_the_matrix_is_one_number_that_has_changed(
    student: SentenceTransformer, teacher: Any, tmp_path: Path, settings: dict[str, Any], optim: str
) -> None:
    begun = length(student)
    make_trainer(tmp_path, student, teacher, triples(16), optim=optim, **FAST, **settings).train()
    weight = student[3].linear.weight.detach()
    assert torch.equal(weight, weight[0, 0] * torch.eye(32)) and length(student) != begun


def test_a_trained_student_is_saved_with_its_length_and_continues_training(
    student: SentenceTransformer, teacher: Any, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "run", student, teacher, triples(16), save_strategy="epoch", **FAST).train()
    for path in (tmp_path / "run" / "checkpoint-2", save_student(student, tmp_path / "student")):
        loaded = SentenceTransformer(str(path), device="cpu")
        assert length(loaded) == length(student)
        vectors = np.vstack([loaded.encode_query(QUERIES), loaded.encode(PASSAGES)])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), length(student), rtol=1e-6)
    make_trainer(tmp_path / "more", loaded, teacher, triples(16), **FAST).train()
    assert length(loaded) != length(student)


def test_the_scale_has_no_weight_decay_and_may_have_its_own_learning_rate(
    student: SentenceTransformer, teacher: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(8), weight_decay=0.1, **FAST)
    groups = [group for group in trainer.create_optimizer().param_groups if group["params"]]
    [own] = [group for group in groups if group["lr"] == 0.1]
    assert [id(one) for one in own["params"]] == [id(student[3].linear.weight)] and own["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))
    assert any(group["weight_decay"] == 0.1 and len(group["params"]) > 5 for group in groups)
    plain = make_trainer(tmp_path, student, teacher, triples(8), weight_decay=0.1).create_optimizer().param_groups
    decays = {group["weight_decay"] for group in plain for one in group["params"] if one is student[3].linear.weight}
    assert decays == {0.0}


def test_what_keeps_the_number_one_is_attached_once_and_another_projection_left_alone(
    student: SentenceTransformer,
) -> None:
    for _ in range(2):
        keep_scalar(student)
    assert len(student[3].linear.weight._backward_hooks) == 1
    with_tanh, uneven = scale_modules(32, 4.0), scale_modules(3, 4.0)
    with_tanh[1].activation_function = nn.Tanh()
    uneven[1].linear.weight.data[2, 2] = float("nan")
    for other in (with_tanh, uneven, [], list(student)[:2]):
        assert length_of(other) is None
    for scale in (0.0, float("inf"), float("nan"), True):
        with pytest.raises(ValueError, match=r"scale=.*finite number greater than 0"):
            scale_modules(8, scale)
