from __future__ import annotations

import json
import mmap as mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tct_hf import SparseIndex, load_vectors
from tct_hf.data.shards import _CHECKSUM, _checksum, run_shards, shard_file
from tct_hf.files import file_digest
from tct_hf.retrieval.sparse import best_rows
from tct_hf.retrieval.vectors import vector_facts, vector_table


def drawn(rows: int, dim: int, density: float, seed: int) -> sparse.csr_matrix:
    generator = np.random.default_rng(seed)
    found = sparse.random(rows, dim, density, format="csr", dtype=np.float32, random_state=generator)
    return sparse.csr_matrix(found)


def names(count: int) -> list[str]:
    """Ids whose order is not that of the rows."""
    return [f"p{(7 * row) % count if count % 7 else count - row:04d}" for row in range(count)]


def by_hand(passages: Any, query: Any, ids: list[str], k: int) -> list[tuple[str, float]]:
    """scipy's product, all of it, and Python's sort."""
    scores = np.asarray((query @ passages.T).todense(), np.float32)[0].tolist()
    ranked = sorted(((ids[row], score) for row, score in enumerate(scores) if score > 0), key=lambda x: (-x[1], x[0]))
    return ranked[:k]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 12), st.integers(1, 250), st.booleans())
def test_any_matrix_is_searched_exactly_ties_by_id(seed: int, rows: int, dim: int, k: int, whole: bool) -> None:
    generator = np.random.default_rng(seed)
    draw = [generator.integers(0, 3, (count, dim)) if whole else generator.random((count, dim)) for count in (rows, 4)]
    kept = [(matrix * (generator.random(matrix.shape) < 0.5)).astype(np.float32) for matrix in draw]
    kept[0][0, 0] = 1
    passages, queries = map(sparse.csr_matrix, kept)
    ids = generator.permutation([f"d{row}" for row in range(rows)]).tolist()
    index = SparseIndex.build(passages, ids)
    assert (len(index), index.dimension, index.postings) == (rows, dim, passages.nnz)
    assert index.active_dims == passages.nnz / rows
    found, scores = index.search(queries, k)
    exact = kept[1].astype(np.float64) @ kept[0].astype(np.float64).T
    for row in range(4):
        expected = by_hand(passages, queries[row], ids, k)
        assert list(zip(found[row], scores[row].tolist(), strict=True)) == expected and scores[row].dtype == np.float32
        np.testing.assert_allclose(scores[row], np.sort(exact[row])[::-1][: len(scores[row])], rtol=1e-5)


def test_lists_longer_than_a_block_of_scores_and_ties_by_the_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 150_000  # three blocks
    terms = np.arange(count) % 3
    passages = sparse.csr_matrix((np.ones(count, np.float32), terms, np.arange(count + 1)), shape=(count, 4))
    ids = [f"{(row * 7919) % count:06d}" for row in range(count)]
    index = SparseIndex.build(passages, ids)
    query = sparse.csr_matrix(np.array([[0, 2, 1, 5]], np.float32))
    (found,), (scores,) = index.search(query, 100)
    assert found == sorted(ids[1::3])[:100] and set(scores.tolist()) == {2.0}
    # Scores that rise with the row make every passage a candidate for a while.
    rising = sparse.csr_matrix((np.arange(1, count + 1, dtype=np.float32), terms * 0, np.arange(count + 1)))
    (found,), _ = SparseIndex.build(rising, ids).search(sparse.csr_matrix([[1.0]]), 10)
    assert found == ids[:-11:-1]


def test_every_kind_of_vectors_makes_the_same_index() -> None:
    passages, query, ids = drawn(70, 30, 0.2, 3), drawn(1, 30, 0.3, 4), names(70)
    expected = SparseIndex.build(passages, ids).search(query, 20)
    coo = torch.from_numpy(passages.toarray()).to_sparse()
    kinds: Any = (passages.tocoo(), sparse.csc_array(passages), passages.astype(float), coo, coo.to_sparse_csr())
    for vectors in kinds:
        found = SparseIndex.build(vectors, ids).search(query, 20)
        assert found[0] == expected[0] and np.array_equal(found[1][0], expected[1][0])
    index = SparseIndex.build(passages, ids)
    assert index.search(torch.from_numpy(query.toarray()[0]).to_sparse(), 20)[0] == expected[0]
    # Repeated entries are summed, as scipy means them; zeros are no postings.
    twice = sparse.csr_matrix(([1.0, 2.0, 0.0], [1, 1, 0], [0, 3]), shape=(1, 2))
    assert SparseIndex.build(twice, ["p"]).postings == 1
    assert SparseIndex.build(twice, ["p"]).run(["q"], twice) == {"q": {"p": 9.0}}


