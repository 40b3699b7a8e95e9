"""Index folders: written aside, renamed, announced by a settings file that holds every file's size and checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tct_hf.files import file_digest, replace_dir


def write_directory(
    directory: str | Path, fill: Callable[[Path], None], settings_file: str, settings: Mapping[str, Any]
) -> None:
    """Fill a folder aside and rename it into place; an index that is there is replaced whole.

    Args:
        directory: the folder.
        fill: writes the content into the empty folder it is given.
        settings_file: the file by which a folder is known to hold such an index.
        settings: what that file says, JSON-ready, with "format"; sizes and checksums of the content are added as
            "files", and the checksum of all that as "sha256".

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it can't be written.
    """
    # Its real place, so that a link to an index on another disk is followed.
    directory = Path(directory).resolve()
    if directory.exists() and not (directory / settings_file).is_file() and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: holds something other than an index of this kind; name another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # What a killed save left: nobody else writes this index now.
    for left in directory.parent.glob(f".{directory.name}.????????.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        fill(staging)
        files = {}
        for path in sorted(staging.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            _sync(path)
        announced = {**settings, "files": files}
        announced["sha256"] = _digest(announced)
        (staging / settings_file).write_text(json.dumps(announced, indent=1) + "\n", encoding="utf-8")
        _sync(staging / settings_file)
        replace_dir(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_settings(
    directory: Path, settings_file: str, written_format: int, what: str, *, verify: bool = True
) -> dict[str, Any]:
    """Read the settings file of an index folder and check the files it announces.

    Args:
        directory: the folder.
        settings_file: the file's name.
        written_format: the only format that this version reads.
        what: the kind of index, for messages.
        verify: compare checksums, which reads every file once; sizes are always compared.

    Returns:
        The settings without format number, files and checksum.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the file is damaged or of another format, or a file is missing, truncated or altered.
    """
    path = directory / settings_file
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {what} here ({settings_file} is missing); build and save one first")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = settings["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); build and save the index again") from error
    if found != written_format:
        raise ValueError(f"{path}: format {found} where this version reads {written_format}; build the index again")
    announced = settings.pop("sha256", None)
    if announced != _digest(settings):
        raise ValueError(f"{path}: altered since it was saved (checksum); build and save the index again")
    del settings["format"]
    for name, expected in settings.pop("files").items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from this {what}; copy it again, or build and save the index again")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{file}: {file.stat().st_size} bytes where {expected['bytes']} were saved: truncated or altered; "
                "copy it again, or build and save the index again"
            )
        if verify and file_digest(file) != expected["sha256"]:
            raise ValueError(
                f"{file}: altered since it was saved (checksum); copy it again, or build and save the index again"
            )
    return settings


def folder_bytes(directory: str | Path) -> int:
    """Bytes of all files of an index folder."""
    return sum(path.stat().st_size for path in Path(directory).iterdir() if path.is_file())


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
