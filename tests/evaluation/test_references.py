from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import build_student
from tct_hf.data.collection import Collection
from tct_hf.evaluation import workspace
from tct_hf.evaluation.references import References
from tct_hf.evaluation.workspace import Workspace, encode_texts
from tests.evaluation.test_maxsim import ASKED, IDS, check
from tests.models import tiny_bert
from tests.train_helpers import PASSAGES, QUERIES

COLLECTION = Collection("tiny", Dataset.from_dict({"id": IDS, "text": PASSAGES}), {}, {})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return build_student(str(tiny_bert(tmp_path_factory.mktemp("base"))), encoding="tct", document_length=64).to("cpu")


@pytest.mark.parametrize(("similarity", "k"), [("dot", 5), ("cosine", 3), ("cosine", 50)])
def test_runs_of_first_dimensions_are_products_of_slices_of_one_encoding(
    student: Any, similarity: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counted(model: Any, texts: Any, **options: Any) -> Any:
        encoded.append(list(texts))
        return encode_texts(model, texts, **options)

    monkeypatch.setattr(workspace, "encode_texts", counted)
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    systems = References(COLLECTION, k, bf16=False).exact("student", "student", lambda: student, [8, 1])
    assert {system.key: system.title for system in systems} == {
        "student": "student",
        "student-8": "student, first 8 dimensions",
        "student-1": "student, first 1 dimensions",
    }
    for system, size in zip(systems, [32, 8, 1], strict=True):
        run = system.run(ASKED)
        queries, passages = student.encode_query(QUERIES)[:, :size], student.encode_document(PASSAGES)[:, :size]
        if similarity == "cosine":
            queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
        if size > 1 or similarity == "dot":
            check(run, queries @ passages.T, k)
    assert encoded.count(PASSAGES) == 1


@pytest.mark.parametrize(
    ("similarity", "size", "message"),
    [
        ("dot", 0, "dims: 0 is not between 1 and the 32 dimensions"),
        ("dot", 33, "dims: 33 is not between 1 and the 32 dimensions"),
        ("euclidean", 8, "compares by 'euclidean': only dot and cosine"),
    ],
)
def test_what_no_index_can_search_is_refused(
    student: Any, monkeypatch: pytest.MonkeyPatch, similarity: str, size: int, message: str
) -> None:
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    with pytest.raises(ValueError, match=message):
        Workspace(COLLECTION, student, "student", precision="fp32", in_memory=True).first_dims(size)
