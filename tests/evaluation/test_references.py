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
from tct_hf.evaluation.workspace import encode_texts
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
    encoded: list[Any] = []
    monkeypatch.setattr(
        workspace, "encode_texts", lambda model, texts, **kw: encoded.append(texts) or encode_texts(model, texts, **kw)
    )
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    systems = References(COLLECTION, k, bf16=False).exact("student", "student", lambda: student, [8, 1])
    titles = ["student", "student, first 8 dimensions", "student, first 1 dimensions"]
    assert [system.title for system in systems] == titles
    for system, (key, size) in zip(systems, {"student": 32, "student-8": 8, "student-1": 1}.items(), strict=True):
        run = system.run(ASKED)
        queries, passages = student.encode_query(QUERIES)[:, :size], student.encode_document(PASSAGES)[:, :size]
        if similarity == "cosine":
            queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
        assert system.key == key
        if size > 1 or similarity == "dot":
            check(run, queries @ passages.T, k)
    assert [list(texts) for texts in encoded].count(PASSAGES) == 1
    monkeypatch.setattr(student, "similarity_fn_name", "euclidean")
    with pytest.raises(ValueError, match="compares by 'euclidean': only dot and cosine"):
        References(COLLECTION, k, bf16=False).exact("student", "student", lambda: student)[0].run(ASKED)
