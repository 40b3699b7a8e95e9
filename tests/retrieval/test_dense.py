from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from scipy.sparse import coo_array, csr_matrix

from tct_hf import DenseIndex, SparseIndex
from tct_hf.evaluation.cost import compute_threads
from tct_hf.retrieval import faiss_tools
from tct_hf.retrieval.faiss_tools import factory_for
from tests.rows import content

IDS = [f"d{at}" for at in range(50)]
AUTO = "IVF8,PQ4x4fsr,Refine(SQ8)"


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)


def clustered(count: int, dimension: int = 32, seed: int = 0) -> np.ndarray:
    """Vectors in clusters off the origin, with lengths that vary."""
    centres = np.random.default_rng(0).standard_normal((40, dimension)) + 0.5
    draw = np.random.default_rng(seed + 1)
    rows = centres[draw.integers(40, size=count)] + 0.6 * draw.standard_normal((count, dimension))
    return (rows * draw.normal(1, 0.1, (count, 1)) * 4 / np.sqrt(dimension)).astype(np.float32)


def names_of(vectors: np.ndarray) -> list[str]:
    return [str(row) for row in range(len(vectors))]


def numpy_recall(index: DenseIndex, queries: np.ndarray, vectors: np.ndarray, k: int) -> float:
    ids, _ = index.search(queries, k)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    pairs = zip(ids, best, strict=True)
    return float(np.mean([len({int(name) for name in found} & set(rows.tolist())) / k for found, rows in pairs]))


# Search


def test_results_are_the_greatest_inner_products_of_vectors_as_they_are(vectors: np.ndarray) -> None:
    queries = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    index = DenseIndex.build(vectors, IDS)
    products = queries @ vectors.T
    for row, (found, values) in enumerate(zip(*index.search(queries, k=7), strict=True)):
        best = np.argsort(-products[row])[:7]
        assert found == [IDS[at] for at in best]
        np.testing.assert_allclose(values, products[row][best], rtol=1e-5)
    ids, scores = index.search(vectors[:1], k=1000)
    assert sorted(ids[0]) == sorted(IDS) and len(scores[0]) == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("pack", [list, lambda rows: rows])
