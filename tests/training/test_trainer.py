"""The trainer on real text: its loss against numpy, and every way of running it against the plain run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import EarlyStoppingCallback

from tct_hf import TCTTrainer, TCTTrainingArguments, validate_checkpoint
from tct_hf.data.ids import stable_id
from tests.train_helpers import QUERIES, logged, make_teacher, make_trainer, triples


def batches(trainer: Any) -> list[Any]:
    return list(trainer.get_train_dataloader())


def test_without_ids_the_same_text_is_masked(student: Any, teacher: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(8, ids=False))
    [batch] = batches(trainer)
    part = batch["tct"]
    targets = trainer.teacher_targets(trainer.collect_features(batch)[0], part, trainer.loss)
    passages = [*part["candidate_ids"].T.reshape(-1).tolist()]
    for i in range(8):
        for c, key in enumerate(passages):
            assert targets.mask[i, c].item() == (c == i or key != passages[i])


@pytest.mark.parametrize("ids", [False, True])
def test_the_query_itself_and_other_positives_of_a_query_are_no_negatives(
    student: Any, teacher: Any, tmp_path: Path, ids: bool
) -> None:
    # Rows of one query, rows whose passages are another row's query, and a positive known from a row elsewhere.
    rows = {"query": ["one", "one", "two", "three"], "positive": ["a", "b", "one", "c"], "negative": list("dcfg")}
    if ids:
        rows |= {"query_id": ["one", "one", "two", "three"]}
        rows |= {f"{name}_id": rows[name] for name in ("positive", "negative")}
        rows["known_positive_ids"] = [list("abc"), list("abc"), ["one"], ["c"]]
    else:
        rows["known_positives"] = [[stable_id(text) for text in known] for known in ("abc", "abc", ["one"], "c")]
    rows["labelled"] = [True, True, True, False]
    trainer = make_trainer(tmp_path, student, teacher, Dataset.from_dict(rows), seed=1)
    batch = trainer.data_collator(list(Dataset.from_dict(rows)))
    mask = trainer.teacher_targets(trainer.collect_features(batch)[0], batch["tct"], trainer.loss).mask
    left = [[c for c, there in zip([*rows["positive"], *rows["negative"]], row, strict=True) if there] for row in mask]
    assert left == [list("adfg"), list("bdfg"), ["a", "b", "one", *"cdcfg"], ["a", "b", "one", *"cdcfg"]]


def test_a_copy_of_a_positive_under_another_id_is_no_negative(student: Any, teacher: Any, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"query": ["one", "two"], "positive": ["A b.", "c"], "negative": ["d", "a  B"]}
    rows |= {"query_id": ["1", "2"], "positive_id": ["p", "o"], "negative_id": ["n", "m"]}
    rows["known_positive_ids"] = [["p"], ["o", "n"]]
    trainer = make_trainer(tmp_path, student, teacher, Dataset.from_dict(rows), seed=1)
    batch = trainer.data_collator(list(Dataset.from_dict(rows)))
    mask = trainer.teacher_targets(trainer.collect_features(batch)[0], batch["tct"], trainer.loss).mask
    # By text the last is the first query's positive; by id the third is the second's.
    assert mask.tolist() == [[True, True, True, False], [True, True, False, True]]


def plain_losses(models: Path, path: Path, **settings: Any) -> list[float]:
    student = SentenceTransformer(str(models / "student"), device="cpu")
    trainer = make_trainer(path, student, make_teacher(models, "colbert"), triples(16), **settings)
    trainer.train()
    return logged(trainer)


def test_gradient_accumulation_takes_the_mean_of_its_batches(
    student: Any, teacher: Any, models: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(16), gradient_accumulation_steps=2)
    trainer.train()
    still = plain_losses(models, tmp_path, learning_rate=1e-12)  # both batches at the same weights
    assert logged(trainer) == pytest.approx([np.mean(still)], abs=1e-6)


def test_gradient_checkpointing_changes_no_loss(student: Any, teacher: Any, models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, teacher, triples(16), gradient_checkpointing=True)
    trainer.train()
    assert student[0].model.is_gradient_checkpointing
    assert logged(trainer) == pytest.approx(plain_losses(models, tmp_path), abs=1e-5)


def compiler_is_missing() -> str | None:
    """Why torch.compile cannot run here, or None."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return str(error)
    return None


