from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tct_hf import DenseIndex
from tct_hf.data.ids import IdTable
from tct_hf.retrieval import faiss_tools as dense_engine
from tct_hf.retrieval import vector_blocks
from tct_hf.retrieval.dense_tuning import stand_ins
from tct_hf.retrieval.faiss_tools import factory_for
from tct_hf.retrieval.storage import folder_bytes
from tests.warm_process import run_warm

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


@pytest.mark.parametrize("factory", ["SQ8", "SQ4", "HNSW8_SQ8", "IVF4,SQ8", "IVF4,RaBitQfs,Refine(SQ8)", "PCA8,SQ8"])
def test_an_addition_beyond_the_range_of_the_codes_is_warned_of(vectors: np.ndarray, factory: str) -> None:
    import warnings

    index = DenseIndex.build(vectors, IDS, factory, parameters={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(vectors[:10], [f"same{at}" for at in range(10)])
    far = vectors[:4] * np.array([[0.5], [0.5], [40], [40]], np.float32)
    with pytest.warns(UserWarning, match=r"row 2 \(passage 'x2'\) lies outside .* as 2 of 4 rows do.*build the index"):
        index.add(far, [f"x{at}" for at in range(4)])
    assert len(index) == 64


def test_an_index_that_cannot_grow_says_so() -> None:
    vectors = clustered(200, dimension=8)
    index = DenseIndex.build(vectors, names_of(vectors), "NSG8,Flat")
    with pytest.raises(ValueError, match=r"add: Faiss can't add to NSG8,Flat .*build the index anew"):
        index.add(vectors[:50], [f"x{at}" for at in range(50)])
    assert len(index) == 200


def test_a_row_that_scores_what_the_last_exact_one_does_is_found() -> None:
    from tct_hf.retrieval.dense_tuning import exact_neighbours

    vectors = np.array([[3.0], [2], [2], [2], [1]], np.float32)
    exact = exact_neighbours(np.array([[1.0], [-1.0]], np.float32), vectors, 2)
    assert exact.tied.tolist() == [True, True]
    first = int(exact.rows[0, 0])
    assert first == 0
    for row, recall in ((1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5), (-1, 0.5)):
        assert exact.recall(np.array([[0, row], [4, row]])).tolist() == [recall, 0.5 if row in (4, -1) else 1.0]
    assert exact.recall(np.array([[1, 2], [0, 3]])).tolist() == [1.0, 0.5]


def test_passages_of_one_vector_do_not_stand_in_the_way_of_a_recall() -> None:
    vectors = np.repeat(clustered(100), 10, axis=0)
    index = DenseIndex.build(vectors, names_of(vectors), "IVF8,Flat", recall=0.99, k=5, threads=1)
    assert index.tuning is not None and index.tuning["measured"] >= 0.99


def test_asking_for_more_than_there_is_gives_all(vectors: np.ndarray) -> None:
    ids, scores = DenseIndex.build(vectors, IDS).search(vectors[:1], k=1000)
    assert sorted(ids[0]) == sorted(IDS) and len(scores[0]) == 50


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "SQ8"])
def test_any_faiss_factory_finds_a_vector_by_itself(vectors: np.ndarray, factory: str) -> None:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, _ = DenseIndex.build(unit, IDS, factory).search(unit[3:4], k=1)
    assert ids == [["d3"]]


def test_places_an_approximate_index_leaves_empty_are_dropped(vectors: np.ndarray) -> None:
    index = DenseIndex.build(vectors, IDS, "IVF10,Flat", parameters={"nprobe": 1})
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


def clustered(count: int, dimension: int = 32, seed: int = 0) -> np.ndarray:
    """Vectors in clusters off the origin, with lengths that vary."""
    centres = np.random.default_rng(0).standard_normal((40, dimension)) + 0.5
    draw = np.random.default_rng(seed + 1)
    rows = centres[draw.integers(40, size=count)] + 0.6 * draw.standard_normal((count, dimension))
    return (rows * draw.normal(1, 0.1, (count, 1)) * 4 / np.sqrt(dimension)).astype(np.float32)


def numpy_recall(index: DenseIndex, queries: np.ndarray, vectors: np.ndarray, k: int) -> float:
    ids, _ = index.search(queries, k)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    pairs = zip(ids, best, strict=True)
    return float(np.mean([len({int(name) for name in found} & set(rows.tolist())) / k for found, rows in pairs]))


def names_of(vectors: np.ndarray) -> list[str]:
    return [str(row) for row in range(len(vectors))]


