from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train_helpers import make_splade, save_models


@pytest.fixture(scope="session")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved models with dropout: a run that goes on needs its random state back too."""
    return save_models(tmp_path_factory.mktemp("dropout"), dropout=0.1)


@pytest.fixture
def sparse(tmp_path: Path) -> Any:
    return make_splade(tmp_path)
