"""What the package keeps on disk: written aside, given its name when it is whole, and read with a check."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = [os.strerror(one) for one in _FULL]
_RENAME_EXCHANGE = 2  # of Linux's renameat2
_AT_FDCWD = -100
_SAID_AFTER = 1.0  # seconds of waiting for another process


class DiskFullError(OSError):
    """A disk without room for what is written; nothing that was there is lost."""


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make of any library's error about a full disk one that says what was written, and how much is free."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        # numpy, Faiss, safetensors and torch say it in words only; words of a server are of its own disk.
        said = " requested and " if isinstance(error, OSError) else "|".join(_WORDS)
        if getattr(error, "errno", None) not in _FULL and not re.search(said, str(error)):
            raise
        path = getattr(error, "filename", None) or path
        there = next(one for one in Path(os.path.realpath(path)).parents if one.is_dir())
        free = shutil.disk_usage(there).free
        raise DiskFullError(
            errno.ENOSPC,
            f"the disk is full ({free / 1e6:,.1f} MB free): {path} can't be written. What was finished is kept: make "
            "room and run it again, and it goes on where it stopped",
        ) from error


@contextmanager
def _held(lock: Path, what: Path, stale: str | None) -> Iterator[None]:
    """Hold a lock file."""
    from filelock import FileLock, SoftFileLock, Timeout  # not for --help

    lock.parent.mkdir(parents=True, exist_ok=True)
    held: FileLock | SoftFileLock
    for held in (FileLock(lock), SoftFileLock(there := lock.with_name(f"{lock.name}.there"))):
        try:
            try:
                held.acquire(timeout=_SAID_AFTER)
            except Timeout:
                logger.warning(f"{what}: waiting for another process, which is writing it.")
                held.acquire()
            break
        except OSError as error:  # NFS without its lock service, and other mounts; of ENOSYS filelock knows by itself
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            lock.unlink(missing_ok=True)  # which the attempt made
            lock = there
    try:
        for left in lock.parent.glob(stale) if stale else ():  # by killed holders
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that, and makes another
        held.release()


def _aside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where a path leads, and an unused name beside it: a rename is atomic only within one file system."""
    final = Path(os.path.realpath(path))
    # Not mkstemp or mkdtemp, whose private permissions would outlive the rename.
    return final, final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    stale = f".{glob.escape(final.name)}.????????.tmp"
    with writing(final), _held(final.with_name(f".{final.name}.lock"), final, stale):
        yield


@contextmanager
def working_in(folder: str | os.PathLike[str], main: bool = True, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder that is filled file by file: they wait, and say so.

    Args:
        folder: made when missing.
        main: whether this process takes the lock, for all of a distributed run.
        shared: what others are writing without the lock is not cleared away.
    """
    folder = Path(folder)
    if not main:
        yield
        return
    with writing(folder / "."), _held(folder / ".lock", folder, None if shared else ".*.tmp"):
        yield


@contextmanager
def write_aside(path: str | os.PathLike[str], *, held: bool = False) -> Iterator[Path]:
    """A name to write a file under that takes its own when the block ends well; otherwise nothing is left.

    Args:
        path: the file.
        held: nobody else writes into its folder, which :func:`working_in` keeps to this run.
    """
    final, aside = _aside(path)
    with writing(final) if held else _locked(final):
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


def read_json(path: str | os.PathLike[str], fix: str, *, kind: Any = dict, needs: Sequence[str] = ()) -> Any:
    """Read a JSON file of the package's own.

    Args:
        path: the file.
        fix: what to do when it is damaged.
        kind: what it must hold.
        needs: names that must be in it.

    Raises:
        ValueError: it is damaged; names the file and the fix.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"a {type(content).__name__} where a {kind.__name__} is needed")
        if absent := [name for name in needs if name not in content]:
            raise ValueError(f"{absent[0]!r} is missing")
        if not is_shallow(content):
            raise ValueError("nested too deeply")
    except (ValueError, RecursionError) as error:  # also of Unicode and of JSON
        raise ValueError(f"{path} is not JSON that can be used ({error}): {fix}") from error
    return content


def is_shallow(content: Any, levels: int = 100) -> bool:
    """Whether nested lists and mappings end before whoever walks through them runs out of stack."""
    level = [content]
    for _ in range(levels):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [item for items in inner for item in items]
    return not level


