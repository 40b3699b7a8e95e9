"""Texts to vectors in memory, and a corpus to shards; for dense and sparse encoders."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer

from tct_hf import DenseIndex, SparseIndex, build_student, load_vectors
from tct_hf.encoding.weights import weights_digest
from tct_hf.retrieval import cut_queries, encode
from tct_hf.retrieval.encode import choose_precision, encode_texts
from tct_hf.retrieval.encode_corpus import describe_model, encoding_seconds
from tct_hf.retrieval.vectors import ShardedVectors, UnitRows
from tests.encode_worker import COUNT, SHARD, passages
from tests.models import load_colbert, tiny_bert, tiny_colbert, tiny_mpnet
from tests.retrieval.encoded import TEXTS, as_job, content, encoded


def array(vectors: Any) -> np.ndarray:
    """Vectors of ours or of sentence-transformers, dense."""
    if isinstance(vectors, torch.Tensor):
        return vectors.to_dense().numpy()
    return vectors.toarray() if sparse.issparse(vectors) else np.asarray(vectors)


def expected(model: Any, texts: list[str], task: str = "document") -> np.ndarray:
    return array(model.encode_query(texts) if task == "query" else model.encode_document(texts))


# In memory


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(-3, None)], ids=["all", "but the first", "last"])
def test_a_checkpoint_in_half_precision_encodes_as_in_float32(either: Any, half: torch.dtype, part: slice) -> None:
    for weight in list(either.parameters())[part]:
        weight.data = weight.data.to(half)
    whole = copy.deepcopy(either).float()
    assert weights_digest(either) == weights_digest(whole)  # an index knows its model by either
    found = [array(encode_texts(one, TEXTS[:9], task="query")) for one in (either, whole)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("limits", [{}, {"tokens_per_pass": 1}, {"tokens_per_pass": 40}])
@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_sentence_transformers_in_the_order_given(
    either: Any, task: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not limits:  # over several pools
        monkeypatch.setattr(encode, "POOL", 7)
        monkeypatch.setattr(encode, "_TOKENISED_TOGETHER", 3)
    texts = [*TEXTS, "", "dense tokens", " "]
    found = encode_texts(either, texts, task=task, **limits)
    wanted = expected(either, texts, task)
    np.testing.assert_allclose(array(found), wanted, atol=1e-5)
    if isinstance(either, SparseEncoder):
        assert sparse.issparse(found) and found.dtype == np.float32 and found.has_canonical_format
        assert 0.05 < (wanted > 0).mean() < 0.8  # sparse, and not zero
    assert encode_texts(either, [], task=task).shape == (0, found.shape[1])


def test_other_padding_and_limits_of_dimensions_are_followed(
    student: Any, sparse_student: SparseEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [Transformer(str(tiny_mpnet(tmp_path))), Pooling(32)]
    model = SentenceTransformer(modules=modules, truncate_dim=8, device="cpu")
    found = encode_texts(model, TEXTS, task="document")
    assert found.shape == (COUNT, 8)
    np.testing.assert_allclose(found, expected(model, TEXTS), atol=1e-5)
    sparse_student.max_active_dims = 5
    found = encode_texts(sparse_student, TEXTS, task="document")
    assert np.diff(found.indptr).max() == 5
    np.testing.assert_allclose(array(found), expected(sparse_student, TEXTS), atol=1e-5)
    # Padded on the left, this encoder's positions, and so its vectors, follow the padding: batches are the model's.
    student.tokenizer.padding_side = "left"
    monkeypatch.setattr(encode, "_OWN_BATCH", 1)
    found = encode_texts(student, TEXTS, task="document")
    np.testing.assert_allclose(found, student.encode_document(TEXTS, batch_size=1), atol=1e-5)


def test_each_text_is_tokenised_once_and_hardly_any_padding_is_computed(student: Any) -> None:
    student.preprocess = Mock(side_effect=student.preprocess)
    student.forward = Mock(side_effect=student.forward)
    encode_texts(student, TEXTS * 4, task="document", tokens_per_pass=64)
    assert sum(len(call.args[0]) for call in student.preprocess.call_args_list) == 4 * COUNT
    masks = [call.args[0]["attention_mask"] for call in student.forward.call_args_list]
    assert all(mask.numel() <= 64 for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) > 0.9 * sum(mask.numel() for mask in masks)


def test_bfloat16_is_chosen_by_cosine_where_the_hardware_has_it_and_kept(
    either: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "has_bfloat16", lambda device: False)
    assert choose_precision(either, TEXTS) == "fp32"
    monkeypatch.setattr(encode, "has_bfloat16", lambda device: True)
    for enough, chosen in ((1.0 + 1e-9, "fp32"), (0.9, "bf16")):
        monkeypatch.setattr(encode, "ENOUGH_COSINE", enough)
        # The zero vector has no cosine, and is no objection.
        assert choose_precision(either, [*TEXTS, ""]) == chosen
    # What another model's run without a shard was begun in is not taken.
    (tmp_path / "tct_settings.json").write_text('{"weights_sha256": "other", "precision": "fp32"}')
    manifest = encoded(either, tmp_path, precision="auto")
    assert manifest["precision"] == "bf16"
    monkeypatch.setattr(encode, "ENOUGH_COSINE", 2.0)
    assert encoded(either, tmp_path, precision="auto") == manifest
    with pytest.raises(ValueError, match="precision = 'bf16', but now precision = 'fp32'"):
        encoded(either, tmp_path)


# A corpus into a folder


def test_a_folder_of_other_files_is_refused_and_left_as_it_is(student: Any, tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds something other than shards; name another folder"):
        encoded(student, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".hidden", "thesis.tex"}


def test_vectors_with_an_id_twice_are_refused(student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tct_hf.retrieval.encode_corpus.passage_shards", lambda passages, size: iter([list(passages)]))
    encoded(student, tmp_path, corpus=[*passages(3), *passages(1)])
    with pytest.raises(ValueError, match="two passages have the id 'p0'"):
        load_vectors(tmp_path)
    assert load_vectors(tmp_path, verify=False)[0] == ["p0", "p1", "p2", "p0"]


def test_a_corpus_becomes_shards_in_its_order_with_a_manifest(either: Any, tmp_path: Path) -> None:
    manifest = encoded(either, tmp_path / "v", model_id="the student")
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3] and manifest["count"] == COUNT
    assert manifest["model"]["id"] == "the student" and len(manifest["model"]["weights_sha256"]) == 64
    ids, whole, read = load_vectors(tmp_path / "v")
    assert read == manifest and ids == [passage["id"] for passage in passages()]
    assert whole.dtype == np.float32 and whole.shape == (COUNT, manifest["dim"])
    np.testing.assert_allclose(array(whole), expected(either, TEXTS), atol=1e-5)
    encoded(either, tmp_path / "set", corpus=Dataset.from_list(list(passages())), model_id="the student")
    assert content(tmp_path / "set") == content(tmp_path / "v")

    _, mapped, _ = load_vectors(tmp_path / "v", mmap=True)
    assert len(mapped) == COUNT and (mapped.shape, mapped.dtype) == (whole.shape, whole.dtype)
    none = np.zeros(0, int)
    odd = np.arange(COUNT) % 2 == 1
    for taken in (3, -1, slice(None), slice(3, 12), slice(20, 2, -4), [22, 0, 7, 7, 6], slice(4, 4), odd, none):
        found, wanted = array(mapped[taken]), array(whole)[taken]
        np.testing.assert_array_equal(found, np.atleast_2d(wanted) if sparse.issparse(whole) else wanted)
    with pytest.raises(IndexError, match="out of bounds"):
        mapped[[0, COUNT]]


def test_mapped_vectors_make_the_index_block_by_block(
    student: Any, sparse_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded(student, tmp_path / "v")
    ids, whole, _ = load_vectors(tmp_path / "v")
    _, mapped, _ = load_vectors(tmp_path / "v", mmap=True)
    np.testing.assert_array_equal(np.asarray(mapped), whole)
    monkeypatch.setattr("tct_hf.retrieval.vectors.BLOCK", 8)
    read: list[Any] = []
    take = ShardedVectors.__getitem__
    monkeypatch.setattr(ShardedVectors, "__getitem__", lambda self, rows: read.append(take(self, rows)) or read[-1])
    for given, wanted in ((mapped, whole), (UnitRows(mapped), whole / np.linalg.norm(whole, axis=1, keepdims=True))):
        index = DenseIndex.build(given, ids, "Flat")
        np.testing.assert_allclose(index._engine.reconstruct_n(0, COUNT), wanted, rtol=1e-6)
    assert max(map(len, read)) == 8

    manifest = encoded(sparse_student, tmp_path / "s")
    ids, whole, _ = load_vectors(tmp_path / "s")
    _, mapped, _ = load_vectors(tmp_path / "s", mmap=True)
    assert manifest["layout"] == "sparse" and manifest["nonzeros"] == whole.nnz == mapped[:].nnz
    learned = SparseIndex.build(mapped, ids, built_by=manifest["model"])
    queries = sparse_student.encode_query(TEXTS[:4])
    assert learned.run(list("abcd"), queries, 10) == SparseIndex.build(whole, ids).run(list("abcd"), queries, 10)
    learned.save(tmp_path / "index")
    SparseIndex.load(tmp_path / "index", model=sparse_student)


def test_a_corpus_is_read_as_it_is_encoded_and_can_be_stored_in_half_the_bytes(
    student: Any, sparse_student: Any, tmp_path: Path
) -> None:
    def watched() -> Iterator[dict[str, str]]:
        for row, passage in enumerate(passages()):
            # One shard is held in memory: all before it are on disk.
            assert len(list(tmp_path.glob("v/0*.arrow"))) == row // SHARD
            yield passage

    encoded(student, tmp_path / "v", corpus=watched(), dtype="float16")
    _, found, manifest = load_vectors(tmp_path / "v")
    assert manifest["dtype"] == "float16" and manifest["count"] == COUNT
    np.testing.assert_array_equal(found, found.astype(np.float16))
    np.testing.assert_allclose(found, student.encode_document(TEXTS), rtol=2e-3, atol=1e-3)
    with pytest.raises(ValueError, match="dtype='float16' is not known for these vectors: use one of float32"):
        encoded(sparse_student, tmp_path / "half", dtype="float16")


def test_progress_is_told_and_the_time_of_parts_is_scaled_up_to_the_whole(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = tmp_path / "v", list[str]()
    # Every call takes a second.
    monkeypatch.setattr("tct_hf.retrieval.encode_corpus.time", SimpleNamespace(monotonic=itertools.count().__next__))
    settings: dict[str, Any] = {"write": lines.append, "write_every": 0.0}
    assert encoding_seconds(folder) is None
    encoded(student, folder, corpus=list(passages()), **settings)
    assert f" of {COUNT} passages   " in lines[0] and lines[-1].startswith(f"  {COUNT} passages in ")
    encoded(student, folder, **settings)
    assert lines[-1].startswith(f"  {COUNT} passages ({COUNT} were there) in ") and encoding_seconds(folder) == 1
    (folder / "00003.arrow").unlink()
    encoded(student, folder, **{**settings, "write_every": 1e9})
    assert json.loads((folder / "encoding_seconds.json").read_text()) == {"seconds": COUNT / 5, "passages_timed": 5}
    for index, corpus in ((0, None), (1, passages()), (0, None)):  # the last has nothing to do
        as_job(student, tmp_path / "jobs", index, 2, corpus)
    assert encoding_seconds(tmp_path / "jobs") == pytest.approx((COUNT / 13 + COUNT / 10) / 2)


def test_a_model_without_a_greatest_length_is_encoded_and_use_changes_no_description(
    student: Any, sparse_student: Any, tmp_path: Path
) -> None:
    model = SentenceTransformer(modules=[StaticEmbedding(student.tokenizer.backend_tokenizer, embedding_dim=8)])
    manifest = encoded(model.to("cpu"), tmp_path / "v")
    assert manifest["encoding"]["max_length"] is None and manifest["encoding"]["tokenizer_sha256"]
    np.testing.assert_allclose(load_vectors(tmp_path / "v")[1], model.encode_document(TEXTS), atol=1e-5)
    before = describe_model(sparse_student)
    sparse_student.encode_query(["words"])
    assert describe_model(sparse_student) == before
    sparse_student.max_active_dims = 7
    assert describe_model(sparse_student)["model"]["encoding"] != before["model"]["encoding"]


@pytest.mark.parametrize("text", ["half \ud800", None, 3])
def test_a_text_that_no_tokenizer_takes_is_named(student: SentenceTransformer, text: Any) -> None:
    with pytest.raises(ValueError, match=r"texts \(task query\), number 1: "):
        encode_texts(student, ["one", text], task="query")


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_a_corpus_of_any_format_is_encoded_alike(student: SentenceTransformer, tmp_path: Path, form: str) -> None:
    plain = Dataset.from_dict({"id": ["007", "b"], "text": ["a passage", "the teacher"]})
    for name, corpus in (("plain", plain), (form, plain.with_format(form))):
        encoded(student, tmp_path / name, corpus)
    assert load_vectors(tmp_path / form)[0] == ["007", "b"]
    assert content(tmp_path / form) == content(tmp_path / "plain")


def test_what_gives_no_vector_a_text_is_refused(tmp_path: Path) -> None:
    refused: Any
    for refused in (load_colbert(tiny_colbert(tmp_path / "colbert")), "path/to/model"):
        for use in (partial(encoded, folder=tmp_path / "out"), partial(encode_texts, texts=["b"], task="query")):
            with pytest.raises(ValueError, match=rf"The model is a {type(refused).__name__}, not an encoder"):
                use(refused)
    assert not (tmp_path / "out").exists()


SLOTS = [
    ("tct", {}, 36), ("tct", {"query_augmentation": False}, 36), ("own", {"query_length": 20}, 20), ("own", {}, 64),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "settings", "slots"), SLOTS)
def test_queries_longer_than_their_slots_are_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str, settings: dict[str, Any], slots: int
) -> None:
    model = build_student(str(tiny_bert(tmp_path / "bert")), document_length=64, encoding=encoding, **settings)
    taken = 4 if encoding == "tct" else 2  # [CLS] [ Q ], or [CLS] and [SEP]
    queries = [" ".join(["teacher"] * words) for words in (1, slots - taken, slots - taken + 1, 90)]
    vectors = encode_texts(model, [*queries, queries[-1] + " student"], task="query")
    assert np.array_equal(vectors[3], vectors[4])
    encode_texts(model, queries[:2], task="query")
    encode_texts(model, queries, task="document")
    [said] = [record.getMessage() for record in caplog.records if record.name == cut_queries.logger.name]
    assert f"{slots} tokens that are read" in said and "3 of 5 queries" in said
