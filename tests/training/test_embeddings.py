"""Embedding distillation: its arithmetic against numpy, where vectors come from, projections, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf import CachedTeacher, DenseTeacher, NoTeacher, TCTTrainingArguments, TeacherEnsemble, TightlyCoupledLoss
from tct_hf.pipeline.models import make_teacher as teacher_of_run
from tct_hf.pipeline.settings import StudentSettings, TeacherSettings
from tct_hf.training.embeddings import PROJECTIONS_FILE, embedding_loss
from tests.train_helpers import (
    EVERY_STEP,
    PASSAGES,
    QUERIES,
    batch_and_targets,
    logged,
    make_teacher,
    make_trainer,
    triples,
    with_scores,
)

ALONE: dict[str, Any] = {"hard_label_weight": 0.0, "distillation_weight": 0.0, "embedding_weight": 3.0}


def distances(student: list[np.ndarray], teacher: list[np.ndarray], distance: str) -> float:
    """Text by text: half the mean over queries and half the mean over all passages."""

    def one(a: np.ndarray, b: np.ndarray) -> float:
        if distance == "squared":
            return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        return float(1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))

    of = [[one(*pair) for pair in zip(*column, strict=True)] for column in zip(student, teacher, strict=False)]
    passages = [each for column in of[1:] for each in column]
    return float(np.mean(of[0])) if not passages else float(np.mean(of[0]) + np.mean(passages)) / 2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 4), st.integers(1, 7), st.booleans())
def test_the_part_equals_an_independent_numpy_version(
    seed: int, queries: int, columns: int, dim: int, queries_alone: bool
) -> None:
    made = np.random.default_rng(seed).normal(0, 2, (2, 1 + columns, queries, dim))
    student, teacher = ([*side] for side in made)
    if queries_alone:
        teacher = teacher[:1]
    for distance in ("cosine", "squared"):
        found = embedding_loss(
            [torch.tensor(one) for one in student], [torch.tensor(one) for one in teacher], distance
        )
        assert found.item() == pytest.approx(distances(student, teacher, distance), abs=1e-9)


@pytest.fixture
def narrow(models: Path) -> DenseTeacher:
    return make_teacher(models, "narrow")  # type: ignore[no-any-return]


def of_batch(trainer: Any) -> dict[str, float]:
    reports: list[dict[str, Tensor]] = []
    trainer.track_loss_components = reports.append
    reports.append({"loss": trainer.compute_loss(trainer.model, batch_and_targets(trainer)[0]).detach()})
    return {name: float(value) for report in reports for name, value in report.items()}


def test_whole_vectors_are_projected_to_those_of_whichever_teacher_comes(student: Any) -> None:
    student.truncate_dim = 16  # of what it encodes; in training vectors are whole
    loss, made = TightlyCoupledLoss(student, **ALONE), []
    for dim in (32, 16, 16, 8, 32):
        loss.project_to(dim)
        made.append(loss.projection)
    assert made[0] is made[4] is None and made[1] is made[2] is not made[3]
    assert [one.weight.shape for one in made[1:4:2]] == [(16, 32), (8, 32)]


@pytest.mark.parametrize("kind", ["dense", "narrow"])
@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_a_batch_is_compared_with_what_the_teacher_encodes(
    student: Any, models: Path, tmp_path: Path, kind: str, distance: str
) -> None:
    teacher, rows = make_teacher(models, kind), triples(8, negatives=2)
    given: dict[str, Any] = {"matryoshka_dims": [8, 16], "embedding_distance": distance, "mini_batch_size": 3}
    trainer = make_trainer(tmp_path, student.eval(), teacher, rows, **ALONE, **given)
    found = of_batch(trainer)
    texts = [rows["query"], rows["positive"], rows["negative_1"], rows["negative_2"]]

    def encode(model: SentenceTransformer) -> list[np.ndarray]:
        documents = [model.encode_document(list(column)) for column in texts[1:]]
        return [one.astype(np.float64) for one in (model.encode_query(list(texts[0])), *documents)]

    ours = encode(student)
    if kind == "narrow":
        ours = [one @ trainer.loss.projection.weight.detach().double().numpy().T for one in ours]
    assert (trainer.loss.projection is None) is (kind == "dense")
    expected = 3.0 * distances(ours, encode(teacher.model), distance)
    assert found["embedding"] == pytest.approx(expected, rel=1e-4)
    assert found["loss"] == pytest.approx(expected, rel=1e-4) and found["hard_label"] == found["distillation"] == 0.0


def ask(teacher: Any) -> tuple[Tensor, list[Tensor]]:
    columns = [PASSAGES[:3], PASSAGES[2:5]]
    found: Any = teacher.score_and_embed(teacher.collate(QUERIES[:3], columns, [{}] * 3), gather=False)
    return found  # type: ignore[no-any-return]


def test_one_pass_gives_scores_and_vectors_live_from_a_cache_and_in_an_ensemble(
    narrow: DenseTeacher, teacher: Any, tmp_path: Path
) -> None:
    sizes: list[int] = []
    narrow.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]["input_ids"])))
    scores, vectors = ask(narrow)
    assert sum(sizes) == 9 and [one.shape for one in vectors] == [(3, 16)] * 3
    np.testing.assert_allclose(vectors[0], narrow.model.encode_query(QUERIES[:3]), atol=1e-5)
    np.testing.assert_allclose(
        torch.cat(vectors[1:]), narrow.model.encode_document(PASSAGES[:3] + PASSAGES[2:5]), atol=1e-5
    )
    first = ask(CachedTeacher(narrow, tmp_path))
    sizes.clear()
    cached = CachedTeacher(narrow, tmp_path)
    again = ask(cached)
    assert not sizes and cached.embedding_dim == 16
    for of_first, of_again, live in zip((first[0], *first[1]), (again[0], *again[1]), (scores, *vectors), strict=True):
        assert torch.equal(of_first, of_again)
        torch.testing.assert_close(of_first, live, atol=5e-3, rtol=2e-3)
    # A weight of 0: the vectors of the one, the scores of the other.
    mixed = TeacherEnsemble([(teacher, 1.0), (narrow, 0.0)], normalize="softmax")
    found = ask(mixed)
    torch.testing.assert_close(found[0], torch.log_softmax(teacher.training_scale * ask(teacher)[0], 1))
    assert all(map(torch.equal, found[1], vectors)) and ask(teacher)[1] is None  # type: ignore[arg-type]


def test_a_member_of_weight_0_leaves_own_candidates_to_the_others(models: Path, student: Any, tmp_path: Path) -> None:
    ensemble = TeacherEnsemble([(make_teacher(models, "stored"), 1.0), (make_teacher(models, "dense"), 0.0)])
    assert ensemble.covers == "own" and ensemble.embedding_dim == 32
    settings = {"candidates": "own", "embedding_weight": 1.0}
    trainer = make_trainer(tmp_path, student, ensemble, with_scores(16), **settings)
    trainer.train()
    assert len(logged(trainer, "embedding")) == 2


@pytest.mark.parametrize("kind", ["dense", "narrow"])
def test_cached_gradients_are_the_plain_ones_whatever_the_loss_is_scaled_by(
    student: Any, models: Path, tmp_path: Path, kind: str
) -> None:
    student = student.double().eval()
    teacher = make_teacher(models, kind)
    found = []
    for size in (None, 3):
        trainer = make_trainer(tmp_path, student, teacher, triples(8), embedding_weight=2.0, mini_batch_size=size)
        trainer.model.double()
        trainer.loss.zero_grad()
        batch, _ = batch_and_targets(trainer)
        (trainer.compute_loss(student, batch) * 0.25).backward()
        found.append({n: p.grad.clone() for n, p in trainer.loss.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert ("projection.weight" in found[0]) is (kind == "narrow")
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_student_learns_the_vectors_alone_and_a_projection_is_learned_and_resumed(
    student: Any, narrow: DenseTeacher, models: Path, tmp_path: Path
) -> None:
    settings = {**EVERY_STEP, **ALONE, "max_steps": 8, "learning_rate_mapping": {"projection": 1e-2}}
    whole = make_trainer(tmp_path, student, narrow, triples(16), **settings)
    begun = whole.loss.projection.weight.detach().clone()
    torch.testing.assert_close(begun @ begun.T, torch.eye(16), atol=1e-5, rtol=0)
    whole.train()
    parts = logged(whole, "embedding")
    assert parts[-1] < 0.5 * parts[0] and logged(whole) == pytest.approx(parts, abs=1e-3)
    assert (whole.loss.projection.weight - begun).abs().max() > 0.02
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / PROJECTIONS_FILE).is_file()
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(student[0].model.state_dict())
    other = SentenceTransformer(str(models / "student"), device="cpu")
    resumed = make_trainer(tmp_path, other, narrow, triples(16), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.loss.projection.weight, whole.loss.projection.weight)
    for one, two in zip(other.parameters(), student.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="checkpoint-4 has a projection, and this run none"):
        make_trainer(tmp_path, student, narrow, triples(16)).train(resume_from_checkpoint=str(checkpoint))


def test_a_run_asks_a_teacher_where_labels_and_vectors_are_learned(models: Path) -> None:
    run: Any = SimpleNamespace(schedules={}, teacher_model=str(models / "plain"), vectors_folder=None, collection=None)
    for more, kind in (({}, NoTeacher), ({"embedding_weight": 1.0}, DenseTeacher)):
        student = StudentSettings(training={"hard_label_weight": 1.0, **more})
        assert isinstance(teacher_of_run(run, TeacherSettings(kind="dense"), student), kind)


def test_what_can_not_be_learned_is_refused(student: Any, sparse: Any, teacher: Any, tmp_path: Path) -> None:
    for other in (teacher, NoTeacher()):
        with pytest.raises(ValueError, match=r"embedding_weight is 3\.0, but a \w+ has no vectors of texts"):
            make_trainer(tmp_path, student, other, triples(8), **{**ALONE, "hard_label_weight": 1.0})
    with pytest.raises(ValueError, match=r"embedding_weight=3\.0 must be left out of a sparse student"):
        make_trainer(tmp_path, sparse, teacher, triples(8), **ALONE)
    with pytest.raises(ValueError, match="embedding_weight is for dense students"):
        TightlyCoupledLoss(sparse, embedding_weight=1.0)
    for wrong in ({"embedding_weight": -1.0}, {"embedding_distance": "dot"}, {"distillation_weight": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            TCTTrainingArguments(str(tmp_path), **wrong)  # type: ignore[arg-type]
