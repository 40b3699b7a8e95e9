"""Train a student, dense or sparse, against a live teacher."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SparseEncoder,
    SparseEncoderTrainer,
)
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from tct_hf.batches import first_row, gather_rows, sizes_of_all
from tct_hf.data.column_names import candidate_columns
from tct_hf.encoding.build import has_tct_encoding
from tct_hf.encoding.checkpoint import finalise_checkpoint
from tct_hf.encoding.scale import keep_scalar, length_of
from tct_hf.teachers.base import NoTeacher, Teacher
from tct_hf.teachers.colbert import ColBERTTeacher
from tct_hf.training.arguments import SparseTCTTrainingArguments, TCTTrainingArguments
from tct_hf.training.collator import BATCH_KEY, SameDatasetBatchSampler, TCTDataCollator
from tct_hf.training.loss import NO_LABEL, TeacherTargets, TightlyCoupledLoss, coupled_part, coupled_parts
from tct_hf.training.resumable import ResumableTrainer
from tct_hf.training.sparsity import CollapseWatch, FlopsOfAllDevices, RegularizerWarmup

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDataset
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.model import BaseModel

logger = logging.getLogger(__name__)


def candidate_mask(candidate_ids: Tensor, positive_index: Tensor, known_positive_ids: Tensor | None = None) -> Tensor:
    """Which candidates take part: all but those that are the row's positive once more, or another known positive.

    Args:
        candidate_ids: `(candidates,)` int64.
        positive_index: `(queries,)` int64, the column of each row's own positive; -1 for a row without one.
        known_positive_ids: `(queries, most)` int64, padded with an id that no candidate has.

    Returns:
        `(queries, candidates)` bool. A row's own positive always takes part, and so does every candidate of a row
        without one: there the teacher alone judges.
    """
    rows = torch.arange(len(positive_index), device=positive_index.device)
    labelled = positive_index >= 0
    own = candidate_ids[positive_index.clamp(min=0)]  # (queries,)
    positive = candidate_ids[None, :] == own[:, None]
    if known_positive_ids is not None:
        for column in known_positive_ids.T:  # one at a time: a query may have hundreds
            positive = positive | (candidate_ids[None, :] == column[:, None])
    mask = ~(positive & labelled[:, None])
    mask[rows[labelled], positive_index[labelled]] = True
    return mask


class CoupledTrainer(ResumableTrainer):
    """The base of the trainers with a live teacher: scoring, the loss, logging."""

    teacher: Teacher
    loss: Any
    model_class: Any
    other_model: ClassVar[str]  # what to do with a model of another kind

    def __init__(
        self,
        model: Any = None,
        teacher: Teacher | MultiVectorEncoder | str | None = None,
        args: Any = None,
        train_dataset: Dataset | DatasetDict | IterableDataset | None = None,
        eval_dataset: Dataset | DatasetDict | IterableDataset | None = None,
        evaluator: BaseEvaluator | list[BaseEvaluator] | None = None,
        loss: Any = None,
        **kwargs: Any,
    ) -> None:
        own = type(self).__name__
        if teacher is None:
            raise ValueError(f"A {own} needs a teacher: a ColBERTTeacher, or a multi-vector model or its path.")
        if model is not None and not isinstance(model, self.model_class):
            raise ValueError(
                f"A {own} trains a {self.model_class.__name__}, got {type(model).__name__}: {self.other_model}"
            )
        self.teacher = teacher if isinstance(teacher, Teacher) else ColBERTTeacher(teacher)
        self._warned = False
        collator = kwargs.get("data_collator")
        if collator is not None and not isinstance(collator, TCTDataCollator):
            raise ValueError(
                f"data_collator is a {type(collator).__name__}: a {own} needs a TCTDataCollator, "
                "which also lets the teacher prepare a batch. Leave it out, or subclass TCTDataCollator."
            )
        lacks_prompts = model is not None and any(model.prompts.values()) and not getattr(collator, "prompts", None)
        if collator is not None and (collator.teacher is not self.teacher or lacks_prompts):
            raise ValueError(
                "data_collator has another teacher than the trainer, or no prompts: make it with teacher= the same "
                "Teacher and prompts=model.prompts, or leave it out."
            )
        if model is not None:
            self.teacher.attach(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            evaluator=evaluator,
            loss=loss,
            **kwargs,
        )
        self.teacher.to(self.args.device)
        for one in coupled_parts(self.loss):
            self._refuse_no_teacher(one)
            if isinstance(one, TightlyCoupledLoss):  # a loss that was made before the processes met
                one.check(self.accelerator.num_processes)
        self._prepare_teacher()
        # The loss is a mean over the batch: the base class divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False

    def _refuse_no_teacher(self, loss: Any) -> None:
        if isinstance(self.teacher, NoTeacher) and getattr(loss, "asks_teacher", False):
            wanted = {"hard_label_weight": 1.0, "margin_mse_weight": 0.0}
            said = " and ".join(
                f"{name} is {getattr(loss, name)}: set it to {value:g}"
                for name, value in wanted.items()
                if getattr(loss, name) != value
            )
            raise ValueError(f"There is no teacher to distil, but {said}, or give a teacher.")

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> TCTDataCollator:
        """The collator that also lets the teacher prepare a batch."""
        return TCTDataCollator(preprocess_fn=model.preprocess, prompts=model.prompts, teacher=self.teacher)

    def _candidates(self, names: list[str]) -> list[str]:
        return candidate_columns(names, read=self.teacher.columns_read(names))

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        """Refuse a data set without the columns of training, before the first step."""
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
        """Let the teacher refuse what it can't teach, before the first step."""
        given: Any
        for given in (self.train_dataset, self.eval_dataset):
            for dataset in given.values() if isinstance(given, dict) else [given]:
                for loss in coupled_parts(self.loss) if dataset is not None and dataset.column_names else []:
                    self.teacher.check(dataset.column_names, candidates=getattr(loss, "candidates", "in-batch"))

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
            loss_fn = self.override_model_in_loss(loss_fn, cast("BaseModel", model))  # type: ignore[attr-defined]
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
        """Scores, mask and positives of this device's queries against the candidates of a coupled loss.

        Args:
            features: the student's features of query, positive, negative_1, ..., negative_n.
            batch: the collator's other part of the batch.
            loss: the coupled loss.

        Raises:
            ValueError: the teacher gave a score that is not finite, or there is none and the loss asks for it.
        """
        self._refuse_no_teacher(loss)  # a schedule may have changed the weights
        gather = getattr(loss, "gathers", False)
        prepared = {"query": features[0], "columns": features[1:], **batch.get("teacher", {})}
        scores = self.teacher.score_matrix(prepared, gather=gather)
        ids = batch["candidate_ids"]
        queries, columns = ids.shape
        sizes = sizes_of_all(queries, ids.device) if gather else [queries]
        everyones = gather_rows(ids, sizes) if gather else ids
        ids = everyones.T.reshape(-1)  # all positives first, as in the score matrix
        positive = torch.arange(queries, device=ids.device) + (first_row(sizes) if gather else 0)
        weight = batch.get("label_weight")
        if "labelled" in batch:  # the other rows learn from the teacher alone, or from a positive that it has named
            named = batch["labelled"] if weight is None else weight > 0
            positive = positive.masked_fill(~named, NO_LABEL)
        mask = candidate_mask(ids, positive, batch.get("known_positive_ids"))
        if getattr(loss, "candidates", "in-batch") == "own":
            mask = mask & torch.eye(queries, dtype=torch.bool, device=ids.device).repeat(1, columns)
        self._check_teacher(scores, mask, getattr(loss, "temperature", 1.0))
        return TeacherTargets(scores=scores, mask=mask, positive_index=positive, label_weight=weight)

    def _check_teacher(self, scores: Tensor, mask: Tensor, temperature: float) -> None:
        choice = mask.sum(1) > 1  # a row with one candidate is one-hot by nature
        finite = torch.isfinite(scores).all(1)
        logits = (scores.nan_to_num() / temperature).masked_fill(~mask, float("-inf"))
        # Everything but the top candidate is lost in the rounding of the top one.
        one_hot = (torch.softmax(logits, dim=1).amax(1) == 1) & choice
        not_finite, peaked = torch.stack([(~finite).sum(), one_hot.sum()]).tolist()  # one wait for the device
        if not_finite:
            raise ValueError(
                f"The teacher gave scores that are not finite for {not_finite} of {len(scores)} queries (first in row "
                f"{int((~finite).nonzero()[0])}). Load it with dtype='float32' if it is not, and check that its "
                "checkpoint scores single texts finitely."
            )
        if peaked and not self._warned:
            self._warned = True
            logger.warning(
                f"The teacher's distribution is one-hot to float precision for {peaked} of {len(scores)} queries at "
                f"temperature {temperature}: there it teaches no more than a hard label. Raise the temperature (1 / "
                f"the scale the teacher was trained at is {1 / self.teacher.training_scale:.3g})."
            )


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

    def finalise(self, path: str) -> None:
        """Complete a saved student with the TCT encoding; every other is right as it was saved."""
        if has_tct_encoding(self.model):
            finalise_checkpoint(path)


