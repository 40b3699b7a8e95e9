from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tct_hf.retrieval import DenseIndex

IDS = [f"d{at}" for at in range(50)]


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)


def test_results_are_the_greatest_inner_products(vectors: np.ndarray) -> None:
    queries = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    ids, scores = DenseIndex.build(vectors, IDS).search(queries, k=7)
    products = queries @ vectors.T
    for row, (found, values) in enumerate(zip(ids, scores, strict=True)):
        best = np.argsort(-products[row])[:7]
        assert found == [IDS[at] for at in best]
        np.testing.assert_allclose(values, products[row][best], rtol=1e-5)


def test_vectors_are_not_normalised() -> None:
    index = DenseIndex.build([[1.0, 0.0], [10.0, 9.0]], ["unit", "long"])
    assert index.run(["q"], [[1.0, 0.0]], k=2) == {"q": {"long": 10.0, "unit": 1.0}}


def test_equal_scores_are_ordered_by_id() -> None:
    ids, _ = DenseIndex.build(np.ones((3, 2)), ["c", "a", "b"]).search(np.ones((1, 2)), k=3)
    assert ids == [["a", "b", "c"]]


def test_asking_for_more_than_there_is_gives_all(vectors: np.ndarray) -> None:
    ids, scores = DenseIndex.build(vectors, IDS).search(vectors[:1], k=1000)
    assert sorted(ids[0]) == sorted(IDS) and len(scores[0]) == 50


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "SQ8"])
def test_any_faiss_factory_finds_a_vector_by_itself(vectors: np.ndarray, factory: str) -> None:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, _ = DenseIndex.build(unit, IDS, factory).search(unit[3:4], k=1)
    assert ids == [["d3"]]


def test_places_an_approximate_index_leaves_empty_are_dropped(vectors: np.ndarray) -> None:
    index = DenseIndex.build(vectors, IDS, "IVF10,Flat")
    ids, scores = index.search(vectors[:1], k=50)
    assert 0 < len(ids[0]) < 50 and len(ids[0]) == len(scores[0])


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat"])
def test_saved_index_answers_alike(tmp_path: Path, vectors: np.ndarray, factory: str) -> None:
    index = DenseIndex.build(vectors, IDS, factory)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")
    loaded = DenseIndex.load(tmp_path / "index")
    assert loaded.run(["q"], vectors[:1], 5) == index.run(["q"], vectors[:1], 5)
    assert (len(loaded), loaded.dimension, loaded.factory) == (50, 8, index.factory)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_damaged_or_foreign_index_is_refused(tmp_path: Path, vectors: np.ndarray) -> None:
    with pytest.raises(FileNotFoundError, match="no dense index here"):
        DenseIndex.load(tmp_path)
    DenseIndex.build(vectors, IDS).save(tmp_path / "index")
    (tmp_path / "index" / "ids.json").write_text('["d1"]')
    with pytest.raises(ValueError, match="1 ids, 50 vectors"):
        DenseIndex.load(tmp_path / "index")
    (tmp_path / "index" / "index.faiss").write_bytes(b"junk")
    with pytest.raises(ValueError, match="damaged dense index"):
        DenseIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    ("vectors", "ids", "factory", "message"),
    [
        (np.ones(3), ["a"], "auto", r"shape \(3,\)"),
        (np.ones((0, 3)), [], "auto", "nothing to index"),
        ([[1.0, np.nan]], ["a"], "auto", "vectors: row 0 has a NaN"),
        ([[1.0], [np.inf]], ["a", "b"], "auto", "vectors: row 1"),
        (np.ones((2, 3)), ["a"], "auto", "1 ids for 2 vectors"),
        (np.ones((2, 3)), ["a", "a"], "auto", "'a' comes twice"),
        (np.ones((2, 3)), ["a", "b"], "NoSuchIndex", "factory: Faiss can't make 'NoSuchIndex'"),
        (np.ones((2, 3)), ["a", "b"], "IVF64,Flat", "factory: Faiss can't make 'IVF64,Flat' of 2 vectors"),
    ],
)
def test_wrong_input_is_named(vectors: Any, ids: list[str], factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseIndex.build(vectors, ids, factory)


def test_wrong_queries_are_named(vectors: np.ndarray) -> None:
    index = DenseIndex.build(vectors, IDS)
    with pytest.raises(ValueError, match="dimension 4 where the index has 8"):
        index.search(np.ones((1, 4)), k=1)
    with pytest.raises(ValueError, match="k: 0"):
        index.search(vectors[:1], k=0)
    with pytest.raises(ValueError, match="query_ids: 2 ids, 1 of them distinct, for 2 vectors"):
        index.run(["q", "q"], vectors[:2], k=1)
