"""Rows that nobody has judged learn from the teacher alone; without a teacher, rows learn from labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import ColBERTTeacher, NoTeacher
from tct_hf.training.trainer import candidate_mask
from tests.train_helpers import logged, make_models, make_trainer, reference_of_batch, triples

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


@pytest.mark.parametrize("labelled", [MIXED, [False] * 8, [True] * 8], ids=["mixed", "none", "all"])
@pytest.mark.parametrize("candidates", ["in-batch", "own"])
@pytest.mark.parametrize("weight", [0.3, 0.0])
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


def test_known_positives_of_a_row_without_a_label_stay_candidates() -> None:
    ids = torch.tensor([10, 11, 12, 10])
    known = torch.tensor([[10, 11], [11, 12]])
    mask = candidate_mask(ids, torch.tensor([0, -1]), known)
    assert mask.tolist() == [[True, False, True, False], [True, True, True, True]]


@pytest.mark.parametrize("labelled", [MIXED, [False] * 8], ids=["mixed", "none"])
def test_gradient_caching_changes_no_loss_of_unlabelled_rows(
    models: Path, tmp_path: Path, labelled: list[bool]
) -> None:
    losses = []
    for size in (None, 3):
        trainer = make_trainer(tmp_path, *load(models), flagged(labelled), mini_batch_size=size, num_train_epochs=2)
        trainer.train()
        losses.append([*logged(trainer), *logged(trainer, "hard_label")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the log rounds to four digits
    assert len(losses[0]) == 4


def test_the_hard_label_gradient_of_an_unlabelled_row_is_none(models: Path, tmp_path: Path) -> None:
    """With hard labels alone, a batch with unlabelled rows teaches what its labelled rows teach."""
    weights = []
    for text in ("what is dense retrieval", "another question about tokens"):
        student, _ = load(models)
        dataset = flagged(MIXED).map(lambda row, text=text: row if row["labelled"] else {**row, "query": text})
        trainer = make_trainer(tmp_path, student, NoTeacher(), dataset, hard_label_weight=1.0)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_a_flag_that_is_no_bool_is_refused(models: Path, tmp_path: Path, wrong: Any) -> None:
    dataset = triples(8).add_column("labelled", [wrong] * 8)  # type: ignore[call-arg]
    trainer = make_trainer(tmp_path, *load(models), dataset)
    with pytest.raises(ValueError, match=r"Column 'labelled' holds .*give true, or false"):
        list(trainer.get_train_dataloader())


def test_streamed_rows_keep_their_flags(models: Path, tmp_path: Path) -> None:
    student, teacher = load(models)
    stream = flagged(MIXED).to_iterable_dataset()
    trainer = make_trainer(tmp_path, student, teacher, stream, max_steps=1)
    [batch] = list(trainer.get_train_dataloader())
    assert batch["tct"]["labelled"].tolist() == MIXED


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


def test_a_teacher_that_nobody_asks_changes_no_step(models: Path, tmp_path: Path) -> None:
    losses = []
    for teacher in (load(models)[1], NoTeacher()):
        trainer = make_trainer(tmp_path, load(models)[0], teacher, triples(16), hard_label_weight=1.0)
        trainer.train()
        losses.append(logged(trainer))
        # The log says nothing of a teacher whose scores do not count.
        assert not {"teacher_entropy", "top_agreement"} & {name for e in trainer.state.log_history for name in e}
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.999])
def test_distillation_without_a_teacher_is_refused_with_the_mend(models: Path, tmp_path: Path, weight: float) -> None:
    with pytest.raises(ValueError, match=rf"no teacher to distil, but hard_label_weight is {weight}: set it to 1"):
        make_trainer(tmp_path, load(models)[0], NoTeacher(), triples(8), hard_label_weight=weight)


def test_no_teacher_is_not_one_hot_nor_a_teachers_scale(models: Path, tmp_path: Path) -> None:
    student, _ = load(models)
    trainer = make_trainer(tmp_path, student, NoTeacher(), triples(8), hard_label_weight=1.0, temperature=None)
    assert trainer.loss.temperature == 1.0
    loss_of_batch(trainer, student)
    assert not trainer._warned


def test_evaluation_loss_counts_labelled_rows_only_in_its_hard_part(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *load(models), triples(8), eval_dataset=flagged([False] * 8))
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert logged(trainer, "eval_hard_label") == [0]


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
