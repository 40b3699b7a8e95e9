"""Loss settings that change over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import TrainerCallback

from tct_hf.training.loss import coupled_parts
from tct_hf.training.score_losses import NUMBERS, check_settings

Shape = Literal["linear", "cosine"]


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
        for name in ("start", "until", *(() if self.end is None else ("end",))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape={self.shape!r} is not known: use one of {', '.join(get_args(Shape))}.")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until={self.until} must be a share of the steps: a number above 0 and at most 1.")

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
            `margin_mse_weight`, `student_divisor`.

    Raises:
        ValueError: no schedule, one of another setting, or one that leaves the setting's range.
    """

    def __init__(self, loss: Any, **schedules: Schedule | None) -> None:
        self.losses = coupled_parts(loss)
        self.schedules = {name: schedule for name, schedule in schedules.items() if schedule is not None}
        unknown = next((name for name in self.schedules if name not in NUMBERS), None)
        if not self.schedules or unknown:
            what = f"{unknown!r} has no schedule" if unknown else "there is no schedule"
            raise ValueError(f"{what}: give one of {', '.join(NUMBERS)}.")
        for name, schedule in self.schedules.items():
            for value in (schedule.start, schedule.start if schedule.end is None else schedule.end):
                check_settings({name: value})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for loss in self.losses:
            loss.reported_settings = tuple(self.schedules)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, schedule in self.schedules.items():
            for loss in self.losses:
                setattr(loss, name, schedule.value(state.global_step, state.max_steps))
