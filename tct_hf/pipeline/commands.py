"""Recipes run one after another, each in a process of its own; what is finished is left as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tct_hf.files import write_json_atomic
from tct_hf.progress import human_duration
from tct_hf.settings import SettingsError, read_yaml

# What a step leaves when it has ended well: the command, and a digest of all that it was told.
RECORDS = "steps"


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: to be shown.
        script: the recipe.
        settings: its YAML, which names its `output_dir`.
        options: more for its command line.
        makes: what is there below `output_dir` when it is finished; the folder itself when empty.
        alone: it is run by python, whatever launches the others.
    """

    name: str
    script: Path
    settings: Path
    options: tuple[str, ...] = ()
    makes: str = ""
    alone: bool = False

    @property
    def words(self) -> list[str]:
        """The command without its launcher; paths as they are told from the folder of the process."""
        return [os.path.relpath(self.script), os.path.relpath(self.settings), *self.options]

    def made(self) -> Path:
        """What is there when it is finished.

        Raises:
            SettingsError: the YAML can't be read, or names no output_dir.
        """
        folder = read_yaml(self.settings).get("output_dir")
        if folder is None:
            raise SettingsError(f"{self.settings}: output_dir is missing; name the folder of this step")
        return Path(folder) / self.makes


@dataclass(frozen=True)
class Done:
    """A step that is finished: the seconds it took, and whether an earlier call did it."""

    name: str
    seconds: float
    skipped: bool


def run_steps(
    steps: Sequence[Step],
    folder: str | Path,
    *,
    only: Sequence[str] | None = None,
    launcher: str = "accelerate launch",
    start: Callable[[list[str]], int] | None = None,
    write: Callable[[str], None] = print,
) -> list[Done]:
    """Run steps in their order, each by the command that is shown.

    A step is left out where its record says that it ended well under the same command, the same settings and the same
    steps before it, and what it makes is there. Everything else is up to the script, which goes on where it stopped.

    Args:
        steps: in order; each reads what those before it made.
        folder: of the records.
        only: names of those to run; all when None.
        launcher: words before a script.
        start: takes the words of a command and returns its exit status; by default a process, whose output is shown.
        write: takes lines of progress.

    Returns:
        One for each step that was run or left out.

    Raises:
        ChildProcessError: a step ended badly; names it, and says that the same call goes on there.
        SettingsError: settings that can't be read.
    """
    start = start or _start
    done: list[Done] = []
    before = ""
    for step in steps:  # before the first runs: a wrong file is not to be found days later
        step.made()
    for number, step in enumerate(steps, 1):
        place = f"[{number}/{len(steps)}] {step.name}"
        words = ["python" if step.alone else launcher, *step.words]
        told = [words[1:], read_yaml(step.settings), before]
        before = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        if only is not None and step.name not in only:
            continue
        record = Path(folder) / RECORDS / f"{step.name}.json"
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if found.get("told") == before and step.made().exists():
            write(f"{place}: it is done")
            done.append(Done(step.name, found["seconds"], skipped=True))
            continue
        record.unlink(missing_ok=True)
        command = f"{words[0]} {shlex.join(words[1:])}"
        write(f"{place}: {command}")
        begun = time.monotonic()
        status = start([*_program(words[0]), *words[1:]])
        seconds = time.monotonic() - begun
        if status != 0:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ChildProcessError(
                f"{step.name}: `{command}` {how}; mend what it says, then run this again: it goes on"
            )
        if not step.made().exists():
            raise ChildProcessError(f"{step.name}: `{command}` ended well, but {step.made()} is not there")
        write_json_atomic(record, {"told": before, "command": command, "seconds": seconds})
        done.append(Done(step.name, seconds, skipped=False))
    return done


def table(done: Sequence[Done]) -> str:
    """What each step took, in markdown."""
    rows = [f"| {one.name} | {human_duration(one.seconds)}{' (earlier)' if one.skipped else ''} |" for one in done]
    return "\n".join(["| step | time |", "|---|---|", *rows])


def _program(launcher: str) -> list[str]:
    """The launcher of this interpreter's environment, whatever the PATH."""
    words = shlex.split(launcher)
    if words[:2] == ["accelerate", "launch"]:
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]] if words[:1] == ["python"] else words


def _start(words: list[str]) -> int:
    return subprocess.run(words, check=False).returncode
