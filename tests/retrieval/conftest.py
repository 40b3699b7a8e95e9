from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer, SparseEncoder

from tct_hf import build_student, save_student
from tests.models import tiny_bert
from tests.splade import tiny_splade


@pytest.fixture(scope="package")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student = build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=24)
    return save_student(student, path / "student")


@pytest.fixture(scope="package")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_splade(tmp_path_factory.mktemp("splade"))


@pytest.fixture
def student(saved: Path) -> SentenceTransformer:
    return SentenceTransformer(str(saved), device="cpu")


@pytest.fixture
def sparse_student(splade: Path) -> SparseEncoder:
    return SparseEncoder(str(splade), device="cpu")


@pytest.fixture(params=["dense", "sparse"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("student" if request.param == "dense" else "sparse_student")
