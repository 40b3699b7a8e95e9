"""Arguments of a TCT training run, for dense and for sparse students."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments

from tct_hf.training.score_losses import LOSS_SETTINGS, check_settings

# What the paper says, and what its released code does where that differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.1},
    "released-code": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.0},
}


@dataclass
class CoupledArguments:
    """The settings of the coupled loss, as fields of a trainer's arguments.

    Those that are not listed here are described at :class:`~tct_hf.TightlyCoupledLoss`.

    Args:
        temperature: divisor of the teacher's scores. None or "auto": `softening` / (the scale the teacher was trained
            at, or was given by :func:`~tct_hf.calibrate`).
        student_temperature: divisor of the student's scores in the distillation part; `softening` when None.
        hard_label_weight: weight of the hard labels, 0 to 1; 0.1 when None.
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

    temperature: float | str | None = None
    student_temperature: float | None = None
    hard_label_weight: float | None = None
    margin_mse_weight: float = 0.0
    student_scale: float | None = None
    student_divisor: float = 1.0
    kl_direction: str = "forward"
    candidates: str = "in-batch"
    mini_batch_size: int | None = None
    matryoshka_dims: list[int] | None = None
    self_coupled: list[float] | None = None
    preset: str | None = None
    per_device_eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        args: Any = self  # the arguments that these fields are a part of
        if args.temperature == "auto":  # the recipes calibrate; a calibrated teacher says its scale
            self.temperature = None
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not known: use one of {', '.join(PRESETS)}.")
        defaults = {"student_temperature": self.softening, "hard_label_weight": 0.1}
        for name, value in (PRESETS[self.preset] if self.preset else defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_settings({name: getattr(self, name) for name in LOSS_SETTINGS})
        if args.prompts or args.router_mapping:
            raise ValueError(
                "prompts and router_mapping come from the student's encoding: leave them out of the arguments."
            )
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = args.per_device_train_batch_size
        super().__post_init__()  # type: ignore[misc]

    def loss_settings(self, training_scale: float) -> dict[str, Any]:
        """The arguments of :class:`~tct_hf.TightlyCoupledLoss`, for a teacher that was trained at a scale."""
        settings = {name: getattr(self, name) for name in LOSS_SETTINGS}
        if self.temperature is None:
            settings["temperature"] = self.softening / training_scale
        return settings


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
    Unlike there, no temperature-squared factor multiplies the divergence, so that the regularisers' weights must be
    smaller by it too.

    Args:
        document_regularizer_weight: weight of the FLOPS of the passages, all positives and negatives of the batch, on
            all devices.
        query_regularizer_weight: weight of the FLOPS of the queries; None for no regulariser, where queries are
            encoded without inference.
        document_regularizer_threshold: active dimensions above which a passage is regularised; all when None.
        query_regularizer_threshold: active dimensions above which a query is regularised; all when None.
        regularizer_warmup: share of the steps (below 1), or number of steps, over which the weights grow from 0.
        regularizer_warmup_shape: "quadratic" or "linear".

    Raises:
        ValueError: as :class:`CoupledArguments`; a negative weight, threshold or warm-up; `matryoshka_dims` or
            `self_coupled`, which are for dense students.

    Source: Formal et al., arXiv 2205.04733 (weights and quadratic warm-up); Paria et al., arXiv 2004.05665 (FLOPS);
    arXiv 2504.14839 (threshold).
    """

    softening: ClassVar[float] = 2.0

    document_regularizer_weight: float = 3e-5
    query_regularizer_weight: float | None = 5e-5
    document_regularizer_threshold: int | None = None
    query_regularizer_threshold: int | None = None
    regularizer_warmup: float = 1 / 3
    regularizer_warmup_shape: str = "quadratic"

    def __post_init__(self) -> None:
        for name in ("document_regularizer_weight", "query_regularizer_weight", "regularizer_warmup"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or greater, got {value}.")
        for name in ("document_regularizer_threshold", "query_regularizer_threshold"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value != int(value)):
                raise ValueError(f"{name} must be a whole number of dimensions, 0 or more, or None, got {value}.")
        if self.regularizer_warmup >= 1.0 and self.regularizer_warmup != int(self.regularizer_warmup):
            raise ValueError(
                f"regularizer_warmup={self.regularizer_warmup} must be a share of the steps, below 1, or a whole "
                "number of steps."
            )
        if self.regularizer_warmup_shape not in ("quadratic", "linear"):
            raise ValueError(
                f"regularizer_warmup_shape={self.regularizer_warmup_shape!r} is not known: use quadratic or linear."
            )
        for name in ("matryoshka_dims", "self_coupled"):
            if getattr(self, name):
                raise ValueError(f"{name} is for dense students: leave it out of a sparse student's arguments.")
        super().__post_init__()
