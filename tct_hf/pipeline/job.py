"""A recipe at work: its processes, its stages, and what it prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tct_hf.progress import human_duration, print_at_once, quieten
from tct_hf.settings import save_resolved
from tct_hf.training.stages import process_state


class Job:
    """The processes of a recipe; the main one prints a line when a stage begins.

    Args:
        stages: names of the stages, in the order of the run; :attr:`stages` may be set anew before the first.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        quieten()
        self.state = process_state()
        self.is_main = self.state.is_main_process
        self.stages = list(stages)
        self._begun = time.monotonic()

    def write(self, line: str) -> None:
        """Print a line, where this is the main process."""
        if self.is_main:
            print_at_once(line)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage: it lasts as long as the `with` block."""
        self.write(self._label(name))
        yield

    @contextmanager
    def first(self, name: str) -> Iterator[None]:
        """Run one stage in the main process, then in the others: what it prepares on disk, they find."""
        with self.stage(name), self.state.main_process_first():
            yield

    def skip(self, name: str, reason: str) -> None:
        """Pass over a stage, for instance because its result is there from an earlier run."""
        self.write(f"{self._label(name)}: skipped, {reason}")

    def record(self, settings: Any, **extra: Any) -> None:
        """Write what the run was into its output folder."""
        if self.is_main:
            save_resolved(settings, settings.output_dir, extra=extra)

    def end_group(self) -> None:
        """End the group of processes: the main one goes on alone, and no barrier that could time out waits for it."""
        self.state.destroy_process_group()

    def verify(self, settings: Any, file: str | Path) -> None:
        """With --verify, compare the figures of a report.json or metrics.json with those that are expected."""
        if settings.verify and self.is_main:
            settings.expected.verify(Path(file))

    def finish(self) -> None:
        """Print how long the run took in all."""
        self.write(f"done in {human_duration(time.monotonic() - self._begun)}")
        self.end_group()

    def _label(self, name: str) -> str:
        return f"[{self.stages.index(name) + 1}/{len(self.stages)}] {name}"
