"""Train a student against a live teacher: scoring, the loss, logging; and the trainer of a dense one."""

from __future__ import annotations

from copy import copy
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import (
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from torch import Tensor, nn

from tct_hf.batches import first_row, gather_rows, sizes_of_all
from tct_hf.data.column_names import IN_EVERY_ROW, candidate_columns
from tct_hf.data.rows import checked_texts
from tct_hf.encoding.checkpoint import finalise_checkpoint
from tct_hf.encoding.encoders import keep_scalar, length_of
from tct_hf.encoding.routes import has_stored_vectors
from tct_hf.retrieval.cut_queries import say_cut_queries
from tct_hf.teachers.base import NoTeacher, Teacher
from tct_hf.teachers.colbert import ColBERTTeacher
from tct_hf.training.arguments import TCTTrainingArguments
from tct_hf.training.collator import BATCH_KEY, NO_ID, SameDatasetBatchSampler, TCTDataCollator
from tct_hf.training.embeddings import EmbeddingTrainer
from tct_hf.training.loss import NO_LABEL, TeacherTargets, TightlyCoupledLoss, coupled_part, coupled_parts
from tct_hf.training.resumable import ResumableTrainer

_LOOKED_AT = 1000  # queries of training that are looked at for being cut


def candidate_mask(
    candidate_ids: Tensor,
    positive_index: Tensor,
    known_positive_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    same_query: Tensor | None = None,
) -> Tensor:
    """Which candidates take part: all but the row's positive once more, another known positive, and the query itself.

    Args:
        candidate_ids: `(candidates,)` int64.
        positive_index: `(queries,)` int64, the column of each row's own positive; -1 for a row without one.
        known_positive_ids: `(queries, most)` int64, padded with an id that no candidate has.
        query_ids: `(queries,)` int64, under which a candidate is the query itself.
        same_query: `(queries, rows)` bool, which rows, whose positives are the first candidates, are of the query too.

    Returns:
        `(queries, candidates)` bool. A row's own positive always takes part, and so does every candidate of a row
        without one but the query itself: there the teacher alone judges.
    """
    rows = torch.arange(len(positive_index), device=positive_index.device)
    labelled = positive_index >= 0
    own = candidate_ids[positive_index.clamp(min=0)]  # (queries,)
    positive = candidate_ids[None, :] == own[:, None]
    if same_query is not None:
        positive[:, : same_query.shape[1]] |= same_query
    if known_positive_ids is not None:
        for column in known_positive_ids.T:  # one at a time: a query may have hundreds
            positive = positive | (candidate_ids[None, :] == column[:, None])
    mask = ~(positive & labelled[:, None])
    if query_ids is not None:
        mask &= candidate_ids[None, :] != query_ids[:, None]
    mask[rows[labelled], positive_index[labelled]] = True
    return mask


def _each(given: Any, name: str) -> list[tuple[str, Any]]:
    """The data sets of a trainer's argument, with their names."""
    if isinstance(given, dict):
        return [*given.items()]
    return [] if given is None else [(name, given)]


def checked_rows(given: Any, argument: str) -> Any:
    """A trainer's data sets, of Python values; refuses what can't be trained on, before the first step."""
    if not isinstance(given, dict):
        return None if given is None else _checked(given, argument)
    if streamed := [name for name, rows in given.items() if isinstance(rows, IterableDataset)]:
        raise ValueError(
            f"{argument}: {streamed[0]} is streamed, and only a data set that is given alone may be: load them whole."
        )
    # Copies: sentence-transformers puts a transform on each of them in place.
    return type(given)({name: copy(_checked(rows, name)) for name, rows in given.items()})


def _checked(rows: Any, name: str) -> Any:
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise ValueError(
            f"{name} is a {type(rows).__name__}, not a data set: make it one with datasets.Dataset.from_list(rows)."
        )
    if isinstance(rows, IterableDataset) and (rows.column_names or next(iter(rows), None)):
        return rows
    if isinstance(rows, IterableDataset) or not len(rows):
        raise ValueError(f"{name} has no rows: check its source, and what a filter left of it.")
    if rows.format["type"] not in (None, "custom"):  # a transform is the user's own
        rows = rows.with_format(None)
    for column in rows.column_names:
        if IN_EVERY_ROW.fullmatch(column) and rows.data.column(column).null_count and None in rows[column]:
            row = list(rows[column]).index(None)
            raise ValueError(f"{name}: row {row} has no {column}. Fill it in, or remove the row (or a column of ids).")
    return rows


class CoupledTrainer(EmbeddingTrainer, ResumableTrainer):
    """The base of the trainers with a live teacher."""

    teacher: Teacher
    loss: Any
    model_class: Any
    other_model: ClassVar[str]  # what to do with a model of another kind

    def __init__(
        self,
        model: Any = None,
        teacher: Teacher | MultiVectorEncoder | str | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluator: Any = None,
        loss: Any = None,
        **kwargs: Any,
    ) -> None:
        own = type(self).__name__
        if model is not None and not isinstance(model, self.model_class):
            raise ValueError(
                f"A {own} trains a {self.model_class.__name__}, got {type(model).__name__}: {self.other_model}"
            )
        train_dataset = checked_rows(train_dataset, "train_dataset")
        eval_dataset = checked_rows(eval_dataset, "eval_dataset")
        self.teacher = teacher if isinstance(teacher, Teacher) else ColBERTTeacher(teacher)
        collator = kwargs.get("data_collator")
        if isinstance(collator, TCTDataCollator):
            collator.teacher = self.teacher
            collator.prompts = collator.prompts or getattr(model, "prompts", None)
        elif collator is not None:
            raise ValueError(
                f"data_collator is a {type(collator).__name__}: a {own} needs a TCTDataCollator, or a subclass."
            )
        if model is not None:
            self.teacher.attach(model)
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "evaluator": evaluator, "loss": loss}
        super().__init__(model=model, args=args, **given, **kwargs)
        self.teacher.to(self.args.device)
        for one in coupled_parts(self.loss):
            self._refuse_no_teacher(one)
            if isinstance(one, TightlyCoupledLoss):  # a loss that was made before the processes met
                one.check(self.accelerator.num_processes)
        self.learn_embeddings()
        self._prepare_teacher()
        # The loss is a mean over the batch: the base class divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False

    def _refuse_no_teacher(self, loss: Any) -> None:
        if isinstance(self.teacher, NoTeacher) and getattr(loss, "asks_teacher", False):
            raise ValueError(
                f"There is no teacher to distil, but hard_label_weight is {loss.hard_label_weight}, "
                f"distillation_weight {loss.distillation_weight} and margin_mse_weight {loss.margin_mse_weight}: set "
                "them to 1, None and 0, or give a teacher."
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            eval_dataset = checked_rows(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> TCTDataCollator:
        return TCTDataCollator(preprocess_fn=model.preprocess, prompts=model.prompts, teacher=self.teacher)

    def _candidates(self, names: list[str]) -> list[str]:
        return candidate_columns(names, read=self.teacher.columns_read(names))

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        super().validate_column_names(dataset, dataset_name=dataset_name)  # type: ignore[misc]
        if not isinstance(dataset, dict):
            self._candidates(dataset.column_names)

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """sentence-transformers' sampler, shown the texts alone: equal labels make no duplicates."""
        if isinstance(dataset, Dataset) and "query" in dataset.column_names:
            dataset = dataset.select_columns(["query", *self._candidates(dataset.column_names)])
        return super().get_batch_sampler(dataset, *args, **kwargs)  # type: ignore[misc]

    def get_multi_dataset_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Batches of one data set at a time, on all devices at once: their passages become one set of candidates."""
        sampler = super().get_multi_dataset_batch_sampler(dataset, *args, **kwargs)  # type: ignore[misc]
        world = self.accelerator.num_processes
        return SameDatasetBatchSampler(sampler, dataset.cumulative_sizes, world) if world > 1 else sampler

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
        # Several devices need whole batches in training only: dropping the last one in evaluation can leave none.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and dataset_kind == "train"
        try:
            return super()._build_dataloader(dataset, batch_size, dataset_kind)  # type: ignore[misc]
        finally:
            self.args.dataloader_drop_last = drop_last

    def _prepare_teacher(self) -> None:
        """Let the teacher refuse what it can't teach, and say what it will cost, before the first step."""
        size = self.args.per_device_train_batch_size
        sets = [(one, True) for one in _each(self.train_dataset, "train_dataset")]
        sets += [(one, False) for one in _each(self.eval_dataset, "eval_dataset")]
        for (name, dataset), training in sets:
            loss = coupled_part(self.loss[name] if isinstance(self.loss, dict) else self.loss)
            candidates = getattr(loss, "candidates", "in-batch")
            self.teacher.check(dataset.column_names, candidates=candidates)
            if not training:
                continue
            columns = self._candidates(dataset.column_names)
            devices = self.accelerator.num_processes if getattr(loss, "gathers", False) else 1
            if len(columns) == 1 and (candidates == "own" or size * devices == 1):
                why = "candidates is own" if candidates == "own" else "a batch is one row"
                raise ValueError(
                    f"{name} has no negatives, and {why}, so nothing is learned: add some, or use larger batches."
                )
            if self.is_world_process_zero():
                if isinstance(dataset, Dataset):
                    queries = checked_texts((row["query"] for row in islice(dataset, _LOOKED_AT)), f"{name}: queries")
                    say_cut_queries(self.model, queries, len(queries))
                self.teacher.announce(dataset, columns, queries=size, devices=devices)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss `()` of a batch of :class:`TCTDataCollator`, which the teacher scores first."""
        inputs = dict(inputs)
        batch = inputs.pop(BATCH_KEY)
        dataset_name = inputs.pop("dataset_name", None)
        features, _ = self.collect_features(inputs)  # type: ignore[attr-defined]
        loss_fn = self.loss[dataset_name] if isinstance(self.loss, dict) else self.loss
        if model is self.model_wrapped and getattr(loss_fn, "model", model) is not model:
            loss_fn = self.override_model_in_loss(loss_fn, cast("Any", model))  # type: ignore[attr-defined]
        targets = self.teacher_targets(features, batch, coupled_part(loss_fn))
        loss = loss_fn(features, targets)
        report = targets.report
        if isinstance(loss, dict):
            # A cached loss puts its whole gradient into its first part, which the report has as it is.
            report = {**loss, **report}
            loss = torch.stack(list(loss.values())).sum()
        self.track_loss_components(report)  # type: ignore[attr-defined]
        return (loss, {}) if return_outputs else loss

    def teacher_targets(self, features: list[dict[str, Any]], batch: dict[str, Any], loss: Any) -> TeacherTargets:
        """What the teacher says of this device's queries (the first features) and the candidates of a coupled loss."""
        self._refuse_no_teacher(loss)  # a schedule may have changed the weights
        gather = getattr(loss, "gathers", False)
        prepared = {"query": features[0], "columns": features[1:], **batch.get("teacher", {})}
        if getattr(loss, "embedding_weight", 0.0):
            scores, embeddings = self.teacher.score_and_embed(prepared, gather=gather)
            if embeddings is not None and has_stored_vectors(self.model):
                embeddings = embeddings[:1]  # passages stay: queries alone learn
        else:
            scores, embeddings = self.teacher.score_matrix(prepared, gather=gather), None
        not_finite = (~torch.isfinite(scores)).any(1).nonzero().flatten().tolist()
        if not_finite:
            raise ValueError(
                f"The teacher gave scores that are not finite for {len(not_finite)} of {len(scores)} queries (first "
                f"in row {not_finite[0]}): load it with dtype='float32', and check its checkpoint."
            )
        asked, (queries, columns) = batch["asked"][:, None], batch["candidate_ids"].shape
        kinds = [kind for kind in ("ids", "texts") if f"candidate_{kind}" in batch]
        sizes = sizes_of_all(queries, asked.device) if gather else [queries]
        everyones = torch.cat([asked, *(batch[f"candidate_{kind}"] for kind in kinds)], dim=1)
        everyones = gather_rows(everyones, sizes) if gather else everyones
        same_query = (asked == everyones[:, 0]) & (asked != NO_ID)
        positive = torch.arange(queries, device=asked.device) + (first_row(sizes) if gather else 0)
        weight = batch.get("label_weight")
        if "labelled" in batch:  # the other rows learn from the teacher alone, or from a positive that it has named
            named = batch["labelled"] if weight is None else weight > 0
            positive = positive.masked_fill(~named, NO_LABEL)
        masks = []
        for kind, keys in zip(kinds, everyones[:, 1:].split(columns, dim=1), strict=True):
            # All positives first, as in the score matrix; a candidate must pass by its id and by its text.
            known = batch.get(f"known_positive_{kind}")
            masks.append(candidate_mask(keys.T.reshape(-1), positive, known, batch[f"query_{kind}"], same_query))
        mask = torch.stack(masks).all(0)
        if getattr(loss, "candidates", "in-batch") == "own":
            mask = mask & torch.eye(queries, dtype=torch.bool, device=asked.device).repeat(1, columns)
        return TeacherTargets(scores, mask, positive, label_weight=weight, embeddings=embeddings)


class TCTTrainer(CoupledTrainer, SentenceTransformerTrainer):
    """Distil a live teacher into a single-vector student.

    Args:
        model: the student, of :func:`~tct_hf.student_from_teacher` or :func:`~tct_hf.build_student`. Any other
            SentenceTransformer is trained as it is too, with its own prompts, pooling and similarity.
        teacher: a :class:`~tct_hf.Teacher`, or a multi-vector model (or its path or Hub id) for a ColBERTTeacher.
        args: arguments of the run.
        train_dataset: columns query, positive, negative (or negative_1 ... negative_n); where there are ids, also
            positive_id, negative_id and known_positive_ids, so that known positives are no negatives. Rows with
            false in a column labelled learn from the teacher alone: their passages are candidates without judgement.
            A column label_weight weighs the passage in column positive as one, whoever named it.
        eval_dataset: data set with the same columns, for the loss on held-out queries.
        evaluator: such as an InformationRetrievalEvaluator on dev queries; models are chosen by it.
        loss: a TightlyCoupledLoss of the student; by default one with the arguments' settings, which a loss that is
            given here takes none of.
        **kwargs: arguments of :class:`sentence_transformers.SentenceTransformerTrainer`.

    Raises:
        ValueError: a data set without the columns, no teacher, a collator that is no TCTDataCollator, teacher scores
            that are not finite.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """

    model_class = SentenceTransformer
    training_args_class = TCTTrainingArguments
    other_model = "build one with build_student or student_from_teacher; a SparseEncoder takes a SparseTCTTrainer."
    args: TCTTrainingArguments

    def get_default_loss(self, model: Any) -> TightlyCoupledLoss:
        """The coupled loss with the arguments' settings and this teacher's temperature."""
        return TightlyCoupledLoss(model, **self.args.loss_settings(self.teacher.training_scale))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; a student's learned scale stays one number, which a loaded student has forgotten."""
        keep_scalar(self.model)
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the weights that decay: a learned scale has no reason to be small."""
        student: Any = getattr(self.model, "_orig_mod", self.model)
        weight = length_of(student)
        kept = {name for name, parameter in model.named_parameters() if parameter is weight}
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def prepare_loss(self, loss: Any, model: Any) -> nn.Module:
        loss = loss if isinstance(loss, nn.Module) else loss(model)
        if type(loss).__module__.startswith("sentence_transformers."):
            raise ValueError(
                f"The loss is a {type(loss).__name__}, which takes no teacher's scores: give a TightlyCoupledLoss."
            )
        return super().prepare_loss(loss, model)

    def finalise(self, path: str) -> None:
        finalise_checkpoint(path)
