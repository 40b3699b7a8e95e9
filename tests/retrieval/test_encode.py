from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tct_hf import encode_corpus, load_vectors
from tct_hf.retrieval import text_vectors
from tct_hf.retrieval.encode import encode_texts
from tct_hf.retrieval.text_vectors import choose_precision
from tests.encode_worker import COUNT, SHARD, passages
from tests.models import tiny_bert, tiny_mpnet
from tests.warm_process import run_warm

ROOT = Path(__file__).parents[2]
TEXTS = [passage["text"] for passage in passages()]


def quiet(line: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tct_hf import build_student, save_student

    path = tmp_path_factory.mktemp("models")
    return save_student(
        build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=24), path / "student"
    )


@pytest.fixture
def student(saved: Path) -> SentenceTransformer:
    return SentenceTransformer(str(saved), device="cpu")


def encoded(model: Any, folder: Path, corpus: Any = None, **settings: Any) -> dict[str, Any]:
    settings = {"precision": "fp32", "shard_size": SHARD, "write": quiet, **settings}
    return encode_corpus(model, passages() if corpus is None else corpus, folder, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# In memory


@pytest.mark.parametrize("limits", [{}, {"batch_size": 3}, {"tokens_per_pass": 1}, {"tokens_per_pass": 40}])
@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_sentence_transformers_in_the_order_given(
    student: Any, task: str, limits: dict[str, int]
) -> None:
    encode = student.encode_query if task == "query" else student.encode_document
    np.testing.assert_allclose(encode_texts(student, TEXTS, task=task, **limits), encode(TEXTS), atol=1e-5)


def test_a_text_without_words_and_none_at_all_are_encoded_like_any_other(student: Any) -> None:
    texts = ["", "dense tokens", " "]
    np.testing.assert_allclose(
        encode_texts(student, texts, task="document"), student.encode_document(texts), atol=1e-5
    )
    assert encode_texts(student, [], task="document").shape == (0, 32)


def test_texts_over_several_pools_keep_their_order(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_vectors, "POOL", 7)
    monkeypatch.setattr(text_vectors, "_TOKENISED_TOGETHER", 3)
    np.testing.assert_allclose(
        encode_texts(student, TEXTS, task="document"), student.encode_document(TEXTS), atol=1e-5
    )


def test_another_padding_token_and_a_truncated_dimension_are_followed(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(tiny_mpnet(tmp_path)))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], truncate_dim=8, device="cpu")
    vectors = encode_texts(model, TEXTS, task="document")
    assert vectors.shape == (COUNT, 8)
    np.testing.assert_allclose(vectors, model.encode_document(TEXTS), atol=1e-5)


def test_texts_padded_on_the_left_are_not_cut_but_encoded_in_batches_of_the_model(student: Any) -> None:
    student.tokenizer.padding_side = "left"
    # One by one: this encoder's positions, and so its vectors, follow the padding.
    found = encode_texts(student, TEXTS, task="document", batch_size=1)
    np.testing.assert_allclose(found, student.encode_document(TEXTS, batch_size=1), atol=1e-5)


def test_each_text_is_tokenised_once_and_hardly_any_padding_is_computed(student: Any) -> None:
    seen: list[int] = []
    computed: list[torch.Tensor] = []
    tokenise, forward = student.preprocess, student.forward

    def counted(texts: Any, **kwargs: Any) -> Any:
        seen.append(len(texts))
        return tokenise(texts, **kwargs)

    def kept(features: Any, **kwargs: Any) -> Any:
        computed.append(features["attention_mask"])
        return forward(features, **kwargs)

    student.preprocess, student.forward = counted, kept
    encode_texts(student, TEXTS * 4, task="document", tokens_per_pass=64)
    assert sum(seen) == 4 * COUNT
    assert all(mask.numel() <= 64 for mask in computed)
    assert sum(int(mask.sum()) for mask in computed) > 0.9 * sum(mask.numel() for mask in computed)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"tokens_per_pass": -1}, {"task": "passage"}])
