from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf.evaluation import references
from tct_hf.evaluation.references import dense_run, dense_runs, encode_texts
from tests.evaluation.test_maxsim import ASKED, IDS, check
from tests.models import tiny_bert
from tests.train_helpers import PASSAGES, QUERIES


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    from tct_hf import build_student

    return build_student(str(tiny_bert(tmp_path_factory.mktemp("base"))), encoding="tct", document_length=64).to("cpu")


@pytest.mark.parametrize(("similarity", "k"), [("dot", 5), ("cosine", 3), ("cosine", 50)])
def test_dense_runs_of_first_dimensions_are_products_of_slices_of_one_encoding(
    student: Any, similarity: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counted(model: Any, texts: Any, **options: Any) -> Any:
        encoded.append(list(texts))
        return encode_texts(model, texts, **options)

    monkeypatch.setattr(references, "encode_texts", counted)
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    runs = dense_runs(student, IDS, PASSAGES, ASKED, dims=[8, None, 1], k=k)
    assert encoded == [PASSAGES, QUERIES]
    for run, size in zip(runs, [8, 32, 1], strict=True):
        queries, passages = student.encode_query(QUERIES)[:, :size], student.encode_document(PASSAGES)[:, :size]
        if similarity == "cosine":
            queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
        if size > 1 or similarity == "dot":
            check(run, queries @ passages.T, k)
        stock = SentenceTransformer(modules=list(student), truncate_dim=size, prompts=student.prompts, device="cpu")
        assert np.array_equal(stock.encode_query(QUERIES), student.encode_query(QUERIES)[:, :size])


@pytest.mark.parametrize("size", [0, 33])
def test_more_dimensions_than_there_are_is_refused(student: Any, size: int) -> None:
    with pytest.raises(ValueError, match=f"dims: {size} is not between 1 and the 32 dimensions"):
        dense_runs(student, IDS, PASSAGES, ASKED, dims=[size])


def test_a_similarity_that_no_index_can_search_is_refused(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "similarity_fn_name", "euclidean")
    with pytest.raises(ValueError, match="compares by 'euclidean': only dot and cosine"):
        dense_run(student, IDS, PASSAGES, ASKED)
