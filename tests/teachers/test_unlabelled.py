"""Rows without judgement learn from the teacher alone; without a teacher, rows learn from labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import ColBERTTeacher, NoTeacher
from tests.train_helpers import make_models, make_trainer, reference_of_batch, triples

MIXED = [True, False, False, True, False, False, True, False]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path)
    student.save_pretrained(str(path / "student"))
    return path


def load(models: Path) -> tuple[SentenceTransformer, ColBERTTeacher]:
    teacher = ColBERTTeacher(str(models / "teacher" / "colbert"), dtype="float32")
    return SentenceTransformer(str(models / "student"), device="cpu"), teacher


def flagged(labelled: list[bool], *, negatives: int = 2) -> Dataset:
    """Triples of which some are unlabelled; they keep their known positives, which must not count."""
    return triples(len(labelled), negatives=negatives).add_column("labelled", labelled)  # type: ignore[call-arg]


def loss_of_batch(trainer: Any, student: Any) -> tuple[float, dict[str, float], Any]:
    """The loss of the only batch, its logged parts, and the batch."""
    [batch] = list(trainer.get_train_dataloader())
    student.eval()
    reports: list[dict[str, Any]] = []
    trainer.track_loss_components = reports.append
    loss = trainer.compute_loss(student, batch).item()
    return loss, {name: float(value) for name, value in reports[0].items()}, batch


@pytest.mark.parametrize(
    ("labelled", "candidates", "weight"),
    [
        (MIXED, "in-batch", 0.3),
        (MIXED, "own", 0.3),
        (MIXED, "in-batch", 0.0),
        ([False] * 8, "in-batch", 0.3),
        ([True] * 8, "own", 0.3),
    ],
)
def test_loss_of_a_batch_with_unlabelled_rows_equals_an_independent_numpy_version(
    models: Path, tmp_path: Path, labelled: list[bool], candidates: str, weight: float
) -> None:
    student, teacher = load(models)
    dataset = flagged(labelled)
    settings = {"temperature": 0.5, "student_temperature": 2.0}
    options = {**settings, "hard_label_weight": weight, "candidates": candidates}
    trainer = make_trainer(tmp_path, student, teacher, dataset, **options)
    loss, parts, batch = loss_of_batch(trainer, student)
    hard, soft = reference_of_batch(
        student, teacher, dataset, batch, **settings, weight=weight, own_only=candidates == "own"
    )
    assert loss == pytest.approx(hard + soft, abs=2e-5)
    assert (parts["hard_label"], parts["distillation"]) == pytest.approx((hard, soft), abs=2e-5)
    assert bool(hard > 0) is (weight > 0 and any(labelled)) and soft > 0


def test_unlabelled_rows_mask_no_candidate_and_have_no_positive(models: Path, tmp_path: Path) -> None:
    student, teacher = load(models)
    trainer = make_trainer(tmp_path, student, teacher, flagged(MIXED))
    [batch] = list(trainer.get_train_dataloader())
    targets = trainer.teacher_targets(trainer.collect_features(batch)[0], batch["tct"], trainer.loss)
    flags = batch["tct"]["labelled"]
    assert flags.dtype == torch.bool and sorted(flags.tolist()) == sorted(MIXED)
    assert targets.positive_index.tolist() == [i if flag else -1 for i, flag in enumerate(flags.tolist())]
    assert targets.mask[~flags].all()
    assert not targets.mask[flags].all(dim=1).any()  # each labelled row's positive is in the batch once more


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_a_flag_that_is_no_bool_is_refused(models: Path, tmp_path: Path, wrong: Any) -> None:
    dataset = triples(8).add_column("labelled", [wrong] * 8)  # type: ignore[call-arg]
    trainer = make_trainer(tmp_path, *load(models), dataset)
    with pytest.raises(ValueError, match=r"Column 'labelled' holds .*give true, or false"):
        list(trainer.get_train_dataloader())


@pytest.mark.parametrize("candidates", ["in-batch", "own"])
def test_without_a_teacher_the_loss_is_that_of_the_hard_labels(models: Path, tmp_path: Path, candidates: str) -> None:
    student, _ = load(models)
    dataset = triples(8, negatives=2)
    trainer = make_trainer(tmp_path, student, NoTeacher(), dataset, hard_label_weight=1.0, candidates=candidates)
    loss, parts, batch = loss_of_batch(trainer, student)
    hard, _ = reference_of_batch(
        student, None, dataset, batch, temperature=1.0, weight=1.0, own_only=candidates == "own"
    )
    assert loss == pytest.approx(hard, abs=2e-5)
    assert parts == pytest.approx({"hard_label": hard, "distillation": 0.0}, abs=2e-5)


def test_rows_with_the_same_flags_and_known_positives_are_no_duplicates(models: Path, tmp_path: Path) -> None:
    texts = [f"{word} {number}" for number, word in enumerate(["tokens", "dense", "query", "teacher"] * 2)]
    rows = Dataset.from_dict(
        {
            "query": [f"what is {text}" for text in texts],
            "positive": [f"the passage of {text}" for text in texts],
            "negative": [f"a student of {text}" for text in texts],
            "positive_id": [f"p{number}" for number in range(8)],
            "negative_id": [f"n{number}" for number in range(8)],
            "known_positive_ids": [["p"]] * 8,
            "labelled": [False] * 8,
        }
    )
    trainer = make_trainer(tmp_path, *load(models), rows, batch_sampler="no_duplicates")
    assert [len(batch["tct"]["labelled"]) for batch in trainer.get_train_dataloader()] == [8]
