"""A sparse student of stock modules, against the rule in plain transformers."""

from __future__ import annotations

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


def rule(path: Path, texts: list[str], length: int, *, pooling: str = "max", twice: bool = False) -> np.ndarray:
    """`(texts, vocabulary)`, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    found = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            weights = np.log1p(np.maximum(model(**tokens).logits[0].double().numpy(), 0.0))
        weights = np.log1p(weights) if twice else weights
        found.append(weights.max(0) if pooling == "max" else weights.sum(0))
    return np.stack(found)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_vectors_are_those_of_the_rule(mlm: Path, pooling: Any, activation: Any) -> None:
    student = build_splade(str(mlm), query_length=16, document_length=40, pooling=pooling, activation=activation)
    for encode, length in ((student.encode_query, 16), (student.encode_document, 40), (student.encode, 40)):
        found = encode(TEXTS, convert_to_sparse_tensor=False).cpu().numpy()
        expected = rule(mlm, TEXTS, length, pooling=pooling, twice=activation == "log1p_relu")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert student.similarity_fn_name == "dot" and student.get_embedding_dimension() == expected.shape[1]


def test_a_saved_student_loads_as_a_stock_sparse_encoder(mlm: Path, tmp_path: Path) -> None:
    student = build_splade(str(mlm), query_length=16, document_length=40)
    student.save_pretrained(str(tmp_path / "saved"))
    loaded = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    for side in ("encode_query", "encode_document", "encode"):
        assert torch.equal(
            getattr(loaded, side)(TEXTS, convert_to_sparse_tensor=False),
            getattr(student, side)(TEXTS, convert_to_sparse_tensor=False),
        )
    again = build_splade(str(tmp_path / "saved"), query_length=16, document_length=40)
    assert torch.equal(again.encode(TEXTS).to_dense(), student.encode(TEXTS).to_dense())


def test_half_precision_weights_become_float32(mlm: Path, tmp_path: Path) -> None:
    build_splade(str(mlm), document_length=40, dtype=torch.float16).save_pretrained(str(tmp_path / "half"))
    assert build_splade(str(tmp_path / "half"), document_length=40).dtype == torch.float32


def test_an_encoder_without_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks cls\.predictions.*masked-language-model head"):
        build_splade(str(tiny_bert(tmp_path / "plain")))


def test_weights_without_the_name_of_the_architecture_will_do(mlm: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(mlm, tmp_path / "nameless")
    config = json.loads((mlm / "config.json").read_text())
    (tmp_path / "nameless" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert torch.equal(
        build_splade(str(tmp_path / "nameless"), document_length=40).encode(TEXTS).to_dense(),
        build_splade(str(mlm), document_length=40).encode(TEXTS).to_dense(),
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"document_length": 500}, "document_length=500, but the encoder takes 192"),
        ({"query_length": 2}, "query_length=2 leaves no token"),
        ({"pooling": "mean"}, "pooling_strategy must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(mlm: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_splade(str(mlm), **{"document_length": 40, **setting})
