"""Rows without judgement learn from the teacher alone; without a teacher, rows learn from labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tct_hf import ColBERTTeacher, NoTeacher
from tests.train_helpers import make_teacher, make_trainer, reference_of_batch, triples

MIXED = [True, False, False, True, False, False, True, False]


def teacher_of(models: Path) -> ColBERTTeacher:
    return make_teacher(models, "colbert")


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
        (MIXED, "own", 0.0),
        ([False] * 8, "in-batch", 0.3),
        ([True] * 8, "own", 0.3),
        ([True] * 8, "in-batch", 1.0),  # without a teacher
    ],
)
def test_loss_of_a_batch_with_unlabelled_rows_equals_an_independent_numpy_version(
    models: Path, student: Any, tmp_path: Path, labelled: list[bool], candidates: str, weight: float
) -> None:
    teacher = teacher_of(models) if weight < 1 else None
    dataset = flagged(labelled)
    settings = {"temperature": 0.5, "student_temperature": 2.0}
    options = {**settings, "hard_label_weight": weight, "candidates": candidates}
    trainer = make_trainer(tmp_path, student, teacher or NoTeacher(), dataset, **options)
    loss, parts, batch = loss_of_batch(trainer, student)
    hard, soft = reference_of_batch(
        student, teacher, dataset, batch, **settings, weight=weight, own_only=candidates == "own"
    )
    assert loss == pytest.approx(hard + soft, abs=2e-5)
    assert (parts["hard_label"], parts["distillation"]) == pytest.approx((hard, soft), abs=2e-5)
    assert bool(hard > 0) is (weight > 0 and any(labelled)) and bool(soft > 0) is (weight < 1)


def test_unlabelled_rows_mask_no_candidate_and_have_no_positive(models: Path, student: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, teacher_of(models), flagged(MIXED))
    [batch] = list(trainer.get_train_dataloader())
    targets = trainer.teacher_targets(trainer.collect_features(batch)[0], batch["tct"], trainer.loss)
    flags = batch["tct"]["labelled"]
    assert flags.dtype == torch.bool and sorted(flags.tolist()) == sorted(MIXED)
    assert targets.positive_index.tolist() == [i if flag else -1 for i, flag in enumerate(flags.tolist())]
    assert targets.mask[~flags].all()
    assert not targets.mask[flags].all(dim=1).any()  # each labelled row's positive is in the batch once more


def test_a_flag_that_is_no_bool_is_refused(student: Any, tmp_path: Path) -> None:
    dataset = triples(8).add_column("labelled", [1] * 8)  # type: ignore[call-arg]
    trainer = make_trainer(tmp_path, student, NoTeacher(), dataset, hard_label_weight=1.0)
    with pytest.raises(ValueError, match=r"Column 'labelled' holds .*give true, or false"):
        list(trainer.get_train_dataloader())


def test_rows_with_the_same_flags_and_known_positives_are_no_duplicates(
    models: Path, student: Any, tmp_path: Path
) -> None:
    texts = [f"{word} {number}" for number, word in enumerate(["tokens", "dense", "query", "teacher"] * 2)]
    rows = Dataset.from_dict(
        {
            **{name: [f"{name} of {text}" for text in texts] for name in ("query", "positive", "negative")},
            **{f"{name}_id": [f"{name}{number}" for number in range(8)] for name in ("positive", "negative")},
            "known_positive_ids": [["p"]] * 8,
            "labelled": [False] * 8,
        }
    )
    trainer = make_trainer(tmp_path, student, teacher_of(models), rows, batch_sampler="no_duplicates")
    assert [len(batch["tct"]["labelled"]) for batch in trainer.get_train_dataloader()] == [8]
