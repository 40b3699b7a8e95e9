"""OpenVINO encodes what torch would, and the folder says so."""

from __future__ import annotations

import copy
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import build_student, encode_corpus, load_vectors
from tct_hf.encoding import engine as engines
from tct_hf.encoding.engine import OpenVINOEngine
from tct_hf.encoding.export import Graph
from tct_hf.encoding.routes import joined
from tct_hf.evaluation.workspace import Workspace
from tct_hf.retrieval import encode
from tct_hf.retrieval.encode import choose_engine, encode_texts, find_engine
from tests.models import tiny_bert

openvino = pytest.importorskip("openvino")

TEXTS = [" ".join(["the dense passage of tokens"] * (1 + at % 7)) + f" {at}" for at in range(24)]
CORPUS = [{"id": f"p{at}", "text": text} for at, text in enumerate(TEXTS)]


@pytest.mark.parametrize("low_latency", [False, True])
@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_torch_in_order(student: SentenceTransformer, task: str, low_latency: bool) -> None:
    engine = OpenVINOEngine(student, low_latency=low_latency)
    found = encode_texts(student, TEXTS, task=task, engine=engine, tokens_per_pass=64)
    np.testing.assert_allclose(found, encode_texts(student, TEXTS, task=task), atol=1e-4)


@pytest.mark.parametrize("name", ["student", "plain"])
def test_one_question_goes_the_short_way_where_nothing_is_cut(models: Path, name: str) -> None:
    student = SentenceTransformer(str(models / name), device="cpu")
    length, student.max_seq_length = student.max_seq_length, 10**30  # as tokenizers have it that cut nothing
    assert name == "student" or OpenVINOEngine(student, low_latency=True).question("the passage") is not None
    student.max_seq_length = length
    engine = OpenVINOEngine(student, low_latency=True)
    for text in ("the passage", "  a query, of Tokens\n", "", "the dense passage of tokens", " ".join(TEXTS)):
        found = encode_texts(student, [text], task="query", engine=engine)
        np.testing.assert_allclose(found, encode_texts(student, [text], task="query"), atol=1e-4)
        assert (engine.question(text) is None) == (len(text) > 100)


@pytest.mark.parametrize("limit", [36, 77])
def test_a_question_is_not_padded_beyond_the_positions_of_the_encoder(tmp_path: Path, limit: int) -> None:
    student: Any = build_student(str(tiny_bert(tmp_path)))
    embeddings = student[0].auto_model.embeddings
    embeddings.position_embeddings.weight = torch.nn.Parameter(embeddings.position_embeddings.weight[:limit])
    embeddings.position_ids, student.max_seq_length = embeddings.position_ids[:, :limit], limit
    engine = OpenVINOEngine(student, low_latency=True)
    for words in range(1, limit - 2):
        question = " ".join((["tokens", "dense", "query"] * limit)[:words])
        found = engine.question(question)
        assert found is not None
        np.testing.assert_allclose(found, student.encode_query([question]), atol=1e-4)


def test_threads_take_turns_at_questions(student: SentenceTransformer) -> None:
    engine = OpenVINOEngine(student, low_latency=True)
    wanted = encode_texts(student, TEXTS, task="query")
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda text: encode_texts(student, [text], task="query", engine=engine), TEXTS * 20)
        np.testing.assert_allclose(np.concatenate([*found]), np.tile(wanted, (20, 1)), atol=1e-4)


@pytest.mark.parametrize("task", ["query", "document"])
def test_a_route_has_an_engine_of_its_own(tmp_path: Path, task: str) -> None:
    first, second = (build_student(str(tiny_bert(tmp_path / str(seed), seed=seed))) for seed in range(2))
    both = joined([*first], [*second], second, "")
    engine, _ = find_engine(both, TEXTS, "openvino", "fp32", low_latency=task == "query")
    for texts in (TEXTS, TEXTS[:1]):
        wanted = encode_texts(both, texts, task=task)
        np.testing.assert_allclose(encode_texts(both, texts, task=task, engine=engine), wanted, atol=1e-4)


