"""What is wrong around any recipe ends it with one sentence and a status, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tct_hf.settings import run_recipe
from tests.recipe import ROOT, load_recipe
from tests.searching import Material

# Of each recipe, what it needs to get to its input, SOURCE.
RECIPES = {
    "train": ["--data.source=SOURCE"],
    "rounds": ["--data.source=SOURCE"],
    "compare": ["--data.source=SOURCE", "--arms={a: {}}", "--teacher.kind=mixture"],
    "mine": ["--data.source=SOURCE"],
    "evaluate": ["--data.source=SOURCE", "--student=STUDENT"],
    "search": ["--data.source=SOURCE", "--student=STUDENT"],
    "train_expander": ["--data.source=SOURCE"],
    "encode": ["--source=SOURCE", "--model=STUDENT"],
    "expand": ["--source=SOURCE"],
    "score": ["--triples.path=SOURCE", "--teacher=STUDENT"],
    "convert": ["--source=SOURCE"],
    "release": ["--path=SOURCE", "--repo_id=me/it"],
}


@pytest.fixture
def refused(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a recipe that must be refused; the one sentence."""
    for where in ("tct_hf.progress", "tct_hf.pipeline.job"):
        monkeypatch.setattr(f"{where}.quieten", lambda: None)
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))

    def call(name: str, source: str, *more: str) -> str:
        module: Any = load_recipe(ROOT / "recipes" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [module.__file__])
        words = [word.replace("SOURCE", source).replace("STUDENT", str(material.student)) for word in RECIPES[name]]
        with pytest.raises(SystemExit) as caught:
            run_recipe(module.main, module.Settings, "", [*words, *more])
        assert caught.value.code in (1, 2)
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ")
        return said

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_an_input_that_cannot_be_read_is_named_and_nothing_written(
    name: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    output = [] if name == "search" else [f"--output_dir={tmp_path / 'new'}"]
    for source in ("/nowhere/x", str(tmp_path / "file"), str(tmp_path / "empty"), "me/my thing??"):
        assert source in refused(name, source, *output)
    refused(name, "", *output)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "here").iterdir())


def test_a_folder_without_a_model_is_named(refused: Callable[..., str], material: Material, tmp_path: Path) -> None:
    for name, setting in (("encode", "model"), ("evaluate", "student"), ("expand", "model"), ("mine", "model")):
        said = refused(name, str(material.beir), f"--{setting}={tmp_path}", f"--output_dir={tmp_path / 'new'}")
        assert f"{tmp_path}: no config.json here" in said


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("search", "convert", "release")])
def test_an_output_folder_of_another_recipe_or_without_a_name_is_refused(
    name: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"recipe": "other"}))
    assert f"output_dir: {tmp_path} holds a run of the recipe other" in refused(name, "x", f"--output_dir={tmp_path}")
    assert "output_dir: the name is empty" in refused(name, "x", "--output_dir=")
    assert [file.name for file in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("name", ["mine", "encode", "evaluate"])
def test_an_output_folder_that_is_a_file_is_refused(
    name: str, refused: Callable[..., str], material: Material, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    said = refused(name, str(material.beir), f"--output_dir={tmp_path / 'file'}")
    assert f"output_dir: {tmp_path / 'file'}" in said and "can't be written" in said
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = load_recipe(ROOT / "recipes" / "train.py")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda settings: os.kill(os.getpid(), number), module.Settings, "", [])
    assert caught.value.code == 128 + number and signal.getsignal(signal.SIGTERM) is before
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("interrupted; to go on: ") and sys.orig_argv[0] in said
