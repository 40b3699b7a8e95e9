"""Runs that would teach nothing, or spoil the weights, stop with a sentence, and save nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import Trainer

from tct_hf import StoredScores, TightlyCoupledLoss, save_student, validate_checkpoint
from tct_hf.training.run import train_colbert, train_stock, train_student
from tct_hf.training.stages import Stage
from tests.train_helpers import (
    EVERY_STEP,
    PASSAGES,
    QUERIES,
    make_stage,
    make_teacher,
    make_trainer,
    triples,
    with_scores,
)

ROWS = triples(16)
ALONE = ROWS.select_columns(["query", "positive"])
SAME = Dataset.from_dict({"query": [f"q {i}" for i in range(16)], "positive": ["one and the same passage"] * 16})
SMALL = {"per_device_train_batch_size": 4}
WHOLE_BATCHES = {"per_device_train_batch_size": 32, "dataloader_drop_last": True}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"num_train_epochs": 0}, "num_train_epochs=0 makes no step"),
        (ROWS, {"learning_rate": 0.0}, "learning_rate is 0, so nothing is learned"),
        (ROWS, {"frozen": ""}, "unfreeze some with requires_grad_"),
        (ROWS, {"frozen": "pooler"}, "unfreeze some with requires_grad_"),  # which the vectors do not depend on
        (ROWS, {"temperature": 1e-45}, "temperature=1e-45 must be a finite number greater than 0, from 1e-06"),
        (ROWS, {"student_scale": 1e38}, "student_scale=1e.38 must be"),
        (ROWS, {"student_divisor": 1e30}, "student_divisor=1e.30 must be"),
        (ROWS, {"margin_mse_weight": 1e38}, "margin_mse_weight=1e.38 must be a finite number"),
        (ALONE, {"per_device_train_batch_size": 1}, "train_dataset has no negatives, and a batch is one row"),
        (ALONE, {"candidates": "own"}, "train_dataset has no negatives, and candidates is own"),
        (SAME, SMALL, "gradient of the first 3 steps is 0, so nothing is learned"),
        (SAME, {**SMALL, "max_steps": 2}, "gradient of the first 2 steps is 0, so nothing is learned"),
        (triples(8), WHOLE_BATCHES, r"train_dataset has 8 rows, fewer than one whole batch \(32 on"),
        (DatasetDict(many=triples(64), few=triples(8)), WHOLE_BATCHES, "few has 8 rows, fewer than one whole batch"),
        ({"a": ROWS, "b": ROWS.to_iterable_dataset()}, {"max_steps": 2}, "train_dataset: b is streamed, and only"),
    ],
)
def test_a_run_that_can_change_no_weight_is_refused(
    student: Any, trainer_of: Any, rows: Any, settings: dict[str, Any], message: str
) -> None:
    settings = dict(settings)
    if (trained := settings.pop("frozen", None)) is not None:
        for name, weight in student.named_parameters():
            weight.requires_grad_(bool(trained) and trained in name)
    with pytest.raises(ValueError, match=message):
        trainer_of(rows, **settings).train()


def test_a_loss_that_is_not_finite_before_any_update_blames_no_learning_rate(trainer_of: Any) -> None:
    trainer = trainer_of(triples(8))
    trainer.compute_loss = lambda model, *args, **kwargs: next(model.parameters()).sum() * float("nan")
    with pytest.raises(ValueError, match="step 1: the loss is nan, before any weight has changed"):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"mini_batch_size": 4}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_training_stops_where_it_is_not_finite(
    trainer_of: Any, tmp_path: Path, what: str, settings: dict[str, Any]
) -> None:
    settings |= {"max_steps": 4, "lr_scheduler_type": "constant"}
    trainer = trainer_of(triples(32), **EVERY_STEP, **settings)
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(model, inputs, *args, **kwargs)
        if trainer.state.global_step < 2:
            return loss
        weight = next(p for p in model.parameters() if p.requires_grad)
        if what == "gradient" and settings.get("mini_batch_size"):  # the cache has made the gradient by now
            weight.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return loss + float("inf") if what == "loss" else loss + (weight * 0).abs().pow(0.5).sum()

    trainer.compute_loss = compute_loss
    with pytest.raises(ValueError, match=rf"step 3: the {what} is (inf|nan), with learning rate 0.001 .*Lower learn"):
        trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-3").exists()


def test_steps_that_a_scaler_skips_are_let_pass_until_it_finds_no_factor(student: Any, trainer_of: Any) -> None:
    trainer = trainer_of(triples(8), max_steps=1)
    trainer.train()
    trainer.accelerator.scaler = object()
    for norm in [float("inf")] * 31 + [1.0] + [float("nan")] * 31:
        trainer._get_grad_norm(student, norm)
    with pytest.raises(ValueError, match="the gradient is inf, with learning rate"):
        trainer._get_grad_norm(student, float("inf"))


def test_a_best_model_is_chosen_by_a_number(trainer_of: Any) -> None:
    settings = {**EVERY_STEP, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score"}
    settings |= {"load_best_model_at_end": True, "greater_is_better": True}
    scores = iter([0.5, float("nan")])
    trainer = trainer_of(ROWS, eval_dataset=ROWS, **settings)
    trainer.evaluate = lambda *args, **kwargs: {"eval_score": next(scores)}
    with pytest.raises(ValueError, match="step 2: score, which chooses the best model, is nan"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"learning_rate": 1e30, "max_grad_norm": 0.0}, r"step \d+: the (loss|gradient) is|are not finite"),
        (triples(8), WHOLE_BATCHES, "has 8 rows, fewer than one whole batch"),
        # Of which no_duplicates makes no batch of four.
        (Dataset.from_list([ROWS[0]] * 8), {"dataloader_drop_last": True}, "No batch was made of train_dataset"),
        (ALONE, {"per_device_train_batch_size": 1}, "gradient of the first 3 steps is 0, so nothing is learned"),
    ],
)
def test_stages_publish_nothing_that_was_not_trained(
    student: Any, tmp_path: Path, rows: Dataset, settings: dict[str, Any], message: str
) -> None:
    stage = make_stage(tmp_path, arguments={"max_steps": 6, **SMALL, "lr_scheduler_type": "constant", **settings})
    with pytest.raises(ValueError, match=message):
        train_stock(stage, lambda: student, lambda: rows)
    assert not (tmp_path / "final").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_valid(
    student: Any, trainer_of: Any, tmp_path: Path
) -> None:
    save_student(student, tmp_path / "good")
    trainer = trainer_of(triples(8))
    with torch.no_grad():
        next(iter(student.parameters())).fill_(float("nan"))
    for save in (lambda: save_student(student, tmp_path / "bad"), lambda: trainer.save_model(str(tmp_path / "bad"))):
        with pytest.raises(ValueError, match=r"has weights that are not finite \(.*lower learning_rate"):
            save()
    assert not (tmp_path / "bad" / "model.safetensors").exists()
    student.save_pretrained(str(tmp_path / "good"))
    with pytest.raises(ValueError, match=r"good/model.safetensors has weights that are not finite"):
        validate_checkpoint(tmp_path / "good")


def test_each_data_set_is_looked_at_with_its_own_loss(student: Any, trainer_of: Any, tmp_path: Path) -> None:
    own, batch = (TightlyCoupledLoss(student, candidates=one) for one in ("own", "in-batch"))
    rows = DatasetDict(a=ALONE.select(range(8)), b=ROWS)
    trainer_of(rows, loss={"a": batch, "b": own}).train()
    assert "dataset_name" not in rows["a"][0]  # the caller's own rows stay as they were
    with pytest.raises(ValueError, match="a has no negatives, and candidates is own"):
        trainer_of(rows, loss={"a": own, "b": batch})
    scored = DatasetDict(a=with_scores(8), b=with_scores(8))
    with pytest.raises(ValueError, match='own candidates only, but the loss has candidates="in-batch"'):
        make_trainer(tmp_path, student, StoredScores(), scored, loss={"a": own, "b": batch})


def test_an_epoch_of_less_than_a_step_is_one_step(trainer_of: Any) -> None:
    trainer = trainer_of(ROWS, gradient_accumulation_steps=8)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made_by", ["hand", "model_init", "add_adapter"])
def test_half_precision_is_trained_in_float32(
    student: Any, teacher: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, made_by: str, dtype: torch.dtype
) -> None:
    half: Any = student.to(dtype)
    if made_by == "add_adapter":
        peft = pytest.importorskip("peft")
        half.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=2))
    before = {name: weight.clone().float() for name, weight in half.named_parameters()}
    settings: dict[str, Any] = {"model_init": lambda: half} if made_by == "model_init" else {}
    trainer = make_trainer(tmp_path, None if settings else half, teacher, ROWS, learning_rate=1e-5, **settings)
    trainer.train()
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    if made_by == "hand":
        assert f"The weights are {dtype}: they are trained as float32" in caplog.text
        moved = [bool((weight != before[name]).any()) for name, weight in trained.items() if "pooler" not in name]
        assert sum(moved) > 0.9 * len(moved)


def test_evaluation_in_half_precision_leaves_the_weights_as_they_were(student: Any, trainer_of: Any) -> None:
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    trainer = trainer_of(ROWS, eval_dataset=triples(8), bf16_full_eval=True)
    trainer.evaluate()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("query", 7, "train_dataset: queries, number 0: holds 7 where text is needed"),
        ("label_weight", float("nan"), "Column 'label_weight' holds nan"),
        ("label_weight", -1.0, "Column 'label_weight' holds -1.0"),
        ("labelled", 1, "Column 'labelled' holds 1: give true, or false"),
        ("known_positive_ids", "p1", "has known_positive_ids = 'p1': give a list"),
        ("known_positive_ids", [None], r"has known_positive_ids = \[None\]: give a list"),
    ],
)
def test_a_row_of_the_wrong_kind_is_refused(trainer_of: Any, column: str, value: Any, message: str) -> None:
    rows = Dataset.from_list([{**row, column: value} for row in ROWS])
    with pytest.raises(ValueError, match=message):
        trainer_of(rows).train()


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_a_data_set_of_any_format_trains_as_the_plain_one(trainer_of: Any, form: str) -> None:
    trainer, plain = (trainer_of(rows, eval_dataset=rows) for rows in (ROWS.with_format(form), ROWS))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    batch, same = (next(iter(one.get_train_dataloader())) for one in (trainer, plain))
    assert torch.equal(batch["tct"]["candidate_ids"], same["tct"]["candidate_ids"])
    assert torch.equal(batch["query_input_ids"], same["query_input_ids"])


def without(name: str) -> Dataset:
    rows = [dict(row) for row in ROWS]
    rows[3][name] = None
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (list(ROWS), "is a list, not a data set: make it one with datasets.Dataset.from_list"),
        (ROWS.select([]), "has no rows"),
        (Dataset.from_list([]), "has no rows"),
        (IterableDataset.from_generator(lambda: iter(())), "has no rows|is streamed"),
        *((without(name), f"row 3 has no {name}. Fill it in") for name in ("query", "positive", "negative_id")),
    ],
    ids=["list", "none", "empty", "empty stream", "query", "positive", "id"],
)
def test_what_is_no_training_data_is_refused(trainer_of: Any, given: Any, message: str) -> None:
    for argument in ("train_dataset", "eval_dataset"):
        for name, rows in ((argument, given), ("part", {"part": given})):
            with pytest.raises(ValueError, match=f"{name}:? {message}"):
                trainer_of(**{"dataset": ROWS, argument.replace("train_", ""): rows})
    with pytest.raises(ValueError, match=f"eval_dataset:? {message}"):
        trainer_of(ROWS).evaluate(given)


def test_a_stock_loss_is_refused(student: Any, trainer_of: Any) -> None:
    for loss in (MultipleNegativesRankingLoss(student), MultipleNegativesRankingLoss):
        with pytest.raises(ValueError, match=r"MultipleNegativesRankingLoss, which takes no teacher's scores"):
            trainer_of(ROWS, loss=loss)


def test_queries_that_are_cut_are_counted(trainer_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "query": row["query"] + " teacher" * (40 if i < 3 else 0)} for i, row in enumerate(ROWS)]
    trainer_of(Dataset.from_list(rows))
    assert "and cut: 3 of 16 queries" in caplog.text


@pytest.mark.parametrize("kind", ["colbert", "student"])
@pytest.mark.parametrize("stops", ["in step 4", "before publishing"])
def test_card_and_weights_of_an_interrupted_run_are_those_of_one_that_was_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stops: str
) -> None:
    queries, corpus = ({str(i): text for i, text in enumerate(texts)} for texts in (QUERIES, PASSAGES))
    evaluator: Any = InformationRetrievalEvaluator if kind == "student" else MultiVectorInformationRetrievalEvaluator
    make = partial(evaluator, queries, corpus, {"1": {"1"}}, name="dev")
    arguments = {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 2}
    arguments |= {"eval_strategy": "steps", "eval_steps": 2}

    def train(path: Path) -> tuple[str, bytes]:
        stage = make_stage(path, arguments=arguments, make_evaluator=make)
        if kind == "student":
            student = partial(SentenceTransformer, str(models / "student"), device="cpu")
            train_student(stage, student, lambda: make_teacher(models, "colbert"), lambda: triples(32))
        else:
            colbert = partial(MultiVectorEncoder, str(models / "teacher" / "colbert"), device="cpu")
            train_colbert(stage, colbert, lambda: triples(32))
        final = path / "final"
        return (final / "README.md").read_text(encoding="utf-8"), (final / "model.safetensors").read_bytes()

    whole = train(tmp_path / "whole")
    assert "| 6 " in whole[0] and "Training Time" not in whole[0]
    step = Trainer.training_step

    def stop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    def never(*args: Any) -> None:
        raise KeyboardInterrupt

    where: Any = (Trainer, "training_step", stop) if stops == "in step 4" else (Stage, "_publish", never)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where)
        train(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "final").exists()
    assert train(tmp_path / "stopped") == whole
