"""The two training stages of the method, resumable: a ColBERT teacher, then a student distilled from it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SparseEncoder,
)
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from tct_hf.arguments import SparseTCTTrainingArguments, TCTTrainingArguments
from tct_hf.coercion import NO_SECRETS, SECRETS
from tct_hf.collator import candidate_columns
from tct_hf.encoding import save_student
from tct_hf.files import CLAIM_FILE, LOG_FILE, claim, is_claimed, replace_dir, write_json_atomic
from tct_hf.progress import human_duration
from tct_hf.saving import WholeCheckpointsMixin
from tct_hf.schedules import LossSchedule, Schedule
from tct_hf.settings import environment
from tct_hf.stalls import StallWatch
from tct_hf.streaming import StreamedTrainingMixin
from tct_hf.teachers import Teacher, has_bfloat16, write_training_scale
from tct_hf.trainer import SparseTCTTrainer, TCTTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers.base.evaluation import BaseEvaluator

    from tct_hf.data.collection import Collection


_SECONDS_FILE = "seconds.json"

# How long processes wait for one another. One prepares the data of all, which NCCL's ten minutes may not be enough
# for; and in training StallWatch, which names who is behind, has to come first.
_PATIENCE = timedelta(hours=3)


class ColBERTTrainer(StreamedTrainingMixin, WholeCheckpointsMixin, MultiVectorEncoderTrainer):
    """sentence-transformers' trainer of multi-vector models, with checkpoints that are whole or not there."""

    def finalise(self, path: str) -> None:
        """Record what the scores are multiplied by, so that every saved or pushed teacher says it."""
        if isinstance(
            self.loss, (MultiVectorMultipleNegativesRankingLoss, CachedMultiVectorMultipleNegativesRankingLoss)
        ):
            write_training_scale(path, self.loss.scale)


class StepLines(TrainerCallback):
    """Prints one plain line every `logging_steps`, with the time left: readable in a terminal and in a file.

    Args:
        write: takes one line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write = write
        self.clock = clock
        self.begun: tuple[float, int] = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = (self.clock(), state.global_step)
        if state.global_step and state.is_world_process_zero:
            self.write(f"  goes on after step {state.global_step} of {state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        since, first = self.begun
        left = (self.clock() - since) / max(state.global_step - first, 1) * (state.max_steps - state.global_step)
        line = f"  step {state.global_step:>5} of {state.max_steps}   loss {logs['loss']:.3f}"
        if "top_agreement" in logs:
            line += (
                f" (hard labels {logs['hard_label']:.3f}, distillation {logs['distillation']:.3f}, "
                + (f"MarginMSE {logs['margin_mse']:.3f}, " if "margin_mse" in logs else "")
                + f"agreement with the teacher {logs['top_agreement']:.0%})"
            )
        if "document_active_dims" in logs:
            line += (
                f"   active dimensions: {logs['query_active_dims']:.0f} of queries, "
                f"{logs['document_active_dims']:.0f} of passages"
            )
        self.write(f"{line}   {human_duration(max(left, 0))} left")


class Stopwatch(TrainerCallback):
    """Keeps the seconds that training has taken, over all interruptions, in a file.

    Args:
        file: JSON, brought up to date with every checkpoint.
        clock: seconds.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self.clock = clock
        self.since = 0.0

    def seconds(self) -> float:
        """What the file says."""
        return float(json.loads(self.file.read_text(encoding="utf-8"))) if self.file.is_file() else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = self.clock()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            now = self.clock()
            write_json_atomic(self.file, self.seconds() + now - self.since)
            self.since = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)


def process_state() -> PartialState:
    """The processes of this run, as `accelerate launch` started them.

    Returns:
        accelerate's state, with every process counted. Its own default counts one where several are launched on a
        machine without an accelerator, so that each would take itself for the main one.
    """
    state = PartialState(timeout=_PATIENCE)
    if state.device.type == "cpu" and not state.use_distributed and "LOCAL_RANK" in os.environ:
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=_PATIENCE)
    return state


def precision(choice: str, device: torch.device) -> dict[str, bool]:
    """Training arguments for a precision: "bf16", "fp32", or "auto", bf16 where the hardware has it.

    Args:
        choice: the name.
        device: that trains.

    Raises:
        ValueError: another name.
    """
    if choice not in ("auto", "bf16", "fp32"):
        raise ValueError(f'precision={choice!r} is not known: use "auto", "bf16" or "fp32".')
    bf16 = choice == "bf16" or (choice == "auto" and has_bfloat16(device))
    return {"bf16": bf16, "use_cpu": device.type == "cpu"}  # transformers takes bf16 on a CPU only with use_cpu