@contextmanager
def staging_beside(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside a folder to write its new content under; what is still there at the end is removed.

    Others who would replace the same folder wait.
    """
    target, staging = _aside(final)
    with _locked(target):
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def replace_dir(staging: str | os.PathLike[str], final: str | os.PathLike[str]) -> Path:
    """Give a finished folder its final name, replacing the folder that has it.

    Where the system can exchange two names (Linux), a folder is there at every moment. Elsewhere the old one is moved
    to `.<name>.replaced` first, where a killed process leaves it, whole; the next call clears it away.
    """
    source, target = Path(os.path.realpath(staging)), Path(os.path.realpath(final))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.replaced")
    moved = target.is_dir()
    if moved and source.is_dir() and source != target and _exchange(source, target):
        shutil.rmtree(source)
    else:
        if moved:
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed call; `target` is newer
            os.rename(target, aside)
        try:
            os.rename(source, target)
        except OSError:
            if moved:
                os.rename(aside, target)
            raise
    shutil.rmtree(aside, ignore_errors=True)
    return target


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def json_digest(content: Any) -> str:
    """SHA-256 of JSON-ready content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file's content; None where there is no such file."""
    return _hex(hashlib.sha256(), path) if Path(path).is_file() else None


def weights_file_digest(folder: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a saved model's weights, of all files where its modules have their own; None where there are none."""
    whole = Path(folder) / "model.safetensors"
    # Of a Router, whose modules are folders beside its own settings.
    parts = [] if whole.is_file() else sorted(Path(folder).glob("*_[0-9]*_*/model.safetensors"))
    found = "".join(f"{part.parent.name} {file_digest(part)}\n" for part in parts)
    return hashlib.sha256(found.encode()).hexdigest() if found else file_digest(whole)


def _hex(digest: Any, path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


# In a folder that is checked whenever it is opened: size and checksum of each other file.
CONTENTS_FILE = "contents.json"


def seal(folder: Path) -> None:
    """Write down what a finished folder holds, for :func:`check_seal`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CONTENTS_FILE)
    write_json_atomic(folder / CONTENTS_FILE, {path.relative_to(folder).as_posix(): _seen(path) for path in files})


def check_seal(folder: Path, *, verify: bool = True) -> None:
    """Compare the files of a folder with what was written down; a ValueError says which differs.

    Files that came later are passed over: `datasets` keeps its own beside those that it reads. Without `verify` only
    their sizes are compared.
    """
    if not (folder / CONTENTS_FILE).is_file():
        raise ValueError(f"{folder / CONTENTS_FILE} is missing")
    for name, written in read_json(folder / CONTENTS_FILE, "it is made again").items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _seen(folder / name, verify) != (written if verify else written[:1]):
            raise ValueError(f"the checksum differs of {name}")


def _seen(file: Path, verify: bool = True) -> list[Any]:
    """The size of a file and, with `verify`, its checksum."""
    stat = file.stat()
    return [stat.st_size, *([_checksum(os.path.realpath(file), stat.st_size, stat.st_mtime_ns)] if verify else [])]


@cache
def _checksum(path: str, size: int, changed: int) -> str:
    """The checksum of a file, computed once in a process for each path, size and time of change."""
    import xxhash  # only for those who prepare data

    return _hex(xxhash.xxh3_128(), path)


# What a stage writes beside its result: the settings that made it, and the log of its training.
CLAIM_FILE = "tct_settings.json"
LOG_FILE = "training_log.json"
_BEGIN_AGAIN = "choose another folder, or delete this one to begin again."
MADE_AGAIN = "delete it, and it is made again."
_NAMES = "names"  # in the claim: of digests, beside the settings


def claim(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    names: Mapping[str, str | None] | None = None,
    *,
    shared: bool = False,
) -> None:
    """Record which settings a folder's content belongs to, or refuse the folder if they are others.

    Args:
        folder: made when missing.
        settings: JSON-ready.
        names: what digests among the settings are of, such as a model's id, by setting; shown, and never compared.
        shared: others may be at work on what is not there yet.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps(settings))
    file = folder / CLAIM_FILE
    # A folder that holds the claim alone has nothing to lose: the run stopped before its first result.
    begun = shared or any(p.name != CLAIM_FILE and not p.name.startswith(".") for p in folder.glob("*"))
    if file.is_file() and begun:
        kept = read_json(file, _BEGIN_AGAIN)
        kept_names = kept.pop(_NAMES, None)
        kept_names = kept_names if isinstance(kept_names, dict) else {}  # nothing but shown
        if difference := _first_difference(kept, wanted):
            name, *values = difference
            before, now = (
                f"{of[name]!r} ({str(value)[:12]})" if of.get(name) else repr(value)
                for of, value in zip((kept_names, names or {}), values, strict=True)
            )
            raise ValueError(f"{folder} holds a run with {name} = {before}, but now {name} = {now}: {_BEGIN_AGAIN}")
        return
    write_json_atomic(file, {**wanted, _NAMES: dict(names)} if names else wanted)


def read_claim(folder: Path, fix: str) -> dict[str, Any]:
    """The settings that a folder was claimed with; `fix` says what to do where the file is damaged."""
    settings: dict[str, Any] = read_json(folder / CLAIM_FILE, fix)
    settings.pop(_NAMES, None)
    return settings


def is_claimed(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], names: Mapping[str, str | None] | None = None
) -> bool:
    """Whether a folder, which may be missing, holds a finished result of these settings."""
    if not (Path(folder) / CLAIM_FILE).is_file():
        return False
    claim(folder, settings, names)
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
