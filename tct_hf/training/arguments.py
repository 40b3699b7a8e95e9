"""Arguments of a training run, for dense and for sparse students, and settings that change over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments
from transformers import TrainerCallback

from tct_hf.training.loss import coupled_parts
from tct_hf.training.score_losses import LOSS_SETTINGS, NUMBERS, Ranges, check_settings

Shape = Literal["linear", "cosine"]
# What the paper says, and what its released code does where that differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.1},
    "released-code": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.0},
}
_WEIGHT = (lambda value: 0.0 <= value < float("inf")), "a finite number, 0 or greater"
_THRESHOLD = (lambda value: value >= 0 and value == int(value)), "a whole number of dimensions, 0 or more, or None"
_DENSE = (lambda value: not value), "left out of a sparse student's arguments: it is for dense students"
SPARSE_SETTINGS: Ranges = {
    "document_regularizer_weight": _WEIGHT,
    "query_regularizer_weight": _WEIGHT,
    "document_regularizer_threshold": _THRESHOLD,
    "query_regularizer_threshold": _THRESHOLD,
    "regularizer_warmup": (
        lambda value: 0.0 <= value < 1.0 or (value >= 1.0 and float(value).is_integer()),
        "a share of the steps, below 1, or a whole number of steps",
    ),
    "regularizer_warmup_shape": (lambda value: value in ("quadratic", "linear"), "quadratic or linear"),
    **dict.fromkeys(("matryoshka_dims", "passage_bits", "query_bits", "self_coupled", "embedding_weight"), _DENSE),
}
_FINITE = (lambda value: isinstance(value, (int, float)) and math.isfinite(value)), "a finite number"
SCHEDULE_SETTINGS: Ranges = {
    "start": _FINITE,
    "end": _FINITE,
    "shape": (lambda value: value in get_args(Shape), "linear or cosine"),
    "until": (lambda value: 0.0 < value <= 1.0, "a share of the steps, above 0 and at most 1"),
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
    distillation_weight: float | None = None
    margin_mse_weight: float = 0.0
    embedding_weight: float = 0.0
    embedding_distance: str = "cosine"
    student_scale: float | None = None
    student_divisor: float = 1.0
    kl_direction: str = "forward"
    candidates: str = "in-batch"
    mini_batch_size: int | None = None
    matryoshka_dims: list[int] | None = None
    passage_bits: list[int] | None = None
    query_bits: int | None = None
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
            raise ValueError("prompts and router_mapping come from the student's encoding: leave them out.")
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
    """Arguments of :class:`~tct_hf.TCTTrainer`: those of sentence-transformers and :class:`CoupledArguments`."""


@dataclass
class SparseTCTTrainingArguments(CoupledArguments, SparseEncoderTrainingArguments):  # type: ignore[misc]
    """Arguments of :class:`~tct_hf.SparseTCTTrainer`: those of sentence-transformers, :class:`CoupledArguments`, and
    the regularisers of a sparse student.

    Both temperatures are 2 where they are not set (the teacher's relative to the scale it was trained at):
    sentence-transformers saw sparse students at temperature 1 go to zero active dimensions, and has 2 for its default.
    Unlike there, no temperature-squared factor multiplies the divergence: the regularisers' weights are smaller by it.

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
        ValueError: as :class:`CoupledArguments`; a negative weight, threshold or warm-up; what is for dense students
            (`matryoshka_dims`, `passage_bits`, `query_bits`, `self_coupled`, `embedding_weight`).

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
        check_settings({name: getattr(self, name) for name in SPARSE_SETTINGS}, SPARSE_SETTINGS)
        super().__post_init__()


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` over a part of training, and stays there.

    Args:
        start: value at the first step.
        end: value from the share `until` of the steps on; `start` when None.
        shape: "linear" or "cosine" (half a cosine wave: slow, fast, slow).
        until: share of the steps at which `end` is reached, above 0 and at most 1.

    Raises:
        ValueError: not a number, an unknown shape, or a share out of range.
    """

    start: float
    end: float | None = None
    shape: Shape = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        check_settings(vars(self), SCHEDULE_SETTINGS)

    def value(self, step: int, steps: int) -> float:
        """The value at a step, `step` of `steps` being done."""
        end = self.start if self.end is None else self.end
        # The last step that is taken has the last value.
        done = min(1.0, step / max(1.0, self.until * steps - 1.0))
        share = done if self.shape == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
        return (1.0 - share) * self.start + share * end  # exact at both ends


class LossSchedule(TrainerCallback):
    """Sets numeric settings of a loss before every step, and logs them.

    The values depend on `global_step` alone, so that a run that resumes goes on where it was::

        trainer = TCTTrainer(student, teacher, args, train_dataset=triples)
        trainer.add_callback(LossSchedule(trainer.loss, hard_label_weight=Schedule(0.5, 0.1, "cosine")))

    Args:
        loss: the trainer's :class:`TightlyCoupledLoss`, or its dict of losses by data set.
        **schedules: a :class:`Schedule` each for `temperature`, `student_temperature`, `hard_label_weight`,
            `distillation_weight`, `margin_mse_weight`, `student_divisor`.

    Raises:
        ValueError: no schedule, one of another setting, or one that leaves the setting's range.
    """

    def __init__(self, loss: Any, **schedules: Schedule) -> None:
        self.losses, self.schedules = coupled_parts(loss), schedules
        unknown = [name for name in schedules if name not in NUMBERS]
        if unknown or not schedules:
            what = f"{unknown[0]!r} has no schedule" if unknown else "there is no schedule"
            raise ValueError(f"{what}: give one of {', '.join(NUMBERS)}.")
        for name, schedule in schedules.items():
            for value in (schedule.start, schedule.end):
                check_settings({name: value})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for loss in self.losses:
            loss.reported_settings = tuple(self.schedules)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, schedule in self.schedules.items():
            for loss in self.losses:
                setattr(loss, name, schedule.value(state.global_step, state.max_steps))
