from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tct_hf.training import stages
from tct_hf.training.stages import StepLines, Stopwatch, precision


def test_step_lines_tell_loss_parts_and_time_left() -> None:
    said: list[str] = []
    now = [0.0]
    lines = StepLines(said.append, clock=lambda: now[0])
    state = SimpleNamespace(global_step=20, max_steps=100, is_world_process_zero=True)
    lines.on_train_begin(None, state, None)
    now[0], state.global_step = 60.0, 40  # 20 steps a minute since the start
    lines.on_log(None, state, None, logs={"loss": 1.5})
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
    with pytest.raises(ValueError, match=r"precision='half' is not known: use \"auto\", \"bf16\" or \"fp32\""):
        precision("half", cpu)


def test_the_stopwatch_adds_up_what_each_start_took_until_its_last_checkpoint(tmp_path: Path) -> None:
    now = [100.0]
    state = SimpleNamespace(is_world_process_zero=True)
    first = Stopwatch(tmp_path / "seconds.json", clock=lambda: now[0])
    assert first.seconds() == 0
    first.on_train_begin(None, state, None)
    now[0] = 110.0
    first.on_save(None, state, None)
    now[0] = 117.0  # killed: the seven seconds since the checkpoint are done again
    second = Stopwatch(tmp_path / "seconds.json", clock=lambda: now[0])
    now[0] = 1000.0
    second.on_train_begin(None, state, None)
    now[0] = 1002.0
    second.on_save(None, state, None)
    now[0] = 1005.0
    second.on_save(None, SimpleNamespace(is_world_process_zero=False), None)
    second.on_train_end(None, state, None)
    assert second.seconds() == 15.0
    assert [file.name for file in tmp_path.iterdir()] == ["seconds.json"]
