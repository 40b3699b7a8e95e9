"""Files and folders are never seen half-written, and folders know what made them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tct_hf.files import claim, is_claimed, replace_dir, write_aside, write_json_atomic, write_text_atomic


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_text_is_written_with_its_line_ends_through_links_and_with_the_umask(
    tmp_path: Path,
) -> None:
    old = os.umask(0o022)
    try:
        path = write_text_atomic(tmp_path / "new" / "a.txt", "é\r\nb\n")
    finally:
        os.umask(old)
    assert path.read_bytes() == "é\r\nb\n".encode() and path.stat().st_mode & 0o777 == 0o644
    (tmp_path / "new" / "link.txt").symlink_to("a.txt")
    write_text_atomic(tmp_path / "new" / "link.txt", "new")
    assert (tmp_path / "new" / "link.txt").is_symlink() and path.read_text() == "new"
    assert names(tmp_path / "new") == ["a.txt", "link.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    with write_aside(path) as aside:
        aside.write_text("old")
        assert aside.parent == path.parent and not path.exists()
    with pytest.raises(RuntimeError), write_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError

    def refuse(source: object, target: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_json_round_trips_and_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = write_json_atomic(tmp_path / "a.json", {"é": [1, None]})
    for wrong in (float("nan"), object()):
        with pytest.raises(ValueError, match=r"a\.json.*JSON"):
            write_json_atomic(path, wrong)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}


def staged(tmp_path: Path, content: str, name: str = "staging") -> Path:
    staging = tmp_path / name
    staging.mkdir()
    (staging / "f").write_text(content)
    return staging


@pytest.mark.parametrize("final_is_there", [True, False])
def test_a_folder_is_replaced_and_what_a_killed_call_left_aside_is_cleared(
    tmp_path: Path, final_is_there: bool
) -> None:
    (tmp_path / "deep").mkdir()
    staged(tmp_path / "deep", "before", ".final.replaced")
    if final_is_there:
        staged(tmp_path / "deep", "one", "final")
    replace_dir(staged(tmp_path, "two"), tmp_path / "deep" / "final")
    assert (tmp_path / "deep" / "final" / "f").read_text() == "two"
    assert names(tmp_path / "deep") == ["final"] and names(tmp_path) == ["deep"]


def test_impossible_replacements_are_refused_and_change_nothing(tmp_path: Path) -> None:
    staging, final = staged(tmp_path, "one"), staged(tmp_path, "old", "final")
    (tmp_path / "file").write_text("x")
    for source, target in (
        (tmp_path / "nothing", final),
        (staging, tmp_path / "file"),
        (staging, staging),
        (staging, staging / "below"),
        (staging, tmp_path),
    ):
        with pytest.raises(OSError):
            replace_dir(source, target)
    assert names(tmp_path) == ["file", "final", "staging"] and names(staging) == ["f"]
    assert (final / "f").read_text() == "old"


SETTINGS = {"seed": 1, "data": {"source": "a", "depth": 5}, "corpus": "123"}


def test_a_folder_with_the_work_of_other_settings_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path / "work", SETTINGS)
    claim(tmp_path / "work", {"seed": 2})
    claim(tmp_path / "work", SETTINGS)  # nothing was made with the others
    assert is_claimed(tmp_path / "work", SETTINGS)
    (tmp_path / "work" / "weights").write_text("x")
    other = {"seed": 1, "data": {"source": "b", "depth": 6}, "corpus": "456"}
    for refuse in (claim, is_claimed):
        with pytest.raises(ValueError, match=r"work holds a run with data.source = 'a', but now data.source = 'b'"):
            refuse(tmp_path / "work", other)
    with pytest.raises(ValueError, match=r"data.depth = 5, but now data.depth = None"):
        claim(tmp_path / "work", {**SETTINGS, "data": {"source": "a"}})
    claim(tmp_path / "work", {**SETTINGS, "new": None, "data": {"source": "a", "depth": 5, "new": None}})