def test_impossible_settings_are_refused_by_name(student: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        encode_texts(student, TEXTS, **{"task": "document", **wrong})


# Precision


@pytest.mark.parametrize(("enough", "chosen"), [(0.9, True), (1.0 + 1e-9, False)])
def test_bfloat16_is_chosen_only_where_the_probed_vectors_stay_the_same(
    student: Any, monkeypatch: pytest.MonkeyPatch, enough: float, chosen: bool
) -> None:
    monkeypatch.setattr("tct_hf.encoding.precision.has_bfloat16", lambda device: True)
    monkeypatch.setattr(text_vectors, "ENOUGH_COSINE", enough)
    bf16, why = choose_precision(student, [*TEXTS, ""])  # the zero vector has no cosine, and is no objection
    assert bf16 is chosen
    assert why["texts"] == COUNT + 1 and 0.9 < why["cosine"] <= 1.0


def test_bfloat16_is_not_chosen_where_the_hardware_lacks_it(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tct_hf.encoding.precision.has_bfloat16", lambda device: False)
    assert choose_precision(student, TEXTS) == (False, {"hardware": False})


def test_the_choice_is_recorded_and_kept_by_a_later_call(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tct_hf.encoding.precision.has_bfloat16", lambda device: True)
    monkeypatch.setattr(text_vectors, "ENOUGH_COSINE", 0.9)
    manifest = encoded(student, tmp_path / "v", precision="auto")
    assert manifest["precision"] == "bf16" and manifest["precision_probe"]["texts"] == SHARD
    monkeypatch.setattr(text_vectors, "ENOUGH_COSINE", 2.0)
    assert encoded(student, tmp_path / "v", precision="auto") == manifest
    with pytest.raises(ValueError, match="precision = 'bf16', but now precision = 'fp32'"):
        encoded(student, tmp_path / "v", precision="fp32")


# A corpus into a folder


def test_a_corpus_becomes_shards_in_its_order_with_a_manifest(student: Any, tmp_path: Path) -> None:
    manifest = encoded(student, tmp_path / "v", model_id="the student")
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    assert (manifest["count"], manifest["dim"], manifest["dtype"]) == (COUNT, 32, "float32")
    assert manifest["model"]["id"] == "the student" and len(manifest["model"]["weights_sha256"]) == 64
    assert manifest["encoding"]["prompt"] == "[D] " and manifest["encoding"]["max_length"] == 24
    ids, vectors, read = load_vectors(tmp_path / "v")
    assert read == manifest
    assert ids == [passage["id"] for passage in passages()]
    assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, student.encode_document(TEXTS), atol=1e-5)


def test_a_data_set_gives_the_bytes_of_the_same_passages_as_an_iterable(student: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    encoded(student, tmp_path / "iterable")
    encoded(student, tmp_path / "set", corpus=Dataset.from_list(list(passages())))
    assert content(tmp_path / "set") == content(tmp_path / "iterable")


def test_vectors_can_be_stored_in_half_the_bytes(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v", dtype="float16")
    _, vectors, manifest = load_vectors(tmp_path / "v")
    assert manifest["dtype"] == "float16" and np.load(tmp_path / "v" / "00000.npy").dtype == np.float16
    np.testing.assert_allclose(vectors, student.encode_document(TEXTS), rtol=2e-3, atol=1e-3)


def test_mapped_vectors_are_the_concatenated_ones_however_rows_are_taken(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v")
    _, whole, _ = load_vectors(tmp_path / "v")
    _, mapped, _ = load_vectors(tmp_path / "v", mmap=True)
    assert len(mapped) == COUNT and mapped.shape == whole.shape and mapped.dtype == whole.dtype
    for rows in (3, -1, slice(None), slice(3, 12), slice(20, 2, -4), [22, 0, 7, 7, 6], slice(4, 4)):
        np.testing.assert_array_equal(mapped[rows], whole[rows])
    np.testing.assert_array_equal(np.asarray(mapped), whole)


def test_the_corpus_is_read_as_it_is_encoded(student: Any, tmp_path: Path) -> None:
    def watched() -> Iterator[dict[str, str]]:
        for row, passage in enumerate(passages()):
            # One shard is held in memory: all before it are on disk.
            assert len(list(tmp_path.glob("v/0*.npy"))) == row // SHARD
            yield passage

    assert encoded(student, tmp_path / "v", corpus=watched())["count"] == COUNT


def test_progress_tells_speed_and_time_left(student: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    ticks = iter(range(10_000))
    settings: dict[str, Any] = {"write": lines.append, "write_every": 0.0, "clock": lambda: float(next(ticks))}
    encoded(student, tmp_path / "v", corpus=list(passages()), **settings)
    assert f" of {COUNT} passages   " in lines[0] and "passages/s" in lines[0] and lines[0].endswith(" left")
    assert lines[-1].startswith(f"  {COUNT} passages in ")
    lines.clear()
    encoded(student, tmp_path / "v", **settings)
    assert len(lines) == 1 and lines[0].startswith(f"  {COUNT} passages ({COUNT} were there) in ")


# Interrupted, and shared out


def worker(saved: Path, output: Path, *killed: str, processes: int = 1) -> str:
    words = ["-m", "tests.encode_worker", str(saved), str(output), *killed]
    done = run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, processes=processes)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "v"
    encoded(SentenceTransformer(str(saved), device="cpu"), output)
    return output


@pytest.mark.parametrize(("killed", "whole"), [("read", 2), ("vectors", 1), ("plan", 0)])
def test_a_killed_run_goes_on_from_its_last_whole_shard_to_the_bytes_of_an_undisturbed_one(
    saved: Path, student: Any, undisturbed: Path, tmp_path: Path, killed: str, whole: int
) -> None:
    output = tmp_path / "v"
    worker(saved, output, killed)
    with pytest.raises(FileNotFoundError, match="not finished; run it again" if whole else "no encoded corpus here"):
        load_vectors(output)
    assert len(list(output.glob("0*.json"))) == whole
    kept = {file.name: file.stat().st_mtime_ns for n in range(whole) for file in output.glob(f"{n:05d}.*")}
    encoded(student, output)
    assert content(output) == content(undisturbed)
    assert all((output / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_two_processes_share_the_shards_and_give_the_bytes_of_one(
    saved: Path, undisturbed: Path, tmp_path: Path
) -> None:
    said = worker(saved, tmp_path / "v", processes=2)
    assert "process 0 of 2" in said and "process 1 of 2" in said
    assert content(tmp_path / "v") == content(undisturbed)


class State:
    """One of several processes, as encode_corpus sees them."""

    def __init__(self, rank: int, processes: int, wait: Callable[[], None]) -> None:
        self.process_index, self.num_processes, self.wait_for_everyone = rank, processes, wait


def test_a_process_encodes_its_share_alone(student: Any, tmp_path: Path) -> None:
    from tct_hf.retrieval import vectors

    written: list[set[int]] = []

    def wait() -> None:
        written.append(vectors.finished_shards(tmp_path / "v"))

    with pytest.raises(FileNotFoundError, match=r"00001\.json is missing"):  # the other process is not there
        encoded(student, tmp_path / "v", state=State(0, 2, wait))
    assert written[-1] == {0, 2, 4}


# Faults


def test_a_folder_of_another_model_is_refused_with_both_names(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v", model_id="first")
    before = content(tmp_path / "v")
    with torch.no_grad():
        student[0].model.embeddings.word_embeddings.weight[7] += 1
    with pytest.raises(
        ValueError, match=r"of the model first \(weights .*but now it is second \(weights .*delete this"
    ):
        encoded(student, tmp_path / "v", model_id="second")
    assert content(tmp_path / "v") == before


def test_the_same_model_in_another_place_goes_on(student: Any, tmp_path: Path) -> None:
    manifest = encoded(student, tmp_path / "v", model_id="here")
    (tmp_path / "v" / "00001.json").unlink()
    assert encoded(student, tmp_path / "v", model_id="there") == manifest


def test_other_settings_are_refused_by_name(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v")
    with pytest.raises(ValueError, match="shard_size = 5, but now shard_size = 6"):
        encoded(student, tmp_path / "v", shard_size=6)
    with pytest.raises(ValueError, match="dtype = 'float32', but now dtype = 'float16'"):
        encoded(student, tmp_path / "v", dtype="float16")
    student.prompts["document"] = "passage: "
    with pytest.raises(ValueError, match=r"encoding\.prompt = '\[D\] ', but now encoding\.prompt = 'passage: '"):
        encoded(student, tmp_path / "v")


def test_settings_of_a_folder_without_a_whole_shard_are_replaced(student: Any, tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from passages(3)
        yield {"id": "bad", "text": None}

    with pytest.raises(ValueError, match=r"passage number 3 .*text = None"):
        encoded(student, tmp_path / "v", corpus=broken(), shard_size=3)
    (tmp_path / "v" / "00000.json").unlink(missing_ok=True)
    assert encoded(student, tmp_path / "v")["count"] == COUNT


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda rows: rows[1].update(text="other words"), "the ids are the same, but a text is not"),
        (lambda rows: rows[1].update(id="other"), "passage 1 of it was 'p1', but now is 'other'"),
        (lambda rows: rows.__delitem__(slice(22, None)), "it has 3 passages, but now there are 2"),
        (lambda rows: rows.__delitem__(slice(10, None)), "ends before"),
        (lambda rows: rows.extend([{"id": "new", "text": "a query"}]), "it has 3 passages, but now there are 4"),
    ],
)
def test_a_folder_of_another_corpus_is_refused_with_what_differs(
    student: Any, tmp_path: Path, change: Callable[[list[dict[str, str]]], None], what: str
) -> None:
    encoded(student, tmp_path / "v")
    rows = list(passages())
    change(rows)
    with pytest.raises(ValueError, match="was made of another corpus") as error:
        encoded(student, tmp_path / "v", corpus=rows)
    assert what in str(error.value)


def test_a_folder_that_holds_something_else_is_left_alone(student: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something other than an encoded corpus"):
        encoded(student, tmp_path)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_an_empty_corpus_is_refused_and_leaves_no_folder(student: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no passage"):
        encoded(student, tmp_path / "v", corpus=[])
    assert not (tmp_path / "v").exists()


def test_a_passage_without_words_is_refused_by_id_unless_it_is_wanted(student: Any, tmp_path: Path) -> None:
    rows = [{"id": "p0", "text": "dense"}, {"id": "blank", "text": " \n"}]
    with pytest.raises(ValueError, match=r"'blank' \(number 1\) has no words: .*allow_empty=True"):
        encoded(student, tmp_path / "v", corpus=rows)
    encoded(student, tmp_path / "w", corpus=rows, allow_empty=True)
    assert not load_vectors(tmp_path / "w")[1][1].any()


def test_a_nan_vector_is_refused_with_its_passage(student: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        student[0].model.embeddings.word_embeddings.weight[student.tokenizer.convert_tokens_to_ids("z")] = float("nan")
    rows = [*passages(7), {"id": "bad", "text": "z"}]
    with pytest.raises(ValueError, match=r"'bad' has a NaN or infinite vector .*computed in fp32"):
        encoded(student, tmp_path / "v", corpus=rows)
    assert not (tmp_path / "v" / "00001.json").exists()


def test_a_stored_nan_is_refused_with_file_and_passage(student: Any, tmp_path: Path) -> None:
    import hashlib

    encoded(student, tmp_path / "v")
    file = tmp_path / "v" / "00001.npy"
    vectors = np.load(file)
    vectors[2, 3] = np.nan
    np.save(file, vectors)
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    manifest["shards"][1]["vectors_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "v" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"00001\.npy: row 2 \(passage 'p7'\) has a NaN"):
        load_vectors(tmp_path / "v")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["00002.npy", "00002.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_corrupt_or_missing_shard_is_refused_by_name_and_mended_as_told(
    student: Any, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "v"
    encoded(student, folder)
    before = content(folder)
    damage(folder / name)
    error = FileNotFoundError if damage is Path.unlink else ValueError
    with pytest.raises(error, match=rf"{name}.* delete 00002\.npy and 00002\.json there, and encode again"):
        load_vectors(folder)
    for ending in ("npy", "json"):
        (folder / f"00002.{ending}").unlink(missing_ok=True)
    encoded(student, folder)
    assert content(folder) == before


def test_encoding_again_finds_an_altered_shard(student: Any, tmp_path: Path) -> None:
    encoded(student, tmp_path / "v")
    flip(tmp_path / "v" / "00002.npy")
    with pytest.raises(ValueError, match=r"00002\.npy is damaged or was altered"):
        encoded(student, tmp_path / "v")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_shard_of_another_shape_is_refused_without_checksums(student: Any, tmp_path: Path, mmap: bool) -> None:
    encoded(student, tmp_path / "v")
    np.save(tmp_path / "v" / "00000.npy", np.zeros((5, 7), dtype=np.float32))
    with pytest.raises(ValueError, match=r"00000\.npy: float32 of shape \(5, 7\) .*\(5, 32\) is announced"):
        load_vectors(tmp_path / "v", verify=False, mmap=mmap)


def record(folder: Path, shard: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter the record of a shard."""
    file = folder / f"{shard:05d}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_an_id_that_comes_twice_is_refused_when_its_shard_is_read(student: Any, tmp_path: Path) -> None:
    corpus = [*passages(), {"id": "p3", "text": "tokens"}, *passages()]
    with pytest.raises(ValueError, match=rf"two passages have the id 'p3' \(again at number {COUNT}\)"):
        encoded(student, tmp_path / "v", corpus=corpus)
    assert len(list((tmp_path / "v").glob("0*.npy"))) == COUNT // SHARD
    with pytest.raises(ValueError, match=r"'p1' \(again at number 2\)"):
        encoded(student, tmp_path / "w", corpus=[{"id": f"p{row}", "text": "a"} for row in (0, 1, 1)])
    assert not (tmp_path / "w").exists()


def test_two_passages_with_one_id_are_refused_by_the_reader(student: Any, tmp_path: Path) -> None:
    import hashlib

    encoded(student, tmp_path / "v")
    record(tmp_path / "v", 4, lambda content: content["ids"].__setitem__(1, "p3"))
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    digest = hashlib.sha256((tmp_path / "v" / "00004.json").read_bytes()).hexdigest()
    manifest["shards"][4]["record_sha256"] = digest
    (tmp_path / "v" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="two passages have the id 'p3'"):
        load_vectors(tmp_path / "v")


def test_an_id_that_utf8_cannot_hold_is_refused_by_name(student: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the id 'p\\ud800' \(number 1\) has a lone surrogate"):
        encoded(student, tmp_path / "v", corpus=[{"id": "p0", "text": "a"}, {"id": "p\ud800", "text": "b"}])
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content["ids"].reverse(), "its ids are not those of its passages"),
        (lambda content: content.update(count=4), "its ids are not those of its passages"),
        (lambda content: content.update(dim=31), r"it announces 5 x 31 of \(5, 32\)"),
    ],
)
def test_encoding_again_does_not_approve_an_altered_record(
    student: Any, tmp_path: Path, change: Any, why: str, finished: bool
) -> None:
    folder = tmp_path / "v"
    encoded(student, folder)
    before = content(folder)
    record(folder, 2, change)
    if not finished:
        (folder / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=rf"00002\.json is damaged or was altered \({why}\): delete it and 00002\.npy"
    ):
        encoded(student, folder)
    for ending in ("npy", "json"):
        (folder / f"00002.{ending}").unlink()
    encoded(student, folder)
    assert content(folder) == before


def test_encoding_again_compares_shards_with_the_manifest_that_is_there(student: Any, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "v"
    encoded(student, folder)
    np.save(folder / "00001.npy", np.load(folder / "00001.npy")[::-1])
    digest = hashlib.sha256((folder / "00001.npy").read_bytes()).hexdigest()
    record(folder, 1, lambda content: content.update(vectors_sha256=digest))
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"00001\.npy is damaged or was altered \(manifest\.json announces another"):
        encoded(student, folder)
    assert (folder / "manifest.json").read_bytes() == manifest


def test_tokens_a_pass_and_device_are_kept_by_a_folder(student: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens_per_pass must be at least 1, got 0"):
        encoded(student, tmp_path / "v", tokens_per_pass=0)
    assert not (tmp_path / "v").exists()
    manifest = encoded(student, tmp_path / "v", tokens_per_pass=64)
    assert (manifest["tokens_per_pass"], manifest["device"]) == (64, "cpu")
    with pytest.raises(ValueError, match=r"tokens_per_pass = 64, but now tokens_per_pass = 2048"):
        encoded(student, tmp_path / "v")
    plan = tmp_path / "v" / "encoding.json"
    plan.write_text(plan.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(ValueError, match="device = 'cuda', but now device = 'cpu'"):
        encoded(student, tmp_path / "v", tokens_per_pass=64)


def test_a_model_without_a_greatest_length_is_encoded(student: Any, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    model = SentenceTransformer(modules=[StaticEmbedding(student.tokenizer.backend_tokenizer, embedding_dim=8)])
    manifest = encoded(model.to("cpu"), tmp_path / "v")
    assert manifest["encoding"]["max_length"] is None and manifest["encoding"]["tokenizer_sha256"]
    np.testing.assert_allclose(load_vectors(tmp_path / "v")[1], model.encode_document(TEXTS), atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_seen_ids_are_those_of_a_set(seed: int) -> None:
    import random

    from tct_hf.data.ids import SeenIds

    draw, seen, known = random.Random(seed), SeenIds(), set[str]()
    for _ in range(60):
        ids = [str(draw.randint(0, 20_000)) for _ in range(draw.randint(0, 30))]
        found = seen.add(ids)
        expected = next((at for at, name in enumerate(ids) if name in known or name in ids[:at]), None)
        assert found == expected
        if expected is None:
            known.update(ids)


def test_mapped_vectors_are_indexed_block_by_block(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf import DenseIndex
    from tct_hf.retrieval import vector_blocks
    from tct_hf.retrieval.vectors import ShardedVectors

    encoded(student, tmp_path / "v")
    ids, whole, _ = load_vectors(tmp_path / "v")
    _, mapped, _ = load_vectors(tmp_path / "v", mmap=True)
    monkeypatch.setattr(vector_blocks, "BLOCK", 8)
    read: list[int] = []
    take = ShardedVectors.__getitem__

    def watched(self: ShardedVectors, rows: Any) -> np.ndarray:
        found = take(self, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(ShardedVectors, "__getitem__", watched)
    monkeypatch.delattr(ShardedVectors, "__array__")
    for vectors, expected in ((mapped, whole), (vector_blocks.UnitRows(mapped), None)):
        index = DenseIndex.build(vectors, ids, "Flat")
        if expected is None:
            expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
        found = np.asarray(index._engine.reconstruct_n(0, COUNT))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert max(read) == 8
    with pytest.raises(IndexError, match="of 23 vectors"):
        mapped[[0, COUNT]]
    np.testing.assert_array_equal(mapped[np.arange(COUNT) % 2 == 0], whole[::2])


@pytest.mark.parametrize("wrong", [{"precision": "fp16"}, {"dtype": "int8"}, {"shard_size": 0}])
def test_unknown_settings_of_a_corpus_are_refused_by_name(student: Any, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        encoded(student, tmp_path / "v", **wrong)
