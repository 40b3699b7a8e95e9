"""Progress of a run in stages: which one is under way and about how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


def human_duration(seconds: float) -> str:
    """Write a duration for people, with its two largest units.

    Args:
        seconds: The duration in seconds.

    Returns:
        For instance "3 min 20 s", "2 h 5 min", "under 1 s".

    Raises:
        ValueError: The duration is negative or not a number.
    """
    if not seconds >= 0:
        raise ValueError(f"a duration must be 0 seconds or more, got {seconds}")
    if seconds < 1:
        return "under 1 s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _about(seconds: float) -> str:
    """An estimate with no more digits than it deserves."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 3600:
        return f"about {round(seconds / 60)} min"
    return "about " + human_duration(round(seconds / 600) * 600)


# An estimate from less than this share of the work (reading the data, say) would mislead.
_ENOUGH = 0.1


class Stages:
    """Prints one line when a stage begins, with an estimate of the time left once enough of the run is measured.

    The estimate is the time taken so far, scaled by the weights: no stage is assumed to be faster or slower than its
    weight says. Skipped stages count neither as done nor as time.

    Args:
        weights: Expected share of the time of each stage, by name, in the order of the run; any unit.
        clock: Seconds from a fixed moment, never going back.
        write: Takes one line without its line end.
        enabled: False prints nothing, as for all processes of a run but the main one.

    Raises:
        ValueError: There is no stage, or a weight is not above zero.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
        enabled: bool = True,
    ) -> None:
        if not weights:
            raise ValueError("weights: there must be at least one stage")
        for name, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"weights: stage {name!r} must weigh more than 0, got {weight}")
        self._weights = dict(weights)
        self._clock = clock
        self._write = write
        self._enabled = enabled
        self._begun = clock()
        self._ended: set[str] = set()
        self._done = 0.0  # weight of the stages that ran
        self._spent = 0.0  # seconds they took
        self._current: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage.

        Args:
            name: One of the names in `weights`.

        Yields:
            Nothing; the stage lasts as long as the `with` block. One that fails is not counted as done.

        Raises:
            ValueError: The name is unknown or its stage has run, or another stage is under way.
        """
        self._check(name)
        begun = self._clock()
        self._print(f"{self._label(name)}{self._left()}")
        self._current = name
        try:
            yield
        finally:
            self._current = None
        self._ended.add(name)
        self._done += self._weights[name]
        self._spent += self._clock() - begun

    def skip(self, name: str, reason: str) -> None:
        """Pass over a stage, for instance because its result is there from an earlier run.

        Args:
            name: One of the names in `weights`.
            reason: Why, for the line printed.

        Raises:
            ValueError: The name is unknown or its stage has run, or another stage is under way.
        """
        self._check(name)
        self._ended.add(name)
        self._print(f"{self._label(name)}: skipped, {reason}")

    def finish(self) -> None:
        """Print how long the run took in all."""
        self._print(f"done in {human_duration(self._clock() - self._begun)}")

    def _check(self, name: str) -> None:
        if name not in self._weights:
            raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(self._weights)}")
        if name in self._ended:
            raise ValueError(f"stage {name!r} has run already")
        if self._current is not None:
            raise ValueError(f"stage {name!r} cannot begin while {self._current!r} is under way")

    def _label(self, name: str) -> str:
        return f"[{list(self._weights).index(name) + 1}/{len(self._weights)}] {name}"

    def _left(self) -> str:
        if self._done < _ENOUGH * sum(self._weights.values()):
            return ""
        remaining = sum(weight for name, weight in self._weights.items() if name not in self._ended)
        return f" ({_about(self._spent / self._done * remaining)} left in all)"

    def _print(self, line: str) -> None:
        if self._enabled:
            (self._write or print_at_once)(line)


def print_at_once(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)  # a pipe or log file would otherwise hold lines back until the run ends


class PassageProgress:
    """Lines of progress of work on a corpus; other processes are taken to be as fast as this one.

    Args:
        total: passages in all; None: not known, and no time left is told.
        processes: that share the work.
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
        self._total, self._processes, self._write, self._every, self._clock = total, processes, write, every, clock
        self._enabled = enabled
        self._begun = self._last = clock()
        self._skipped = 0
        self._encoded = 0

    def skipped(self, passages: int) -> None:
        """Passages that were there from an earlier run."""
        self._skipped += passages

    def encoded(self, passages: int) -> None:
        """Passages that this process has done."""
        self._encoded += passages * self._processes
        if self._clock() - self._last >= self._every:
            self._line()

    def finish(self, passages: int) -> None:
        """All passages are there."""
        if self._enabled:
            seconds = self._clock() - self._begun
            fresh = passages - self._skipped
            rate = f", {_rate(fresh / seconds)}" if fresh and seconds > 0 else ""
            there = f" ({self._skipped:,} were there)" if self._skipped else ""
            self._write(f"  {passages:,} passages{there} in {human_duration(seconds)}{rate}")

    def _line(self) -> None:
        now = self._clock()
        self._last = now
        if not self._enabled or now <= self._begun:
            return
        rate = self._encoded / (now - self._begun)
        done = self._skipped + self._encoded
        line = f"  {done:,} passages"
        left = ""
        if self._total is not None:
            done = min(done, self._total)
            line = f"  {done:,} of {self._total:,} passages"
            left = f"   {human_duration((self._total - done) / rate)} left"
        self._write(f"{line}   {_rate(rate)}{left}")


def _rate(passages: float) -> str:
    return f"{passages:,.0f} passages/s" if passages >= 10 else f"{passages:.2g} passages/s"
