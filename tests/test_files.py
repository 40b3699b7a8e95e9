"""Files and folders are never seen half-written, and folders know what made them."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from tct_hf import DenseIndex, files
from tct_hf.data import shards
from tct_hf.data.shards import run_shards
from tct_hf.encoding.kinds import read_modules
from tct_hf.evaluation.experiment import read_log
from tct_hf.evaluation.report import Report
from tct_hf.files import (
    CLAIM_FILE,
    claim,
    is_claimed,
    read_json,
    replace_dir,
    staging_beside,
    working_in,
    write_aside,
    write_json_atomic,
    write_text_atomic,
)
from tct_hf.hub_client import HubError
from tct_hf.retrieval.encode_corpus import encoding_seconds
from tct_hf.retrieval.mining import read_counts
from tct_hf.teachers.base import read_training_scale
from tests.warm_process import run_warm


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_text_is_written_with_its_line_ends_through_links_and_with_the_umask(tmp_path: Path) -> None:
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

    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def staged(tmp_path: Path, content: str, name: str = "staging") -> Path:
    staging = tmp_path / name
    staging.mkdir()
    (staging / "f").write_text(content)
    return staging


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("final_is_there", [True, False])
def test_a_folder_is_replaced_and_what_a_killed_call_left_aside_is_cleared(
    tmp_path: Path, final_is_there: bool, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # where the file system can't
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "deep").mkdir()
    staged(tmp_path / "deep", "before", ".final.replaced")
    if final_is_there:
        staged(tmp_path / "deep", "one", "final")
    replace_dir(staged(tmp_path, "two"), tmp_path / "deep" / "final")
    assert (tmp_path / "deep" / "final" / "f").read_text() == "two"
    assert names(tmp_path / "deep") == ["final"] and names(tmp_path) == ["deep"]


@pytest.mark.parametrize(
    ("source", "target"),
    [("nothing", "final"), ("staging", "file"), ("staging", "staging"), ("staging", "staging/below"), ("staging", "")],
)
def test_impossible_replacements_are_refused_and_change_nothing(tmp_path: Path, source: str, target: str) -> None:
    staging, final = staged(tmp_path, "one"), staged(tmp_path, "old", "final")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        replace_dir(tmp_path / source, tmp_path / target)
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


def test_whoever_reads_a_folder_while_it_is_replaced_finds_one(tmp_path: Path) -> None:
    final = staged(tmp_path, "0", "final")
    if not files._exchange(staged(tmp_path, "0"), final):
        pytest.skip("this file system can't exchange two names")
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        absent = pool.submit(lambda: [not final.is_dir() for _ in iter(done.is_set, True)])
        for number in range(200):
            replace_dir(staged(tmp_path, str(number), f"staging{number}"), final)
        done.set()
    assert absent.result() and not any(absent.result())


def _slowly(items: Sequence[Any]) -> dict[str, Any]:
    time.sleep(0.02)  # so that they meet
    return {"id": pa.array(items)}


SHARDS = [(str(n), [str(n)]) for n in range(3)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: write_text_atomic(folder / "a.txt", "x" * 10_000),
    "settings": lambda folder: claim(folder, SETTINGS),
    "shards": lambda folder: run_shards(folder / "shards", {}, SHARDS, _slowly),
    "an index": lambda folder: DenseIndex.build(np.eye(3, dtype="f4"), list("abc"), "Flat").save(folder / "index"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_several_who_write_the_same_take_turns_and_leave_nothing_else(tmp_path: Path, kind: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: WRITERS[kind](tmp_path), range(8)))
    assert not [path for path in tmp_path.rglob(".*")]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.0123abcd.tmp").write_text("half")
    (tmp_path / ".b.txt.0123abcd.tmp").write_text("another's")
    write_text_atomic(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == [".b.txt.0123abcd.tmp", "a.txt"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("Error in write_index: write error in index.faiss: 0 != 1 (No space left on device)"),
]


@pytest.mark.parametrize("error", FULL, ids=["errno", "quota", "faiss"])
@pytest.mark.parametrize("block", [write_aside, staging_beside, working_in])
def test_a_full_disk_is_told_with_the_path_and_the_room_that_is_left(
    tmp_path: Path, block: Any, error: Exception
) -> None:
    said = r"disk is full \([\d,.]+ MB free\): .*one can't be written.*goes on"
    with pytest.raises(OSError, match=said) as caught, block(tmp_path / "one"):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is error
    with pytest.raises(HubError, match="answered 413"), block(tmp_path / "one"):  # the disk of a server
        raise HubError("the Hub answered 413 (No space left on device)")


@pytest.mark.parametrize("missing", [None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_the_second_who_would_fill_a_folder_waits_and_says_so(
    tmp_path: Path, missing: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_SAID_AFTER", 0.05)
    if missing:
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(missing, "of the file system")))
    with ThreadPoolExecutor(1) as pool:
        with working_in(tmp_path):
            second = pool.submit(lambda: working_in(tmp_path).__enter__())
            while not caplog.messages and not second.done():
                time.sleep(0.01)
            assert not second.done()
        second.result()
    assert f"{tmp_path}: waiting for another process, which is writing it." in caplog.messages
    with working_in(tmp_path):
        pass
    assert not names(tmp_path)


def test_a_limit_of_the_system_is_told_of_every_library(tmp_path: Path) -> None:
    """Files of at most 20 kB, which Arrow, numpy and Faiss each say in their own way."""
    done = run_warm(["-c", _LIMITED, str(tmp_path)], env=os.environ)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3 and all("the disk is full" in line for line in said), done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "tct_settings.json"]


_LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from tct_hf import DenseIndex, SparseIndex
from tct_hf.cache import build_once
from tct_hf.data.shards import run_shards

folder, vectors = Path(sys.argv[1]), np.random.rand(2000, 16).astype("float32")
index = DenseIndex.build(vectors, list(map(str, range(2000))), "Flat")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: index.save(folder / "index"),
    lambda: run_shards(folder / "shards", {}, [("a", ["a"])], lambda items: {"id": pa.array(range(10_000))}),
    lambda: build_once(folder / "cache", lambda staging: np.save(staging / "a.npy", vectors)),
):
    try:
        write()
    except OSError as error:
        print(error)
"""


