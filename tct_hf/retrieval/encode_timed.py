"""Encoding a corpus with the time it takes kept beside the vectors, for reports of what an index costs to build."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.files import write_json_atomic
from tct_hf.retrieval.encode import encode_corpus
from tct_hf.retrieval.vectors import finished_shards

if TYPE_CHECKING:
    from accelerate import PartialState

SECONDS_FILE = "encoding_seconds.json"


def encode_timed(
    model: Any,
    corpus: Any,
    folder: str | Path,
    *,
    state: PartialState | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> dict[str, Any]:
    """Encode a corpus as `encode_corpus` does, and write the time beside the vectors.

    Where a part was there already, the time of the rest is scaled up to the whole.

    Args:
        model: as in `encode_corpus`.
        corpus: likewise.
        folder: likewise.
        state: likewise.
        clock: seconds from a fixed moment, never going back.
        **options: the rest of the arguments of `encode_corpus`.

    Returns:
        The manifest of `encode_corpus`, which raises what this raises.
    """
    folder = Path(folder)
    before = sum(
        json.loads((folder / f"{shard:05d}.json").read_text(encoding="utf-8"))["count"]
        for shard in finished_shards(folder)
    )
    begun = clock()
    manifest = encode_corpus(model, corpus, folder, state=state, **options)
    seconds = clock() - begun
    fresh = manifest["count"] - before
    if fresh > 0 and (state is None or state.is_main_process):
        record = {"seconds": seconds * manifest["count"] / fresh, "passages_timed": fresh}
        write_json_atomic(folder / SECONDS_FILE, record)
    return manifest


def encoding_seconds(folder: str | Path) -> float | None:
    """What encoding a folder of vectors took in all; None where no call of `encode_timed` encoded a part of it."""
    file = Path(folder) / SECONDS_FILE
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.is_file() else None
