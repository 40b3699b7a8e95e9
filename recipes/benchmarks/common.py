"""What the benchmarks share: options, turns that are timed, memory, tables, and the name of the processor."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ["numpy", "scipy", "pandas", "sklearn"]
Clocks = tuple[float, float]  # wall and CPU seconds; they part where other programs compete for the cores


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with an option for each name: its default, or the default and its help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, given in defaults.items():
        default, said = given if isinstance(given, tuple) else (given, None)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=said)
    return parser


def begin(threads: int, *more: str) -> None:
    """Set threads, and say what is measured on."""
    import torch

    from tct_hf.progress import quieten

    quieten()
    torch.set_num_threads(threads)
    words = [f"{processor()} ({platform.machine()})", f"{threads} threads", f"torch {torch.__version__}", *more]
    print(", ".join(words))


def processor() -> str:
    """The processor's name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def clocked(run: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, Clocks]:
    """What a call returns, and its time."""
    begun, worked = time.perf_counter(), time.process_time()
    found = run(*given, **named)
    return found, (time.perf_counter() - begun, time.process_time() - worked)


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[Clocks]], dict[str, Any]]:
    """The times of each way, one a round, the order turned round each time; and what each returned last."""
    times: dict[str, list[Clocks]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for turn in range(rounds):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            found[name], taken = clocked(ways[name])
            times[name].append(taken)
    return times, found


def median(times: Sequence[Clocks], clock: int = 0) -> float:
    """The median of the wall clock's seconds, or with `clock` 1 of the processor's."""
    return statistics.median(taken[clock] for taken in times)


def quartiles(mine: Sequence[Clocks], others: Sequence[Clocks], clock: int = 0) -> str:
    """How many times as long one side took as another in the same round: the median, and the quartiles."""
    ratios = [one[clock] / other[clock] for one, other in zip(mine, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(head: str, rows: Iterable[Sequence[Any]]) -> None:
    """Print a table of Markdown line by line, `head` being its columns with a bar between them."""
    print(f"| {head} |\n" + "|---" * (head.count("|") + 1) + "|", flush=True)
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def ready_to_step(trainer: Any, student: Any) -> tuple[Any, Any]:
    """The model and the optimizer of a trainer whose `training_step` is called by hand."""
    trainer.create_optimizer_and_scheduler(1000)
    model, optimizer = trainer.accelerator.prepare(student, trainer.optimizer)
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1
    return model, optimizer


def memory_of(field: str) -> float:
    """MiB of a field of /proc/self/status: VmRSS, its peak VmHWM, the private RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def give_back() -> None:
    """Return what earlier work leaves unused to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that a function takes at its peak beyond what is resident before; on Linux, in a process of its own."""
    give_back()
    before = memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return memory_of("VmHWM") - before


def in_own_process(script: str, **given: Any) -> float:
    """The number that a script prints last when it is called with these options."""
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))
