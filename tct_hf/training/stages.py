"""What all stages of training share: processes and precision, lines, a folder, going on, publishing."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from tct_hf.encoding.weights import has_bfloat16
from tct_hf.files import CLAIM_FILE, LOG_FILE, claim, command, is_claimed, replace_dir, write_json_atomic
from tct_hf.progress import human_duration
from tct_hf.settings import environment, refuse_secret

_SECONDS_FILE = "seconds.json"

# How long processes wait for one another: one prepares the data of all, which may take longer than NCCL's ten minutes.
_PATIENCE = timedelta(hours=3)


class StepLines(TrainerCallback):
    """Prints one plain line every `logging_steps`, with the time left: readable in a terminal and in a file.

    Args:
        write: takes one line.
        clock: seconds from a fixed moment.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write = write
        self.clock = clock
        self.begun: tuple[float, int] = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = (self.clock(), state.global_step)
        if state.global_step and state.is_world_process_zero:
            self.write(f"  goes on after step {state.global_step} of {state.max_steps}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        since, first = self.begun
        left = (self.clock() - since) / max(state.global_step - first, 1) * (state.max_steps - state.global_step)
        line = f"  step {state.global_step:>5} of {state.max_steps}   loss {logs['loss']:.3f}"
        if "top_agreement" in logs:
            margins = f"MarginMSE {logs['margin_mse']:.3f}, " if "margin_mse" in logs else ""
            line += (
                f" (hard labels {logs['hard_label']:.3f}, distillation {logs['distillation']:.3f}, {margins}"
                f"agreement with the teacher {logs['top_agreement']:.0%})"
            )
        if "document_active_dims" in logs:
            line += (
                f"   active dimensions: {logs['query_active_dims']:.0f} of queries, "
                f"{logs['document_active_dims']:.0f} of passages"
            )
        self.write(f"{line}   {human_duration(max(left, 0))} left")


class Stopwatch(TrainerCallback):
    """Keeps the seconds that training has taken, over all interruptions, in a JSON file beside the checkpoints.

    Args:
        file: updated with every checkpoint.
        clock: seconds from a fixed moment.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self.clock = clock
        self.since = 0.0

    def seconds(self) -> float:
        """What the file says."""
        return float(json.loads(self.file.read_text(encoding="utf-8"))) if self.file.is_file() else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = self.clock()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            now = self.clock()
            write_json_atomic(self.file, self.seconds() + now - self.since)
            self.since = now

    on_train_end = on_save


def process_state() -> PartialState:
    """The processes of this run, as `accelerate launch` started them."""
    state = PartialState(timeout=_PATIENCE)
    if state.device.type == "cpu" and not state.use_distributed and "LOCAL_RANK" in os.environ:
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=_PATIENCE)
    return state


def precision(choice: str, device: torch.device) -> dict[str, bool]:
    """Training arguments for a precision on a device: "bf16", "fp32", or "auto", bf16 where the hardware has it."""
    if choice not in ("auto", "bf16", "fp32"):
        raise ValueError(f'precision={choice!r} is not known: use "auto", "bf16" or "fp32".')
    bf16 = choice == "bf16" or (choice == "auto" and has_bfloat16(device))
    return {"bf16": bf16, "use_cpu": device.type == "cpu"}  # transformers takes bf16 on a CPU only with use_cpu


def check_stage(arguments: Mapping[str, Any]) -> None:
    """Refuse training arguments that a stage sets itself, and secrets, by name."""
    for name in ("output_dir", "disable_tqdm", "prompts", "router_mapping"):
        if name in arguments:
            raise ValueError(f"training.{name} is set by the stage itself: leave it out of the settings.")
    for name, value in arguments.items():
        refuse_secret(f"training.{name}", value)


def run_stage(
    make: Callable[[], tuple[Any, Callable[[Path], object]]],
    final: str | Path,
    *,
    work: str | Path,
    settings: Mapping[str, Any],
    write: Callable[[str], None],
) -> Path:
    """Train to the end from the last checkpoint in `work`, and publish the model as `final`.

    Stopped and called again, it goes on from the last checkpoint; finished, it returns at once.
    """
    final, work = Path(final), Path(work)
    if is_claimed(final, settings):
        return final
    state = PartialState()
    if state.is_main_process:
        claim(work, settings)
    state.wait_for_everyone()
    trainer, save = make()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepLines(write))
    stopwatch = Stopwatch(work / _SECONDS_FILE)
    trainer.add_callback(stopwatch)
    last = get_last_checkpoint(str(work))
    reached = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME)) if last else None
    if last and reached and reached.global_step >= reached.max_steps:
        # Stopped between its last step and publishing: transformers would train one step more.
        best = reached.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or last)
        trainer.state = reached
    else:
        trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        end = {"step": trainer.state.global_step, "seconds": stopwatch.seconds()}
        write_json_atomic(work / LOG_FILE, [*trainer.state.log_history, end])
        _publish(work, final, save)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except OSError as error:
            write(f"  not pushed: {error} The model is saved; push it with {command('release')}.")
    return final


def _publish(work: Path, final: Path, save: Callable[[Path], object]) -> None:
    """Save a trained model aside and give it its final name when it is whole; then the checkpoints can go."""
    staging = work / "finished"
    shutil.rmtree(staging, ignore_errors=True)
    save(staging)
    for name in (LOG_FILE, CLAIM_FILE):
        shutil.copyfile(work / name, staging / name)
    write_json_atomic(staging / "environment.json", environment())  # of this stage: others may run elsewhere
    replace_dir(staging, final)
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (work / _SECONDS_FILE).unlink(missing_ok=True)
