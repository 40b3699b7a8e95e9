"""Gradient caching gives the gradients of the uncached loss, however the batch is cut and whatever is around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf import TeacherTargets, TightlyCoupledLoss, build_student
from tct_hf.batches import stack_columns, take, token_lengths
from tests.models import tiny_bert
from tests.train_helpers import logged, make_models, make_trainer, triples
from tests.training.test_losses import features, gradients, targets, total


class SameChunks(TightlyCoupledLoss):
    """The same forward passes in the same order, with their graphs kept: what caching must not differ from."""

    def _forward_in_mini_batches(self, features: list[dict[str, Tensor]], labels: TeacherTargets) -> Tensor:
        assert self.mini_batch_size is not None
        merged = stack_columns(features[1:])
        assert merged is not None
        order = torch.tensor(token_lengths(merged)).argsort(stable=True)
        width = merged["attention_mask"].shape[1]
        vectors = []
        for column in (features[0], {key: take(value, order, width) for key, value in merged.items()}):
            lengths = token_lengths(column)
            parts = []
            for start in range(0, len(lengths), self.mini_batch_size):
                rows = torch.arange(start, min(start + self.mini_batch_size, len(lengths)))
                longest = max(lengths[start : start + self.mini_batch_size])
                part = {key: take(value, rows, longest) for key, value in column.items()}
                parts.append(self.model(part)["sentence_embedding"])
            vectors.append(torch.cat(parts))
        columns = vectors[1][order.argsort()].chunk(len(features) - 1)
        return total(self.compute_loss_from_embeddings([vectors[0], *columns], labels))


def student_of(path: Path, dropout: float) -> SentenceTransformer:
    return build_student(str(tiny_bert(path, seed=11, dropout=dropout)), encoding="tct", document_length=64).train()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    scale = max(1.0, *(gradient.abs().max().item() for gradient in expected.values()))
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize(
    ("mini_batch_size", "negatives", "dims"), [(1, 0, None), (3, 1, None), (3, 2, [8, 32]), (50, 3, None)]
)
def test_in_float64_gradients_are_the_uncached_ones_to_a_millionth(
    tmp_path: Path, mini_batch_size: int, negatives: int, dims: list[int] | None
) -> None:
    student = student_of(tmp_path, 0.0).double()
    settings: dict[str, Any] = {"temperature": 0.5, "student_temperature": 4.0, "matryoshka_dims": dims}
    of_plain, of_cached = targets(negatives), targets(negatives)
    plain = total(TightlyCoupledLoss(student, **settings)(features(student, negatives), of_plain))
    expected = gradients(student, plain)
    cached = TightlyCoupledLoss(student, mini_batch_size=mini_batch_size, **settings)
    loss = total(cached(features(student, negatives), of_cached))
    assert {k: v.item() for k, v in of_cached.report.items()} == pytest.approx(
        {k: v.item() for k, v in of_plain.report.items()}, abs=1e-9
    )
    assert plain.dtype == loss.dtype == torch.float64
    assert loss.item() == pytest.approx(plain.item(), abs=1e-9)
    close(gradients(student, loss), expected, 1e-6)


def test_a_prompt_length_in_a_tensor_is_cut_with_its_rows(tmp_path: Path) -> None:
    student = student_of(tmp_path, 0.0)
    of_ints = features(student, 2)
    of_tensors = [column | {"prompt_length": torch.full((7,), column["prompt_length"])} for column in of_ints]
    loss = TightlyCoupledLoss(student, mini_batch_size=4)
    assert total(loss(of_tensors, targets(2))).item() == total(loss(of_ints, targets(2))).item()


def test_with_dropout_gradients_are_those_of_the_same_chunks(tmp_path: Path) -> None:
    student = student_of(tmp_path, 0.3)

    def step(kind: type[TightlyCoupledLoss], seed: int) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(seed)
        loss = total(kind(student, temperature=1.0, mini_batch_size=2)(features(student, 2), targets(2)))
        return loss.item(), gradients(student, loss)

    expected, wanted = step(SameChunks, 0)
    found, got = step(TightlyCoupledLoss, 0)
    assert found == pytest.approx(expected, abs=1e-6)
    close(got, wanted, 1e-6)
    assert abs(step(TightlyCoupledLoss, 1)[0] - expected) > 1e-4  # dropout is on


@pytest.mark.parametrize(("bf16", "accumulate"), [(False, 2), (True, 1)])
def test_in_training_weights_are_those_of_the_same_chunks(tmp_path: Path, bf16: bool, accumulate: int) -> None:
    weights, losses = [], []
    for kind in (SameChunks, TightlyCoupledLoss):
        student, teacher = make_models(tmp_path / kind.__name__, dropout=0.1)
        loss = kind(student, temperature=1.0, mini_batch_size=3)
        trainer = make_trainer(
            tmp_path / "run",
            student,
            teacher,
            triples(32, negatives=2),
            loss=loss,
            bf16=bf16,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.02,
            max_steps=2,
            max_grad_norm=0.0,
        )
        trainer.train()
        losses.append(logged(trainer))
        weights.append({name: value.clone() for name, value in student.state_dict().items()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-3 if bf16 else 1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=5e-4 if bf16 else 1e-6, rtol=0)