class _HalfPrecisionEncoding:
    """Of an evaluator: encodes in bfloat16 when training does, and compares in float32."""

    bf16 = False

    def embed_inputs(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            vectors = super().embed_inputs(model, *args, **kwargs)  # type: ignore[misc]
        return vectors.float() if isinstance(vectors, torch.Tensor) else [one.float() for one in vectors]


def dev_evaluator(
    collection: Collection,
    arguments: Mapping[str, Any],
    *,
    kind: Literal["dense", "late interaction", "sparse"],
    **part: int | None,
) -> Any:
    """An evaluator on the dev queries where the arguments ask for evaluation, None where they do not.

    Args:
        collection: with a dev split.
        arguments: of the training; eval_strategy says whether there is evaluation, bf16 what it encodes in.
        kind: of model; the evaluator of a sparse one also tells the active dimensions.
        **part: `queries` and `passages` of :meth:`Collection.part`: quick, and too easy to be compared with
            anything but itself.

    Returns:
        Its measures are named eval_dev_dot_mrr@10 and so on (eval_dev_maxsim_mrr@10 for a multi-vector model).

    Raises:
        ValueError: evaluation is asked for and there is no dev split.
    """
    if not _evaluates(collection, arguments):
        return None
    from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

    class Dense(_HalfPrecisionEncoding, InformationRetrievalEvaluator):
        bf16 = bool(arguments.get("bf16"))

    class LateInteraction(_HalfPrecisionEncoding, MultiVectorInformationRetrievalEvaluator):
        bf16 = bool(arguments.get("bf16"))

    class Sparse(_HalfPrecisionEncoding, SparseInformationRetrievalEvaluator):
        bf16 = bool(arguments.get("bf16"))

    make: Any = {"dense": Dense, "late interaction": LateInteraction, "sparse": Sparse}[kind]
    searched = replace(collection, splits={"dev": collection.splits["dev"]}).part(**part)
    dev = searched.splits["dev"]
    return make(
        queries=dev.queries,
        corpus=dict(zip(searched.corpus["id"], searched.corpus["text"], strict=True)),
        relevant_docs={query: {p for p, grade in grades.items() if grade > 0} for query, grades in dev.qrels.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[100],
        name="dev",
    )


def _evaluates(collection: Collection, arguments: Mapping[str, Any]) -> bool:
    if arguments.get("eval_strategy", "no") in ("no", False):
        return False
    if "dev" not in collection.splits:
        raise ValueError(
            f"training.eval_strategy is {arguments['eval_strategy']!r}, but {collection.name} has no dev split: name "
            "one with data.dev_split, or leave eval_strategy out."
        )
    return True


def check_arguments(
    arguments: Mapping[str, Any], collection: Collection, *, of: Literal["colbert", "dense", "splade"]
) -> None:
    """Find out before any training what is wrong with training arguments.

    Args:
        arguments: as for :func:`train_colbert` or :func:`train_student`.
        collection: with a dev split, where they ask for evaluation.
        of: what they train.

    Raises:
        ValueError, TypeError: with the mend.
    """
    _check(arguments)
    _evaluates(collection, arguments)
    kinds: dict[str, Any] = {
        "colbert": MultiVectorEncoderTrainingArguments,
        "dense": TCTTrainingArguments,
        "splade": SparseTCTTrainingArguments,
    }
    kinds[of](output_dir="unused", **arguments)


def _check(arguments: Mapping[str, Any]) -> None:
    for name in ("output_dir", "disable_tqdm", "prompts", "router_mapping"):
        if name in arguments:
            raise ValueError(f"training.{name} is set by the stage itself: leave it out of the settings.")
    for name in SECRETS:
        if name in arguments:
            raise ValueError(f"training.{name} {NO_SECRETS}")


def _claim(work: Path, settings: Mapping[str, Any]) -> None:
    state = PartialState()
    if state.is_main_process:
        claim(work, settings)
    state.wait_for_everyone()


def _run(trainer: Any, work: Path, write: Callable[[str], None]) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepLines(write))
    trainer.add_callback(StallWatch())
    stopwatch = Stopwatch(work / _SECONDS_FILE)
    trainer.add_callback(stopwatch)
    last = get_last_checkpoint(str(work))
    reached = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME)) if last else None
    if last and reached and reached.global_step >= reached.max_steps:
        # Stopped between its last step and publishing: transformers would train one step more.
        best = reached.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or last)
        trainer.state = reached
    else:
        trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        step = trainer.state.global_step
        write_json_atomic(
            work / LOG_FILE, [*trainer.state.log_history, {"step": step, "seconds": stopwatch.seconds()}]
        )


def _publish(work: Path, final: Path, save: Callable[[Path], object]) -> None:
    """Save a trained model aside and give it its final name when it is whole; then the checkpoints can go."""
    staging = work / "finished"
    shutil.rmtree(staging, ignore_errors=True)
    save(staging)
    shutil.copyfile(work / LOG_FILE, staging / LOG_FILE)
    shutil.copyfile(work / CLAIM_FILE, staging / CLAIM_FILE)
    write_json_atomic(staging / "environment.json", environment())  # of this stage: others may run elsewhere
    replace_dir(staging, final)
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (work / _SECONDS_FILE).unlink(missing_ok=True)


