"""End a run in which a process stands still, and say which, in place of waiting for it without a word."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

_EXIT = 75  # a failure that may pass: start again


@dataclass
class _Told:
    """What a process says of itself: `waits` for others or not, `place` in its code."""

    step: int
    when: float
    waits: bool
    place: str
    process: str


class StallWatch(TrainerCallback):
    """Ends this process when no step has been finished for too long, with a message that names who is behind.

    Processes that train together wait for one another in every step: when one hangs (a stuck file system, a stopped
    process, a dead lock) the others wait in a collective call until its time-out, half an hour by default, whose error
    tells the operation and not the process. Here a thread in every process tells the run's store each second how far
    it is, at which line, and whether it waits for others there; once its own training stands still, it reads what the
    others tell. Named are processes that give no sign of life, else those that do not wait.

    A run of one process is not watched.

    Args:
        seconds: without a step, on any process, until the run ends. Longer than the longest step takes.
        evaluation_seconds: likewise between a step and the next where there is an evaluation or a checkpoint: an
            evaluator that encodes a corpus tells nothing until its end.
        end: takes the message; ends the process with status 75 when None.

    Raises:
        ValueError: no positive number of seconds.
    """

    def __init__(
        self,
        seconds: float = 600.0,
        *,
        evaluation_seconds: float = 3600.0,
        end: Callable[[str], None] | None = None,
    ) -> None:
        for name, value in (("seconds", seconds), ("evaluation_seconds", evaluation_seconds)):
            if not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}.")
        self.seconds = self._limit = seconds
        self.evaluation_seconds = max(seconds, evaluation_seconds)
        self.end = end or _end
        self._store: Any = None
        self._rank = self._world = self._step = self._main = 0
        self._moved = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # The store of the group itself: with a launcher it is kept by the launcher, which outlives any process.
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: the main thread holds the other while it waits for a key (where a group is set up).
        store = store.clone() if hasattr(store, "clone") else store
        self._store = dist.PrefixStore("tct_hf/stalls", store)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._stopped.clear()
        self._limit = self.evaluation_seconds if getattr(args, "eval_on_start", False) else self.seconds
        self._moves(state.global_step)
        self._main = threading.get_ident()
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        self._thread.start()

    def _moves(self, step: int) -> None:
        self._step, self._moved = step, time.monotonic()

    def _tell(self) -> None:
        """What the others may need to know of this process."""
        waits, place = _where(self._main)
        told = _Told(self._step, time.time(), waits, place, f"pid {os.getpid()} on {socket.gethostname()}")
        self._store.set(str(self._rank), json.dumps(asdict(told)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._limit = self.seconds
        self._moves(state.global_step)

    on_substep_end = on_step_begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._limit = self.evaluation_seconds
        self._moves(state.global_step)

    on_epoch_end = on_step_end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._moves(state.global_step)

    on_evaluate = on_save = on_prediction_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = self._store = None

    def _watch(self) -> None:
        every = min(1.0, self.seconds / 4)
        while not self._stopped.wait(every):
            with contextlib.suppress(RuntimeError):  # who keeps the store is gone: the message finds that out, too
                self._tell()
            if time.monotonic() - self._moved > self._limit:
                self._stopped.wait(2 * every)  # the others may tell once more, too
                self.end(self._message(every))
                return

    def _message(self, every: float) -> str:
        silent, busy, waiting = [], [], []
        for rank in range(self._world):
            try:
                self._store.wait([str(rank)], timedelta(seconds=5))
                told = _Told(**json.loads(self._store.get(str(rank))))
            except RuntimeError:
                silent.append(f"process {rank} has told nothing, or keeps what the others tell")
                continue
            name = f"process {rank} ({told.process}), in step {told.step}"
            since = time.time() - told.when
            if since > 10 * every:
                silent.append(f"{name}, has given no sign of life for {since:.0f} s")
            elif told.waits:
                waiting.append((told.step, f"{name}, waits for others in {told.place}"))
            else:
                busy.append(f"{name}, stands at {told.place}")
        to_blame = silent or busy or [text for _, text in sorted(waiting)]
        return (
            f"Training stands still: no step for {self._limit:.0f} s. {'; '.join(to_blame)}. Look there first. The "
            "run ends; the same command goes on from the last checkpoint. If steps take that long, give StallWatch "
            "more seconds."
        )


def _where(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other processes, and the innermost line it is at outside torch."""
    frame = sys._current_frames().get(thread)
    waits, place = False, "its end"
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/distributed/" in file or "/torch/autograd/" in file:  # a backward pass averages the gradients
            waits = True
        elif "/torch/" not in file:
            place = f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
            break
        frame = frame.f_back
    return waits, place


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(_EXIT)  # the main thread waits in a collective call, which nothing interrupts
