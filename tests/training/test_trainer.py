"""The trainer on real text: its loss against numpy, and every way of running it against the plain run."""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler, RoundRobinBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import ConcatDataset, RandomSampler
from transformers import EarlyStoppingCallback

from tct_hf import NoTeacher, TCTTrainer, TCTTrainingArguments, validate_checkpoint
from tct_hf.data.ids import stable_id
from tct_hf.encoding.routes import joined
from tct_hf.training import resumable
from tct_hf.training.collator import SameDatasetBatchSampler
from tests.train_helpers import (
    EVERY_STEP,
    QUERIES,
    batch_and_targets,
    logged,
    make_teacher,
    make_trainer,
    reference_of_batch,
    triples,
)


def candidates_left(trainer: Any) -> list[list[str]]:
    """The passages that each row is compared with."""
    rows = trainer.train_dataset
    passages = [*rows["positive"], *rows["negative"]]
    _, targets = batch_and_targets(trainer)
    return [[text for text, there in zip(passages, row, strict=True) if there] for row in targets.mask]


@pytest.mark.parametrize("ids", [False, True])
def test_the_query_itself_and_other_positives_of_a_query_are_no_negatives(trainer_of: Any, ids: bool) -> None:
    # Rows of one query, rows whose passages are another row's query, and a positive known from a row elsewhere.
    rows = {"query": ["one", "one", "two", "three"], "positive": ["a", "b", "one", "c"], "negative": list("dcfg")}
    known = [list("abc"), list("abc"), ["one"], ["c"]]
    if ids:
        rows |= {f"{name}_id": rows[name] for name in ("query", "positive", "negative")}
        rows["known_positive_ids"] = known
    else:
        rows["known_positives"] = [[stable_id(text) for text in texts] for texts in known]
    rows["labelled"] = [True, True, True, False]
    left = candidates_left(trainer_of(Dataset.from_dict(rows)))
    assert left == [list("adfg"), list("bdfg"), ["a", "b", "one", *"cdcfg"], ["a", "b", "one", *"cdcfg"]]


def test_a_copy_of_a_positive_under_another_id_is_no_negative(trainer_of: Any) -> None:
    rows: dict[str, Any] = {"query": ["one", "two"], "positive": ["A b.", "c"], "negative": ["d", "a  B"]}
    rows |= {"query_id": ["1", "2"], "positive_id": ["p", "o"], "negative_id": ["n", "m"]}
    rows["known_positive_ids"] = [["p"], ["o", "n"]]
    left = candidates_left(trainer_of(Dataset.from_dict(rows)))
    # By text the last is the first query's positive; by id the third is the second's.
    assert left == [["A b.", "c", "d"], ["A b.", "c", "a  B"]]


def plain_losses(models: Path, path: Path, **settings: Any) -> list[float]:
    student = SentenceTransformer(str(models / "student"), device="cpu")
    trainer = make_trainer(path, student, make_teacher(models, "colbert"), triples(16), **settings)
    trainer.train()
    return logged(trainer)