def test_tensors_of_any_floating_type_are_vectors(vectors: np.ndarray, dtype: torch.dtype, pack: Any) -> None:
    rows = torch.nn.Parameter(torch.from_numpy(vectors).to(dtype))  # with a gradient, as a model gives them
    index = DenseIndex.build(pack(rows), IDS)
    same = DenseIndex.build(rows.detach().float().numpy(), IDS)
    assert index.search(pack(rows[:5]), k=4)[0] == same.search(vectors[:5], k=4)[0]


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 8)), 0, "k: 0 is below 1"),
        (np.ones((1, 8)), -3, "k: -3 is below 1"),
        (np.ones((1, 8)), 2.5, "k: 2.5 is not a whole number"),
        (np.ones(8), 2, r"query_vectors: (float64 in the )?shape \(8,\) "),
        (np.ones((1, 7)), 2, "query_vectors: dimension 7 where the index has 8"),
        (np.full((1, 8), 1e300), 2, "query_vectors: row 0 has"),
        (np.full((1, 8), np.nan), 2, "query_vectors: row 0 has"),
        (np.ones((1, 8), bool), 2, "query_vectors: bool"),
        (np.ones((1, 8), complex), 2, "query_vectors: complex128"),
        (np.ones((1, 8), np.int8), 2, "query_vectors: int8"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_no_index_can_search_for_is_named(vectors: np.ndarray, queries: Any, k: Any, message: str) -> None:
    sparse = SparseIndex.build(csr_matrix(abs(vectors)), IDS)
    for index, asked in ((DenseIndex.build(vectors, IDS), queries), (sparse, coo_array(queries))):
        with pytest.raises(ValueError, match=message):
            index.search(asked, k)
        assert index.search([], k=3) == ([], []) and index.run([], [], k=3) == {}


@pytest.mark.parametrize("factory", ["IVF10,Flat", "PCA8,IVF10,Flat", "IVF10_HNSW4,Flat", "HNSW2", "RaBitQfs", AUTO])
def test_a_search_that_falls_short_is_made_again_until_all_places_are_filled(
    vectors: np.ndarray, factory: str
) -> None:
    far = np.concatenate([vectors, vectors[:1] + 100])
    index = DenseIndex.build(far, [*IDS, "far"], factory, recall=None)
    _, ivf, _ = faiss_tools.parts(index._engine)
    if "_HNSW" in factory:  # lists that no edge leads to
        graph = faiss.downcast_index(ivf.quantizer).hnsw
        edges = faiss.vector_to_array(graph.neighbors)
        faiss.copy_array_to_vector(np.full_like(edges, -1), graph.neighbors)
    assert (index._engine.search(vectors[:9], 51)[1] < 0).any() == (factory != "RaBitQfs")
    for k in (1, 40, 51, 1000):
        for found, values in zip(*index.search(vectors[:9], k), strict=True):
            assert len(set(found)) == min(k, 51) and set(found) <= {*IDS, "far"}
            assert (np.diff(values) <= 0).all() and np.isfinite(values).all()
    assert ivf is None or ivf.nprobe == 1


def test_equal_scores_at_the_cut_are_chosen_by_id() -> None:
    index = DenseIndex.build(np.ones((5, 4)), ["e", "d", "c", "b", "a"], "Flat")
    assert index.search(np.ones((1, 4)), k=2)[0] == [["a", "b"]]
    draw = np.random.default_rng(0)
    vectors = draw.integers(-1, 2, (400, 3)).astype(np.float32)
    ids = [str(name) for name in draw.permutation(400)]
    index = DenseIndex.build(vectors, ids)
    for count in (3, 40):  # few queries are compared one by one, many by matrix products
        queries = draw.integers(-1, 2, (count, 3)).astype(np.float32)
        found, scores = index.search(queries, k=7)
        for query, names, values in zip(queries, found, scores, strict=True):
            best = sorted(zip(-(vectors @ query), ids, strict=True))[:7]
            assert names == [name for _, name in best] and values.tolist() == [-score for score, _ in best]


def test_a_score_that_float32_cannot_hold_is_refused() -> None:
    index = DenseIndex.build(np.array([[3e38, 3e38], [1.0, 1.0]]), ["big", "small"])
    for query in ([[1e10, 1e10]], [[1e10, -1e10]], [[-1e10, -1e10]]):
        with pytest.raises(ValueError, match="query_vectors: row 0 has a score that is NaN or infinite"):
            index.search(query, k=2)
    assert index.search([[0.1, 0.0]], k=1)[0] == [["big"]]


@pytest.mark.parametrize(
    ("vectors", "factory", "options", "message"),
    [
        (np.ones(3), "auto", {}, r"shape \(3,\)"),
        (np.ones((0, 3)), "auto", {}, "nothing to index"),
        ([[1.0], [np.inf]], "auto", {}, "vectors: row 1 has a NaN or infinite"),
        (np.ones((2, 3), np.int8), "auto", {}, "vectors: int8 where floating-point vectors"),
        ([np.ones(3), np.ones(3, np.uint8)], "auto", {}, "vectors: uint8 where floating-point vectors"),
        ([[1, 2]], "auto", {}, "vectors: int64 where floating-point vectors"),
        (np.ma.masked_invalid([[1.0, np.nan]]), "auto", {}, "vectors: masked arrays can't be indexed"),
        ([torch.ones(3), np.ones(2)], "auto", {}, "vectors: not numbers in rows of one length"),
        (torch.ones(2, 3, device="meta"), "auto", {}, "vectors: not numbers in rows"),
        (torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "auto", {}, "vectors: not numbers in rows"),
        (np.zeros((2, 3), "V2"), "auto", {}, "vectors: .*V2 where floating-point vectors"),
        ([["1", "2"]], "auto", {}, "vectors: <U1 where floating-point vectors are needed"),
        ([np.ones(3)], "auto", {"query_vectors": [np.ones(3, np.int8)]}, "query_vectors: int8 where"),
        (csr_matrix(np.eye(2)), "auto", {}, "vectors: sparse vectors where dense"),
        (torch.eye(2).to_sparse(), "auto", {}, "vectors: sparse vectors where dense"),
        ([[1.0], [1.0, 2.0]], "auto", {}, "vectors: not numbers in rows of one length"),
        (np.ones((2, 3)), "NoSuchIndex", {}, "factory: Faiss can't make 'NoSuchIndex'"),
        (np.ones((2, 3)), "IVF64,Flat", {}, "factory: Faiss can't make 'IVF64,Flat' of 2 vectors"),
        (np.ones((2, 3)), "auto", {"recall": 1.0}, "recall: 1.0 is not between"),
        (np.ones((2, 3)), "auto", {"k": 0}, "k: 0"),
        (np.ones((2, 3)), "auto", {"threads": 0}, "threads: 0"),
        (np.eye(4), "IVF4,Flat", {"parameters": {"efSearch": 4}}, r"has \['nprobe'\], not 'efSearch'"),
        (np.eye(4), "IVF4,Flat", {"parameters": {"nprobe": 0}}, "nprobe=0 is below 1"),
        (np.ones((2, 3)), "auto", {"query_vectors": np.ones((2, 4))}, r"query_vectors: shape \(2, 4\)"),
    ],
)
def test_wrong_input_is_named(vectors: Any, factory: str, options: dict[str, Any], message: str) -> None:
    count = vectors.shape[0] if hasattr(vectors, "shape") else len(vectors)
    with pytest.raises(ValueError, match=message):
        DenseIndex.build(vectors, [str(row) for row in range(count)], factory, **options)


def test_given_parameters_and_threads_are_set(vectors: np.ndarray) -> None:
    before = faiss.omp_get_max_threads()
    index = DenseIndex.build(vectors, IDS, "IVF4,Flat", parameters={"nprobe": 4}, threads=2)
    assert index.parameters == {"nprobe": 4} and index.tuning is None
    assert DenseIndex.build(vectors, IDS, "IVF4,Flat", recall=None).parameters == {}
    beyond = DenseIndex.build(vectors, IDS, "HNSW8", parameters={"efSearch": 10**9})  # takes no more memory than 50
    assert beyond.search(vectors[:1], 1)[0] == DenseIndex.build(vectors, IDS, "HNSW8").search(vectors[:1], 1)[0]
    assert faiss.omp_get_max_threads() == before


# Kinds of index and their parameters


def test_auto_follows_the_number_of_vectors() -> None:
    counts = (1, 50_000, 50_001, 1_000_000, 8_841_823)
    lists = [f"IVF{lists},PQ192x4fsr,Refine(SQ8)" for lists in (512, 2048, 8192)]
    assert [factory_for(count, 384) for count in counts] == ["Flat", "Flat", *lists]
    assert factory_for(50_001, 33) == "IVF512,PQ33x4fsr,Refine(SQ8)"


@pytest.mark.parametrize(
    ("factory", "with_queries"),
    [("HNSW16", True), ("IVF32,Flat", False), ("IVF32,RaBitQfs,Refine(SQ8)", True), ("PQ16x4fs,RFlat", False)],
)
def test_parameters_are_chosen_for_the_recall(factory: str, with_queries: bool) -> None:
    vectors = clustered(3000)
    queries = clustered(300, seed=1) + np.float32(0.1)
    given = queries[:200] if with_queries else None
    index = DenseIndex.build(vectors, names_of(vectors), factory, recall=0.95, k=20, query_vectors=given, threads=1)
    assert index.parameters and index.tuning is not None
    assert index.tuning["source"] == ("queries" if with_queries else "passages")
    assert index.tuning["measured"] >= index.tuning["aim"] > 0.95
    assert numpy_recall(index, queries[200:], vectors, 20) >= 0.95
    assert numpy_recall(index, queries[200:], vectors, 5) >= 0.95


def test_auto_index_of_many_vectors_keeps_its_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_tools, "EXACT_UP_TO", 100)
    vectors = clustered(4000)
    index = DenseIndex.build(vectors, names_of(vectors), k=50, threads=1)
    assert index.factory == "IVF128,PQ16x4fsr,Refine(SQ8)" and set(index.parameters) == {"nprobe", "k_factor"}
    assert numpy_recall(index, clustered(50, seed=2), vectors, 50) >= 0.97


