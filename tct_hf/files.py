"""Write files and directories so that nobody ever meets a half-written one: written aside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file that appears whole or not at all.

    Missing parent directories are made. An interrupted call leaves the previous file as it was.

    Args:
        path: The file to write; a symbolic link is followed.
        text: Its content; line ends are written as they are.

    Returns:
        The path of the file written.

    Raises:
        OSError: The file cannot be written.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a file was to be written here, but this is a directory", str(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final name: a rename is atomic only within one file system. O_EXCL by way of "x": two writers
    # never share one name aside. Not mkstemp, whose 0600 would outlive the rename.
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, final)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return final


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write a file under that takes its own when the block ends well; otherwise nothing is left.

    Args:
        path: the file; missing parent directories are made, a file already there is replaced.

    Yields:
        A path in the same folder.

    Raises:
        OSError: The file cannot be written.
    """
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, final)
    finally:
        aside.unlink(missing_ok=True)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write an object as indented JSON that appears whole or not at all.

    Args:
        path: The file to write.
        obj: What `json` can write; NaN and infinities are refused, since they are not JSON.

    Returns:
        The path of the file written.

    Raises:
        ValueError: The object holds something JSON cannot express.
        OSError: The file cannot be written.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: this cannot be written as JSON: {error}") from error
    return write_text_atomic(path, text + "\n")


def replace_dir(staging: str | os.PathLike[str], final: str | os.PathLike[str]) -> Path:
    """Rename a finished directory to its final name, in place of the one that is there.

    At no moment is a half-written directory at `final`. A directory already there is first moved aside, to
    `.<name>.replaced` beside it, and deleted last; a process killed between the two renames leaves it under that
    name, whole, and the next call for the same `final` clears it away once the new one is in place.

    Args:
        staging: The finished directory, on the same file system as `final`.
        final: The name it takes; missing parent directories are made, a symbolic link is followed.

    Returns:
        The path of the directory in its final place.

    Raises:
        FileNotFoundError: There is no directory `staging`.
        NotADirectoryError: `final` is a file.
        ValueError: One of the two paths lies inside the other.
        OSError: A rename fails, for instance across file systems; the old directory is then back at `final`.
    """
    source, target = Path(os.path.realpath(staging)), Path(os.path.realpath(final))
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no finished directory to move into place", str(source))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a directory was to be put here, but this is a file", str(target))
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ValueError(f"{source} cannot replace {target}: one lies inside the other; stage beside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.replaced")
    if target.exists():
        if aside.exists():  # left by a killed call; `target` is newer
            shutil.rmtree(aside)
        os.rename(target, aside)
        moved = True
    else:
        moved = False
    try:
        os.rename(source, target)
    except OSError as error:
        if moved:
            os.rename(aside, target)
        if error.errno == errno.EXDEV:
            raise OSError(
                errno.EXDEV, "staging and final directory are on different file systems; stage beside it", str(target)
            ) from error
        raise
    if aside.exists():
        shutil.rmtree(aside)
    return target


@contextmanager
def staging_beside(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside a folder to write its new content under; what is still there at the end is removed.

    Args:
        final: the folder that :func:`replace_dir` will put in place; missing parent directories are made.

    Yields:
        A path at which there is nothing yet.
    """
    target = Path(os.path.realpath(final))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# What a stage writes beside its result: the settings that made it, and the log of its training.
CLAIM_FILE = "tct_settings.json"
LOG_FILE = "training_log.json"


def claim(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Record which settings a folder's content belongs to, or refuse the folder if they are others.

    Args:
        folder: made when missing.
        settings: JSON-ready, all that the content depends on.

    Raises:
        ValueError: the folder holds the work of other settings; names the first that differs, and the mend.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps(settings))
    file = folder / CLAIM_FILE
    # A folder that holds the claim alone has nothing to lose: the run stopped before its first result.
    if file.is_file() and any(p.name != CLAIM_FILE and not p.name.startswith(".") for p in folder.iterdir()):
        found = json.loads(file.read_text(encoding="utf-8"))
        if difference := _first_difference(found, wanted):
            name, before, now = difference
            raise ValueError(
                f"{folder} holds a run with {name} = {before!r}, but now {name} = {now!r}: "
                "choose another --output_dir, or delete the folder to begin again."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, wanted)


def _first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where settings first differ, in the order of `now`: dotted name and both values; missing is as good as None."""
    if before == now:
        return None
    if not isinstance(before, dict) or not isinstance(now, dict):
        return name, before, now
    for key in [*now, *(key for key in before if key not in now)]:
        if found := _first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key):
            return found
    return None


def is_claimed(folder: str | Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds a finished result of these settings.

    Args:
        folder: may be missing.
        settings: as for :func:`claim`.

    Raises:
        ValueError: it holds the work of other settings.
    """
    if not (Path(folder) / CLAIM_FILE).is_file():
        return False
    claim(folder, settings)
    return True


def file_digest(path: str | Path) -> str | None:
    """SHA-256 of a file's content; None where there is no such file."""
    path = Path(path)
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
