"""Run a recipe that kills itself as soon as it has printed a certain line.

python -m tests.recipe_worker LINE RECIPE ARGUMENTS...
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from typing import TextIO


class LastWords(io.TextIOBase):
    """Passes text on until a line that holds `last_line` is complete."""

    def __init__(self, out: TextIO, last_line: str) -> None:
        self.out = out
        self.last_line = last_line
        self.line = ""

    def write(self, text: str) -> int:
        self.out.write(text)
        self.line += text
        if "\n" in text:
            if self.last_line in self.line:
                self.out.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            self.line = self.line.rpartition("\n")[2]
        return len(text)

    def flush(self) -> None:
        self.out.flush()


if __name__ == "__main__":
    sys.stdout = LastWords(sys.stdout, sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
