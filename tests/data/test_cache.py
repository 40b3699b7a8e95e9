from __future__ import annotations

from pathlib import Path

import pytest

from tct_hf.cache import build_once, default_cache_dir


def test_folder_is_built_once_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build_once(tmp_path / "done", fail)
    assert list(tmp_path.iterdir()) == []
    calls: list[Path] = []
    for _ in range(2):
        build_once(tmp_path / "a" / "done", calls.append)
    assert len(calls) == 1


def test_slower_of_two_builders_takes_what_the_faster_made(tmp_path: Path) -> None:
    final = tmp_path / "done"

    def overtaken(staging: Path) -> None:
        (staging / "who").write_text("slow")
        final.mkdir()
        (final / "who").write_text("fast")

    assert (build_once(final, overtaken) / "who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_cache_folder_follows_the_environment_and_an_unwritable_one_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TCT_HF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "tct_hf"
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="TCT_HF_CACHE"):
        build_once(tmp_path / "file" / "done", lambda staging: None)
