"""Prepared data on disk: built once, aside, and checked at every opening."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from tct_hf.files import DiskFullError, check_seal, replace_dir, seal, staging_beside

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """The folder for prepared data, which may not exist yet."""
    own = os.environ.get("TCT_HF_CACHE")
    return Path(own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/tct_hf").expanduser()


def prepared(kind: str, key: Any, build: Callable[[Path], None], cache_dir: str | Path | None = None) -> Path:
    """A folder of prepared data, named by what it is and what it was made of, which is JSON-ready; built once."""
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return build_once(folder / f"{kind}-{sha256(json.dumps(key).encode()).hexdigest()[:16]}", build)


def build_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, built first when it is missing; every file is compared with its checksum at each call.

    A damaged folder is built again. Of several processes one builds it, and the others wait.
    """
    if _is_whole(final, say=False):
        return final
    with ExitStack() as stack:
        try:
            staging = stack.enter_context(staging_beside(final))
            if _is_whole(final):  # by the process that was waited for
                return final
            staging.mkdir()
        except DiskFullError:
            raise
        except OSError as error:
            raise OSError(
                f"can't write prepared data below {final.parent} ({error.strerror}); "
                "pass cache_dir= or set TCT_HF_CACHE to a folder that can be written"
            ) from error
        build(staging)
        seal(staging)
        return replace_dir(staging, final)


def _is_whole(folder: Path, say: bool = True) -> bool:
    if not folder.is_dir():
        return False
    try:
        check_seal(folder)
    except (ValueError, OSError) as error:
        if say:
            logger.warning(f"{folder}: prepared data are damaged or of an earlier version; made again ({error}).")
        return False
    return True
