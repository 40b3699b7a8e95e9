"""A sparse student of stock modules, against the rule in plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tct_hf import build_splade
from tests.models import tiny_bert, tiny_mlm

TEXTS = ["what is dense retrieval", "", "the student of a teacher: " + "tokens " * 60]


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mlm(tmp_path_factory.mktemp("mlm"))


def rule(path: Path, length: int) -> np.ndarray:
    """`(texts, vocabulary)`, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    found = []
    for text in TEXTS:
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            weights = np.log1p(np.maximum(model(**tokens).logits[0].double().numpy(), 0.0))
        found.append(weights.max(0))
    return np.stack(found)


def encoded(student: SparseEncoder) -> list[torch.Tensor]:
    ways = (student.encode_query, student.encode_document, student.encode)
    return [encode(TEXTS, convert_to_sparse_tensor=False).cpu() for encode in ways]


def test_vectors_are_those_of_the_rule_and_a_saved_student_is_a_stock_sparse_encoder(
    mlm: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"query_length": 16, "document_length": 40}
    student = build_splade(str(mlm), **settings)
    for found, length in zip(encoded(student), (16, 40, 40), strict=True):
        expected = rule(mlm, length)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert student.similarity_fn_name == "dot" and student.get_embedding_dimension() == expected.shape[1]
    student.save_pretrained(str(tmp_path / "saved"))
    config = json.loads((shutil.copytree(mlm, tmp_path / "nameless") / "config.json").read_text())
    (tmp_path / "nameless" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    for other in (
        SparseEncoder(str(tmp_path / "saved"), device="cpu"),
        build_splade(str(tmp_path / "saved"), **settings),
        build_splade(str(tmp_path / "nameless"), **settings),  # its weights hold the head
    ):
        assert all(map(torch.equal, encoded(other), encoded(student)))


def test_settings_and_encoders_that_do_not_fit_are_refused(mlm: Path, tmp_path: Path) -> None:
    plain = tiny_bert(tmp_path / "plain")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (mlm, {"document_length": 500}, "document_length=500, but the encoder has 192 positions"),
        (mlm, {"query_length": 2}, "query_length=2 leaves no token"),
        (plain, {}, r"lacks cls\.predictions.*masked-language-model head"),
    ]
    for base, setting, message in cases:
        with pytest.raises(ValueError, match=message):
            build_splade(str(base), **{"document_length": 40, **setting})
    build_splade(str(mlm), document_length=40).half().save_pretrained(str(tmp_path / "half"))
    assert build_splade(str(tmp_path / "half"), document_length=40).dtype == torch.float32