@pytest.mark.slow
def test_torch_compile_changes_no_loss(models: Path, tmp_path: Path) -> None:
    if reason := compiler_is_missing():
        pytest.skip(f"no C++ compiler: {reason}")
    losses = plain_losses(models, tmp_path, torch_compile=True)
    assert losses == pytest.approx(plain_losses(models, tmp_path), abs=1e-4)


def test_dataset_dict_mixes_no_data_sets_in_a_batch(student: Any, teacher: Any, tmp_path: Path) -> None:
    a, b = triples(16), triples(16).map(lambda row: {"query": "other " + row["query"]})
    trainer = make_trainer(tmp_path, student, teacher, DatasetDict(a=a, b=b))
    kinds = []
    for batch in batches(trainer):
        texts = student.tokenizer.batch_decode(batch["query_input_ids"], skip_special_tokens=True)
        kinds.append({"] other " in text.replace(" ##", "").replace("o ther", "other") for text in texts})
    assert len(kinds) == 4 and all(len(kind) == 1 for kind in kinds)

    # With one batch a data set, each logged loss is that of one data set trained alone.
    both = make_trainer(
        tmp_path, student, teacher, DatasetDict(a=a, b=b), learning_rate=1e-12, per_device_train_batch_size=16
    )
    both.train()
    alone = []
    for rows in (a, b):
        trainer = make_trainer(tmp_path, student, teacher, rows, learning_rate=1e-12, per_device_train_batch_size=16)
        trainer.train()
        alone += logged(trainer)
    assert sorted(logged(both)) == pytest.approx(sorted(alone), abs=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_lora_student_trains_only_its_adapter_and_starts_at_the_plain_loss(
    student: Any, teacher: Any, models: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    student.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=True))
    trainer = make_trainer(tmp_path, student, teacher, triples(16))
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(plain_losses(models, tmp_path)[0], abs=1e-5)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert np.abs(loaded.encode_query(QUERIES) - student.encode_query(QUERIES)).max() < 1e-5
    trained = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name for name, p in student.named_parameters() if p in trained} == {
        name for name, _ in student.named_parameters() if "lora_" in name
    }


