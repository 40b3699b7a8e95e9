"""Prepared data: built once, by one process at a time, checked at every opening, built again when damaged."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.data.scores import ScoreTable
from tct_hf.data.texts import open_texts
from tct_hf.files import CONTENTS_FILE
from tct_hf.retrieval.triples import load_triples
from tests.rows import write


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


_BUILD = """
import sys, time
from pathlib import Path
from tct_hf import files
from tct_hf.cache import build_once

def build(staging):
    (staging / "who").write_text(sys.argv[2])
    end = time.monotonic() + 60
    while len(list(Path(sys.argv[1]).parent.glob("*.begun"))) < 2:
        assert time.monotonic() < end, "the other process did not begin"
        time.sleep(0.01)
    time.sleep(0.5)

files._SAID_AFTER = 0.1
Path(sys.argv[1]).with_name(sys.argv[2] + ".begun").touch()
print((build_once(Path(sys.argv[1]), build) / "who").read_text())
"""


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", _BUILD, str(tmp_path / "done"), name], stdout=-1, stderr=-1, text=True)
        for name in ("one", "other")
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0] and len({out for out, _ in said}) == 1
    assert sum("waiting for another process, which is writing it" in err for _, err in said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "one.begun", "other.begun"]


KEPT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "triples": ("a query\ta passage\tanother\na second\tits passage\tits other\n", lambda file: load_triples(file)[:]),
    "texts": ("1\tone text\n2\tanother text\n", lambda file: open_texts(file, "collection", None).dataset[:]),
    "scores": ("1\t2\t0.5\n3\t4\t0.25\n", lambda file: ScoreTable.open(file).get([("1", "2"), ("3", "4")])),
}


@pytest.mark.parametrize(("lines", "read"), KEPT.values(), ids=KEPT)
def test_any_byte_that_is_damaged_is_noticed_and_the_data_are_made_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, lines: str, read: Callable[[Path], object]
) -> None:
    source = write(tmp_path / "source.tsv", lines)
    right = read(source)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 1
    for file in files:
        whole = file.read_bytes()
        flipped = (bytes([*whole[:at], whole[at] ^ 4, *whole[at + 1 :]]) for at in range(0, len(whole), 397))
        for broken in (*flipped, whole[:-2], b"", None):
            file.unlink() if broken is None else file.write_bytes(broken)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert read(source) == right
            assert caplog.text.count("; made again") == 1, (file, broken)
            assert file.read_bytes() == whole


def test_what_killed_builds_left_is_removed_by_the_next_that_builds(tmp_path: Path) -> None:
    for name in (".done.12345678.tmp", ".done.abcdef12.tmp", ".other.12345678.tmp"):
        (tmp_path / name).mkdir()
    build_once(tmp_path / "done", lambda staging: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.12345678.tmp", "done"]
    assert [path.name for path in (tmp_path / "done").iterdir()] == [CONTENTS_FILE]


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


def test_files_that_datasets_adds_are_no_damage(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "t.tsv", "".join(f"query {n}\tpassage {n}\tother {n}\n" for n in range(8)))
    load_triples(file).shuffle(seed=1)
    assert list(cache.rglob("cache-*.arrow"))
    assert len(load_triples(file)) == 8
    assert "damaged" not in caplog.text
