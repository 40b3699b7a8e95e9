"""The training stages of the method, resumable: a ColBERT teacher, a student distilled from it, the stock baseline."""

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
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

from tct_hf.data.column_names import candidate_columns
from tct_hf.encoding.build import save_student
from tct_hf.teachers.base import Teacher, write_training_scale
from tct_hf.training.arguments import SparseTCTTrainingArguments, TCTTrainingArguments
from tct_hf.training.loss import COSINE_SCALE
from tct_hf.training.resumable import ResumableTrainer
from tct_hf.training.schedules import LossSchedule, Schedule
from tct_hf.training.stages import check_stage, run_stage
from tct_hf.training.trainer import SparseTCTTrainer, TCTTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers.base.evaluation import BaseEvaluator

    from tct_hf.data.collection import Collection


class ColBERTTrainer(ResumableTrainer, MultiVectorEncoderTrainer):
    """sentence-transformers' trainer of multi-vector models, resumable."""

    def finalise(self, path: str) -> None:
        """Record what the scores are multiplied by, so that every saved or pushed teacher says it."""
        kinds = (MultiVectorMultipleNegativesRankingLoss, CachedMultiVectorMultipleNegativesRankingLoss)
        if isinstance(self.loss, kinds):
            write_training_scale(path, self.loss.scale)


class StockTrainer(ResumableTrainer, SentenceTransformerTrainer):
    """sentence-transformers' own trainer, resumable."""


class _HalfPrecisionEncoding:
    """For evaluators: encodes in bfloat16 when training does, and compares in float32."""

    bf16 = False

    def embed_inputs(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            vectors = super().embed_inputs(model, *args, **kwargs)  # type: ignore[misc]
        return vectors.float() if isinstance(vectors, torch.Tensor) else [one.float() for one in vectors]


_EVALUATORS: dict[str, type] = {
    "dense": InformationRetrievalEvaluator,
    "late interaction": MultiVectorInformationRetrievalEvaluator,
    "sparse": SparseInformationRetrievalEvaluator,
}


def dev_evaluator(
    collection: Collection,
    arguments: Mapping[str, Any],
    *,
    kind: Literal["dense", "late interaction", "sparse"],
    **part: int | None,
) -> Any:
    """An evaluator on the dev queries where the arguments ask for evaluation, None where they do not."""
    if not _evaluates(collection, arguments):
        return None
    make: Any = type(kind, (_HalfPrecisionEncoding, _EVALUATORS[kind]), {"bf16": bool(arguments.get("bf16"))})
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
    """Find out before any training what is wrong with the arguments of :func:`train_colbert` or of a student."""
    check_stage(arguments)
    _evaluates(collection, arguments)
    kinds: dict[str, Any] = {
        "colbert": MultiVectorEncoderTrainingArguments,
        "dense": TCTTrainingArguments,
        "splade": SparseTCTTrainingArguments,
    }
    kinds[of](output_dir="unused", **arguments)


def _labelled(triples: Dataset) -> Dataset:
    """The texts of the rows that have a positive."""
    columns = ["query", *candidate_columns(triples.column_names)]
    if "labelled" in triples.column_names:
        triples = triples.filter(lambda labelled: labelled, input_columns="labelled")
    return triples.select_columns(columns)


def _prompts(model: Any, columns: list[str]) -> dict[str, str]:
    return {name: model.prompts.get("query" if name == "query" else "document") or "" for name in columns}


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
    """Train a ColBERT teacher by softmax over the in-batch candidates, and save it; see :func:`run_stage`.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1; Khattab and Zaharia, arXiv 2004.12832.
    """
    check_stage(arguments)

    def make() -> tuple[Any, Callable[[Path], object]]:
        model = make_model()
        is_mean = model.similarity_fn_name == "meanmaxsim"
        factor = scale if scale is not None else COSINE_SCALE if is_mean else 1.0
        triples = _labelled(make_triples())
        # A query with several positives has several rows: in one batch each would be the others' negative.
        own = {"batch_sampler": "no_duplicates", **arguments}
        trainer = ColBERTTrainer(
            model=model,
            args=MultiVectorEncoderTrainingArguments(output_dir=str(work), disable_tqdm=True, **own),
            train_dataset=triples,
            loss=MultiVectorMultipleNegativesRankingLoss(
                model,
                scale=factor,
                similarity_fct=mean_colbert_scores if is_mean else None,
                gather_across_devices=PartialState().num_processes > 1,
            ),
            evaluator=evaluator,
        )
        trainer.data_collator.prompts = _prompts(model, triples.column_names)

        def save(folder: Path) -> None:
            model.save_pretrained(str(folder))
            write_training_scale(folder, factor)

        return trainer, save

    return run_stage(make, final, work=work, settings=settings, write=write)


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

    The loss is MultipleNegativesRankingLoss: cosines times 20, softmax over the passages of the batch. Arguments,
    return value and errors as of :func:`train_colbert`; arguments of a student's training that sentence-transformers'
    own lack, and push_to_hub, are left out.

    Source: sentence-transformers' training overview, for (anchor, positive, negative) triplets.
    """
    check_stage(arguments)

    def make() -> tuple[Any, Callable[[Path], object]]:
        model = make_model()
        triples = _labelled(make_triples())
        known = {field.name for field in fields(SentenceTransformerTrainingArguments)} - {"push_to_hub"}
        own = {"batch_sampler": "no_duplicates", **{name: arguments[name] for name in arguments if name in known}}
        own["prompts"] = _prompts(model, triples.column_names)
        gather = PartialState().num_processes > 1
        trainer = StockTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(output_dir=str(work), disable_tqdm=True, **own),
            train_dataset=triples,
            loss=MultipleNegativesRankingLoss(model, scale=COSINE_SCALE, gather_across_devices=gather),
            evaluator=evaluator,
        )
        return trainer, lambda folder: model.save_pretrained(str(folder))

    return run_stage(make, final, work=work, settings=settings, write=write)


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
    """Distil a live teacher into a student, and save it; see :func:`run_stage`.

    Arguments that are not listed here, return value and errors as of :func:`train_colbert`.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """
    check_stage(arguments)

    def make() -> tuple[Any, Callable[[Path], object]]:
        student = make_student()
        sparse = isinstance(student, SparseEncoder)
        make_args: Any = SparseTCTTrainingArguments if sparse else TCTTrainingArguments
        make_trainer: Any = SparseTCTTrainer if sparse else TCTTrainer
        args = make_args(output_dir=str(work), disable_tqdm=True, **arguments)
        trainer = make_trainer(student, make_teacher(), args, train_dataset=make_triples(), evaluator=evaluator)
        if schedules:
            trainer.add_callback(LossSchedule(trainer.loss, **schedules))
        if isinstance(student, SparseEncoder):
            return trainer, lambda folder: student.save_pretrained(str(folder))
        return trainer, lambda folder: save_student(student, folder)

    return run_stage(make, final, work=work, settings=settings, write=write)
