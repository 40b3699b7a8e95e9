from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from tests.train_helpers import make_models, make_splade, make_teacher


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models for :func:`tests.train_helpers.make_teacher`, and a student of the same tokens."""
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path)
    student.save_pretrained(str(path / "student"))
    return path


@pytest.fixture(scope="session")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout: a run that goes on needs its random state back too."""
    path = tmp_path_factory.mktemp("dropout")
    student, _ = make_models(path, dropout=0.1)
    student.save_pretrained(str(path / "student"))
    return path


@pytest.fixture
def student(models: Path) -> SentenceTransformer:
    return SentenceTransformer(str(models / "student"), device="cpu")


@pytest.fixture
def teacher(models: Path) -> Any:
    return make_teacher(models, "colbert")


@pytest.fixture
def sparse(tmp_path: Path) -> Any:
    return make_splade(tmp_path)
