"""What a run tells: its stages, how far it is through a corpus, and no noise from the libraries under it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def human_duration(seconds: float) -> str:
    """Write a duration for people, with its two largest units: "3 min 20 s", "2 h 5 min", "under 1 s"."""
    if seconds < 1:
        return "under 1 s"
    minutes, rest = divmod(round(seconds), 60)
    parts = {"d": minutes // 1440, "h": minutes // 60 % 24, "min": minutes % 60, "s": rest}
    first = next(at for at, count in enumerate(parts.values()) if count)
    return " ".join(f"{count} {unit}" for unit, count in list(parts.items())[first : first + 2] if count)


def print_at_once(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)  # a pipe or log file would otherwise hold lines back until the run ends


class PassageProgress:
    """Lines of progress through a corpus, of the main process; other processes are taken to be as fast as this one.

    Args:
        total: passages in all; None where that is not known.
        state: the processes that share the work; one when None.
        write: takes a line without its line end; prints it when None.
        every: seconds between lines.
    """

    def __init__(
        self, total: int | None, state: PartialState | None, write: Callable[[str], None] | None, every: float
    ) -> None:
        self._total, self._every = total, every
        self._processes = 1 if state is None else state.num_processes
        speaks = state is None or state.process_index == 0
        self._write = (write or print_at_once) if speaks else lambda line: None
        self._begun = self._last = time.monotonic()
        self.there = self._encoded = 0  # `there`: from an earlier run

    def skipped(self, passages: int) -> None:
        """Count passages that were there from an earlier run."""
        self.there += passages

    def encoded(self, passages: int) -> None:
        """Count passages that this process has done."""
        self._encoded += passages * self._processes
        now = time.monotonic()
        if now - self._last < self._every or now <= self._begun:
            return
        self._last, done = now, self.there + self._encoded
        rate = self._encoded / (now - self._begun)
        of = left = ""
        if self._total is not None:
            done = min(done, self._total)
            of, left = f" of {self._total:,}", f"   {human_duration((self._total - done) / rate)} left"
        self._write(f"  {done:,}{of} passages   {_rate(rate)}{left}")

    def finish(self, passages: int | None = None) -> int:
        """Say that all passages are there, those counted if their number is not given; returns how many are new."""
        passages = self.there + self._encoded if passages is None else passages
        seconds = time.monotonic() - self._begun
        fresh = passages - self.there
        rate = f", {_rate(fresh / seconds)}" if fresh and seconds > 0 else ""
        there = f" ({self.there:,} were there)" if self.there else ""
        self._write(f"  {passages:,} passages{there} in {human_duration(seconds)}{rate}")
        return fresh


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
    # Over the examples of a model card; no switch turns it off.
    model_card.tqdm = partial(model_card.tqdm, disable=True)  # type: ignore[attr-defined]
    transformers.utils.logging.set_verbosity_warning()
    for name in NOTICES:
        logging.getLogger(name).addFilter(_no_notice)
    # Of calls that these libraries make to torch and to each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|sentence_transformers)\.")
    # Raised when compiled wheels are imported.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
