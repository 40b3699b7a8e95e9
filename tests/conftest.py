from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.loopback_hub import WRITER, LoopbackHub
from tests.warm_process import run_warm, spare_the_collector, start_server

# A shell lets what it starts in the background ignore these, and servers that this starts in turn would not end.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Set before torch or a Hub client is imported: two threads slow each other down, and no test may reach the network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# The client takes its Hub's address when it is imported. Nothing listens there until a test asks for `hub`.
_HUB = LoopbackHub()
os.environ["HF_ENDPOINT"] = _HUB.url
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_TOKEN_PATH"] = os.path.join(tempfile.gettempdir(), "tct_hf-tests-have-no-token")
_ENVIRONMENT = dict(os.environ)

os.fsync = lambda fd: None  # no test cuts the power


def pytest_collection_finish() -> None:
    """The test modules have imported nearly everything."""
    if "torch" in sys.modules:
        import jinja2
        import sentence_transformers  # noqa: F401

        # Each save of a model compiles the template of its card again: 0.05 s.
        jinja2.Environment.compile = cache(jinja2.Environment.compile)  # type: ignore[method-assign]

    spare_the_collector()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.testscollected:  # not in the process that hands tests out to others
        start_server()


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    """Warnings that are given once in a process are given once in a test."""
    if cut_queries := sys.modules.get("tct_hf.retrieval.cut_queries"):
        cut_queries._said.clear()


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """As `monkeypatch`, for what a whole module shares."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def warm_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are loaded without this package in a process that has the rest imported already."""
    from tct_hf.encoding import checkpoint

    def run(command: list[str], *, cwd: str | Path = ".", **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return run_warm(command[1:], env=_ENVIRONMENT, cwd=Path(cwd).resolve())

    monkeypatch.setattr(checkpoint, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def _listening() -> None:
    _HUB.start()


@pytest.fixture
def hub(_listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub on the loopback interface, its writer's token in HF_TOKEN, and an empty cache."""
    import huggingface_hub.constants

    _HUB.forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "tct-cache"))
    yield _HUB
    _HUB.forget()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models of :func:`tests.train_helpers.save_models`, loaded afresh by each test."""
    from tests.train_helpers import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def student(models: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(models / "student"), device="cpu")


@pytest.fixture
def teacher(models: Path) -> Any:
    from tests.train_helpers import make_teacher

    return make_teacher(models, "colbert")


@pytest.fixture
def trainer_of(student: Any, teacher: Any, tmp_path: Path) -> Any:
    """Makes a trainer of the student and the teacher that works in `tmp_path`."""
    from tests.train_helpers import make_trainer

    return partial(make_trainer, tmp_path, student, teacher)
