"""Index folders: written aside, renamed, announced by a settings file."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tct_hf.files import replace_dir


def write_directory(directory: str | Path, fill: Callable[[Path], None], settings_file: str) -> None:
    """Fill a folder aside and rename it into place; an index that is there is replaced whole.

    Args:
        directory: the folder.
        fill: writes the content into the empty folder it is given.
        settings_file: the file by which a folder is known to hold such an index.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it can't be written.
    """
    # Its real place, so that a link to an index on another disk is followed.
    directory = Path(directory).resolve()
    if directory.exists() and not (directory / settings_file).is_file() and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: holds something other than an index of this kind; name another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        fill(staging)
        replace_dir(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_settings(directory: Path, settings_file: str, written_format: int, what: str) -> dict[str, Any]:
    """Read the settings file of an index folder.

    Args:
        directory: the folder.
        settings_file: the file's name.
        written_format: the only format that this version reads.
        what: the kind of index, for messages.

    Returns:
        The settings without the format number.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the file is damaged or of another format.
    """
    path = directory / settings_file
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {what} here ({settings_file} is missing); build and save one first")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = settings.pop("format")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); build and save the index again") from error
    if found != written_format:
        raise ValueError(f"{path}: format {found} where this version reads {written_format}; build the index again")
    return settings