class SparseTCTTrainer(CoupledTrainer, SparseEncoderTrainer):
    """Distil a live teacher into a sparse student.

    The loss is the coupled loss inside sentence-transformers' SpladeLoss (CachedSpladeLoss with a `mini_batch_size`),
    whose regularisers keep queries and passages sparse. Mean active dimensions of both are logged, as
    `query_active_dims` and `document_active_dims`, and the training stops when they head for zero.

    Args:
        model: the student, of :func:`~tct_hf.build_splade` or any SparseEncoder, compared by dot product; with a
            Router, columns go to its routes "query" and "document".
        teacher: as of :class:`TCTTrainer`.
        args: arguments of the run.
        train_dataset: as of :class:`TCTTrainer`.
        eval_dataset: data set with the same columns, for the loss on held-out queries.
        evaluator: such as a SparseInformationRetrievalEvaluator on dev queries; models are chosen by it.
        loss: a SpladeLoss of a TightlyCoupledLoss of the student; by default one with the arguments' settings, which
            a loss that is given here takes none of but the warm-up.
        **kwargs: arguments of :class:`sentence_transformers.SparseEncoderTrainer`.

    Raises:
        ValueError: as :class:`TCTTrainer`.
        CollapsedStudent: in training, when the student is about to be empty.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2; Formal et al., arXiv 2205.04733.
    """

    model_class = SparseEncoder
    training_args_class = SparseTCTTrainingArguments
    other_model = "build one with build_splade; a SentenceTransformer takes a TCTTrainer."
    args: SparseTCTTrainingArguments
    _watch: CollapseWatch | None = None
    _dims: list[Tensor]

    def get_default_loss(self, model: Any) -> SpladeLoss:
        """The coupled loss with the arguments' settings, this teacher's temperature and the regularisers."""
        settings = self.args.loss_settings(self.teacher.training_scale)
        # The gradient cache is the outer loss's: it holds the embeddings that all parts of the loss take.
        size = settings.pop("mini_batch_size")
        kind, cached = (SpladeLoss, {}) if size is None else (CachedSpladeLoss, {"mini_batch_size": size})
        return kind(
            model,
            TightlyCoupledLoss(model, **settings),
            document_regularizer_weight=self.args.document_regularizer_weight,
            query_regularizer_weight=self.args.query_regularizer_weight,
            document_regularizer=FlopsOfAllDevices(model, self.args.document_regularizer_threshold),
            query_regularizer=FlopsOfAllDevices(model, self.args.query_regularizer_threshold),
            **cached,
        )

    def prepare_loss(self, loss: Any, model: Any) -> nn.Module:
        """The loss on the model's device, and the regularisers' warm-up as the arguments say."""
        loss = loss if isinstance(loss, nn.Module) else loss(model)
        if not isinstance(loss, SpladeLoss) or not isinstance(loss.loss, TightlyCoupledLoss):
            inner = f" of a {type(loss.loss).__name__}" if isinstance(loss, SpladeLoss) else ""
            raise ValueError(
                f"The loss is a {type(loss).__name__}{inner}: a SparseTCTTrainer needs a SpladeLoss or "
                "CachedSpladeLoss of a TightlyCoupledLoss, or none for one with the arguments' settings."
            )
        if loss.loss.mini_batch_size is not None:
            raise ValueError(
                "mini_batch_size of the TightlyCoupledLoss has no effect inside another loss: leave it out there, and "
                "make the outer one a CachedSpladeLoss(..., mini_batch_size=...)."
            )
        if not any(isinstance(one, RegularizerWarmup) and one.loss is loss for one in self.callback_handler.callbacks):
            shape, warmup = self.args.regularizer_warmup_shape, self.args.regularizer_warmup
            # After the first callback, where sentence-transformers looks for it: it would add its own.
            self.callback_handler.callbacks.insert(1, RegularizerWarmup(loss, warmup=warmup, shape=shape))
        return super().prepare_loss(loss, model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers' trainer; stops when the student is about to be empty."""
        self._watch, self._dims = CollapseWatch(), []
        return super().train(*args, **kwargs)

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        """Keep a batch's figures for the log, and look whether the student still has active dimensions."""
        super().track_loss_components(loss)
        if self._watch is None or not self.model.training or "document_active_dims" not in loss:
            return
        self._dims.append(torch.stack([loss["query_active_dims"], loss["document_active_dims"]]))
        if not self.accelerator.sync_gradients:  # more batches of this step are to come
            return
        dims = torch.stack(self._dims).mean(0)
        self._dims.clear()
        if get_world_size() > 1:  # all processes decide the same
            dist.all_reduce(dims)
            dims = dims / get_world_size()
        queries, passages = dims.tolist()
        part = coupled_parts(self.loss)[0]
        changeable = ("document_regularizer_weight", "query_regularizer_weight", "regularizer_warmup", "learning_rate")
        self._watch.step(
            {"queries": queries, "passages": passages},
            {name: getattr(part, name, None) for name in ("temperature", "student_temperature")}
            | {name: getattr(self.args, name) for name in changeable},
        )