@pytest.mark.parametrize(
    ("count", "factory"),
    [
        (1, "Flat"),
        (50_000, "Flat"),
        (50_001, "HNSW32"),
        (500_000, "HNSW32"),
        (500_001, "IVF1024,RaBitQfs,Refine(SQ8)"),
        (1_000_000, "IVF2048,RaBitQfs,Refine(SQ8)"),
        (8_841_823, "IVF8192,RaBitQfs,Refine(SQ8)"),
    ],
)
def test_auto_follows_the_number_of_vectors(count: int, factory: str) -> None:
    assert factory_for(count) == factory


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,Flat", "IVF32,RaBitQfs,Refine(SQ8)", "PQ16x4fs,RFlat"])
@pytest.mark.parametrize("with_queries", [True, False])
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
    monkeypatch.setattr(dense_engine, "EXACT_UP_TO", 100)
    monkeypatch.setattr(dense_engine, "GRAPH_UP_TO", 200)
    vectors = clustered(4000)
    index = DenseIndex.build(vectors, names_of(vectors), k=50, threads=1)
    assert index.factory == "IVF128,RaBitQfs,Refine(SQ8)" and set(index.parameters) == {"nprobe", "k_factor"}
    assert numpy_recall(index, clustered(50, seed=2), vectors, 50) >= 0.97


def test_stand_ins_are_passages_with_the_difference_of_two_others() -> None:
    passages = np.eye(5, dtype=np.float32)
    made = stand_ins(passages, seed=0)
    assert np.all(made.diagonal() == 1) and np.array_equal(np.sort(made), [[-1, 0, 0, 1, 1]] * 5)
    assert np.array_equal(made, stand_ins(passages, seed=0))


def test_looser_recall_costs_less() -> None:
    vectors = clustered(3000)
    probes = [
        DenseIndex.build(vectors, names_of(vectors), "IVF32,Flat", recall=recall, k=20, threads=1).parameters["nprobe"]
        for recall in (0.5, 0.99)
    ]
    assert probes[0] < probes[1]


def test_a_recall_out_of_reach_is_said_and_the_best_is_set() -> None:
    vectors = clustered(1000)
    with pytest.warns(UserWarning, match=r"recall: 0.999 wanted, 0\.\d+ is the most"):
        index = DenseIndex.build(vectors, names_of(vectors), "IVF8,PQ2x4", recall=0.999, threads=1)
    assert index.parameters == {"nprobe": 8}


def test_given_parameters_are_set_and_unknown_ones_refused(vectors: np.ndarray) -> None:
    index = DenseIndex.build(vectors, IDS, "IVF4,Flat", parameters={"nprobe": 4})
    assert index.parameters == {"nprobe": 4} and index.tuning is None
    assert DenseIndex.build(vectors, IDS, "IVF4,Flat", recall=None).parameters == {}
    with pytest.raises(ValueError, match=r"this index has \['nprobe'\], not 'efSearch'"):
        DenseIndex.build(vectors, IDS, "IVF4,Flat", parameters={"efSearch": 4})
    with pytest.raises(ValueError, match="nprobe=0 is below 1"):
        DenseIndex.build(vectors, IDS, "IVF4,Flat", parameters={"nprobe": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 1.0}, "recall: 1.0 is not between"),
        ({"k": 0}, "k: 0"),
        ({"query_vectors": np.ones((2, 3))}, r"query_vectors: shape \(2, 3\)"),
        ({"query_vectors": np.full((2, 8), np.nan)}, "query_vectors: row 0 has a NaN"),
        ({"threads": 0}, "threads: 0"),
    ],
)
def test_wrong_settings_are_named(vectors: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseIndex.build(vectors, IDS, **options)


def test_mapped_half_precision_vectors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_blocks, "BLOCK", 64)
    vectors = clustered(300).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = DenseIndex.build(mapped, names_of(vectors))
    assert numpy_recall(index, clustered(5, seed=1), vectors.astype(np.float32), 300) == 1
    broken = vectors.copy()
    broken[150, 3] = np.nan
    with pytest.raises(ValueError, match="vectors: row 150 has a NaN"):
        DenseIndex.build(broken, names_of(broken), "IVF4,Flat")


@pytest.mark.filterwarnings("ignore:.*lies outside the range")
@pytest.mark.parametrize("factory", ["auto", "HNSW8", "IVF4,Flat", "IVF4,RaBitQfs,Refine(SQ8)"])
def test_added_passages_are_found_and_saved(tmp_path: Path, vectors: np.ndarray, factory: str) -> None:
    index = DenseIndex.build(vectors[:40], IDS[:40], factory, parameters={})
    index.add(vectors[40:] * 3, IDS[40:])
    index.save(tmp_path / "index")
    loaded = DenseIndex.load(tmp_path / "index")
    assert len(index) == len(loaded) == 50 and loaded.ids == IDS
    for one in (index, loaded):
        assert one.search(vectors[45:46], k=1)[0] == [["d45"]]