@pytest.fixture(scope="module")
def plain(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return plain_losses(models, tmp_path_factory.mktemp("plain"))


def test_gradient_accumulation_takes_the_mean_of_its_batches(models: Path, tmp_path: Path) -> None:
    accumulated = plain_losses(models, tmp_path, gradient_accumulation_steps=2)
    still = plain_losses(models, tmp_path, learning_rate=1e-12)  # both batches at the same weights
    assert accumulated == pytest.approx([np.mean(still)], abs=1e-6)


def test_gradient_checkpointing_changes_no_loss(student: Any, trainer_of: Any, plain: list[float]) -> None:
    trainer = trainer_of(triples(16), gradient_checkpointing=True)
    trainer.train()
    assert student[0].model.is_gradient_checkpointing
    assert logged(trainer) == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_changes_no_loss(models: Path, plain: list[float], tmp_path: Path) -> None:
    assert plain_losses(models, tmp_path, torch_compile=True) == pytest.approx(plain, abs=1e-4)


def test_attention_with_dropout_stays_in_half_precision_in_steps(
    with_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    losses = []
    for expected in (True, False):
        student = SentenceTransformer(str(with_dropout / "student"), device="cpu")
        found: set[bool] = set()
        student[0].register_forward_hook(lambda *_, found=found: found.add(allowed()))
        trainer = make_trainer(tmp_path, student, make_teacher(with_dropout, "colbert"), triples(16), bf16=True)
        trainer.train()
        assert (found, allowed()) == ({expected}, False)
        losses.append(logged(trainer))
        monkeypatch.setattr(resumable, "half_attention", lambda device: nullcontext())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


COMPILED = {"torch_compile_backend": "eager"}  # the student is wrapped in the same way, and no compiler is needed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mini_batch_size": 3}, {"self_coupled": [1.0, 2.0]}, {"routes": True}], ids=str)
def test_a_compiled_student_has_the_same_loss(models: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    losses = []
    for how in ({}, COMPILED):
        student = SentenceTransformer(str(models / "student"), device="cpu")
        if "routes" in settings:
            passages = SentenceTransformer(str(models / "student"), device="cpu")
            student = joined(list(student), list(passages), passages, student.prompts["query"])
        options = {name: value for name, value in settings.items() if name != "routes"}
        trainer = make_trainer(tmp_path, student, make_teacher(models, "colbert"), triples(8), **options, **how)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_a_compiled_student_resumes_and_is_saved_plain(models: Path, tmp_path: Path) -> None:
    losses = []
    for resume in (None, True):
        student = SentenceTransformer(str(models / "student"), device="cpu")
        settings = {**COMPILED, **EVERY_STEP, "num_train_epochs": 2}
        trainer = make_trainer(tmp_path, student, make_teacher(models, "colbert"), triples(8), **settings)
        trainer.train(resume_from_checkpoint=resume)
        losses.append(logged(trainer))
        saved = SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")
        assert np.abs(saved.encode_query(QUERIES) - student.encode_query(QUERIES)).max() < 1e-6
        shutil.rmtree(tmp_path / "checkpoint-2")
    assert losses[0] == losses[1]


def test_dataset_dict_mixes_no_data_sets_in_a_batch(student: Any, trainer_of: Any) -> None:
    parts = {"a": triples(16), "b": triples(16).map(lambda row: {"query": "retrieval of " + row["query"]})}
    both = DatasetDict(parts)
    kinds = []
    for batch in trainer_of(both).get_train_dataloader():
        texts = student.tokenizer.batch_decode(batch["query_input_ids"], skip_special_tokens=True)
        kinds.append({"retrieval of" in text for text in texts})
    assert sorted(kinds, key=str) == [{False}, {False}, {True}, {True}]


def test_lora_trains_only_its_adapter(student: Any, trainer_of: Any, plain: list[float], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=True))
    trainer = trainer_of(triples(16))
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(plain[0], abs=1e-5)
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


def test_training_stops_early_and_loads_the_best_model(student: Any, trainer_of: Any, tmp_path: Path) -> None:
    scripted = Scripted([0.1, 0.7, 0.3, 0.2, 0.9])
    stop = [EarlyStoppingCallback(early_stopping_patience=2)]
    settings = {**EVERY_STEP, "save_total_limit": 1, "load_best_model_at_end": True, "num_train_epochs": 20}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_score"}
    settings |= {"greater_is_better": True, "evaluator": scripted, "callbacks": stop}
    trainer = trainer_of(triples(16), **settings)
    trainer.train()
    assert trainer.state.global_step == 4  # two steps without a better score
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2" and best.parent == tmp_path
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    for vectors in (student.encode_query(QUERIES), SentenceTransformer(str(best), device="cpu").encode_query(QUERIES)):
        assert np.abs(vectors - scripted.seen[1]).max() < 1e-6
        assert np.abs(vectors - scripted.seen[3]).max() > 1e-3


@pytest.mark.usefixtures("warm_checks")
def test_checkpoints_hold_the_student_alone_and_load_by_themselves(
    student: Any, trainer_of: Any, teacher: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(triples(16), **EVERY_STEP)
    optimizer_parameters = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert optimizer_parameters.isdisjoint(id(p) for p in teacher.model.parameters())
    assert optimizer_parameters == {id(p) for p in student.parameters()}
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(student[0].model.state_dict())
    assert not (tmp_path / ".unfinished").exists()
    validate_checkpoint(checkpoint)
    assert not any(module.training for module in teacher.model.modules())


def test_teacher_scores_that_are_not_finite_stop_training_with_the_fix(trainer_of: Any, teacher: Any) -> None:
    with torch.no_grad():
        teacher.model[1].linear.weight[0, 0] = float("nan")
    trainer = trainer_of(triples(16))
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
def test_a_data_set_without_the_columns_is_refused_before_training(trainer_of: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(change(triples(8, ids=False)))


def test_passages_without_ids_and_another_collator_are_refused(student: Any, trainer_of: Any, teacher: Any) -> None:
    trainer = trainer_of(triples(8).remove_columns("negative_id"))
    with pytest.raises(ValueError, match="but no negative_id: add these ids"):
        next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="needs a TCTDataCollator"):
        TCTTrainer(student, teacher, data_collator=SentenceTransformerDataCollator(student.preprocess))


def test_presets_keep_the_published_numbers_and_give_way_to_explicit_ones(tmp_path: Path) -> None:
    paper = TCTTrainingArguments(output_dir=str(tmp_path), preset="paper")
    assert (paper.temperature, paper.student_temperature, paper.hard_label_weight) == (0.25, 1.0, 0.1)
    code = TCTTrainingArguments(output_dir=str(tmp_path), preset="released-code", temperature=2.0)
    assert (code.temperature, code.hard_label_weight) == (2.0, 0.0)
    batch = TCTTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=24)
    assert batch.per_device_eval_batch_size == 24


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "papers"}, "preset='papers' is not known"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number greater than 0"),
        ({"temperature": "warm"}, "temperature='warm' must be a finite number"),
        ({"candidates": "all"}, "candidates='all' must be 'in-batch' or 'own'"),
        ({"kl_direction": None}, "kl_direction=None must be 'forward' or 'reverse'"),
        ({"prompts": "x"}, "prompts and router_mapping come from the student's encoding"),
        ({"matryoshka_dims": [8, 0]}, "matryoshka_dims="),
        ({"passage_bits": [32, 4]}, "passage_bits=.* must be a list of 32, 8 and 1"),
        ({"query_bits": 9}, "query_bits=9 must be a whole number from 1 to 8"),
        ({"mini_batch_size": 2.5}, "mini_batch_size=2.5 must be a whole number"),
        ({"self_coupled": [6.0, 12.0], "mini_batch_size": 2}, "leave out mini_batch_size"),
    ],
)
def test_arguments_out_of_their_range_are_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TCTTrainingArguments(output_dir=str(tmp_path), **wrong)


