"""What a system costs: milliseconds a query, stage by stage, queries a second, bytes a passage, seconds to build."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from tct_hf.evaluation.tables import markdown_table
from tct_hf.settings import environment

TOTAL = "total"
MILLISECONDS, BYTES = "milliseconds a query, median", "bytes a passage on disk"  # axes of plots


@dataclass(frozen=True)
class Footprint:
    """What searching needs besides models: bytes on disk and in memory, seconds to make it, None where unknown."""

    disk: int = 0
    memory: int = 0
    build_seconds: float | None = 0.0

    def __add__(self, other: Footprint) -> Footprint:
        seconds = (self.build_seconds, other.build_seconds)
        taken = None if None in seconds else sum(filter(None, seconds))
        return Footprint(self.disk + other.disk, self.memory + other.memory, taken)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one query at a time: percentiles (interpolated), mean, and how many were timed."""

    p50: float
    p95: float
    p99: float
    mean: float
    queries: int


@dataclass(frozen=True)
class Efficiency:
    """What `measure_efficiency` found; `str()` of it is a Markdown table. A figure that is not known is None.

    Args:
        latency: stage to its latency, and under "total" that of all stages of a query together.
        queries_per_second, batch_size: in batches.
        passages: searched.
        threads: library to its number of threads.
        machine: versions of packages and the machine (`tct_hf.settings.environment`), processor and memory.
    """

    latency: dict[str, Latency]
    queries_per_second: float | None
    batch_size: int | None
    passages: int
    disk_bytes: int | None
    disk_bytes_per_passage: float | None
    memory_bytes: int | None
    memory_bytes_per_passage: float | None
    build_seconds: float | None
    threads: dict[str, int]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [["stage", " p50 ms", " p95 ms", " p99 ms", "mean ms"]]
        for stage, one in self.latency.items():
            rows.append([stage, *(f"{value:7.2f}" for value in (one.p50, one.p95, one.p99, one.mean))])
        lines = [markdown_table(rows), ""]
        if self.queries_per_second is not None:
            lines.append(f"Throughput: {self.queries_per_second:,.1f} queries/s in batches of {self.batch_size}.")
        for where, size, each in (
            ("On disk", self.disk_bytes, self.disk_bytes_per_passage),
            ("In memory", self.memory_bytes, self.memory_bytes_per_passage),
        ):
            if size is not None:
                lines.append(f"{where}: {size:,} bytes, {each:,.1f} a passage ({self.passages:,} passages).")
        if self.build_seconds is not None:
            lines.append(f"Build: {self.build_seconds:,.1f} s.")
        threads = ", ".join(f"{name} {count}" for name, count in self.threads.items()) or "not known"
        timed = self.latency[TOTAL].queries
        lines.append(f"{timed} queries timed one at a time; threads: {threads}; {self.machine['processor']}.")
        return "\n".join(lines)


