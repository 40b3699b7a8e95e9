"""Prepared data on disk: built once, aside, and renamed into place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.files import staging_beside

if TYPE_CHECKING:
    from datasets import Dataset


def default_cache_dir() -> Path:
    """The folder for prepared data, which may not exist yet."""
    own = os.environ.get("TCT_HF_CACHE")
    return Path(own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/tct_hf").expanduser()


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


def write_corpus(path: Path, passages: Iterable[tuple[str, str]]) -> int:
    """Write (id, text) pairs as an Arrow stream, in constant memory."""
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    left, count = iter(passages), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(left, 1000)):
            writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in zip(*batch)], schema))  # noqa: B905
            count += len(batch)
    return count


def read_corpus(path: Path) -> Dataset:
    """Open what `write_corpus` wrote: a memory-mapped data set with the columns id and text."""
    from datasets import Dataset

    return Dataset.from_file(str(path))
