"""Nobody meets a half-written file or directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tct_hf.files import claim, is_claimed, replace_dir, write_aside, write_json_atomic, write_text_atomic


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_text_is_written_with_its_line_ends_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = write_text_atomic(tmp_path / "new" / "a.txt", "é\r\nb\n")
    assert path.read_bytes() == "é\r\nb\n".encode()
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(source: object, target: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_text_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = write_text_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="this is a directory"):
        write_text_atomic(tmp_path, "x")


def test_json_round_trips_and_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = write_json_atomic(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}
    for wrong in (float("nan"), object()):
        with pytest.raises(ValueError, match=r"a\.json.*JSON"):
            write_json_atomic(path, wrong)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}


def staged(tmp_path: Path, content: str, name: str = "staging") -> Path:
    staging = tmp_path / name
    staging.mkdir()
    (staging / "f").write_text(content)
    return staging


def test_a_directory_is_put_in_place_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        replace_dir(staged(tmp_path, content), tmp_path / "deep" / "final")
        assert (tmp_path / "deep" / "final" / "f").read_text() == content
        assert names(tmp_path / "deep") == ["final"] and names(tmp_path) == ["deep"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = replace_dir(staged(tmp_path, "one"), tmp_path / "final")
    staging = staged(tmp_path, "two")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source == staging:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="disk gone"):
        replace_dir(staging, final)
    assert (final / "f").read_text() == "one" and names(tmp_path) == ["final", "staging"]


@pytest.mark.parametrize("final_is_there", [True, False])
def test_what_a_killed_call_left_aside_is_cleared(tmp_path: Path, final_is_there: bool) -> None:
    staged(tmp_path, "before", ".final.replaced")
    if final_is_there:
        staged(tmp_path, "one", "final")
    replace_dir(staged(tmp_path, "two"), tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "two" and names(tmp_path) == ["final"]


def test_impossible_replacements_are_refused_and_change_nothing(tmp_path: Path) -> None:
    staging = staged(tmp_path, "one")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="nothing"):
        replace_dir(tmp_path / "nothing", tmp_path / "final")
    with pytest.raises(NotADirectoryError, match="file"):
        replace_dir(staging, tmp_path / "file")
    for inside in (staging, staging / "below", tmp_path):
        with pytest.raises(ValueError, match="inside the other"):
            replace_dir(staging, inside)
    assert names(tmp_path) == ["file", "staging"]


SETTINGS = {"seed": 1, "data": {"source": "a", "depth": 5}, "corpus": "123"}


def test_a_folder_with_the_work_of_other_settings_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    claim(tmp_path / "work", SETTINGS)
    assert is_claimed(tmp_path / "work", SETTINGS)
    (tmp_path / "work" / "weights").write_text("x")
    other = {"seed": 1, "data": {"source": "b", "depth": 6}, "corpus": "456"}
    for refuse in (claim, is_claimed):
        with pytest.raises(ValueError, match=r"work holds a run with data.source = 'a', but now data.source = 'b'"):
            refuse(tmp_path / "work", other)
    with pytest.raises(ValueError, match=r"data.depth = 5, but now data.depth = None"):
        claim(tmp_path / "work", {**SETTINGS, "data": {"source": "a"}})
    claim(tmp_path / "work", {**SETTINGS, "new": None, "data": {**SETTINGS["data"], "new": None}})  # type: ignore[dict-item]


def test_a_folder_without_work_takes_new_settings(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path / "work", SETTINGS)
    claim(tmp_path / "work", SETTINGS)
    claim(tmp_path / "work", {"seed": 2})
    (tmp_path / "work" / "weights").write_text("x")
    assert is_claimed(tmp_path / "work", {"seed": 2})


def test_a_file_written_aside_takes_its_name_when_the_block_ends_well_and_leaves_nothing_otherwise(
    tmp_path: Path,
) -> None:
    final = tmp_path / "new" / "rows.bin"
    with write_aside(final) as aside:
        aside.write_bytes(b"first")
        assert aside.parent == final.parent and not final.exists()
    with pytest.raises(RuntimeError), write_aside(final) as aside:
        aside.write_bytes(b"half of the sec")
        raise RuntimeError
    assert final.read_bytes() == b"first" and [file.name for file in final.parent.iterdir()] == ["rows.bin"]