def test_a_query_without_a_known_term_finds_nothing() -> None:
    index = SparseIndex.build(sparse.csr_matrix([[1.0, 0, 0], [0, 0, 2.0]]), ["a", "b"])
    queries = sparse.csr_matrix([[0, 3.0, 0], [0, 0, 0], [0, 0, 1.0]])
    assert index.run(["x", "y", "z"], queries, 5) == {"x": {}, "y": {}, "z": {"b": 2.0}}


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mapping.mmap)


def test_one_compiled_function_searches_lists_mapped_or_not(tmp_path: Path) -> None:
    index = SparseIndex.build(drawn(9, 5, 0.5, 0), names(9))
    index.save(tmp_path / "index")
    mapped = SparseIndex.load(tmp_path / "index", mmap=True)
    for opened in (index, SparseIndex.load(tmp_path / "index"), mapped):
        opened.search(drawn(1, 5, 0.9, 1))
    assert is_mapped(mapped._weights) and not is_mapped(index._weights)
    assert len(best_rows.signatures) == 1


BEYOND: list[tuple[str, Any]] = [
    ("rows", 30), ("rows", 2**32 - 1), ("rows", "as before"), ("weights", -1.0), ("weights", np.nan), ("starts", 999),
]  # fmt: skip


@pytest.mark.parametrize(("part", "value"), BEYOND)
def test_arrays_beyond_or_unlike_what_is_announced_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    index = SparseIndex.build(drawn(30, 20, 0.3, 0), names(30))
    array = np.array(getattr(index, f"_{part}"))
    array[1] = array[0] if value == "as before" else value
    setattr(index, f"_{part}", array)
    index.save(tmp_path / "index")
    for mapped in (False, True):
        with pytest.raises(ValueError, match="damaged sparse index"):
            SparseIndex.load(tmp_path / "index", mmap=mapped)


def with_weight(value: float) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.array([1.0, value], np.float32), [0, 1], [0, 1, 2]), shape=(2, 3))


EYE = np.eye(2, dtype=np.int8)
DAMAGED = sparse.csr_matrix(np.ones((2, 3), np.float32))
DAMAGED.indices[1] = 6
HUGE = sparse.csr_matrix(np.full((2, 3), 3e38, np.float32))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (DAMAGED, "the matrix is damaged"),
        (np.ones((2, 3)), "ndarray where sparse vectors are needed"),
        (torch.ones(2, 3), "Tensor where sparse vectors are needed"),
        ([EYE], "list where sparse vectors are needed"),
        (sparse.csr_matrix(EYE), "int8 in the shape"),
        (torch.from_numpy(EYE).to_sparse(), r"torch\.int8 in"),
        *((with_weight(value), "row 1 has the weight .* for term 1") for value in (np.nan, np.inf, -0.5)),
    ],
)
def test_vectors_that_no_sparse_student_gives_are_refused(vectors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^vectors: {message}"):
        SparseIndex.build(vectors, ["a", "b"])
    with pytest.raises(ValueError, match=f"^query_vectors: {message}"):
        SparseIndex.build(with_weight(1.0), ["a", "b"]).search(vectors)


def test_what_can_not_be_indexed_or_searched_says_why() -> None:
    with pytest.raises(ValueError, match="every passage is zero in all dimensions"):
        SparseIndex.build(sparse.csr_matrix((2, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="nothing to index"):
        SparseIndex.build(sparse.csr_matrix((0, 3)), [])
    with pytest.raises(ValueError, match="query_vectors: row 0 has a score that is infinite"):
        SparseIndex.build(HUGE, ["a", "b"]).search(HUGE)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("part", "value"), [("indices", 10**6), ("indices", -1), ("ends", -5), ("ends", 10**6), ("dim", -1), ("dim", 0)]
)
def test_forged_vectors_are_refused_when_they_are_read(tmp_path: Path, part: str, value: int, mmap: bool) -> None:
    rows = drawn(9, 5, 0.9, 0)
    if part == "indices":
        rows.indices[0] = value
    run_shards(tmp_path, {}, [("x", names(9))], lambda ids: vector_table(ids, rows), about=vector_facts)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shard = shard_file(tmp_path, 0)
    if part == "ends":
        ends = rows.indptr.astype(np.int64)
        forged = ends.copy()
        forged[2] = value
        assert ends.tobytes() in shard.read_bytes()
        shard.write_bytes(shard.read_bytes().replace(ends.tobytes(), forged.tobytes()))
        manifest["shards"][0]["sha256"] = file_digest(shard)
    manifest |= {"layout": "sparse", **({"dim": value} if part == "dim" else {})}
    del manifest[_CHECKSUM]
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, _CHECKSUM: _checksum(manifest)}))
    with pytest.raises(ValueError, match="its vectors are damaged"):
        load_vectors(tmp_path, mmap=mmap)