def measure_efficiency(
    stages: Mapping[str, Callable[[Any], Any]],
    queries: Sequence[Any],
    *,
    passages: int,
    batch: Callable[[Sequence[Any]], Any] | None = None,
    batch_size: int = 32,
    disk: int | str | Path | Sequence[str | Path] | None = None,
    memory: int | None = None,
    build_seconds: float | None = None,
    warm_up: int = 10,
    clock: Callable[[], float] = perf_counter,
) -> Efficiency:
    """Time a system one query at a time, stage by stage, then in batches, with the size of its index.

    A stage takes what the one before it returned, the first takes the query:
    `{"encode": lambda text: encode([text]), "search": lambda vector: index.search(vector, 100)}`. A stage on an
    accelerator must wait for its result, or the next stage is charged for it.

    Args:
        stages: name to function, in order.
        queries: arguments of the first stage.
        passages: number of passages searched, for bytes a passage.
        batch: function that answers a list of queries; throughput is left out without it.
        batch_size: queries a batch; the last one may be smaller.
        disk: bytes of the index on disk, or its files or folders.
        memory: bytes of the index in memory.
        build_seconds: seconds to make the index.
        warm_up: queries run before any is timed, repeated where there are fewer; one batch is run too.
        clock: seconds from any fixed moment.

    Returns:
        The figures, with the threads and the machine they were taken on.

    Raises:
        ValueError: no stage, no query, a stage called "total", or a number out of range.
        FileNotFoundError: `disk` names what is not there.
    """
    if not stages:
        raise ValueError('stages: none; name at least one, for instance {"search": lambda query: ...}')
    if TOTAL in stages:
        raise ValueError(f'stages: "{TOTAL}" is the name of the sum; call the stage something else')
    if isinstance(queries, str) or not len(queries):
        raise ValueError("queries: pass a list of one or more queries")
    for name, number, least in (("passages", passages, 1), ("batch_size", batch_size, 1), ("warm_up", warm_up, 0)):
        if number < least:
            raise ValueError(f"{name}: {number} is below {least}")
    if disk is not None and not isinstance(disk, int):
        disk = bytes_on_disk(disk)

    for turn in range(warm_up):
        _timed(stages, queries[turn % len(queries)], clock)
    times = [_timed(stages, query, clock) for query in queries]
    rate = None
    if batch is not None:
        parts = [queries[start : start + batch_size] for start in range(0, len(queries), batch_size)]
        if warm_up:
            batch(parts[0])
        begun = clock()
        for part in parts:
            batch(part)
        if (seconds := clock() - begun) <= 0:
            raise ValueError("clock: no time passed over the batches; pass a finer clock")
        rate = len(queries) / seconds
    return Efficiency(
        latency={name: _latency(one) for name, one in zip((*stages, TOTAL), zip(*times, strict=True), strict=True)},
        queries_per_second=rate,
        batch_size=min(batch_size, len(queries)) if batch else None,
        passages=passages,
        disk_bytes=disk,
        disk_bytes_per_passage=None if disk is None else disk / passages,
        memory_bytes=memory,
        memory_bytes_per_passage=None if memory is None else memory / passages,
        build_seconds=build_seconds,
        threads=threads_in_use(),
        machine=environment() | {"processor": _processor(), "memory_bytes": psutil.virtual_memory().total},
    )


def bytes_on_disk(paths: str | Path | Sequence[str | Path]) -> int:
    """The size of files, and of all files under folders."""
    total = 0
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder to measure; save the index there first")
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def threads_in_use() -> dict[str, int]:
    """Library to the threads it is set to, of those that are loaded and compute."""
    ask = {"torch": "get_num_threads", "faiss": "omp_get_max_threads"}
    # What is not loaded took no part in the measurement; what numba may use says nothing.
    return {name: int(getattr(sys.modules[name], number)()) for name, number in ask.items() if name in sys.modules}


@contextmanager
def compute_threads(threads: int | None) -> Iterator[None]:
    """Give torch and Faiss a number of CPU threads for a while; None leaves their own settings."""
    import torch

    from tct_hf.retrieval.faiss_tools import faiss_threads, usable_threads

    before = torch.get_num_threads()
    with faiss_threads(threads):
        if threads is not None:
            torch.set_num_threads(usable_threads(threads))
        try:
            yield
        finally:
            torch.set_num_threads(usable_threads(before))


def _timed(stages: Mapping[str, Callable[[Any], Any]], query: Any, clock: Callable[[], float]) -> list[float]:
    moments, value = [clock()], query
    for stage in stages.values():
        value = stage(value)
        moments.append(clock())
    parts = [after - before for before, after in pairwise(moments)]
    return [*parts, moments[-1] - moments[0]]


def _latency(seconds: Sequence[float]) -> Latency:
    milliseconds = 1000 * np.asarray(seconds)
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99]).tolist()
    return Latency(p50, p95, p99, float(milliseconds.mean()), len(seconds))


def machine_key() -> dict[str, Any]:
    """What times depend on: those of another machine are not mixed in."""
    return {"processor": _processor(), "cpu_count": os.cpu_count(), "system": platform.system()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine() or "unknown processor"