def test_what_is_not_json_is_refused_with_the_file_it_was_for(tmp_path: Path) -> None:
    for wrong in (float("nan"), object()):
        with pytest.raises(ValueError, match=r"a\.json.*JSON"):
            write_json_atomic(tmp_path / "a.json", wrong)


DEEP = b'{"a":' * 200 + b"1" + b"}" * 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, DEEP, b"7", b'{"other": 1}'])
def test_a_damaged_file_of_our_own_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "small.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"small\.json is not JSON that can be used \(.*\): write it again"):
        read_json(file, "write it again", needs=["seconds"])


READERS: dict[str, Callable[[Path], object]] = {
    "tct_settings.json": lambda folder: claim(folder, SETTINGS),
    "manifest.json": lambda folder: shards.read_manifest(folder, "shards"),
    "encoding_seconds.json": encoding_seconds,
    "summary.json": read_counts,
    "training_log.json": read_log,
    "modules.json": read_modules,
    "tct_teacher.json": lambda folder: read_training_scale(str(folder)),
    "report.json": Report.load,
}


@pytest.mark.parametrize("kept", [3, None, ["model"], {"model": 3}])
def test_names_of_another_kind_hide_no_claim(tmp_path: Path, kept: Any) -> None:
    (tmp_path / "result").write_text("x")
    write_json_atomic(tmp_path / CLAIM_FILE, {"model": "0123", "names": kept})
    claim(tmp_path, {"model": "0123"}, {"model": "me/it"})
    with pytest.raises(ValueError, match=r"holds a run with model = .*but now model = 'me/it' \(4567\)"):
        claim(tmp_path, {"model": "4567"}, {"model": "me/it"})


@pytest.mark.parametrize("counts", ["[]", "7", "{}", '{"queries": "x"}', '{"other": 1}'])
def test_figures_of_other_kinds_are_refused_with_their_file(tmp_path: Path, counts: str) -> None:
    (tmp_path / "summary.json").write_text(f'{{"counts": {counts}}}')
    with pytest.raises(ValueError, match=r"summary\.json does not hold the counts of mining: delete the folder"):
        read_counts(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"7"])
@pytest.mark.parametrize("name", READERS)
def test_each_reader_names_its_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "weights").write_text("x")
    with pytest.raises(ValueError, match=name):
        READERS[name](tmp_path)
