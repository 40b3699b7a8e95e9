from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder

from tct_hf import SparseIndex, encode_corpus, load_vectors
from tct_hf.retrieval import text_vectors
from tct_hf.retrieval.encode import describe_model, encode_texts
from tct_hf.retrieval.sparse_rows import ShardedRows
from tct_hf.retrieval.text_vectors import choose_precision
from tests.encode_worker import COUNT, SHARD, passages
from tests.splade import tiny_splade

TEXTS = [passage["text"] for passage in passages()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_splade(tmp_path_factory.mktemp("splade"))


@pytest.fixture
def student(saved: Path) -> SparseEncoder:
    return SparseEncoder(str(saved), device="cpu")


def encoded(model: Any, folder: Path, corpus: Any = None, **settings: Any) -> dict[str, Any]:
    settings = {"precision": "fp32", "shard_size": SHARD, "write": lambda line: None, **settings}
    return encode_corpus(model, passages() if corpus is None else corpus, folder, **settings)


def expected(model: SparseEncoder, texts: list[str], task: str = "document") -> np.ndarray:
    encode = model.encode_query if task == "query" else model.encode_document
    return encode(texts).to_dense().numpy()


@pytest.mark.parametrize("limits", [{}, {"batch_size": 3}, {"tokens_per_pass": 40}])
@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_sentence_transformers(student: SparseEncoder, task: str, limits: dict[str, int]) -> None:
    found = encode_texts(student, TEXTS, task=task, **limits)
    assert sparse.issparse(found) and found.dtype == np.float32 and found.has_canonical_format
    wanted = expected(student, TEXTS, task)
    assert 0.05 < (wanted > 0).mean() < 0.8  # sparse, and not zero
    np.testing.assert_allclose(found.toarray(), wanted, atol=1e-5)


def test_pools_keep_their_order_and_no_text_makes_no_row(
    student: SparseEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_vectors, "POOL", 7)
    found = encode_texts(student, TEXTS, task="document")
    np.testing.assert_allclose(found.toarray(), expected(student, TEXTS), atol=1e-5)
    assert encode_texts(student, [], task="document").shape == (0, found.shape[1])


def test_the_models_limit_of_active_dims_holds(student: SparseEncoder) -> None:
    student.max_active_dims = 5
    found = encode_texts(student, TEXTS, task="document")
    assert np.diff(found.indptr).max() == 5
    np.testing.assert_allclose(found.toarray(), expected(student, TEXTS), atol=1e-5)


def test_bfloat16_is_chosen_by_the_cosine(student: SparseEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tct_hf.encoding.precision.has_bfloat16", lambda device: True)
    chosen, why = choose_precision(student, TEXTS)
    assert why["texts"] and 0.9 < why["cosine"] <= 1 and chosen == (why["cosine"] >= text_vectors.ENOUGH_COSINE)


def test_a_corpus_becomes_sparse_shards_and_an_index(student: SparseEncoder, tmp_path: Path) -> None:
    manifest = encoded(student, tmp_path / "vectors", model_id="a/splade")
    ids, vectors, read = load_vectors(tmp_path / "vectors")
    assert read == manifest and manifest["layout"] == "sparse" and manifest["nonzeros"] == vectors.nnz
    assert ids == [passage["id"] for passage in passages()]
    np.testing.assert_allclose(vectors.toarray(), expected(student, TEXTS), atol=1e-5)

    _, mapped, _ = load_vectors(tmp_path / "vectors", mmap=True)
    assert isinstance(mapped, ShardedRows) and mapped.shape == vectors.shape and mapped.nnz == vectors.nnz
    whole = vectors.toarray()
    none = np.zeros(0, int)
    chosen = [slice(2, 9), slice(None, None, -1), [COUNT - 1, 0, 0, 5], -1, np.arange(COUNT) % 2 == 0, none]
    for rows in chosen:
        np.testing.assert_array_equal(mapped[rows].toarray(), np.atleast_2d(whole[rows]))
    with pytest.raises(IndexError, match=f"of {COUNT} vectors"):
        mapped[COUNT]

    index = SparseIndex.build(mapped, ids, built_by=manifest["model"])
    queries = student.encode_query(TEXTS[:4])
    found, scores = index.search(queries, 10)
    again = SparseIndex.build(vectors, ids).search(queries, 10)
    assert found == again[0] and all(np.array_equal(a, b) for a, b in zip(scores, again[1], strict=True))
    index.save(tmp_path / "index")
    SparseIndex.load(tmp_path / "index", model=student)


def test_a_stopped_encoding_goes_on_to_the_same_bytes(student: SparseEncoder, tmp_path: Path) -> None:
    encoded(student, tmp_path / "whole")

    def stopping() -> Any:
        yield from list(passages())[: SHARD + 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(student, tmp_path / "stopped", stopping())
    assert (tmp_path / "stopped" / "00000.npy").is_file() and not (tmp_path / "stopped" / "manifest.json").exists()
    # Having encoded queries since must not count as another model.
    student.encode_query(["words"])
    encoded(student, tmp_path / "stopped")
    content = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "stopped")]
    assert content[0] == content[1]


def test_a_model_is_described_alike_before_and_after_use(saved: Path) -> None:
    fresh, used = SparseEncoder(str(saved), device="cpu"), SparseEncoder(str(saved), device="cpu")
    used.encode_query(["words"])
    assert describe_model(fresh) == describe_model(used)
    used.max_active_dims = 7
    assert describe_model(fresh)["model"]["encoding"] != describe_model(used)["model"]["encoding"]


def test_damaged_or_foreign_shards_are_refused(student: SparseEncoder, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    encoded(student, folder)
    file = folder / "00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\xc0\x7f")
    for again in (lambda: load_vectors(folder), lambda: encoded(student, folder)):
        with pytest.raises(ValueError, match=r"00001\.npy is damaged or was altered"):
            again()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"00001\.npy: damaged shard"):
        load_vectors(folder, verify=False)
    file.write_bytes(content)
    record = json.loads((folder / "00001.json").read_text())
    record["nonzeros"][0] += 1
    (folder / "00001.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"00001\.json is damaged or was altered"):
        encoded(student, folder)


def test_what_a_sparse_encoder_can_not_do_is_said(student: SparseEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the weights of sparse vectors are stored as they are"):
        encoded(student, tmp_path / "half", dtype="float16")
    with torch.no_grad():
        student[0].model.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="has a NaN or infinite vector"):
        encoded(student, tmp_path / "broken")