def test_every_loss_setting_of_the_arguments_reaches_the_loss(trainer_of: Any, teacher: Any) -> None:
    settings: dict[str, Any] = {"temperature": 0.5, "student_temperature": 3.0, "student_scale": 3.0}
    settings |= {"hard_label_weight": 0.2, "margin_mse_weight": 0.3, "student_divisor": 30.0, "candidates": "own"}
    settings |= {"kl_direction": "reverse", "mini_batch_size": 3, "matryoshka_dims": [8, 32], "self_coupled": None}
    settings |= {"distillation_weight": 0.4, "embedding_weight": 0.0, "embedding_distance": "squared"}
    settings |= {"passage_bits": [32, 1], "query_bits": 4}
    trainer = trainer_of(triples(8), **settings)
    assert trainer.loss.get_config_dict() == {**settings, "gather_across_devices": True}
    assert "2010.11386" in trainer.loss.citation and trainer.loss.citation.strip().startswith("@misc{")
    teacher.training_scale = 4.0  # the default temperature is relative to it
    assert trainer_of(triples(8), temperature=None).loss.temperature == 0.25
    trainer.train()
    entry = trainer.state.log_history[0]
    parts = ("hard_label", "distillation", "margin_mse")
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), abs=1e-3)


def test_the_hub_token_is_never_written(trainer_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled: list[Any] = []
    save = torch.save

    def spy(content: Any, *args: Any, **kwargs: Any) -> None:
        pickled.append(getattr(content, "hub_token", None))
        save(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", spy)
    trainer = trainer_of(triples(8), hub_token="hf_" + "a" * 34, **EVERY_STEP)
    trainer.train()
    trainer.save_model()
    assert pickled and not any(pickled)
    assert trainer.args.hub_token and not list(tmp_path.rglob("training_args.bin"))


MIXED = [True, False, False, True, False, False, True, False]


def flagged(labelled: list[Any]) -> Dataset:
    """Triples of which some are unlabelled; they keep their known positives, which must not count."""
    return triples(len(labelled), negatives=2).add_column("labelled", labelled)  # type: ignore[call-arg]


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
    student: Any, teacher: Any, tmp_path: Path, labelled: list[bool], candidates: str, weight: float
) -> None:
    settings = {"temperature": 0.5, "student_temperature": 2.0}
    options = {**settings, "hard_label_weight": weight, "candidates": candidates}
    taught = teacher if weight < 1 else NoTeacher()
    trainer = make_trainer(tmp_path, student.eval(), taught, flagged(labelled), **options)
    reports: list[dict[str, Any]] = []
    trainer.track_loss_components = reports.append
    loss = trainer.compute_loss(student, batch_and_targets(trainer)[0]).item()
    hard, soft = reference_of_batch(
        student, teacher, flagged(labelled), **settings, weight=weight, own_only=candidates == "own"
    )
    found = [loss, float(reports[0]["hard_label"]), float(reports[0]["distillation"])]
    assert found == pytest.approx([hard + soft, hard, soft], abs=2e-5)
    assert bool(hard > 0) is (weight > 0 and any(labelled)) and bool(soft > 0) is (weight < 1)


def test_rows_with_the_same_flags_and_known_positives_are_no_duplicates(trainer_of: Any) -> None:
    names = ("query", "positive", "negative")
    rows: dict[str, Any] = {name: [f"{name} {number}" for number in range(8)] for name in names}
    rows |= {f"{name}_id": rows[name] for name in names[1:]}
    rows |= {"known_positive_ids": [["p"]] * 8, "labelled": [False] * 8}
    trainer = trainer_of(Dataset.from_dict(rows), batch_sampler="no_duplicates")
    assert [len(batch["tct"]["labelled"]) for batch in trainer.get_train_dataloader()] == [8]


@pytest.mark.parametrize("kind", [ProportionalBatchSampler, RoundRobinBatchSampler])
@pytest.mark.parametrize("world", [2, 3])
def test_batches_that_go_to_the_devices_together_are_of_one_data_set(kind: type, world: int) -> None:
    parts = [Dataset.from_dict({"x": list(range(size))}) for size in (26, 40, 14)]
    whole = ConcatDataset(parts)
    generator = torch.Generator().manual_seed(3)
    drawn = [RandomSampler(part, generator=generator) for part in parts]
    samplers = [DefaultBatchSampler(one, batch_size=4, drop_last=True) for one in drawn]
    inner = kind(dataset=whole, batch_samplers=samplers, generator=generator, seed=3)
    sampler = SameDatasetBatchSampler(inner, whole.cumulative_sizes, world)
    sampler.set_epoch(1)
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    sources = [{bisect_right(whole.cumulative_sizes, row) for row in batch} for batch in batches]
    for first in range(0, len(batches), world):
        assert len(set().union(*sources[first : first + world])) == 1
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows))
