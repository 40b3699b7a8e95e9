"""The training stages of the method: a ColBERT teacher, a student distilled from it, the stock baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

from tct_hf.data.column_names import KNOWN, KNOWN_TEXTS, candidate_columns
from tct_hf.data.near_duplicates import is_query, same, text_key
from tct_hf.teachers.base import Teacher, write_training_scale
from tct_hf.training.arguments import LossSchedule, Schedule, SparseTCTTrainingArguments, TCTTrainingArguments
from tct_hf.training.loss import COSINE_SCALE
from tct_hf.training.resumable import ResumableTrainer
from tct_hf.training.sparse_trainer import SparseTCTTrainer
from tct_hf.training.stages import Stage
from tct_hf.training.trainer import TCTTrainer, checked_rows

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

Kind = Literal["dense", "late interaction", "sparse"]

_EVALUATORS: dict[str, type] = {
    "dense": InformationRetrievalEvaluator,
    "late interaction": MultiVectorInformationRetrievalEvaluator,
    "sparse": SparseInformationRetrievalEvaluator,
}
ARGUMENTS: dict[str, Any] = {
    "dense": TCTTrainingArguments,
    "late interaction": MultiVectorEncoderTrainingArguments,
    "sparse": SparseTCTTrainingArguments,
}


class _ApartTrainer(ResumableTrainer):
    """Puts no two rows into a batch of which one has a known positive of the other: in a batch all are negatives."""

    known: Any = None  # the rows with their ids and known positives, where there are any

    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super().get_batch_sampler(*args, **kwargs)  # type: ignore[misc]
        if self.known is not None and isinstance(sampler, NoDuplicatesBatchSampler):
            sampler.dataset = self.known.with_transform(_kept_apart)
            sampler.precompute_hashes = False  # which needs as many values of every row
        return sampler


def _row_of(row: Mapping[str, Any]) -> tuple[list[str], list[Any], set[Any]]:
    """Texts of a row's candidates, what they are called among known positives, and its known positives."""
    names = candidate_columns(list(row))
    called = [row[f"{name}_id"] if KNOWN in row else text_key(row[name]) for name in names]
    return [row[name] for name in names], called, {called[0], *(row.get(KNOWN, row.get(KNOWN_TEXTS)) or ())}


