"""What all training stages share: processes, precision, progress lines, the output folder, resuming and saving."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from tct_hf.encoding.weights import has_bfloat16
from tct_hf.files import (
    CLAIM_FILE,
    LOG_FILE,
    claim,
    command,
    is_claimed,
    replace_dir,
    working_in,
    write_json_atomic,
)
from tct_hf.progress import human_duration
from tct_hf.settings import environment
from tct_hf.training.checkpoints import last_whole_checkpoint, refuse_damaged

# How long processes wait for one another: one prepares the data of all, which may take longer than NCCL's ten minutes.
_TIMEOUT = timedelta(hours=3)


def process_state() -> PartialState:
    """The processes of this run, as `accelerate launch` started them."""
    state = PartialState(timeout=_TIMEOUT)
    if state.device.type == "cpu" and not state.use_distributed and "LOCAL_RANK" in os.environ:
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=_TIMEOUT)
    return state


def precision(choice: str, device: torch.device) -> dict[str, bool]:
    """Training arguments for a precision on a device: "bf16", "fp32", or "auto", bf16 where the hardware has it."""
    bf16 = choice == "bf16" or (choice == "auto" and has_bfloat16(device))
    return {"bf16": bf16, "use_cpu": device.type == "cpu"}  # transformers takes bf16 on a CPU only with use_cpu


# What the parts of a coupled loss are called in a run's lines.
_PARTS = {
    "hard_label": "hard labels",
    "distillation": "distillation",
    "margin_mse": "MarginMSE",
    "embedding": "vectors",
}


class StepLines(TrainerCallback):
    """Prints a plain line every `logging_steps`, and adds `elapsed`, seconds over all interruptions, to the log."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock = write, clock
        self.since, self.first, self.before = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since, self.first, self.before = self.clock(), state.global_step, elapsed(state)
        if state.global_step and state.is_world_process_zero:
            self.write(f"  goes on after step {state.global_step} of {state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        taken = self.clock() - self.since
        state.log_history[-1]["elapsed"] = self.before + taken
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        left = taken / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
        line = f"  step {state.global_step:>5} of {state.max_steps}   loss {logs['loss']:.3f}"
        if "top_agreement" in logs or "embedding" in logs:
            shown = [f"{what} {logs[name]:.3f}" for name, what in _PARTS.items() if name in logs]
            if "top_agreement" in logs:
                shown.append(f"agreement with the teacher {logs['top_agreement']:.0%}")
            line += f" ({', '.join(shown)})"
        if "document_active_dims" in logs:
            line += (
                f"   active dimensions: {logs['query_active_dims']:.0f} of queries, "
                f"{logs['document_active_dims']:.0f} of passages"
            )
        with tqdm.external_write_mode():  # above the bar
            self.write(f"{line}   {human_duration(max(left, 0))} left")


class _Bars(ProgressCallback):
    """The Trainer's bars; what is logged, :class:`StepLines` says."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def elapsed(state: TrainerState) -> float:
    """The seconds that training had taken at the last entry of its log."""
    return next((entry["elapsed"] for entry in reversed(state.log_history) if "elapsed" in entry), 0.0)


@dataclass(frozen=True)
class Stage:
    """One model to train, from the first step to the finished folder.

    Args:
        final: folder of the finished model.
        work: folder of its checkpoints until then.
        settings: all that the model depends on, JSON-ready; folders of other settings are refused.
        arguments: training arguments.
        make_evaluator: makes what measures the model in training, or None.
        write: takes one line of progress.
    """

    final: Path
    work: Path
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]
    make_evaluator: Callable[[], Any] = lambda: None
    write: Callable[[str], None] = print

    def args(self, kind: Any, **defaults: Any) -> Any:
        """The arguments as the trainer takes them."""
        for name in ("output_dir", "prompts", "router_mapping"):
            if name in self.arguments:
                raise ValueError(f"training.{name} is set by the stage itself: leave it out of the settings.")
        bars = {"disable_tqdm": not sys.stderr.isatty()}  # a log file would keep every state of a bar
        made = kind(output_dir=str(self.work), **{**bars, **defaults, **self.arguments})
        try:
            for tracker in get_reporting_integration_callbacks(made.report_to):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:  # an unknown one, or one that is not installed
            raise ValueError(f"training.report_to: {error}") from error
        return made

    def train(self, make: Callable[[], Any]) -> Path:
        """Train what `make` makes from the last checkpoint to the end, and publish it; finished, return at once."""
        if is_claimed(self.final, self.settings):
            return self.final
        state = PartialState()
        with working_in(self.work, state.is_main_process):
            if state.is_main_process:
                claim(self.work, self.settings)
            state.wait_for_everyone()
            if is_claimed(self.final, self.settings):  # by the run that was waited for
                return self.final
            return self._train(make)

    def _train(self, make: Callable[[], Any]) -> Path:
        trainer = make()
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(_Bars())
        trainer.add_callback(StepLines(self.write))
        last = last_whole_checkpoint(self.work)
        reached = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME)) if last else None
        if last and reached and reached.global_step >= reached.max_steps:
            # Stopped between its last step and publishing: transformers would train one step more.
            best = reached.best_model_checkpoint if trainer.args.load_best_model_at_end else None
            if best and not os.path.isdir(best):
                self.write(f"  The best checkpoint {best} is gone: the last one is taken.")
                best = None
            refuse_damaged(best or last)
            trainer.restore(best or last, reached)
        else:
            trainer.train(resume_from_checkpoint=last)
        if trainer.is_world_process_zero():
            end = {"step": trainer.state.global_step, "seconds": elapsed(trainer.state)}
            log = [*trainer.state.log_history, end]
            # The gradient of a step that fp16's scaler skipped is infinite, which JSON can't say.
            log = [{k: v if v == v and abs(v) != float("inf") else None for k, v in entry.items()} for entry in log]
            write_json_atomic(self.work / LOG_FILE, log)
            self._publish(trainer)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            try:
                trainer.push_to_hub()
            except OSError as error:
                self.write(f"  not pushed: {error} The model is saved; push it with {command('release')}.")
        return self.final

    def _publish(self, trainer: Any) -> None:
        """Save the model aside and give it its final name when it is whole; then the checkpoints can go."""
        staging = self.work / "finished"
        shutil.rmtree(staging, ignore_errors=True)
        trainer.save_model(str(staging), _internal_call=True)
        for name in (LOG_FILE, CLAIM_FILE):
            shutil.copyfile(self.work / name, staging / name)
        write_json_atomic(staging / "environment.json", environment())  # of this stage: others may run elsewhere
        replace_dir(staging, self.final)
        for checkpoint in self.work.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
