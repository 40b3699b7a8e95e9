from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf.evaluation import references
from tct_hf.evaluation.references import dense_and_reranked_run, dense_run, dense_runs, encode_texts
from tests.models import tiny_bert
from tests.train_helpers import PASSAGES, QUERIES

IDS = [f"p{row}" for row in range(len(PASSAGES))]
ASKED = {f"q{row}": text for row, text in enumerate(QUERIES)}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    from tct_hf import build_student

    return build_student(str(tiny_bert(tmp_path_factory.mktemp("base"))), encoding="tct", document_length=64).to("cpu")


def check(run: dict[str, dict[str, float]], scores: np.ndarray, k: int) -> None:
    """The run holds the k best of `scores` (queries, passages)."""
    assert list(run) == list(ASKED)
    for row, hits in enumerate(run.values()):
        order = np.argsort(-scores[row], kind="stable")[:k]
        assert sorted(hits, key=lambda name: -hits[name]) == [IDS[column] for column in order]
        assert [hits[IDS[column]] for column in order] == pytest.approx(scores[row][order].tolist(), abs=1e-4)


@pytest.mark.parametrize("k", [3, 50])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_dense_run_is_the_sorted_product_of_the_vectors(student: Any, similarity: str, k: int) -> None:
    queries, passages = student.encode_query(QUERIES), student.encode_document(PASSAGES)
    if similarity == "cosine":
        queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
    student.similarity_fn_name = similarity
    try:
        run = dense_run(student, IDS, PASSAGES, ASKED, k=k)
    finally:
        student.similarity_fn_name = "dot"
    check(run, queries @ passages.T, k)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_another_systems_passages_are_put_in_the_order_of_the_models_scores(
    student: Any, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    first = {name: dict.fromkeys(IDS[at : at + 3], 1.0) for at, name in enumerate(ASKED)}
    lost = first.popitem()[0]
    searched, reranked = dense_and_reranked_run(student, IDS, PASSAGES, ASKED, first, k=2)
    assert searched == dense_run(student, IDS, PASSAGES, ASKED, k=2)
    whole = dense_run(student, IDS, PASSAGES, ASKED, k=len(IDS))
    assert list(reranked) == list(ASKED) and reranked[lost] == {}
    for name, hits in first.items():
        expected = {passage: score for passage, score in whole[name].items() if passage in hits}
        assert list(reranked[name]) == sorted(expected, key=lambda passage: (-expected[passage], passage))
        assert reranked[name] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="passage 'gone' is not there"):
        dense_and_reranked_run(student, IDS, PASSAGES, ASKED, {"q0": {"gone": 1.0}}, k=2)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_dense_runs_of_first_dimensions_are_products_of_slices_of_one_encoding(
    student: Any, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counted(model: Any, texts: Any, **options: Any) -> Any:
        encoded.append(list(texts))
        return encode_texts(model, texts, **options)

    monkeypatch.setattr(references, "encode_texts", counted)
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    runs = dense_runs(student, IDS, PASSAGES, ASKED, dims=[8, None, 1], k=5)
    assert encoded == [PASSAGES, QUERIES]
    for run, size in zip(runs, [8, 32, 1], strict=True):
        queries, passages = student.encode_query(QUERIES)[:, :size], student.encode_document(PASSAGES)[:, :size]
        if similarity == "cosine":
            queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
        if size > 1 or similarity == "dot":
            check(run, queries @ passages.T, 5)
        stock = SentenceTransformer(modules=list(student), truncate_dim=size, prompts=student.prompts, device="cpu")
        assert np.array_equal(stock.encode_query(QUERIES), student.encode_query(QUERIES)[:, :size])


@pytest.mark.parametrize("size", [0, 33])
def test_more_dimensions_than_there_are_is_refused(student: Any, size: int) -> None:
    with pytest.raises(ValueError, match=f"dims: {size} is not between 1 and the 32 dimensions"):
        dense_runs(student, IDS, PASSAGES, ASKED, dims=[size])


def test_a_similarity_that_no_index_can_search_is_refused(student: Any) -> None:
    student.similarity_fn_name = "euclidean"
    try:
        with pytest.raises(ValueError, match="compares by 'euclidean': only dot and cosine"):
            dense_run(student, IDS, PASSAGES, ASKED)
    finally:
        student.similarity_fn_name = "dot"
