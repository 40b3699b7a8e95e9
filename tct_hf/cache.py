"""Prepared data on disk: built once, aside, and renamed into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tct_hf.files import staging_beside


def default_cache_dir() -> Path:
    """The folder for prepared data, which may not exist yet."""
    own = os.environ.get("TCT_HF_CACHE")
    return Path(own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/tct_hf").expanduser()


def prepared(kind: str, key: Any, build: Callable[[Path], None], cache_dir: str | Path | None = None) -> Path:
    """A folder of prepared data, named by what it is and what it was made of, which is JSON-ready; built once."""
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return build_once(folder / f"{kind}-{sha256(json.dumps(key).encode()).hexdigest()[:16]}", build)


def build_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, built first when it is missing; safe with several processes at once.

    Each process that finds it missing builds its own copy beside it; the first to finish renames it into place and
    the others drop theirs, so that a reader never sees half a folder and no process waits for the lock of a dead one.
    """
    if final.is_dir():
        return final
    try:
        with staging_beside(final) as staging:
            staging.mkdir()
    except OSError as error:
        raise OSError(
            f"can't write prepared data below {final.parent} ({error.strerror}); "
            "pass cache_dir= or set TCT_HF_CACHE to a folder that can be written"
        ) from error
    with staging_beside(final) as staging:
        staging.mkdir()
        build(staging)
        try:
            staging.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    return final