def test_looser_recall_costs_less_and_one_out_of_reach_is_said() -> None:
    vectors = clustered(1000)
    options: dict[str, Any] = {"factory": "IVF32,Flat", "k": 20, "threads": 1}
    cheap, dear = (DenseIndex.build(vectors, names_of(vectors), recall=recall, **options) for recall in (0.5, 0.99))
    assert cheap.parameters["nprobe"] < dear.parameters["nprobe"]
    with pytest.warns(UserWarning, match=r"recall: 0.999 wanted, 0\.\d+ is the most"):
        index = DenseIndex.build(vectors, names_of(vectors), "IVF8,PQ2x4", recall=0.999, threads=1)
    assert index.parameters == {"nprobe": 8}


def test_a_graph_that_falls_short_advises_no_graph() -> None:
    vectors = clustered(4000) / 4 + 3
    with pytest.warns(UserWarning, match="graph does not lead.* another factory, such as 'IVF128,Flat' or 'Flat'"):
        DenseIndex.build(vectors, names_of(vectors), "HNSW4", recall=0.995)
    better = DenseIndex.build(vectors, names_of(vectors), "IVF128,Flat", recall=0.97)
    assert better.tuning is not None and better.tuning["measured"] >= 0.97


def test_the_margin_shrinks_with_the_number_of_queries() -> None:
    vectors, queries = clustered(3000), clustered(400, seed=1)
    options: dict[str, Any] = {"factory": "IVF64,Flat", "recall": 0.9, "k": 20, "threads": 1}
    aims = []
    for count in (1, 4, 40, 400):
        index = DenseIndex.build(vectors, names_of(vectors), query_vectors=queries[:count], **options)
        assert index.tuning is not None and index.tuning["slice"] == count
        aims.append(index.tuning["aim"])
    assert 1.0 == aims[0] > aims[1] > aims[2] > aims[3] > 0.9
    found = index._engine.search(queries, 20)[1]
    spread = faiss_tools.ExactNeighbours(queries, vectors, 20).recall(found).std()
    assert aims[3] == pytest.approx(0.9 + 1.645 * max(spread, 0.1) / 20, abs=1e-6)


