"""A learned scale stays one number, whatever trains it, and stock sentence-transformers reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from tct_hf import build_student, save_student
from tct_hf.encoding.scale import is_multiple_of_identity, keep_scalar, length_of, scale_modules
from tests.models import tiny_bert
from tests.train_helpers import PASSAGES, QUERIES, make_models, make_trainer, triples

FAST = {"learning_rate_mapping": {r"\.3\.linear\.weight": 0.1}}  # a few steps have to show


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_models(tmp_path_factory.mktemp("models"))[1]


@pytest.fixture
def student(base: Path) -> SentenceTransformer:
    return build_student(str(base), encoding="tct", document_length=64, scale=20.0).to("cpu")


def length(student: Any) -> float:
    weight = length_of(student)
    assert weight is not None
    return float(weight[0, 0].detach())


def test_scores_begin_as_the_scale_times_cosine(student: SentenceTransformer, base: Path) -> None:
    plain = build_student(str(base), encoding="tct", document_length=64).to("cpu")
    queries, passages = (
        vectors.astype(np.float64) for vectors in (plain.encode_query(QUERIES), plain.encode(PASSAGES))
    )
    queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
    found = student.encode_query(QUERIES) @ student.encode(PASSAGES).T
    np.testing.assert_allclose(found, 20.0 * queries @ passages.T, rtol=1e-5)
    assert length(student) == pytest.approx(20.0**0.5)


def test_the_gradient_is_that_of_the_one_number_on_the_diagonal(student: SentenceTransformer) -> None:
    keep_scalar(student)
    weight = student[3].linear.weight

    def score(s: float) -> float:
        with torch.no_grad():
            weight.copy_(torch.eye(32) * s)
            vectors = student(student.preprocess(PASSAGES, prompt="[D] ", task="document"))["sentence_embedding"]
        return float((vectors.double() @ vectors.double().T).square().sum())

    by_differences = (score(3.01) - score(2.99)) / 0.02
    score(3.0)
    vectors = student(student.preprocess(PASSAGES, prompt="[D] ", task="document"))["sentence_embedding"]
    (vectors @ vectors.T).square().sum().backward()
    expected = torch.eye(32) * by_differences / 32  # of equal parts of the number's own derivative
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"mini_batch_size": 3},
        {"matryoshka_dims": [8, 32], "weight_decay": 0.5},
    ],
    ids=str,
)
def test_after_training_the_matrix_is_one_number_that_has_changed(
    student: SentenceTransformer, teacher: Any, tmp_path: Path, settings: dict[str, Any], optim: str
) -> None:
    begun = length(student)
    make_trainer(tmp_path, student, teacher, triples(32), optim=optim, **FAST, **settings).train()
    weight = student[3].linear.weight.detach()
    assert torch.equal(weight, weight[0, 0] * torch.eye(32))
    assert length(student) != begun


def test_a_trained_student_is_saved_with_its_length_and_goes_on_training(
    student: SentenceTransformer, teacher: Any, tmp_path: Path
) -> None:
    settings = {**FAST, "save_strategy": "epoch"}
    make_trainer(tmp_path / "run", student, teacher, triples(16), **settings).train()
    for path in (tmp_path / "run" / "checkpoint-2", save_student(student, tmp_path / "student")):
        loaded = SentenceTransformer(str(path), device="cpu")
        assert length(loaded) == length(student)
        vectors = np.vstack([loaded.encode_query(QUERIES), loaded.encode(PASSAGES)])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), length(student), rtol=1e-6)
    make_trainer(tmp_path / "more", loaded, teacher, triples(16), **FAST).train()
    assert length(loaded) != length(student)


def test_weight_decay_leaves_the_scale_alone(student: SentenceTransformer, teacher: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(8), weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    [decay] = {
        group["weight_decay"] for group in groups if any(p is student[3].linear.weight for p in group["params"])
    }
    assert decay == 0.0
    assert any(group["weight_decay"] == 0.1 and len(group["params"]) > 5 for group in groups)


def test_the_scale_alone_takes_a_learning_rate_of_its_own(
    student: SentenceTransformer, teacher: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(8), weight_decay=0.1, **FAST)
    groups = [group for group in trainer.create_optimizer().param_groups if group["params"]]
    [own] = [group for group in groups if group["lr"] == 0.1]
    assert [id(one) for one in own["params"]] == [id(student[3].linear.weight)] and own["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))


def test_what_keeps_the_number_one_is_attached_once(student: SentenceTransformer) -> None:
    keep_scalar(student)
    keep_scalar(student)
    assert len(student[3].linear.weight._backward_hooks) == 1
    copied = copy.deepcopy(student)  # which loses it
    keep_scalar(copied)
    assert len(copied[3].linear.weight._backward_hooks) == 1


def test_a_projection_of_another_kind_is_left_alone(base: Path) -> None:
    student = build_student(str(base), encoding="tct", document_length=64, scale=4.0)
    with torch.no_grad():
        student[3].linear.weight[0, 1] = 0.1
    assert length_of(student) is None
    keep_scalar(student)
    assert not student[3].linear.weight._backward_hooks
    with_tanh = scale_modules(32, 4.0)
    with_tanh[1].activation_function = nn.Tanh()
    assert length_of(with_tanh) is None and length_of([]) is None and length_of(list(student)[:2]) is None


def test_only_one_number_times_the_identity_is_a_multiple_of_it() -> None:
    assert is_multiple_of_identity(torch.eye(3) * 0.7) and is_multiple_of_identity(torch.eye(1))
    for other in (
        torch.ones(3, 3),
        torch.ones(2, 3),
        torch.eye(3) * float("nan"),
        torch.diag(torch.tensor([1.0, 2.0])),
    ):
        assert not is_multiple_of_identity(other)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), True])
def test_a_scale_that_is_none_is_refused(base: Path, scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale=.*finite number greater than 0"):
        build_student(str(base), encoding="tct", scale=scale)
