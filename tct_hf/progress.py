"""What a run tells: its stages, how far it is through a corpus, and no noise from the libraries under it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any


def human_duration(seconds: float) -> str:
    """Write a duration for people, with its two largest units: "3 min 20 s", "2 h 5 min", "under 1 s"."""
    if seconds < 1:
        return "under 1 s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def print_at_once(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)  # a pipe or log file would otherwise hold lines back until the run ends


class PassageProgress:
    """Lines of progress through a corpus; other processes are taken to be as fast as this one.

    Args:
        total: passages in all; None where that is not known.
        processes: number of processes that share the work.
        write: takes a line without its line end.
        every: seconds between lines.
        clock: seconds from a fixed moment, never going back.
        enabled: False writes nothing, as for all processes but the main one.
    """

    def __init__(
        self,
        total: int | None,
        processes: int,
        write: Callable[[str], None],
        every: float,
        clock: Callable[[], float],
        *,
        enabled: bool,
    ) -> None:
        self._total, self._processes, self._every, self._clock = total, processes, every, clock
        self._write = write if enabled else lambda line: None
        self._begun = self._last = clock()
        self.there = self._encoded = 0  # `there`: from an earlier run

    def skipped(self, passages: int) -> None:
        """Count passages that were there from an earlier run."""
        self.there += passages

    def encoded(self, passages: int) -> None:
        """Count passages that this process has done."""
        self._encoded += passages * self._processes
        now = self._clock()
        if now - self._last < self._every or now <= self._begun:
            return
        self._last = now
        rate = self._encoded / (now - self._begun)
        done = self.there + self._encoded
        if self._total is None:
            self._write(f"  {done:,} passages   {_rate(rate)}")
        else:
            done = min(done, self._total)
            left = human_duration((self._total - done) / rate)
            self._write(f"  {done:,} of {self._total:,} passages   {_rate(rate)}   {left} left")

    def finish(self, passages: int) -> None:
        """Say that all passages are there."""
        seconds = self._clock() - self._begun
        fresh = passages - self.there
        rate = f", {_rate(fresh / seconds)}" if fresh and seconds > 0 else ""
        there = f" ({self.there:,} were there)" if self.there else ""
        self._write(f"  {passages:,} passages{there} in {human_duration(seconds)}{rate}")


def _rate(passages: float) -> str:
    return f"{passages:,.0f} passages/s" if passages >= 10 else f"{passages:.2g} passages/s"


# Logged as warnings, but true of every run of a recipe and nothing that a user can fix: logger to how it begins.
NOTICES = {
    "sentence_transformers.base.training_args": "When using DistributedDataParallel",  # a short last batch is left out
    "sentence_transformers.base.model": "Default prompt name is set to",  # by this package, for plain encode()
    "transformers.trainer_utils": "mtime may not be reliable",  # checkpoints are then ordered by their numbers
}


def _no_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOTICES.get(record.name, "\0"))


def quieten() -> None:
    """Show warnings and errors of the model libraries, without their progress bars and notices."""
    import datasets
    import transformers
    from sentence_transformers.base import model_card

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    bar: Any = getattr(model_card, "tqdm", None)
    if bar is not None:  # over the examples of a model card; no switch turns it off
        model_card.tqdm = partial(bar, disable=True)
    transformers.utils.logging.set_verbosity_warning()
    for name in NOTICES:
        logging.getLogger(name).addFilter(_no_notice)
    # Of calls that these libraries make to torch and to each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|sentence_transformers)\.")
    # Raised when compiled wheels are imported.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
