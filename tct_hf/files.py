"""Files and folders that are never seen half-written, and the record of the settings that made them."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _aside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where a path leads, and an unused name beside it: a rename is atomic only within one file system."""
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp or mkdtemp, whose private permissions would outlive the rename.
    return final, final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write a file under that takes its own when the block ends well; otherwise nothing is left."""
    final, aside = _aside(path)
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, final)
    finally:
        aside.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file that appears whole or not at all; line ends are written as they are."""
    with write_aside(path) as aside, open(aside, "x", encoding="utf-8", newline="") as file:
        file.write(text)
    return Path(os.path.realpath(path))


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write an object as indented JSON that appears whole or not at all."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: this cannot be written as JSON: {error}") from error
    return write_text_atomic(path, text + "\n")


@contextmanager
def staging_beside(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside a folder to write its new content under; what is still there at the end is removed."""
    _, staging = _aside(final)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_dir(staging: str | os.PathLike[str], final: str | os.PathLike[str]) -> Path:
    """Give a finished folder its final name, replacing the folder that has it.

    At no moment is a half-written folder at `final`. A folder already there is first moved aside, to
    `.<name>.replaced` beside it, and deleted last; a process killed between the two renames leaves it under that
    name, whole, and the next call for the same `final` clears it away.
    """
    target = Path(os.path.realpath(final))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.replaced")
    moved = target.is_dir()
    if moved:
        if aside.exists():  # left by a killed call; `target` is newer
            shutil.rmtree(aside)
        os.rename(target, aside)
    try:
        os.rename(os.path.realpath(staging), target)
    except OSError:
        if moved:
            os.rename(aside, target)
        raise
    if aside.exists():
        shutil.rmtree(aside)
    return target


def file_digest(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file's content; None where there is no such file."""
    if not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# What a stage writes beside its result: the settings that made it, and the log of its training.
CLAIM_FILE = "tct_settings.json"
LOG_FILE = "training_log.json"


def claim(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Record which settings a folder's content belongs to, or refuse the folder if they are others."""
    folder = Path(folder)
    wanted = json.loads(json.dumps(settings))
    file = folder / CLAIM_FILE
    # A folder that holds the claim alone has nothing to lose: the run stopped before its first result.
    if file.is_file() and any(p.name != CLAIM_FILE and not p.name.startswith(".") for p in folder.iterdir()):
        if difference := _first_difference(json.loads(file.read_text(encoding="utf-8")), wanted):
            name, before, now = difference
            raise ValueError(
                f"{folder} holds a run with {name} = {before!r}, but now {name} = {now!r}: "
                "choose another --output_dir, or delete the folder to begin again."
            )
        return
    write_json_atomic(file, wanted)


def is_claimed(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether a folder, which may be missing, holds a finished result of these settings."""
    if not (Path(folder) / CLAIM_FILE).is_file():
        return False
    claim(folder, settings)
    return True


def _first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where settings first differ, in the order of `now`: dotted name and both values; missing counts as None."""
    if before == now:
        return None
    if not isinstance(before, dict) or not isinstance(now, dict):
        return name, before, now
    for key in [*now, *(key for key in before if key not in now)]:
        if found := _first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key):
            return found
    return None


def command(recipe: str) -> str:
    """How a recipe is run where the user is: `train paper` from a source tree, or in an installation."""
    name, *settings = recipe.split()
    if (Path(__file__).parent / "recipes").is_dir():
        return " ".join(["tct-hf", name.replace("_", "-"), *settings])
    return " ".join([f"recipes/{name}.py", *(f"recipes/{one}.yaml" for one in settings)])