def _kept_apart(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The texts of a row, and what passages are known by, as columns of one value each."""
    row = {name: values[0] for name, values in batch.items()}
    texts, called, known = _row_of(row)
    keys = [row["query"], *texts, *(f"id {one}" for one in {*called, *known})]
    return {str(at): [key] for at, key in enumerate(keys)}


def _can_train(row: Mapping[str, Any]) -> bool:
    """Whether a row has a label, and no negative that is its query or a positive of it."""
    texts, called, known = _row_of(row)
    wrong = any(is_query(text, row["query"]) or same(text, texts[0]) for text in texts[1:])
    return bool(row.get("labelled", True) and not wrong and not known.intersection(called[1:]))


class ColBERTTrainer(_ApartTrainer, MultiVectorEncoderTrainer):
    """sentence-transformers' trainer of multi-vector models, resumable; all that it saves says its scale."""

    loss: Any

    def finalise(self, path: str) -> None:
        write_training_scale(path, self.loss.scale)


class StockTrainer(_ApartTrainer, SentenceTransformerTrainer):
    """sentence-transformers' own trainer, resumable."""


class _HalfPrecisionEncoding:
    """For evaluators: encodes in bfloat16 when training does, compares in float32, and ranks no query for itself."""

    bf16, ignore_identical_ids = False, False

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> Any:
        if self.ignore_identical_ids:
            names: list[str] = self.queries_ids  # type: ignore[attr-defined]
            queries_result_list = [
                [hit for hit in hits if hit["corpus_id"] != name]
                for name, hits in zip(names, queries_result_list, strict=True)
            ]
        return super().compute_metrics(queries_result_list)  # type: ignore[misc]

    def embed_inputs(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            vectors = super().embed_inputs(model, *args, **kwargs)  # type: ignore[misc]
        return vectors.float() if isinstance(vectors, torch.Tensor) else [one.float() for one in vectors]


def dev_evaluator(collection: Collection, kind: Kind, *, bf16: bool = False) -> Any:
    """An evaluator on the dev queries of a collection."""
    make: Any = type(
        kind, (_HalfPrecisionEncoding, _EVALUATORS[kind]), {"bf16": bf16, "ignore_identical_ids": collection.skips_own}
    )
    dev = collection.splits["dev"]
    return make(
        queries=dev.queries,
        corpus=dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True)),
        relevant_docs={query: {p for p, grade in grades.items() if grade > 0} for query, grades in dev.qrels.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[100],
        name="dev",
    )


def _train_on_labels(
    stage: Stage,
    make_model: Callable[[], Any],
    make_triples: Callable[[], Dataset],
    make_loss: Callable[[Any], Any],
    trainer: Any,
    arguments: Any,
) -> Path:
    """Train with a loss of sentence-transformers, on the texts of the rows that have a positive."""

    def make() -> Any:
        model, triples = make_model(), checked_rows(make_triples(), "train_dataset")
        columns, in_memory = ["query", *candidate_columns(triples.column_names)], isinstance(triples, Dataset)
        flagged = "labelled" in triples.column_names
        if in_memory:
            labelled = sum(triples["labelled"]) if flagged else len(triples)
            triples = triples.filter(_can_train)
            if left_out := labelled - len(triples):
                what = "a negative of theirs is their query or a positive of it"
                stage.write(f"  {left_out:,} of {labelled:,} rows are left out: {what}")
        elif flagged:
            triples = triples.filter(lambda labelled: labelled, input_columns="labelled")
        made = trainer(
            model,
            # A query with several positives has several rows: in one batch each would be the others' negative.
            stage.args(arguments, batch_sampler="no_duplicates"),
            train_dataset=triples.select_columns(columns),
            loss=make_loss(model),
            evaluator=stage.make_evaluator(),
        )
        if in_memory and {KNOWN, KNOWN_TEXTS} & {*triples.column_names}:
            made.known = triples
        made.data_collator.prompts = {
            name: model.prompts.get("query" if name == "query" else "document") or "" for name in columns
        }
        return made

    return stage.train(make)


def train_colbert(
    stage: Stage,
    make_model: Callable[[], MultiVectorEncoder],
    make_triples: Callable[[], Dataset],
    *,
    scale: float | None = None,
) -> Path:
    """Train a ColBERT teacher by softmax over the in-batch candidates; scores times 20 for means, 1 for sums.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1; Khattab and Zaharia, arXiv 2004.12832.
    """

    def make_loss(model: MultiVectorEncoder) -> MultiVectorMultipleNegativesRankingLoss:
        is_mean = model.similarity_fn_name == "meanmaxsim"
        return MultiVectorMultipleNegativesRankingLoss(
            model,
            scale=scale if scale is not None else COSINE_SCALE if is_mean else 1.0,
            similarity_fct=mean_colbert_scores if is_mean else None,
            gather_across_devices=PartialState().num_processes > 1,
        )

    return _train_on_labels(stage, make_model, make_triples, make_loss, ColBERTTrainer, ARGUMENTS["late interaction"])


def train_stock(
    stage: Stage, make_model: Callable[[], SentenceTransformer], make_triples: Callable[[], Dataset]
) -> Path:
    """Train an embedding model as sentence-transformers does by itself, the baseline of a distilled student.

    Arguments of a student's training that sentence-transformers' own lack, and push_to_hub, are left out.
    """
    kind = SentenceTransformerTrainingArguments
    known = {field.name for field in fields(kind)} - {"push_to_hub"}
    stage = replace(stage, arguments={name: value for name, value in stage.arguments.items() if name in known})

    def make_loss(model: SentenceTransformer) -> MultipleNegativesRankingLoss:
        gather = PartialState().num_processes > 1
        return MultipleNegativesRankingLoss(model, scale=COSINE_SCALE, gather_across_devices=gather)

    return _train_on_labels(stage, make_model, make_triples, make_loss, StockTrainer, kind)


def train_student(
    stage: Stage,
    make_student: Callable[[], SentenceTransformer | SparseEncoder],
    make_teacher: Callable[[], Teacher],
    make_triples: Callable[[], Dataset],
    *,
    schedules: Mapping[str, Schedule] | None = None,
) -> Path:
    """Distil a live teacher into a student.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """

    def make() -> TCTTrainer | SparseTCTTrainer:
        student = make_student()
        sparse = isinstance(student, SparseEncoder)
        args = stage.args(ARGUMENTS["sparse" if sparse else "dense"])
        kind: Any = SparseTCTTrainer if sparse else TCTTrainer
        trainer = kind(student, make_teacher(), args, train_dataset=make_triples(), evaluator=stage.make_evaluator())
        if schedules:
            trainer.add_callback(LossSchedule(trainer.loss, **schedules))
        return trainer

    return stage.train(make)
