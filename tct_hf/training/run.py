"""The two training stages of the method, resumable: a ColBERT teacher, then a student distilled from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from tct_hf.data.column_names import candidate_columns
from tct_hf.encoding.build import save_student
from tct_hf.files import is_claimed
from tct_hf.teachers.base import Teacher, write_training_scale
from tct_hf.training.arguments import SparseTCTTrainingArguments, TCTTrainingArguments
from tct_hf.training.loss import COSINE_SCALE
from tct_hf.training.saving import WholeCheckpointsMixin
from tct_hf.training.schedules import LossSchedule, Schedule
from tct_hf.training.stages import check_stage, claim_stage, publish_stage, run_stage
from tct_hf.training.streaming import StreamedTrainingMixin
from tct_hf.training.trainer import SparseTCTTrainer, TCTTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers.base.evaluation import BaseEvaluator

    from tct_hf.data.collection import Collection


class ColBERTTrainer(StreamedTrainingMixin, WholeCheckpointsMixin, MultiVectorEncoderTrainer):
    """sentence-transformers' trainer of multi-vector models, with checkpoints that are whole or not there."""

    def finalise(self, path: str) -> None:
        """Record what the scores are multiplied by, so that every saved or pushed teacher says it."""
        if isinstance(
            self.loss, (MultiVectorMultipleNegativesRankingLoss, CachedMultiVectorMultipleNegativesRankingLoss)
        ):
            write_training_scale(path, self.loss.scale)


class StockTrainer(StreamedTrainingMixin, WholeCheckpointsMixin, SentenceTransformerTrainer):
    """sentence-transformers' own trainer, with checkpoints that are whole or not there."""


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
    check_stage(arguments)
    _evaluates(collection, arguments)
    kinds: dict[str, Any] = {
        "colbert": MultiVectorEncoderTrainingArguments,
        "dense": TCTTrainingArguments,
        "splade": SparseTCTTrainingArguments,
    }
    kinds[of](output_dir="unused", **arguments)


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
    scale: float | None = None,
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
        scale: of the scores in the softmax, recorded with the teacher for the student's default temperature. None: 1
            of MaxSim, 20 of its mean over the query's tokens.
        evaluator: on dev queries.
        write: takes lines of progress.

    Returns:
        `final`.

    Raises:
        ValueError: a folder that belongs to other settings, or a data set without the columns.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1; Khattab and Zaharia, arXiv 2004.12832.
    """
    check_stage(arguments)
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    claim_stage(work, settings)
    model = make_model()
    is_mean = model.similarity_fn_name == "meanmaxsim"
    if scale is None:
        scale = COSINE_SCALE if is_mean else 1.0
    triples = _labelled(make_triples())
    columns = triples.column_names
    # A query with several positives has several rows: in one batch each would be the others' negative.
    arguments = {"batch_sampler": "no_duplicates", **arguments}
    args = MultiVectorEncoderTrainingArguments(output_dir=str(work), disable_tqdm=True, **arguments)
    trainer = ColBERTTrainer(
        model=model,
        args=args,
        train_dataset=triples,
        loss=MultiVectorMultipleNegativesRankingLoss(
            model,
            scale=scale,
            similarity_fct=mean_colbert_scores if is_mean else None,
            gather_across_devices=PartialState().num_processes > 1,
        ),
        evaluator=evaluator,
    )
    trainer.data_collator.prompts = {
        name: model.prompts["query" if name == "query" else "document"] or "" for name in columns
    }
    run_stage(trainer, work, write)

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))
        write_training_scale(folder, scale)

    if trainer.is_world_process_zero():
        publish_stage(work, final, save)
    trainer.accelerator.wait_for_everyone()
    _push_finished(trainer, write)
    return final


def _labelled(triples: Dataset) -> Dataset:
    """The texts of the rows that have a positive."""
    columns = ["query", *candidate_columns(triples.column_names)]
    if "labelled" in triples.column_names:
        triples = triples.filter(lambda labelled: labelled, input_columns="labelled")
    return triples.select_columns(columns)


def train_stock(
    make_model: Callable[[], SentenceTransformer],
    make_triples: Callable[[], Dataset],
    final: str | Path,
    *,
    work: str | Path,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    evaluator: BaseEvaluator | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    """Train an embedding model as sentence-transformers does by itself, the baseline of a distilled student.

    The loss is MultipleNegativesRankingLoss: cosines times 20, softmax over the passages of the batch. Stopped and
    called again, it goes on from the last checkpoint; finished, it returns at once.

    Args:
        make_model: the base as it is, on the device; called when there is something to train.
        make_triples: the data set, columns query, positive, negative ...; called when there is something to train.
        final: folder for the trained model.
        work: folder for checkpoints.
        arguments: of a student's training, without output_dir; what sentence-transformers' own arguments lack, and
            push_to_hub, is left out.
        settings: JSON-ready, all that the model depends on: a folder with others is refused.
        evaluator: on dev queries.
        write: takes lines of progress.

    Returns:
        `final`.

    Raises:
        ValueError: a folder that belongs to other settings, or a data set without the columns.

    Source: sentence-transformers' training overview, for (anchor, positive, negative) triplets.
    """
    check_stage(arguments)
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    claim_stage(work, settings)
    model = make_model()
    triples = _labelled(make_triples())
    known = {field.name for field in fields(SentenceTransformerTrainingArguments)} - {"push_to_hub"}
    own = {"batch_sampler": "no_duplicates", **{name: arguments[name] for name in arguments if name in known}}
    prompts = {
        name: model.prompts.get("query" if name == "query" else "document") or "" for name in triples.column_names
    }
    trainer = StockTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(work), disable_tqdm=True, prompts=prompts, **own),
        train_dataset=triples,
        loss=MultipleNegativesRankingLoss(model, scale=20.0, gather_across_devices=PartialState().num_processes > 1),
        evaluator=evaluator,
    )
    run_stage(trainer, work, write)
    if trainer.is_world_process_zero():
        publish_stage(work, final, lambda folder: model.save_pretrained(str(folder)))
    trainer.accelerator.wait_for_everyone()
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
    check_stage(arguments)
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    claim_stage(work, settings)
    student = make_student()
    sparse = isinstance(student, SparseEncoder)
    make_args: Any = SparseTCTTrainingArguments if sparse else TCTTrainingArguments
    make_trainer: Any = SparseTCTTrainer if sparse else TCTTrainer
    args = make_args(output_dir=str(work), disable_tqdm=True, **arguments)
    trainer = make_trainer(student, make_teacher(), args, train_dataset=make_triples(), evaluator=evaluator)
    if schedules:
        trainer.add_callback(LossSchedule(trainer.loss, **schedules))
    run_stage(trainer, work, write)
    if trainer.is_world_process_zero():
        publish_stage(
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