def test_refused_addition_leaves_the_index_as_it_was(tmp_path: Path, vectors: np.ndarray) -> None:
    index = DenseIndex.build(vectors[:40], IDS[:40])
    for bad, ids, message in (
        (vectors[40:], IDS[:10], "'d0' comes twice"),
        (vectors[40:, :4], IDS[40:], "dimension 4 where the index has 8"),
        (vectors[40:], IDS[40:45], "5 ids for 10 vectors"),
        (vectors[40:] * np.nan, IDS[40:], "row 0 has a NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(bad, ids)
    assert len(index) == 40 and len(index.search(vectors[:1], k=50)[0][0]) == 40
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="mmap=False"):
        DenseIndex.load(tmp_path / "index", mmap=True).add(vectors[40:], IDS[40:])


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF8,Flat", "IVF8,RaBitQfs,Refine(SQ8)"])
def test_mapped_index_answers_alike(tmp_path: Path, factory: str) -> None:
    vectors = clustered(800)
    index = DenseIndex.build(vectors, [f"é{row}" for row in range(800)], factory, threads=1)
    index.save(tmp_path / "index")
    queries = {f"q{row}": clustered(9, seed=3)[row] for row in range(9)}
    expected = index.run(list(queries), np.stack(list(queries.values())), 20)
    for options in ({}, {"mmap": True}, {"mmap": True, "verify": False}):
        loaded = DenseIndex.load(tmp_path / "index", **options)
        assert loaded.run(list(queries), np.stack(list(queries.values())), 20, threads=1) == expected
        assert (loaded.parameters, loaded.tuning, loaded.ids) == (index.parameters, index.tuning, index.ids)


def test_one_query_and_a_batch_find_the_same() -> None:
    vectors, queries = clustered(2000), clustered(40, seed=1)
    index = DenseIndex.build(
        vectors, names_of(vectors), "IVF16,RaBitQfs,Refine(SQ8)", parameters={"nprobe": 6, "k_factor": 4}, threads=1
    )
    together, _ = index.search(queries, 10)
    alone = [index.search(query[None], 10)[0][0] for query in queries]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(together, alone, strict=True)]
    assert np.mean(shared) > 0.98


def test_threads_are_set_for_the_call_only(vectors: np.ndarray) -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    index = DenseIndex.build(vectors, IDS, threads=2)
    index.search(vectors, 3, threads=2)
    assert faiss.omp_get_max_threads() == before
    with pytest.raises(ValueError, match="threads: 0"):
        index.search(vectors, 3, threads=0)


@pytest.mark.parametrize("factory", ["HNSW8", "IVF8,RaBitQfs,Refine(SQ8)"])
def test_same_vectors_and_seed_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    vectors = clustered(1000)
    for name in ("a", "b"):
        DenseIndex.build(vectors, names_of(vectors), factory, threads=1).save(tmp_path / name)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    DenseIndex.build(vectors, names_of(vectors), factory, threads=1, seed=1).search(vectors[:3], 5)


def test_searching_before_saving_changes_no_byte(tmp_path: Path) -> None:
    vectors = clustered(1000)
    index = DenseIndex.build(vectors, names_of(vectors), "IVF8,RaBitQfs,Refine(SQ8)", threads=1)
    index.save(tmp_path / "a")
    index.search(vectors[:3], 5)
    index.save(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_compressed_index_is_small_on_disk_and_in_memory(tmp_path: Path) -> None:
    vectors = clustered(5000, dimension=64)
    index = DenseIndex.build(vectors, names_of(vectors), "IVF16,RaBitQfs,Refine(SQ8)", threads=1)
    index.save(tmp_path / "index")
    # 64 B of bytes, 8 B of bits, 8 B of factors, 8 B of row number, centroids, half-filled blocks, ids.
    assert folder_bytes(tmp_path / "index") / 5000 < 64 + 8 + 8 + 8 + 16
    assert isinstance(index.ids, IdTable) and index.ids.nbytes / 5000 < 8


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def saved(tmp_path: Path, vectors: np.ndarray) -> Path:
    DenseIndex.build(vectors, IDS, built_by={"id": "mine", "weights_sha256": "a1" * 32}).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("name", ["index.faiss", "ids.bin", "ids.npy"])
def test_truncated_altered_or_missing_file_is_named(saved: Path, name: str) -> None:
    file = saved / name
    whole = file.read_bytes()
    for broken, message in (
        (whole[:-1], f"{name}: {len(whole) - 1} bytes where {len(whole)} were saved"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), f"{name}: altered since it was saved"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            DenseIndex.load(saved)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        DenseIndex.load(saved, verify=False)


def test_altered_settings_and_foreign_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dense index here"):
        DenseIndex.load(tmp_path)
    settings = saved / "tct_dense.json"
    text = settings.read_text()
    settings.write_text(text.replace('"mine"', '"other"'))
    with pytest.raises(ValueError, match=r"tct_dense\.json: altered"):
        DenseIndex.load(saved)
    settings.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"tct_dense\.json: damaged"):
        DenseIndex.load(saved)
    settings.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="format 1 where this version reads"):
        DenseIndex.load(saved)


