"""The time of encoding beside the vectors: of the whole, and scaled up from what a stopped run had left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tct_hf.retrieval import encode_timed as timed
from tests.encode_worker import passages


def test_the_time_of_the_rest_is_scaled_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(model: Any, corpus: Any, folder: Path, *, state: Any) -> dict[str, Any]:
        """Shards of five passages, as they are told of on disk."""
        folder.mkdir(exist_ok=True)
        for shard in range(4):
            (folder / f"{shard:05d}.npy").touch()
            (folder / f"{shard:05d}.json").write_text(json.dumps({"count": 5}))
        return {"count": 20}

    monkeypatch.setattr(timed, "encode_corpus", encode)
    folder = tmp_path / "vectors"
    assert timed.encoding_seconds(folder) is None
    timed.encode_timed(None, passages(), folder, clock=iter([100.0, 108.0]).__next__)
    assert timed.encoding_seconds(folder) == 8.0
    timed.encode_timed(None, passages(), folder, clock=iter([0.0, 1.0]).__next__)  # all is there: nothing to time
    assert timed.encoding_seconds(folder) == 8.0
    (folder / "00003.json").unlink()
    timed.encode_timed(None, passages(), folder, clock=iter([0.0, 3.0]).__next__)
    assert timed.encoding_seconds(folder) == 12.0
