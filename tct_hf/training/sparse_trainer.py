"""Train a sparse student against a live teacher: its regularisers, and what stops one that loses all dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import (
    SparseEncoder,
    SparseEncoderTrainer,
)
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, FlopsLoss, SpladeLoss
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from tct_hf.batches import gather_rows, sizes_of_all
from tct_hf.training.arguments import SparseTCTTrainingArguments
from tct_hf.training.loss import TightlyCoupledLoss, coupled_parts
from tct_hf.training.score_losses import at_least_float32
from tct_hf.training.trainer import CoupledTrainer

PATIENCE = 3  # steps without active dimensions before training of a sparse student stops


class FlopsOfAllDevices(FlopsLoss):
    """FLOPS of the whole batch, where sentence-transformers takes the mean over a device's rows, in float32.

    Source: Paria et al., arXiv 2004.05665, section 4; threshold: arXiv 2504.14839.
    """

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            weights = at_least_float32(embeddings)
            if self.threshold is not None:
                dense = (embeddings != 0).sum(dim=1, keepdim=True) > self.threshold
                weights = weights.masked_fill(~dense, 0.0)
            sizes = sizes_of_all(len(weights), weights.device)
            sums = gather_rows(weights.sum(dim=0, keepdim=True), [1] * len(sizes), with_grad=True)
            return (sums.sum(dim=0) / sum(sizes)).square().sum()


class RegularizerWarmup(SpladeRegularizerWeightSchedulerCallback):
    """sentence-transformers' warm-up of the regularisers' weights, over a share of the steps or a number of them."""

    def __init__(self, loss: SpladeLoss, *, warmup: float, shape: str) -> None:
        super().__init__(loss, shape, warmup_ratio=warmup if 0.0 < warmup < 1.0 else 1.0)
        self.fixed_steps = None if 0.0 < warmup < 1.0 else int(warmup)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.fixed_steps is not None:
            self.warmup_steps: Any = self.fixed_steps


class CollapsedStudent(ValueError):
    """A sparse student's vectors have lost all active dimensions; they do not come back."""


class SparseTCTTrainer(CoupledTrainer, SparseEncoderTrainer):
    """Distil a live teacher into a sparse student.

    The loss is the coupled loss inside sentence-transformers' SpladeLoss (CachedSpladeLoss with a `mini_batch_size`),
    whose regularisers keep queries and passages sparse. Mean active dimensions of both are logged, as
    `query_active_dims` and `document_active_dims`, and the training stops when they are gone.

    Args:
        model: the student, of :func:`~tct_hf.build_splade` or any SparseEncoder, compared by dot product; with a
            Router, columns go to its routes "query" and "document".
        teacher: as of :class:`~tct_hf.TCTTrainer`, like the arguments that are not listed here.
        evaluator: such as a SparseInformationRetrievalEvaluator on dev queries; models are chosen by it.
        loss: a SpladeLoss of a TightlyCoupledLoss of the student; by default one with the arguments' settings, which
            a loss that is given here takes none of but the warm-up.

    Raises:
        ValueError: as :class:`~tct_hf.TCTTrainer`.
        CollapsedStudent: in training, when the student is empty.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2; Formal et al., arXiv 2205.04733.
    """

    model_class = SparseEncoder
    training_args_class = SparseTCTTrainingArguments
    other_model = "build one with build_splade; a SentenceTransformer takes a TCTTrainer."
    args: SparseTCTTrainingArguments
    _dims: tuple[Tensor, ...] = ()  # active dimensions of queries and passages, of the batches of this step
    _empty_steps = 0

    def get_default_loss(self, model: Any) -> SpladeLoss:
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
        loss = loss if isinstance(loss, nn.Module) else loss(model)
        if not isinstance(loss, SpladeLoss) or not isinstance(loss.loss, TightlyCoupledLoss):
            inner = f" of a {type(loss.loss).__name__}" if isinstance(loss, SpladeLoss) else ""
            raise ValueError(
                f"The loss is a {type(loss).__name__}{inner}: a SparseTCTTrainer needs a SpladeLoss or "
                "CachedSpladeLoss of a TightlyCoupledLoss, or none."
            )
        if loss.loss.mini_batch_size is not None:
            raise ValueError("mini_batch_size has no effect inside another loss: give it to a CachedSpladeLoss.")
        if not any(isinstance(one, RegularizerWarmup) and one.loss is loss for one in self.callback_handler.callbacks):
            shape, warmup = self.args.regularizer_warmup_shape, self.args.regularizer_warmup
            # After the first callback, where sentence-transformers looks for it: it would add its own.
            self.callback_handler.callbacks.insert(1, RegularizerWarmup(loss, warmup=warmup, shape=shape))
        return super().prepare_loss(loss, model)

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        super().track_loss_components(loss)
        if not self.model.training or "document_active_dims" not in loss:
            return
        self._dims += (torch.stack([loss["query_active_dims"], loss["document_active_dims"]]),)
        if not self.accelerator.sync_gradients:  # more batches of this step are to come
            return
        dims, self._dims = torch.stack(self._dims).mean(0), ()
        if get_world_size() > 1:  # all processes decide the same
            dist.all_reduce(dims)
            dims = dims / get_world_size()
        self.refuse_collapse(*dims.tolist())

    def refuse_collapse(self, queries: float, passages: float) -> None:
        """Stop when queries or passages have had less than one active dimension on average, several steps in a row."""
        self._empty_steps = self._empty_steps + 1 if min(queries, passages) < 1.0 else 0
        if self._empty_steps < PATIENCE:
            return
        part = coupled_parts(self.loss)[0]
        settings = [f"{name}={getattr(part, name, None)}" for name in ("temperature", "student_temperature")]
        for name in ("document_regularizer_weight", "query_regularizer_weight", "regularizer_warmup", "learning_rate"):
            settings.append(f"{name}={getattr(self.args, name)}")
        raise CollapsedStudent(
            f"The student has {queries:.4g} active dimensions a query and {passages:.4g} a passage, and vectors of "
            "zeros have no gradient. Start again with higher temperatures, lower regularizer weights or a lower "
            f"learning_rate; now {', '.join(settings)}."
        )
