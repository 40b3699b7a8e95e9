"""How much memory a function takes at its peak, beyond what is resident before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def _resident(field: str) -> float:
    """MiB of a field of /proc/self/status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that a function takes at its peak beyond what is resident before; on Linux, in a process of its own."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work leaves unused goes back
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return _resident("VmHWM") - before
