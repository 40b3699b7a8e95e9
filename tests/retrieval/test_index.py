"""What all indexes share: files that are checked, replaced whole and refused with what to do."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from tct_hf import BM25Index, DenseIndex, SparseIndex
from tct_hf.files import seal
from tests.rows import content

TEXTS = ["red apples and green apples", "green pears", "red wine", "the of and"]
IDS = ["a", "é", "c", "d"]
VECTORS = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
WEIGHTS = sparse.csr_matrix(VECTORS.clip(0))
MINE = {"id": "mine", "weights_sha256": "a1" * 32, "encoding": {"prompt": "1", "max_length": "2"}}

BUILD: dict[str, Callable[..., Any]] = {
    "bm25": lambda ids=IDS: BM25Index.build(TEXTS, ids, k1=0.9, backend="numpy"),
    "dense": lambda ids=IDS: DenseIndex.build(VECTORS, ids, built_by=MINE),
    "sparse": lambda ids=IDS: SparseIndex.build(WEIGHTS, ids, built_by=MINE),
}


def found_by(index: Any) -> Any:
    queries = {BM25Index: ["red apples"], DenseIndex: VECTORS, SparseIndex: WEIGHTS}[type(index)]
    ids, scores = index.search(queries, 3)
    return ids, [values.tolist() for values in scores]


@pytest.mark.parametrize("kind", BUILD)
def test_a_saved_index_comes_back_and_replaces_an_index_and_nothing_else(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "index"
    index = BUILD[kind]()
    BUILD[kind](["w", "x", "y", "z"]).save(folder)
    (tmp_path / ".index.12345678.tmp").mkdir()  # left by a killed save
    index.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    for options in ({}, {"mmap": True}, {"mmap": True, "verify": False}):
        loaded = type(index).load(folder, **options)
        assert list(map(str, loaded.ids)) == IDS and len(loaded) == 4
        assert found_by(loaded) == found_by(index)
        loaded.save(tmp_path / "copy")  # from its own mapped files
        assert content(tmp_path / "copy") == content(folder)
    with pytest.raises(FileExistsError, match="holds something other"):
        index.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no {index.kind} here"):
        type(index).load(tmp_path)


@pytest.mark.parametrize("kind", BUILD)
def test_a_truncated_altered_or_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    index = BUILD[kind]()
    index.save(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole, name = file.read_bytes(), "" if file.name == "contents.json" else file.name
        for broken, verify in ((whole[:-9], True), (whole[:-9], False), (whole[:-9] + whole[-9:].swapcase(), True)):
            file.write_bytes(broken)
            if broken != whole:
                with pytest.raises(ValueError, match=f"{name} is not JSON|differs of {name}"):
                    type(index).load(tmp_path, mmap=True, verify=verify)
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=f"{file.name} is missing"):
            type(index).load(tmp_path, verify=False)
        file.write_bytes(whole)


def rewrite(folder: Path, name: str, change: dict[str, Any]) -> None:
    """Announce something else, as a publisher can."""
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    seal(folder)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    BUILD["dense"]().save(tmp_path)
    rewrite(tmp_path, "tct_dense.json", {"format": 1})
    with pytest.raises(ValueError, match=r"tct_dense\.json: format 1 where this version reads \d; delete the folder"):
        DenseIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bm25", {"k1": float("nan")}),
        ("bm25", {"b": 2.0}),
        ("bm25", {"backend": "jax"}),
        ("bm25", {"language": 3}),
        ("bm25", {"stemmer": "klingon"}),
        ("bm25", {"average_length": 0}),
        ("bm25", {"average_length": "x"}),
        ("bm25", {"num_docs": 1}),
        ("dense", {"tuning": 3}),
        ("dense", {"parameters": 3}),
        ("dense", {"factory": 3}),
        ("dense", {"built_by": "mine"}),
        ("sparse", {"built_by": 3}),
    ],
)
def test_settings_that_no_index_of_ours_has_are_refused(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    index = BUILD[kind]()
    index.save(tmp_path)
    rewrite(tmp_path, "params.index.json" if "num_docs" in change else index.settings_file, change)
    with pytest.raises(ValueError, match=rf"damaged {index.kind} \("):
        type(index).load(tmp_path)


def test_a_model_that_did_not_build_the_index_is_refused_by_what_differs(tmp_path: Path) -> None:
    BUILD["dense"]().save(tmp_path / "index")
    for model in (MINE, {**MINE, "id": "mine, moved"}, {"id": "mine"}, {**MINE, "encoding": {}}):
        assert DenseIndex.load(tmp_path / "index", model=model).built_by == MINE
    for other in ({"id": "yours"}, {"id": "yours", "weights_sha256": "b2" * 32}):
        with pytest.raises(ValueError, match=r"built by 'mine' .*would be encoded by 'yours'.*don't compare"):
            DenseIndex.load(tmp_path / "index", model=other)
    with pytest.raises(ValueError, match="built by 'mine' with another prompt, max_length than 'mine' has"):
        DenseIndex.load(tmp_path / "index", model={**MINE, "encoding": {"prompt": "9", "max_length": "9"}})
    DenseIndex.build(VECTORS, IDS).save(tmp_path / "unnamed")
    with pytest.raises(ValueError, match="does not say which model built it"):
        DenseIndex.load(tmp_path / "unnamed", model=MINE)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:3], "3 ids for 4"),
        (["a", "b", "a", "d"], "'a' comes twice"),
        (["a", "b", 3, "d"], "number 2 is 3, not a string"),
        (["a\ud800", "b", "c", "d"], r"ids: 'a\\ud800' \(number 0\) has a lone surrogate"),
    ],
)
def test_ids_that_no_index_can_keep_are_named(kind: str, ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILD[kind](ids)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_run_needs_one_id_a_vector(kind: str) -> None:
    index, queries = BUILD[kind](), WEIGHTS if kind == "sparse" else VECTORS
    assert list(index.run(["x", "y", "z", "w"], queries, 2)) == ["x", "y", "z", "w"]
    with pytest.raises(ValueError, match="query_ids: 2 ids, 1 of them distinct, for 4 vectors"):
        index.run(["q", "q"], queries)


def forge(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    seal(folder)


def with_value(file: Path, at: int, value: Any) -> bytes:
    array = np.load(file)
    array[at] = value
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        ("indices", 0, 10**9), ("indices", 0, -1), ("indptr", 1, -7), ("indptr", 1, 10**6), ("indptr", -1, 10**6),
        ("data", 0, np.nan), ("data", 0, -1.0), ("vocab", 0, 10**6), ("vocab", 0, -1), ("vocab", 0, "x"),
    ],
)  # fmt: skip
def test_a_forged_bm25_index_is_refused(tmp_path: Path, part: str, at: int, value: Any, mmap: bool) -> None:
    BUILD["bm25"]().save(tmp_path)
    name = "vocab.index.json" if part == "vocab" else f"{part}.csc.index.npy"
    if part == "vocab":
        words = json.loads((tmp_path / name).read_text())
        forged = json.dumps({**words, next(iter(words)): value}).encode()
    else:
        forged = with_value(tmp_path / name, at, value)
    forge(tmp_path, name, forged)
    with pytest.raises(ValueError, match="damaged BM25 index"):
        BM25Index.load(tmp_path, mmap=mmap)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("at", [1, 2])
def test_ids_whose_ends_lie_beyond_them_are_refused(tmp_path: Path, kind: str, at: int) -> None:
    index = BUILD[kind]()
    index.save(tmp_path)
    whole = (tmp_path / "ids.arrow").read_bytes()
    ends = np.array([0, 1, 3, 4, 5], np.int32)  # of the ids, in UTF-8
    assert whole.count(ends.tobytes()) == 1
    forged = ends.copy()
    forged[at] = 10**9
    forge(tmp_path, "ids.arrow", whole.replace(ends.tobytes(), forged.tobytes()))
    with pytest.raises(ValueError, match=f"damaged {index.kind}"):
        type(index).load(tmp_path, mmap=True)


def test_a_faiss_file_of_other_passages_or_of_a_stranger_is_refused(tmp_path: Path) -> None:
    BUILD["dense"]().save(tmp_path / "one")
    DenseIndex.build(VECTORS[:3], IDS[:3]).save(tmp_path / "other")
    forge(tmp_path / "one", "index.faiss", (tmp_path / "other" / "index.faiss").read_bytes())
    with pytest.raises(ValueError, match="damaged dense index"):
        DenseIndex.load(tmp_path / "one")
    with pytest.raises(ValueError, match="owner/name: Faiss can't check the file"):
        DenseIndex.from_hub("owner/name")
