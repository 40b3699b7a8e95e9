"""A corpus to shards that survive a kill, are shared out, refused and repaired; for dense and sparse encoders."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from tct_hf import load_vectors
from tct_hf.data.ids import SeenIds
from tct_hf.data.shards import _write_shard
from tct_hf.retrieval import encode
from tct_hf.retrieval.vectors import vector_table
from tests.encode_worker import SHARD, passages
from tests.retrieval.encoded import as_job, content, encoded
from tests.warm_process import run_warm

# Interrupted, and shared out


def worker(saved: Path, output: Path, *killed: str, processes: int = 1) -> str:
    words = ["-m", "tests.encode_worker", str(saved), str(output), *killed]
    done = run_warm(words, env=os.environ, processes=processes)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr[-4000:]
    return done.stdout


def test_a_stopped_encoding_goes_on_in_two_processes_to_the_bytes_of_one(either: Any, tmp_path: Path) -> None:
    encoded(either, tmp_path / "whole")

    def stopping() -> Iterator[dict[str, str]]:
        yield from list(passages())[: SHARD + 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(either, tmp_path / "v", stopping())
    with pytest.raises(FileNotFoundError, match="not finished; run again"):
        load_vectors(tmp_path / "v")
    before = (tmp_path / "v" / "00000.arrow").stat().st_mtime_ns
    either.encode_query(["words"])  # having encoded queries since must not count as another model
    barrier, models = threading.Barrier(2), [either, copy.deepcopy(either)]

    def process(rank: int) -> dict[str, Any]:
        wait = partial(barrier.wait, 60)
        state: Any = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=wait)
        return encoded(models[rank], tmp_path / "v", state=state)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert first == second and content(tmp_path / "v") == content(tmp_path / "whole")
    assert (tmp_path / "v" / "00000.arrow").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes_to_the_bytes_of_an_undisturbed_one(
    student: Any, saved: Path, tmp_path: Path
) -> None:
    encoded(student, tmp_path / "whole")
    for killed, whole in (("tct_settings.json", 0), ("00001.arrow", 1)):
        worker(saved, tmp_path / "v", killed)
        assert len(list((tmp_path / "v").glob("0*.arrow"))) == whole
    said = worker(saved, tmp_path / "v", processes=2)
    assert "process 0 of 2" in said and "process 1 of 2" in said
    assert content(tmp_path / "v") == content(tmp_path / "whole")


# As jobs that share nothing but the folder


def test_jobs_in_any_order_make_the_bytes_of_one_and_missing_ones_are_named(either: Any, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    whole, lines = encoded(either, tmp_path / "whole"), list[str]()
    assert as_job(either, folder, 2, write=lines.append) == {} and lines[-1].startswith("  5 passages in ")
    with pytest.raises(FileNotFoundError, match=r"4 of 5 .* missing \(00000\.arrow, 00001\.arrow, 00003.*: 0, 1$"):
        load_vectors(folder)

    def stopping() -> Iterator[dict[str, str]]:
        yield from list(passages())[: 3 * SHARD + 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # an iterable is read to the end of what is needed
        as_job(either, folder, 0, corpus=stopping())
    with pytest.raises(FileNotFoundError, match=r"3 of 5 .* \(00001\.arrow, 00003\.arrow, 00004\.arrow\).*: 0, 1$"):
        load_vectors(folder)
    assert as_job(either, folder, 1) == {}
    before = (folder / "00000.arrow").stat().st_mtime_ns
    assert as_job(either, folder, 0, corpus=passages(), write=lines.append) == whole
    assert lines[-1].startswith("  10 passages (5 were there) in ")
    assert content(folder) == content(tmp_path / "whole") and before == (folder / "00000.arrow").stat().st_mtime_ns
    assert as_job(either, folder, 1) == whole  # again, with all there
    (folder / "manifest.json").unlink()
    assert as_job(either, folder, 7, jobs=9) == whole  # nothing of its own
    (folder / "00003.arrow").unlink()
    assert encoded(either, folder) == whole and content(folder) == content(tmp_path / "whole")


def test_a_job_reads_only_its_own_rows_of_a_data_set(student: Any, tmp_path: Path) -> None:
    corpus = Dataset.from_list(list(passages()))
    corpus.select = Mock(side_effect=corpus.select)
    as_job(student, tmp_path / "v", 1, corpus=corpus)
    read = [list(call.args[0]) for call in corpus.select.call_args_list]
    assert read == [list(range(5)), list(range(5, 10)), list(range(20, 23))]  # the first is what precision is told by


def test_all_jobs_take_the_precision_of_the_first(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(encode, "ENOUGH_COSINE", 0.9)
    as_job(student, tmp_path, 1, jobs=9, corpus=passages(3), precision="auto")  # claims, and has nothing to encode
    monkeypatch.setattr(encode, "ENOUGH_COSINE", 2.0)
    assert as_job(student, tmp_path, 0, jobs=1, corpus=passages(3), precision="auto")["precision"] == "bf16"
    with pytest.raises(ValueError, match="precision = 'bf16', but now precision = 'fp32'"):
        as_job(student, tmp_path, 1, jobs=9, corpus=passages(3))


def test_jobs_of_another_corpus_or_model_and_impossible_ones_are_refused(student: Any, tmp_path: Path) -> None:
    as_job(student, tmp_path / "v", 1)
    with pytest.raises(ValueError, match="another job was given 23 passages, this one 22; give all jobs the same"):
        as_job(student, tmp_path / "v", 0, corpus=Dataset.from_list(list(passages(22))))
    with pytest.raises(ValueError, match="shard_size = 5, but now shard_size = 6"):
        as_job(student, tmp_path / "v", 0, shard_size=6)
    for index, jobs in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match=r"job=\(.*: the first must be a number from 0"):
            as_job(student, tmp_path / "none", index, jobs)
    with pytest.raises(ValueError, match="2 processes share this job; start a job for each"):
        as_job(student, tmp_path / "none", 0, state=SimpleNamespace(process_index=0, num_processes=2))
    assert not (tmp_path / "none").exists()
    twice = [*passages(20), *passages(3)]
    assert as_job(student, tmp_path / "twice", 0, 2, twice) == {}
    with pytest.raises(ValueError, match=r"two passages have the id 'p0' \(again at number 20\)"):
        as_job(student, tmp_path / "twice", 1, 2, twice)


@pytest.mark.slow
def test_four_jobs_started_together_of_which_one_is_killed_make_the_bytes_of_one(
    student: Any, saved: Path, tmp_path: Path
) -> None:
    encoded(student, tmp_path / "whole")
    folder, dying = tmp_path / "v", 1  # it has two shards, and is killed before the second is put in place
    words = [sys.executable, "-m", "tests.encode_worker", str(saved), str(folder)]

    def start(index: int, killed: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen([*words, killed, str(index), "4"], stderr=subprocess.PIPE, text=True)

    jobs = [start(index, "00001.arrow" if index == dying else "") for index in range(4)]
    for index, job in enumerate(jobs):
        _, errors = job.communicate()
        assert job.returncode == (-signal.SIGKILL if index == dying else 0), errors[-4000:]
    assert not (folder / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 .* missing \(00001\.arrow\); .*: 1$"):
        load_vectors(folder)
    again = start(dying)
    assert again.communicate() and again.returncode == 0
    assert content(folder) == content(tmp_path / "whole")


# Faults


def test_a_folder_of_another_model_or_other_settings_is_refused_by_what_differs(student: Any, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    manifest = encoded(student, folder, model_id="first", tokens_per_pass=64)
    before = content(folder)
    for change, message in (
        ({"shard_size": 6}, "shard_size = 5, but now shard_size = 6"),
        ({"dtype": "float16"}, "dtype = 'float32', but now dtype = 'float16'"),
        ({"tokens_per_pass": None}, "tokens_per_pass = 64, but now tokens_per_pass = 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            encoded(student, folder, **{"tokens_per_pass": 64, **change})
    (folder / "00001.arrow").unlink()  # the same model in another place goes on
    moved = encoded(student, folder, model_id="there", tokens_per_pass=64)
    assert moved == {**manifest, "model": {**manifest["model"], "id": "there"}}
    before["manifest.json"] = (folder / "manifest.json").read_bytes()
    student.prompts["document"] = "passage: "
    with pytest.raises(ValueError, match=r"encoding\.prompt = '\[D\] ', but now encoding\.prompt = 'passage: '"):
        encoded(student, folder, tokens_per_pass=64)
    with torch.no_grad():
        student[0].model.embeddings.word_embeddings.weight[7] += 1
    with pytest.raises(ValueError, match=r"weights_sha256 = 'first' \(\w{12}\), but now weights_sha256 = 'second' \("):
        encoded(student, folder, model_id="second")
    assert content(folder) == before


def test_a_folder_of_another_corpus_is_refused_by_the_shard_that_differs(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v")
    right = list(passages())
    for given, what in (
        ([right[0], {**right[1], "text": "other words"}, *right[2:]], "00000.arrow was made of other passages"),
        ([right[0], {**right[1], "id": "other"}, *right[2:]], "00000.arrow was made of other passages"),
        (right[:22], "00004.arrow was made of other passages"),
        (right[:10], "00002.arrow was made of another corpus .*ends before"),
    ):
        with pytest.raises(ValueError, match=what):
            encoded(student, tmp_path / "v", corpus=given)


def texts_of(texts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": name, "text": text} for name, text in texts.items()]


BLANK = texts_of({"p0": "dense", "blank": " \n"})


@pytest.mark.parametrize(
    ("corpus", "settings", "message"),
    [
        ([], {}, "it has no passage"),
        (BLANK, {}, r"'blank' \(number 1\) has no words: .*allow_empty=True"),
        (texts_of({"p0": "a", "p\ud800": "b"}), {}, r"passage number 1 .*column 'id': half a surrogate"),
        ([*texts_of({"a": "a", "b": "a"}), *texts_of({"b": "c"})], {}, r"the id 'b' \(again at number 2\)"),
        ([*passages(3), *texts_of({"bad": None})], {}, r"corpus, passage number 3 .*column 'text': no text"),
        (["a text"], {}, r"corpus, passage number 0 is a str: give rows of id and text"),
        (None, {"precision": "fp16"}, "precision='fp16' is not known"),
        (None, {"shard_size": 0}, "shard_size must be at least 1"),
        (None, {"tokens_per_pass": -1}, "tokens_per_pass"),
    ],
)
def test_wrong_passages_and_settings_are_refused_and_leave_no_folder(
    student: Any, tmp_path: Path, corpus: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(student, tmp_path / "v", corpus=corpus, **settings)
    assert not (tmp_path / "v").exists()


def test_a_nan_vector_is_refused_with_its_passage(student: Any, sparse_student: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        student[0].model.embeddings.word_embeddings.weight[student.tokenizer.convert_tokens_to_ids("z")] = float("nan")
        sparse_student[0].model.cls.predictions.bias.fill_(torch.nan)
    encoded(student, tmp_path / "blank", corpus=BLANK, allow_empty=True)  # the vector of no words is zero
    assert not load_vectors(tmp_path / "blank")[1][1].any()
    corpus = [*passages(7), {"id": "bad", "text": "z"}]
    with pytest.raises(ValueError, match=r"'bad' has a NaN or infinite vector .*computed in fp32"):
        encoded(student, tmp_path / "v", corpus=corpus)
    assert not (tmp_path / "v" / "00001.arrow").exists()
    with pytest.raises(ValueError, match="'p0' has a NaN or infinite vector"):
        encoded(sparse_student, tmp_path / "w")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(file.read_bytes()[:-100]), Path.unlink])
def test_a_corrupt_or_missing_shard_is_refused_by_name_and_fixed_as_told(
    either: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "v"
    encoded(either, folder)
    before = content(folder)
    damage(folder / "00002.arrow")
    error = FileNotFoundError if damage is Path.unlink else ValueError
    fix = r"00002\.arrow.* run again what wrote the folder"
    with pytest.raises(error, match=fix):
        load_vectors(folder)
    if damage is not Path.unlink:
        with pytest.raises(ValueError, match=fix):
            encoded(either, folder)
    (folder / "00002.arrow").unlink(missing_ok=True)
    encoded(either, folder)
    assert content(folder) == before
    if damage is Path.unlink:  # a whole shard, but not the one that the manifest announces
        ids, whole, _ = load_vectors(folder)
        made_of = pa.ipc.open_stream(pa.memory_map(str(folder / "00001.arrow"))).schema.metadata[b"tct_hf"].decode()
        _write_shard(folder / "00001.arrow", vector_table(ids[5:10], whole[5:10][::-1]), made_of)
        for again in (load_vectors, partial(encoded, either)):
            with pytest.raises(ValueError, match=r"00001\.arrow is damaged or was altered"):
                again(folder)


def test_seen_ids_are_those_of_a_set() -> None:
    draw, seen, known = random.Random(0), SeenIds(), set[str]()
    for _ in range(200):
        ids = [str(draw.randint(0, 20_000)) for _ in range(draw.randint(0, 30))]
        assert seen.add(ids) == [at for at, name in enumerate(ids) if name in known or name in ids[:at]]
        known.update(ids)