def test_a_large_model_has_one_graph(student: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenVINOEngine(student, low_latency=True)._of_width
    monkeypatch.setattr(engines, "_SMALL_MODEL", 100)
    one = OpenVINOEngine(student, low_latency=True)
    found = one.question("the passage")
    assert not one._of_width and found is not None
    np.testing.assert_allclose(found, encode_texts(student, ["the passage"], task="query"), atol=1e-4)


def test_a_student_in_half_precision_is_brought_to_float32_first(student: SentenceTransformer) -> None:
    half = copy.deepcopy(student).to(torch.bfloat16)
    wanted = encode_texts(copy.deepcopy(half), TEXTS, task="document")
    found = encode_texts(half, TEXTS, task="document", engine=OpenVINOEngine(half))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_student_that_trains_on_leaves_its_engine_as_it_was(student: SentenceTransformer) -> None:
    engine, wanted = OpenVINOEngine(student), encode_texts(student, TEXTS, task="document")
    with torch.no_grad():
        for weight in student.parameters():
            weight.copy_(torch.randn_like(weight))
    np.testing.assert_allclose(encode_texts(student, TEXTS, task="document", engine=engine), wanted, atol=1e-4)


def test_signals_are_handled_after_engines_that_ended_in_the_order_of_their_making(
    student: SentenceTransformer,
) -> None:
    seen: list[int] = []
    first, second = OpenVINOEngine(student), OpenVINOEngine(student)
    del first
    del second
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_folder_says_its_engine_and_keeps_it(
    student: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"precision": "fp32", "shard_size": 10, "write": lambda line: None}
    small = encode_corpus(student, CORPUS, tmp_path / "small", **settings)
    assert small["backend"] == "torch"  # too few passages for the graph to be worth it
    monkeypatch.setattr(encode, "ENOUGH_TEXTS", 1)
    graphs: list[Graph] = []

    def made_graph(given: SentenceTransformer) -> Graph:
        graphs.append(Graph(given))
        return graphs[-1]

    monkeypatch.setattr("tct_hf.encoding.engine.Graph", made_graph)
    made = encode_corpus(student, CORPUS, tmp_path / "openvino", **settings)
    assert len(graphs) == 1  # the one that was tried
    assert made["backend"] == "openvino"
    assert encode_corpus(student, CORPUS, tmp_path / "small", **settings)["backend"] == "torch"
    np.testing.assert_allclose(load_vectors(tmp_path / "openvino")[1], load_vectors(tmp_path / "small")[1], atol=1e-4)
    monkeypatch.setattr(encode, "ENOUGH_TEXTS", 1000)  # as begun, though it would now be chosen otherwise
    assert encode_corpus(student, CORPUS, tmp_path / "openvino", **settings) == made
    with pytest.raises(ValueError, match="with backend = 'openvino', but now backend = 'torch'"):
        encode_corpus(student, CORPUS, tmp_path / "openvino", backend="torch", **settings)


def test_queries_are_encoded_by_the_engine_of_the_passages(
    student: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_torch: dict[str, Any] = {"precision": "fp32", "write": lambda line: None}
    collection: Any = SimpleNamespace(corpus=Dataset.from_list(CORPUS))

    def encodes(folder: str, backend: Any = None) -> bool:
        """Whether an engine encodes queries."""
        opened = Workspace(collection, student, "student", tmp_path / folder, backend=backend, **by_torch)
        found = opened.encode_queries({"q": "the passage", "r": "tokens"})
        np.testing.assert_allclose(found, student.encode_query(["the passage", "tokens"]), atol=1e-4)
        return any(opened._engines.values())

    assert not encodes("torch") and not encodes("torch", "torch")
    assert encodes("torch", "auto") and encodes("torch", "openvino")
    monkeypatch.setattr(encode, "ENOUGH_TEXTS", 1)
    assert encodes("openvino") and not encodes("openvino", "torch")
    monkeypatch.setattr(encode, "has_openvino", lambda: False)  # vectors from another machine
    assert not encodes("openvino")


class Broken:
    """An engine that fails as a conversion does: with an exception of no common class."""

    error = Exception("no conversion rule")

    def __init__(self, *_: Any, **__: Any) -> None:
        raise self.error


def test_a_model_that_openvino_does_not_take_is_left_to_torch_with_a_warning(
    student: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encode, "ENOUGH_TEXTS", 1)
    monkeypatch.setattr(encode, "ENOUGH_COSINE", 1.1)
    assert choose_engine(student, TEXTS)[0] is None
    assert "cosines of its vectors" in caplog.text
    with pytest.raises(ValueError, match="backend: OpenVINO does not take this model"):
        choose_engine(student, TEXTS, "openvino")
    monkeypatch.setattr(encode, "OpenVINOEngine", Broken)
    assert choose_engine(student, TEXTS)[0] is None and "no conversion rule" in caplog.text
    monkeypatch.setattr(Broken, "error", ImportError("no libtbb"))
    assert choose_engine(student, TEXTS)[0] is None and "no libtbb" in caplog.text
    with pytest.raises(ImportError, match="no libtbb"):
        choose_engine(student, TEXTS, "openvino")


def test_the_longest_text_is_among_those_that_an_engine_is_tried_on() -> None:
    assert encode._probed(["short"] * 101 + ["a longer one"] + ["short"] * 98)[-1] == "a longer one"
