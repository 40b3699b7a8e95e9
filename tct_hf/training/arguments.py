"""Arguments of a TCT training run, for dense and for sparse students."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments

from tct_hf.batches import check_mini_batch_size
from tct_hf.training.score_losses import check_scale, check_settings

# What the paper says, and what its released code does where that differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.1},
    "released-code": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.0},
}
DEFAULTS: dict[str, Any] = {"student_temperature": 1.0, "hard_label_weight": 0.1}


@dataclass
class CoupledArguments:
    """The settings of the coupled loss, as fields of a trainer's arguments.

    Args:
        temperature: divides the teacher's scores. None or "auto": `softening` / (the scale the teacher was trained
            at, or was given by :func:`~tct_hf.calibrate`).
        student_temperature: divides the student's scores in the distillation part; `softening` when None.
        hard_label_weight: weight of the hard labels, 0 to 1; 0.1 when None.
        margin_mse_weight: weight of MarginMSE beside these, on raw scores.
        student_scale: factor of the student's scores before anything else. None: 20 where the student compares by
            cosine or ends in Normalize, 1 otherwise.
        student_divisor: divides the student's scores before anything else.
        kl_direction: "forward", KL(teacher || student), or "reverse".
        candidates: "in-batch" or "own" (only a query's own positive and negatives).
        mini_batch_size: rows a forward pass when gradients are cached; None for no caching.
        matryoshka_dims: also train the first d dimensions of the embeddings, for each d.
        self_coupled: see :class:`~tct_hf.TightlyCoupledLoss`.
        preset: "paper" or "released-code": their temperature, student temperature and hard-label weight, where these
            are not given. The released code trains on the teacher alone (hard-label weight 0).
        per_device_eval_batch_size: the training batch size when None, since the loss depends on the batch.

    Attributes:
        softening: what both temperatures are when they are not set, at a teacher that was trained at scale 1.

    Raises:
        ValueError: a setting outside its range, or prompts and router_mapping (the student's encoding sets them).

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1, and its released code.
    """

    softening: ClassVar[float] = 1.0

    temperature: float | str | None = field(default=None, metadata={"help": "Divides the teacher's scores."})
    student_temperature: float | None = field(
        default=None, metadata={"help": "Divides the student's scores in the distillation part."}
    )
    hard_label_weight: float | None = field(default=None, metadata={"help": "Weight of the hard labels, 0 to 1."})
    margin_mse_weight: float = field(default=0.0, metadata={"help": "Weight of MarginMSE beside the other parts."})
    student_scale: float | None = field(
        default=None, metadata={"help": "Factor of the student's scores; 20 for cosines and 1 for others when None."}
    )
    student_divisor: float = field(default=1.0, metadata={"help": "Divides the student's scores before all else."})
    kl_direction: str = field(default="forward", metadata={"help": '"forward", KL(teacher || student), or "reverse".'})
    candidates: str = field(default="in-batch", metadata={"help": 'Candidates of a query: "in-batch" or "own".'})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a forward pass when gradients are cached; None for no caching."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Also train the first d dimensions of the embeddings, for each d."}
    )
    self_coupled: list[float] | None = field(
        default=None, metadata={"help": "Weights of the student's own pooled score and own MaxSim in the teacher."}
    )
    preset: str | None = field(default=None, metadata={"help": 'Published loss settings: "paper" or "released-code".'})
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "The training batch size when None: the loss depends on the batch."}
    )

    def __post_init__(self) -> None:
        args: Any = self  # the arguments that these fields are a part of
        if args.temperature == "auto":  # the recipes calibrate; a calibrated teacher says its scale
            self.temperature = None
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not known: use one of {', '.join(PRESETS)}.")
        defaults = {**DEFAULTS, "student_temperature": self.softening}
        for name, value in (PRESETS[self.preset] if self.preset else defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_scale(self.student_scale)
        check_settings(
            temperature=args.temperature,
            student_temperature=args.student_temperature,
            hard_label_weight=args.hard_label_weight,
            margin_mse_weight=self.margin_mse_weight,
            student_divisor=self.student_divisor,
            kl_direction=self.kl_direction,
        )
        if self.candidates not in ("in-batch", "own"):
            raise ValueError(f'candidates must be "in-batch" or "own", got {self.candidates!r}.')
        check_mini_batch_size(self.mini_batch_size)
        dims = self.matryoshka_dims
        if dims is not None and not (isinstance(dims, list) and dims and all(type(d) is int and d > 0 for d in dims)):
            raise ValueError(
                f"matryoshka_dims={dims!r}: give a list of whole numbers above 0, such as [96, 192, 384]."
            )
        if args.prompts or args.router_mapping:
            raise ValueError(
                "prompts and router_mapping come from the student's encoding: leave them out of the arguments."
            )
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = args.per_device_train_batch_size
        super().__post_init__()  # type: ignore[misc]
        accelerator: Any = args.accelerator_config  # an AcceleratorConfig by now
        if accelerator.dispatch_batches is None:
            # Dispatching would join the ranks' batches, whose token matrices differ in width.
            accelerator.dispatch_batches = False

    def loss_settings(self, training_scale: float) -> dict[str, Any]:
        """The arguments of :class:`~tct_hf.TightlyCoupledLoss` that these settings stand for.

        Args:
            training_scale: of the teacher; the default temperature is relative to it.
        """
        return {
            "temperature": self.softening / training_scale if self.temperature is None else self.temperature,
            "student_temperature": self.student_temperature,
            "hard_label_weight": self.hard_label_weight,
            "margin_mse_weight": self.margin_mse_weight,
            "student_scale": self.student_scale,
            "student_divisor": self.student_divisor,
            "kl_direction": self.kl_direction,
            "candidates": self.candidates,
            "mini_batch_size": self.mini_batch_size,
            "matryoshka_dims": self.matryoshka_dims,
            "self_coupled": self.self_coupled,
        }


@dataclass
class TCTTrainingArguments(CoupledArguments, SentenceTransformerTrainingArguments):  # type: ignore[misc]
    """Arguments of :class:`~tct_hf.TCTTrainer`: those of sentence-transformers and :class:`CoupledArguments`.

    Without a temperature both distributions are taken as they are: a teacher's scores times the scale it was trained
    at give back the distribution that it learned.
    """


@dataclass
class SparseTCTTrainingArguments(CoupledArguments, SparseEncoderTrainingArguments):  # type: ignore[misc]
    """Arguments of :class:`~tct_hf.SparseTCTTrainer`: those of sentence-transformers, :class:`CoupledArguments`, and
    the regularisers of a sparse student.

    Both temperatures are 2 where they are not set (the teacher's relative to the scale it was trained at):
    sentence-transformers saw sparse students at temperature 1 go to zero active dimensions, and has 2 for its default.
    There is no temperature-squared factor here as there is there: with the same temperature the divergence is smaller
    by its square, and so have the regularisers' weights to be.

    Args:
        document_regularizer_weight: of the FLOPS of the passages, all positives and negatives of the batch, on all
            devices.
        query_regularizer_weight: likewise of the queries; None for no regulariser, where queries are encoded without
            inference.
        document_regularizer_threshold: only passages with more active dimensions than this are regularised.
        query_regularizer_threshold: likewise of the queries.
        regularizer_warmup: the weights grow from 0 over this share of the steps (below 1), or this number of steps.
        regularizer_warmup_shape: "quadratic" or "linear".

    Raises:
        ValueError: as :class:`CoupledArguments`, a negative weight, threshold or warm-up, or `matryoshka_dims`: the
            first dimensions of a vocabulary are no smaller student.

    Source: Formal et al., arXiv 2205.04733 (weights and quadratic warm-up); Paria et al., arXiv 2004.05665 (FLOPS);
    arXiv 2504.14839 (threshold).
    """

    softening: ClassVar[float] = 2.0

    document_regularizer_weight: float = field(default=3e-5, metadata={"help": "Of the FLOPS of the passages."})
    query_regularizer_weight: float | None = field(
        default=5e-5, metadata={"help": "Of the FLOPS of the queries; None for no regulariser."}
    )
    document_regularizer_threshold: int | None = field(
        default=None, metadata={"help": "Only passages with more active dimensions are regularised."}
    )
    query_regularizer_threshold: int | None = field(
        default=None, metadata={"help": "Only queries with more active dimensions are regularised."}
    )
    regularizer_warmup: float = field(
        default=1 / 3, metadata={"help": "Share of the steps (below 1), or steps, over which the weights grow from 0."}
    )
    regularizer_warmup_shape: str = field(default="quadratic", metadata={"help": '"quadratic" or "linear".'})

    def __post_init__(self) -> None:
        for name in ("document_regularizer_weight", "query_regularizer_weight", "regularizer_warmup"):
            value = getattr(self, name)
            if value is None and name == "query_regularizer_weight":
                continue
            if value is None or not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or greater, got {value}.")
        for name in ("document_regularizer_threshold", "query_regularizer_threshold"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value != int(value)):
                raise ValueError(
                    f"{name} counts active dimensions: a whole number, 0 or more, or None for none, got {value}."
                )
        if self.regularizer_warmup >= 1.0 and self.regularizer_warmup != int(self.regularizer_warmup):
            raise ValueError(
                f"regularizer_warmup={self.regularizer_warmup} is neither a share of the steps, below 1, nor a whole "
                "number of them."
            )
        if self.regularizer_warmup_shape not in ("quadratic", "linear"):
            raise ValueError(
                f"regularizer_warmup_shape={self.regularizer_warmup_shape!r} is not known: use quadratic or linear."
            )
        if self.matryoshka_dims:
            raise ValueError(
                "matryoshka_dims are for dense students: a sparse student's dimensions are words, its size is set by "
                "document_regularizer_weight."
            )
        super().__post_init__()