def test_a_model_of_the_same_weights_that_encodes_otherwise_is_refused_by_what_differs(tmp_path: Path) -> None:
    built_by = {"id": "m", "weights_sha256": "a1", "encoding": {"prompt": "1", "max_length": "2", "modules": "3"}}
    DenseIndex.build(np.ones((1, 2)), ["a"], built_by=built_by).save(tmp_path / "index")
    assert len(DenseIndex.load(tmp_path / "index", model=built_by)) == 1
    assert len(DenseIndex.load(tmp_path / "index", model={"id": "m", "weights_sha256": "a1"})) == 1
    other = {**built_by, "encoding": {"prompt": "9", "max_length": "9", "modules": "3"}}
    with pytest.raises(ValueError, match="built by 'm' with another prompt, max_length than 'm' has"):
        DenseIndex.load(tmp_path / "index", model=other)


def test_model_that_did_not_build_the_index_is_refused_with_both_names(saved: Path, tmp_path: Path) -> None:
    built_by = {"id": "mine", "weights_sha256": "a1" * 32}
    assert DenseIndex.load(saved, model=built_by).built_by == built_by
    assert len(DenseIndex.load(saved, model={"id": "mine, moved", "weights_sha256": "a1" * 32})) == 50
    assert len(DenseIndex.load(saved, model={"id": "mine"})) == 50
    for other in ({"id": "yours"}, {"id": "yours", "weights_sha256": "b2" * 32}):
        with pytest.raises(ValueError, match=r"built by 'mine' .*would be encoded by 'yours'"):
            DenseIndex.load(saved, model=other)
    DenseIndex.build(np.ones((1, 2)), ["a"]).save(tmp_path / "unnamed")
    with pytest.raises(ValueError, match="does not say which model built it"):
        DenseIndex.load(tmp_path / "unnamed", model=built_by)


KILLED_SAVE = """
import os, signal, sys
import faiss, numpy
from tct_hf import DenseIndex
from tct_hf.retrieval import storage
folder, when = sys.argv[1:]
def die(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)
if when == "in the index file":
    write = faiss.write_index
    def half(engine, path):
        write(engine, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()
    faiss.write_index = half
elif when == "before the rename":
    storage.replace_dir = die
vectors = numpy.random.default_rng(0).standard_normal((200, 16)).astype("float32")
DenseIndex.build(vectors, [str(row) for row in range(200)], "IVF4,RaBitQfs,Refine(SQ8)", threads=1).save(folder)
"""


@pytest.mark.parametrize("when", ["in the index file", "before the rename"])
def test_kill_in_save_keeps_the_old_index_and_the_rerun_gives_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, vectors: np.ndarray, when: str
) -> None:
    def run(folder: Path, when: str) -> int:
        return run_warm(["-c", KILLED_SAVE, str(folder), when], env=os.environ).returncode

    folder = tmp_path / "killed" / "index"
    DenseIndex.build(vectors, IDS).save(folder)
    assert run(folder, when) == -signal.SIGKILL
    assert DenseIndex.load(folder).ids == IDS
    assert run(folder, "never") == 0
    assert run(tmp_path / "undisturbed", "never") == 0
    assert content(folder) == content(tmp_path / "undisturbed")
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


@given(ids=st.lists(st.text(max_size=6), max_size=20))
def test_id_table_is_the_list_it_was_made_of(ids: list[str]) -> None:
    table = IdTable.of(ids)
    assert table == ids and list(table) == ids and table[1:3] == ids[1:3]
    if ids:
        assert table[-1] == ids[-1]
    with pytest.raises(IndexError):
        table[len(ids)]
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder))
        assert IdTable.load(Path(folder)) == IdTable.load(Path(folder), mmap=True) == ids


def test_id_longer_than_a_byte_can_say_comes_back(tmp_path: Path) -> None:
    IdTable.of(["x" * 300, ""]).save(tmp_path)
    assert IdTable.load(tmp_path) == ["x" * 300, ""]
