"""Static students: their vectors against a few lines of NumPy, and through checkpoint, training and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router

from tct_hf import build_colbert, build_static, build_student, save_student, validate_checkpoint
from tct_hf.encoding.kinds import kind_of
from tct_hf.encoding.static import static_modules
from tct_hf.retrieval.encode import encode_texts
from tests.models import tiny_bert, tiny_colbert, tiny_roberta

TEXTS = ["the teacher is dense", "a passage of the query", "", "what is retrieval of tokens"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    prompts = {"query": "query ", "document": "passage "}
    return build_student(str(tiny_bert(tmp_path_factory.mktemp("base"))), prompts=prompts)


def rows(model: Any) -> np.ndarray:
    return model[0].embedding.weight.detach().numpy().astype(np.float64)


def test_a_token_is_the_mean_of_what_the_encoder_makes_of_it_alone_and_in_texts(base: Any) -> None:
    tokenizer = base.tokenizer
    seen: dict[int, list[np.ndarray]] = {}

    def read(text: list[int], places: range) -> None:
        with torch.no_grad():
            vectors = base[0].model(input_ids=torch.tensor([text])).last_hidden_state[0].numpy().astype(np.float64)
        for place in places:
            seen.setdefault(text[place], []).append(vectors[place])

    for token in range(len(tokenizer)):
        read([2, token, 3], range(1, 2))
    for text in TEXTS:
        ids = tokenizer("passage " + text)["input_ids"]
        read(ids, range(2, len(ids) - 1))  # neither special tokens nor the prompt
    share = np.array([len(seen[token]) - 1 for token in range(len(tokenizer))])
    share = share / share.sum()
    table = np.array([np.mean(seen[token], axis=0) for token in range(len(tokenizer))])
    weights = (0.01 / (0.01 + share))[:, None]
    made = build_static(base, texts=TEXTS, smoothing=0.01)
    np.testing.assert_allclose(rows(made), table * weights, rtol=1e-4, atol=1e-5)
    assert (made.similarity_fn_name, len(made)) == ("dot", 1)

    centred = table - share @ table
    _, _, axes = np.linalg.svd(np.sqrt(share)[:, None] * centred, full_matrices=False)
    few = rows(build_static(base, texts=TEXTS, smoothing=0.01, dim=5))
    np.testing.assert_allclose(few @ few.T, (t := weights * centred @ axes[:5].T) @ t.T, rtol=1e-3, atol=1e-4)


def test_without_texts_weights_follow_the_place_in_the_vocabulary(base: Any) -> None:
    some, other = (rows(build_static(base, smoothing=smoothing)) for smoothing in (None, 1e9))
    place = np.arange(1, len(some) + 1)
    zipf = 1 / place / (1 / place).sum()
    np.testing.assert_allclose(some, other * (1e-4 / (1e-4 + zipf))[:, None], rtol=1e-4)


@pytest.mark.usefixtures("warm_checks")
@pytest.mark.parametrize("kind", ["cosine", "colbert", "roberta", "tct"])
def test_a_student_of_any_model_is_loaded_by_plain_sentence_transformers(kind: str, base: Any, tmp_path: Path) -> None:
    if kind == "colbert":
        model: Any = str(tiny_colbert(tmp_path))
    elif kind == "roberta":
        model = build_colbert(str(tiny_roberta(tmp_path / "roberta")))
    elif kind == "tct":
        model = build_student(str(tiny_bert(tmp_path / "bert")), encoding="tct", scale=20.0)
    else:
        model = SentenceTransformer(modules=[base[0], base[1], Normalize()], similarity_fn_name="cosine")
    student = build_static(model, texts=TEXTS)
    folder = save_student(student, tmp_path / "student")
    assert kind_of(str(folder)) == "dual-encoder"
    long = [*TEXTS, "passage " * 500]
    vectors = SentenceTransformer(str(folder)).encode(long)
    assert validate_checkpoint(folder).query < 1e-6
    np.testing.assert_allclose(encode_texts(student, long, task="query"), vectors, atol=1e-5)
    assert vectors.shape[1] == {"colbert": 16}.get(kind, 32)
    lengths = np.linalg.norm(vectors[[0, 1, 3]], axis=1)
    np.testing.assert_allclose(lengths, {"tct": 20.0**0.5}.get(kind, 1.0), rtol=1e-5)
    assert not vectors[2].any()  # of no token


def test_the_query_route_of_a_router_is_looked_up_too(base: Any) -> None:
    static: Any = build_static(base)
    routes = Router.for_query_document([static[0]], [base[0], base[1]])
    tower = SentenceTransformer(modules=[routes], similarity_fn_name="dot")
    assert static_modules(tower, "document") is None and static_modules(base, "query") is None
    found = encode_texts(tower, TEXTS, task="query")
    np.testing.assert_allclose(found, tower.encode_query(TEXTS), atol=1e-5)
    assert encode_texts(tower, [], task="query").shape == (0, 32)
    tower.half()  # computed by torch, in float32
    np.testing.assert_allclose(encode_texts(tower, TEXTS, task="query"), found, rtol=2e-2, atol=2e-2)


def test_wrong_requests_are_refused(base: Any) -> None:
    static = build_static(base)
    with pytest.raises(ValueError, match="dim=33: must be from 1 to the 32 dimensions"):
        build_static(base, dim=33)
    with pytest.raises(ValueError, match="smoothing=0: give a number above 0"):
        build_static(base, smoothing=0)
    with pytest.raises(ValueError, match="made of a Transformer's outputs, and StaticEmbedding is none"):
        build_static(static)
