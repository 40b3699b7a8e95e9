from __future__ import annotations

from pathlib import Path

import pytest

from tct_hf import build_student, save_student
from tct_hf.encoding.checkpoint import CheckpointReport
from tests.models import tiny_bert


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TCT student that no test changes."""
    path = tmp_path_factory.mktemp("run")
    made = build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=64)
    return save_student(made, path / "student")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter of its own that looks at the vectors: for tests of what is pushed."""
    for name in ("validate_checkpoint", "check_vectors"):
        monkeypatch.setattr(f"tct_hf.hub.release.{name}", lambda *args, **options: CheckpointReport(0, 0, 0))
