from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tct_hf
from tct_hf import files
from tct_hf.__main__ import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command as it is typed, without its name."""

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tct-hf", *words])
        main()

    return call


def test_list_names_every_command_and_settings_file_and_an_unknown_one_is_refused(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("list")
    said = capsys.readouterr().out
    assert "train           Train a single-vector student" in said and "train-expander" in said
    assert "quickstart" in said and "compare/" in said and "accelerate/" not in said
    with pytest.raises(SystemExit, match=r"no command 'trian'; choose from .*train"):
        run("trian")


def test_settings_that_no_file_has_are_refused_with_the_nearest_name(run: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"no settings 'quickstrat'\. Did you mean quickstart\? `tct-hf list`"):
        run("train", "quickstrat")


def test_copy_makes_a_new_folder_of_recipes_and_refuses_one_that_is_there(
    run: Callable[..., None], tmp_path: Path
) -> None:
    run("copy", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "train.py").is_file() and (tmp_path / "mine" / "quickstart.yaml").is_file()
    with pytest.raises(SystemExit, match="name one new folder"):
        run("copy", str(tmp_path / "mine"))


def test_a_name_stands_for_the_settings_that_come_along(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is found, or the recipe would complain of it before the setting that does not exist."""
    with pytest.raises(SystemExit):
        run("train", "quickstart", "--no_such_setting", "1")
    assert "no_such_setting" in capsys.readouterr().err
    assert sys.argv[1].endswith("recipes/quickstart.yaml")


def test_the_api_page_has_every_public_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: tct_hf\.(\w+)$", page, re.MULTILINE)) == set(tct_hf.__all__) - {"__version__"}


def test_messages_name_the_command_that_exists_where_the_user_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert files.command("train paper") == "recipes/train.py recipes/paper.yaml"
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    assert files.command("train_expander") == "tct-hf train-expander"


def test_the_package_knows_its_public_names_in_a_zip_file_too(tmp_path: Path) -> None:
    found = shutil.make_archive(str(tmp_path / "package"), "zip", Path(tct_hf.__file__).parents[1], "tct_hf")
    code = f"import sys; sys.path.insert(0, {found!r}); import tct_hf; print(tct_hf.__file__, *tct_hf.__all__)"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [f"{found}/tct_hf/__init__.py", *tct_hf.__all__]