def _push_finished(trainer: Any, write: Callable[[str], None]) -> None:
    """Push the finished model where that was asked for; it is saved by now, and a failure loses nothing."""
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except OSError as error:
        write(f"  not pushed: {error} The model is saved; push it with recipes/release.py.")


def train_colbert(
    make_model: Callable[[], MultiVectorEncoder],
    make_triples: Callable[[], Dataset],
    final: str | Path,
    *,
    work: str | Path,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    scale: float = 1.0,
    evaluator: BaseEvaluator | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    """Train a ColBERT teacher by softmax over the in-batch candidates, and save it.

    Stopped and called again, it goes on from the last checkpoint; finished, it returns at once.

    Args:
        make_model: the untrained model, on the device; called when there is something to train.
        make_triples: the data set, columns query, positive, negative ...; called when there is something to train.
        final: folder for the trained model.
        work: folder for checkpoints.
        arguments: of MultiVectorEncoderTrainingArguments, without output_dir.
        settings: JSON-ready, all that the model depends on: a folder with others is refused.
        scale: of the scores in the softmax, recorded with the teacher for the student's default temperature.
        evaluator: on dev queries.
        write: takes lines of progress.

    Returns:
        `final`.

    Raises:
        ValueError: a folder that belongs to other settings, or a data set without the columns.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1; Khattab and Zaharia, arXiv 2004.12832.
    """
    _check(arguments)
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    _claim(work, settings)
    model = make_model()
    triples = make_triples()
    columns = ["query", *candidate_columns(triples.column_names)]
    if "labelled" in triples.column_names:  # the others have no positive to train on
        triples = triples.filter(lambda labelled: labelled, input_columns="labelled")
    # A query with several positives has several rows: in one batch each would be the others' negative.
    arguments = {"batch_sampler": "no_duplicates", **arguments}
    args = MultiVectorEncoderTrainingArguments(output_dir=str(work), disable_tqdm=True, **arguments)
    trainer = ColBERTTrainer(
        model=model,
        args=args,
        train_dataset=triples.select_columns(columns),
        loss=MultiVectorMultipleNegativesRankingLoss(
            model, scale=scale, gather_across_devices=PartialState().num_processes > 1
        ),
        evaluator=evaluator,
    )
    trainer.data_collator.prompts = {
        name: model.prompts["query" if name == "query" else "document"] or "" for name in columns
    }
    _run(trainer, work, write)

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))
        write_training_scale(folder, scale)

    if trainer.is_world_process_zero():
        _publish(work, final, save)
    trainer.accelerator.wait_for_everyone()
    _push_finished(trainer, write)
    return final


def train_student(
    make_student: Callable[[], SentenceTransformer | SparseEncoder],
    make_teacher: Callable[[], Teacher],
    make_triples: Callable[[], Dataset],
    final: str | Path,
    *,
    work: str | Path,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    evaluator: BaseEvaluator | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    """Distil a live teacher into a student, and save it.

    Stopped and called again, it goes on from the last checkpoint; finished, it returns at once.

    Args:
        make_student: the untrained student, dense or sparse; called when there is something to train.
        make_teacher: the teacher; likewise.
        make_triples: the data set, columns query, positive, negative ... and ids; likewise.
        final: folder for the trained student.
        work: folder for checkpoints.
        arguments: of TCTTrainingArguments, or SparseTCTTrainingArguments for a sparse student; without output_dir.
        settings: JSON-ready, all that the student depends on: a folder with others is refused.
        evaluator: on dev queries.
        schedules: of the loss's settings over training, for :class:`LossSchedule`.
        write: takes lines of progress.

    Returns:
        `final`.

    Raises:
        ValueError: a folder that belongs to other settings, or a data set without the columns.
        CollapsedStudent: a sparse student is about to lose all active dimensions.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """
    _check(arguments)
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    _claim(work, settings)
    student = make_student()
    sparse = isinstance(student, SparseEncoder)
    make_args: Any = SparseTCTTrainingArguments if sparse else TCTTrainingArguments
    make_trainer: Any = SparseTCTTrainer if sparse else TCTTrainer
    args = make_args(output_dir=str(work), disable_tqdm=True, **arguments)
    trainer = make_trainer(student, make_teacher(), args, train_dataset=make_triples(), evaluator=evaluator)
    if schedules:
        trainer.add_callback(LossSchedule(trainer.loss, **schedules))
    _run(trainer, work, write)
    if trainer.is_world_process_zero():
        _publish(
            work,
            final,
            lambda folder: (
                student.save_pretrained(str(folder))
                if isinstance(student, SparseEncoder)
                else save_student(student, folder)
            ),
        )
    trainer.accelerator.wait_for_everyone()
    _push_finished(trainer, write)
    return final