def test_passages_of_one_vector_do_not_stand_in_the_way_of_a_recall() -> None:
    vectors = np.repeat(clustered(100), 10, axis=0)
    index = DenseIndex.build(vectors, names_of(vectors), "IVF8,Flat", recall=0.99, k=5, threads=1)
    assert index.tuning is not None and index.tuning["measured"] >= 0.99


# Files and blocks


def test_mapped_half_precision_vectors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tct_hf.retrieval.vectors.BLOCK", 64)
    vectors = clustered(300).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    index = DenseIndex.build(np.load(tmp_path / "vectors.npy", mmap_mode="r"), names_of(vectors))
    assert numpy_recall(index, clustered(5, seed=1), vectors.astype(np.float32), 300) == 1
    vectors[150, 3] = np.nan
    with pytest.raises(ValueError, match="vectors: row 150 has a NaN"):
        DenseIndex.build(vectors, names_of(vectors), "IVF4,Flat")


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF8,Flat", AUTO])
def test_an_index_comes_back_with_the_same_bytes_every_time(tmp_path: Path, factory: str) -> None:
    vectors, queries = clustered(800), clustered(9, seed=3)
    index = DenseIndex.build(vectors, names_of(vectors), factory, threads=1)
    expected = index.search(queries, 20)
    index.save(tmp_path / "index")
    DenseIndex.build(vectors, names_of(vectors), factory, threads=1).save(tmp_path / "again")
    assert content(tmp_path / "index") == content(tmp_path / "again")
    for mmap in (False, True):
        loaded = DenseIndex.load(tmp_path / "index", mmap=mmap)
        found = loaded.search(queries, 20)
        assert found[0] == expected[0] and all(map(np.array_equal, found[1], expected[1]))
        assert (loaded.factory, loaded.parameters, loaded.tuning) == (factory, index.parameters, index.tuning)


def test_compressed_index_is_small_on_disk_and_in_memory(tmp_path: Path) -> None:
    vectors = clustered(5000, dimension=64)
    index = DenseIndex.build(vectors, names_of(vectors), "IVF16,PQ32x4fsr,Refine(SQ8)", threads=1)
    index.save(tmp_path)
    # 64 B of bytes, 16 B of bits, 8 B of row number, centroids, half-filled blocks, ids.
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) / 5000 < 64 + 16 + 8 + 18
    assert index.ids.nbytes / 5000 < 9


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat", AUTO])
def test_a_child_searches_an_index_that_its_parent_has_searched(tmp_path: Path, factory: str, mmap: bool) -> None:
    vectors, before = clustered(2000), faiss.omp_get_max_threads()
    DenseIndex.build(vectors, names_of(vectors), factory, recall=None).save(tmp_path / "index")
    index = DenseIndex.load(tmp_path / "index", mmap=mmap)
    faiss.omp_set_num_threads(2)
    try:
        expected = index.search(vectors[:40], 5)[0]
        assert in_child(lambda: index.search(vectors[:40], 5)[0] == expected)
    finally:
        faiss.omp_set_num_threads(before)


def test_a_child_process_encodes_after_its_parent() -> None:
    import tct_hf.encoding.weights  # noqa: F401

    before, rows = torch.get_num_threads(), torch.ones(512, 512)
    torch.set_num_threads(2)
    try:
        expected = rows @ rows
        assert in_child(lambda: torch.allclose(rows @ rows, expected))
        with compute_threads(2):
            rows @ rows
        assert in_child(lambda: _threads_in_use(2) == (1, 1))  # asked for in the child, too
    finally:
        torch.set_num_threads(before)


def _threads_in_use(threads: int) -> tuple[int, int]:
    with compute_threads(threads):
        return torch.get_num_threads(), faiss.omp_get_max_threads()


def in_child(holds: Callable[[], bool]) -> bool:
    """Whether a child process ends within a minute, and finds that something holds."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if holds() else 1
        finally:
            os._exit(code)
    for _ in range(6000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
