"""Prepared data on disk: built once, aside, and renamed into place."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 1000


def default_cache_dir() -> Path:
    """Name the folder for prepared data.

    Returns:
        `$TCT_HF_CACHE`, else `tct_hf` under `$XDG_CACHE_HOME`, else `~/.cache/tct_hf`. It may not exist yet.
    """
    own = os.environ.get("TCT_HF_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tct_hf"


def build_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, built first when it is missing; safe with several processes at once.

    Each process that finds it missing builds its own copy beside it; the first to finish renames it into place and
    the others drop theirs, so that a reader never sees half a folder and nobody waits for a lock of a dead process.

    Args:
        final: the folder.
        build: fills the empty folder it is given; what it writes must depend on nothing but what `final` names.

    Returns:
        `final`.

    Raises:
        OSError: the folder can't be written; the message names the setting that moves it.
    """
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Not mkdtemp, whose 0700 would outlive the rename: several users may share the cache.
        staging = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        staging.mkdir()
    except OSError as error:
        raise OSError(
            f"can't write prepared data below {final.parent} ({error.strerror}); "
            "pass cache_dir= or set TCT_HF_CACHE to a folder that can be written"
        ) from error
    try:
        build(staging)
        try:
            staging.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def write_corpus(path: Path, passages: Iterable[tuple[str, str]]) -> int:
    """Write passages as an Arrow stream, in constant memory.

    Args:
        path: the file to write.
        passages: (id, text) pairs.

    Returns:
        The number of passages.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    count = 0
    ids: list[str] = []
    texts: list[str] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), pa.array(texts, pa.string())], schema))
            ids.clear()
            texts.clear()

        for passage_id, text in passages:
            ids.append(passage_id)
            texts.append(text)
            count += 1
            if len(ids) == _ROWS_A_BATCH:
                flush()
        if ids or not count:
            flush()
    return count


def read_corpus(path: Path) -> Dataset:
    """Open what `write_corpus` wrote.

    Args:
        path: the file.

    Returns:
        A memory-mapped data set with the columns id and text.
    """
    from datasets import Dataset

    return Dataset.from_file(str(path))