class Scripted(BaseEvaluator):
    """Says what the scores are, and keeps the weights it was asked about."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.seen: list[np.ndarray] = []

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.seen.append(model.encode_query(QUERIES))
        return {"score": self.scores[len(self.seen) - 1]}


def test_the_best_model_is_loaded_at_the_end_and_training_stops_early(
    student: Any, teacher: Any, tmp_path: Path
) -> None:
    scripted = Scripted([0.1, 0.7, 0.3, 0.2, 0.9])
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        triples(16),
        evaluator=scripted,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        metric_for_best_model="eval_score",
        greater_is_better=True,
        num_train_epochs=20,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4  # two steps without a better score
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2" and best.parent == tmp_path
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    for vectors in (student.encode_query(QUERIES), SentenceTransformer(str(best), device="cpu").encode_query(QUERIES)):
        assert np.abs(vectors - scripted.seen[1]).max() < 1e-6
        assert np.abs(vectors - scripted.seen[3]).max() > 1e-3


@pytest.mark.usefixtures("warm_checks")
def test_checkpoints_hold_the_student_alone_and_load_without_this_package(
    student: Any, teacher: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, student, teacher, triples(16), save_strategy="steps", save_steps=1, hub_token="hf_secret_token"
    )
    optimizer_parameters = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert optimizer_parameters.isdisjoint(id(p) for p in teacher.model.parameters())
    assert optimizer_parameters == {id(p) for p in student.parameters()}
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(student[0].model.state_dict())
    assert not (checkpoint / "training_args.bin").exists()
    assert trainer.args.hub_token == "hf_secret_token"
    assert not (tmp_path / ".unfinished").exists()
    validate_checkpoint(checkpoint)
    assert not any(module.training for module in teacher.model.modules())


def test_teacher_scores_that_are_not_finite_stop_training_with_the_fix(
    student: Any, teacher: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        teacher.model[1].linear.weight[0, 0] = float("nan")
    trainer = make_trainer(tmp_path, student, teacher, triples(16))
    with pytest.raises(ValueError, match=r"not finite for 8 of 8 queries.*dtype='float32'"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.rename_column("query", "anchor"), "'query' is missing and 'anchor' is not known"),
        (lambda d: d.remove_columns("positive"), "'positive' is missing"),
        (lambda d: d.rename_column("negative", "negative_2"), "negative_1 to negative_n without a gap"),
    ],
)
def test_a_data_set_without_the_columns_is_refused_before_training(
    student: Any, teacher: Any, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, change(triples(8, ids=False)))
    trainer = make_trainer(tmp_path, student, teacher, triples(8).remove_columns("negative_id"))
    with pytest.raises(ValueError, match="but no negative_id: add these ids"):
        batches(trainer)
    with pytest.raises(ValueError, match="needs a TCTDataCollator"):
        TCTTrainer(student, teacher, data_collator=SentenceTransformerDataCollator(student.preprocess))


def test_presets_keep_the_published_numbers_and_give_way_to_explicit_ones(tmp_path: Path) -> None:
    paper = TCTTrainingArguments(output_dir=str(tmp_path), preset="paper")
    assert (paper.temperature, paper.student_temperature, paper.hard_label_weight) == (0.25, 1.0, 0.1)
    code = TCTTrainingArguments(output_dir=str(tmp_path), preset="released-code", temperature=2.0)
    assert (code.temperature, code.hard_label_weight) == (2.0, 0.0)
    batch = TCTTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=24)
    assert batch.per_device_eval_batch_size == 24
    wrong: Any
    for wrong, message in (
        ({"preset": "papers"}, "preset='papers' is not known"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number greater than 0"),
        ({"hard_label_weight": 1.5}, "hard_label_weight=1.5 must be a number from 0 to 1"),
        ({"candidates": "all"}, "candidates must be 'in-batch' or 'own', got 'all'"),
        ({"prompts": "x"}, "prompts and router_mapping come from the student's encoding"),
        ({"matryoshka_dims": [8, 0]}, "matryoshka_dims="),
        ({"mini_batch_size": 2.5}, "mini_batch_size must be a whole number"),
        ({"self_coupled": [6.0, 12.0], "mini_batch_size": 2}, "leave out mini_batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            TCTTrainingArguments(output_dir=str(tmp_path), **wrong)


def test_every_loss_setting_of_the_arguments_reaches_the_loss(student: Any, teacher: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.5,
        "student_temperature": 3.0,
        "hard_label_weight": 0.2,
        "margin_mse_weight": 0.3,
        "student_scale": 3.0,
        "student_divisor": 30.0,
        "kl_direction": "reverse",
        "candidates": "own",
        "mini_batch_size": 3,
        "matryoshka_dims": [8, 32],
        "self_coupled": None,
    }
    trainer = make_trainer(tmp_path, student, teacher, triples(8), **settings)
    assert trainer.loss.get_config_dict() == {**settings, "gather_across_devices": True}
    assert "2010.11386" in trainer.loss.citation and trainer.loss.citation.strip().startswith("@misc{")
    teacher.training_scale = 4.0  # the default temperature is relative to it
    assert make_trainer(tmp_path, student, teacher, triples(8), temperature=None).loss.temperature == 0.25
    trainer.train()
    entry = trainer.state.log_history[0]
    parts = ("hard_label", "distillation", "margin_mse")
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), abs=1e-3)


def test_the_hub_token_never_reaches_the_disk(
    student: Any, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled: list[Any] = []
    save = torch.save

    def spy(content: Any, *args: Any, **kwargs: Any) -> None:
        pickled.append(getattr(content, "hub_token", None))
        save(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", spy)
    trainer = make_trainer(tmp_path, student, teacher, triples(8), hub_token="hf_" + "a" * 34)
    trainer.save_model()
    assert pickled and not any(pickled)
    assert trainer.args.hub_token and not (tmp_path / "training_args.bin").exists()
