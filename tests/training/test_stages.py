from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tct_hf.training import stages
from tct_hf.training.stages import Stage, StepLines, precision


def test_step_lines_tell_loss_parts_and_time_left() -> None:
    said: list[str] = []
    now = [0.0]
    lines = StepLines(said.append, clock=lambda: now[0])
    state = SimpleNamespace(global_step=20, max_steps=100, is_world_process_zero=True, log_history=[{"elapsed": 5.0}])
    lines.on_train_begin(None, state, None)
    now[0], state.global_step = 60.0, 40  # 20 steps a minute since the start
    state.log_history.append({"loss": 1.5})
    lines.on_log(None, state, None, logs={"loss": 1.5})
    assert state.log_history == [{"elapsed": 5.0}, {"loss": 1.5, "elapsed": 65.0}]  # over all interruptions
    parts = {"loss": 0.5, "hard_label": 0.2, "distillation": 0.3, "top_agreement": 0.256}
    lines.on_log(None, state, None, logs=parts)
    lines.on_log(None, state, None, logs={"eval_loss": 1.0})
    lines.on_log(None, SimpleNamespace(**{**vars(state), "is_world_process_zero": False}), None, logs=parts)
    assert said == [
        "  goes on after step 20 of 100",
        "  step    40 of 100   loss 1.500   3 min left",
        "  step    40 of 100   loss 0.500 (hard labels 0.200, distillation 0.300, agreement with the teacher 26%)"
        "   3 min left",
    ]


def test_precision_follows_the_choice_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert precision("bf16", cpu) == {"bf16": True, "use_cpu": True}
    assert precision("fp32", torch.device("cuda")) == {"bf16": False, "use_cpu": False}
    for has in (True, False):
        monkeypatch.setattr(stages, "has_bfloat16", lambda device, has=has: has)
        assert precision("auto", cpu) == {"bf16": has, "use_cpu": True}


def test_arguments_that_the_stage_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.output_dir is set by the stage itself"):
        Stage(tmp_path, tmp_path, settings={}, arguments={"output_dir": "x"}).args(dict)
