from __future__ import annotations

from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from tests.models import tiny_cross_encoder
from tests.train_helpers import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models for :func:`tests.train_helpers.make_teacher`, loaded afresh by each test."""
    path = tmp_path_factory.mktemp("models")
    for name in ("student", "plain"):
        student, _ = make_models(path)
        student.save_pretrained(str(path / name))
    tiny_cross_encoder(path / "cross-encoder")
    return path


@pytest.fixture
def student(models: Path) -> SentenceTransformer:
    return SentenceTransformer(str(models / "student"), device="cpu")
