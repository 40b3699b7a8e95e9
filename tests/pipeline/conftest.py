from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import recipe as recipes
from tests.models import tiny_bert, tiny_cross_encoder, tiny_mlm
from tests.searching import Material, write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A small collection and tiny models for all recipes, which share the folder's cache."""
    from tct_hf import build_student

    folder = tmp_path_factory.mktemp("pipeline")
    recipes.write_material(folder)
    tiny_mlm(folder / "mlm", dropout=0.1)
    tiny_cross_encoder(folder / "cross-encoder")
    base = build_student(str(tiny_bert(folder / "bare")))
    base.similarity_fn_name = "cosine"
    base.save_pretrained(str(folder / "mean"))  # mean pooling, the encoder's own tokens
    return write_material(folder)


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest, material: Material) -> Path:
    """The file of the module's SETTINGS, where FOLDER is the material's."""
    file = material.folder / f"{request.module.__name__.rpartition('.')[2]}.yaml"
    file.write_text(request.module.SETTINGS.replace("FOLDER", str(material.folder)))
    return file


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest, settings: Path, patch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the module's RECIPE with its `settings` in this process; the exit status."""
    return recipes.in_this_process(request.module.RECIPE, settings, patch)


@pytest.fixture(scope="module")
def whole(settings: Path, recipe: Callable[..., int]) -> Path:
    """The folder of a whole run."""
    output = settings.with_suffix("") / "whole"
    assert recipe(output) == 0
    return output


@pytest.fixture
def refused(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str], str], None]:
    """Expects that options end a run with one message before anything is written."""

    def check(options: list[str], message: str, *, code: int = 2) -> None:
        assert recipe(tmp_path / "new", *options) == code
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "new").exists()

    return check


@pytest.fixture
def kept(whole: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], None]:
    """Expects that an option is refused by name in the folder of a whole run, which stays as it is."""

    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}

    def check(option: str, name: str) -> None:
        before = contents()
        assert recipe(whole, option) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"holds a run with {name} = " in message and f"but now {name} = " in message
        assert "choose another folder, or delete this one" in message
        assert contents() == before

    return check


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that students were trained on."""
    from tct_hf.pipeline import train

    found: list[Any] = []
    original = train.collection_triples

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(original(*args, **options))
        return found[-1]

    monkeypatch.setattr(train, "collection_triples", recorded)
    return found
