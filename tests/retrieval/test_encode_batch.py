"""Batches of passages to vectors, alone and as Ray Data's actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import EncodeBatch
from tests.encode_worker import COUNT, passages
from tests.splade import tiny_splade

ROWS = list(passages())


def batch(rows: list[dict[str, str]]) -> dict[str, Any]:
    """As Ray Data gives one."""
    return {name: np.array([row[name] for row in rows]) for name in ("id", "text")}


def wanted(saved: Path) -> np.ndarray:
    return SentenceTransformer(str(saved), device="cpu").encode_document([row["text"] for row in ROWS])


def test_a_batch_becomes_ids_and_vectors(saved: Path) -> None:
    made = EncodeBatch(str(saved), device="cpu")({**batch(ROWS), "more": np.zeros(COUNT)})
    assert list(made) == ["id", "vector"] and made["id"].tolist() == [row["id"] for row in ROWS]
    assert made["vector"].dtype == np.float32
    np.testing.assert_allclose(made["vector"], wanted(saved), atol=1e-5)
    assert EncodeBatch(str(saved), device="cpu", truncate_dim=8)(batch(ROWS[:2]))["vector"].shape == (2, 8)


def test_other_models_and_columns_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparse vectors, which a column can't hold"):
        EncodeBatch(str(tiny_splade(tmp_path)), device="cpu")
    encode = EncodeBatch(str(saved), device="cpu")
    with pytest.raises(ValueError, match="no column 'text' among id, body; rename_columns makes one"):
        encode({"id": ["a"], "body": ["b"]})
    encode._model[0].model.embeddings.word_embeddings.weight.data.fill_(np.nan)
    with pytest.raises(ValueError, match="passage 'p0' has a NaN or infinite vector"):
        encode(batch(ROWS))


@pytest.mark.slow
def test_ray_encodes_a_corpus_in_two_actors(saved: Path) -> None:
    reason = "Ray is not installed: pip install 'tct_hf[ray]'"
    data: Any = pytest.importorskip("ray.data", reason=reason)
    ray: Any = pytest.importorskip("ray", reason=reason)
    # Workers have the packages and the tests of this process.
    ray.init(
        "local",
        _node_ip_address="127.0.0.1",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    try:
        corpus = data.from_items(ROWS, override_num_blocks=4)
        options = {"fn_constructor_args": (str(saved),), "fn_constructor_kwargs": {"device": "cpu"}}
        made = corpus.map_batches(EncodeBatch, concurrency=2, batch_size=5, **options).take_all()
    finally:
        ray.shutdown()
    vectors = {row["id"]: row["vector"] for row in made}
    assert len(made) == len(vectors) == COUNT
    np.testing.assert_allclose([vectors[row["id"]] for row in ROWS], wanted(saved), atol=1e-5)
