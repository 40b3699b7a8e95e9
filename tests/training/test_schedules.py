"""Loss settings over training: their shapes, that they are used, logged, and go on after a resume."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tct_hf import LossSchedule, NoTeacher, Schedule
from tests.train_helpers import logged, make_trainer, triples


@pytest.mark.parametrize("until", [1.0, 0.5])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_goes_from_start_to_end_and_stays(shape: Any, until: float) -> None:
    schedule = Schedule(2.0, 0.5, shape, until=until)
    values = [schedule.value(step, 100) for step in range(100)]
    last = int(100 * until) - 1
    assert values[0] == 2.0 and all(value == pytest.approx(0.5) for value in values[last:])
    assert all(before >= after for before, after in pairwise(values))
    for step in range(last + 1):
        share = step / last
        expected = 2.0 - 1.5 * (share if shape == "linear" else math.sin(math.pi * share / 2) ** 2)
        assert values[step] == pytest.approx(expected)


def test_a_constant_and_a_training_of_one_step() -> None:
    assert {Schedule(0.3).value(step, 10) for step in range(10)} == {0.3}
    assert Schedule(1.0, 0.0).value(0, 1) == 1.0


def test_the_loss_of_every_step_has_the_values_of_that_step(trainer_of: Any) -> None:
    schedules = {"temperature": Schedule(4.0, 0.5, "cosine"), "hard_label_weight": Schedule(1.0, 0.0)}
    schedules |= {"margin_mse_weight": Schedule(0.0, 0.05, until=0.5), "student_divisor": Schedule(3.0, 1.0)}
    trainer = trainer_of(triples(48), max_steps=6)
    trainer.add_callback(LossSchedule(trainer.loss, **schedules))
    trainer.train()
    for name, schedule in schedules.items():
        expected = [schedule.value(step, 6) for step in range(6)]
        assert logged(trainer, name) == pytest.approx(expected, abs=1e-4)  # rounded for the log
    assert logged(trainer, "hard_label")[-1] == 0.0 and logged(trainer, "distillation")[0] == 0.0


def test_without_a_teacher_no_schedule_may_ask_for_one(student: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student, NoTeacher(), triples(16), hard_label_weight=1.0, max_steps=2)
    trainer.add_callback(LossSchedule(trainer.loss, hard_label_weight=Schedule(1.0, 0.1)))
    with pytest.raises(ValueError, match=r"no teacher to distil, but hard_label_weight is 0\.1, dist"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(1.0, 2.0, "steps"), "shape='steps' must be linear or cosine"),
        (lambda: Schedule(1.0, until=0.0), "until=0.0 must be a share"),
        (lambda: Schedule(1.0, until="half"), "until='half' must be a share"),  # type: ignore[arg-type]
        (lambda: Schedule(None), "start=None must be a finite number"),  # type: ignore[arg-type]
        (lambda: Schedule("2"), "start='2' must be a finite number"),  # type: ignore[arg-type]
        (lambda: LossSchedule({}), "there is no schedule: give one of temperature"),
        (lambda: LossSchedule({}, candidates=Schedule(1.0)), "'candidates' has no schedule"),
        (lambda: LossSchedule({}, hard_label_weight=Schedule(0.5, 1.5)), "hard_label_weight=1.5 must be"),
    ],
)
def test_an_invalid_schedule_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
