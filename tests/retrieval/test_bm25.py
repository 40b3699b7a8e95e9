from __future__ import annotations

import builtins
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tct_hf import BM25Index, evaluate_run, load_beir
from tests.data.test_beir import data_folder

TEXTS = ["red apples and green apples", "green pears", "red wine", "the of and"]
IDS = ["a", "b", "c", "d"]


def build(texts: list[str] = TEXTS, ids: list[str] = IDS, **options: Any) -> BM25Index:
    return BM25Index.build(texts, ids, **{"backend": "numpy", **options})


def lucene_bm25(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """The formula of Kamphuis et al., ECIR 2020 (Lucene, exact document lengths), written out."""
    documents = [Counter(re.findall(r"\w\w+", text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    average = sum(lengths) / len(lengths)
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for word in re.findall(r"\w\w+", query):
            holders = sum(word in other for other in documents)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            frequency = document[word]
            score += idf * frequency / (frequency + k1 * (1 - b + b * length / average))
        scores.append(score)
    return scores


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_scores_follow_the_formula(backend: str) -> None:
    draw = random.Random(0)
    words = [f"word{at}" for at in range(12)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 15))) for _ in range(40)]
    ids = [f"d{at}" for at in range(40)]
    index = build(texts, ids, k1=1.2, b=0.6, language="none", stemmer=None, backend=backend)
    for _ in range(10):
        query = " ".join(draw.choices(words, k=3))
        run = index.run({"q": query}, k=40)["q"]
        expected = {name: score for name, score in zip(ids, lucene_bm25(texts, query, 1.2, 0.6), strict=True) if score}
        assert run == pytest.approx(expected, rel=1e-5)


def test_words_are_stemmed_and_stop_words_left_out() -> None:
    ids, scores = build().search(["apple", "the", "PEAR"], k=4)
    assert ids == [["a"], [], ["b"]]
    assert [len(values) for values in scores] == [1, 0, 1]
    run = build().run({"q1": "zebra", "q2": "wine", "q3": "", "q4": "red green"}, k=1000)
    assert [(name, set(found)) for name, found in run.items()] == [
        ("q1", set()),
        ("q2", {"c"}),
        ("q3", set()),
        ("q4", {"a", "b", "c"}),
    ]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_equal_scores_at_the_cut_are_chosen_by_id_whatever_the_order_of_the_corpus(backend: str) -> None:
    names = [f"d{at:02}" for at in range(30)]
    texts = {name: "same text here" for name in names} | {"z": "same same same here text"}
    for seed in range(3):
        order = list(texts)
        random.Random(seed).shuffle(order)
        index = build([texts[name] for name in order], order, backend=backend)
        ids, scores = index.search(["same"], k=5)
        assert ids == [["z", "d00", "d01", "d02", "d03"]]
        assert np.all(np.diff(scores[0]) <= 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": [], "ids": []}, "nothing to index"),
        ({"texts": ["the", "of", "and", "."]}, "no passage has a word"),
        ({"k1": -1.0}, "k1=-1.0"),
        ({"k1": math.inf}, r"k1=inf, b=0\.68: k1 must be finite"),
        ({"b": 1.5}, "b=1.5"),
        ({"method": "tfidf"}, "method: 'tfidf'"),
        ({"stemmer": "klingon"}, "stemmer: 'klingon'"),
        ({"language": "klingon"}, "language: no stop words"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_settings_come_back_and_the_backend_can_be_another(tmp_path: Path) -> None:
    index = build(k1=0.9, b=0.4)
    index.save(tmp_path)
    assert BM25Index.load(tmp_path).settings == index.settings and BM25Index.load(tmp_path).ids == IDS
    assert BM25Index.load(tmp_path, backend="numba").settings == {**index.settings, "backend": "numba"}
    with pytest.raises(ValueError, match=r"^backend: 'cuda'"):
        BM25Index.load(tmp_path, backend="cuda")


def test_wrong_search_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="k: 0"):
        build().search(["red"], k=0)
    with pytest.raises(ValueError, match="one string"):
        build().search("red", k=1)


def test_missing_numba_says_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_numba(name: str, *rest: Any, **more: Any) -> Any:
        if name == "numba":
            raise ImportError("No module named 'numba'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_numba)
    with pytest.raises(ImportError, match=r'pip install numba.*backend="numpy"'):
        build(backend="numba")


@pytest.mark.data
def test_scifact_comes_out_as_published(tmp_path: Path) -> None:
    corpus, queries, qrels = load_beir(data_folder("scifact"), "test", cache_dir=tmp_path)
    index = BM25Index.build(corpus["text"], corpus["id"], k1=0.9, b=0.4)
    found = evaluate_run(index.run(queries, 100), qrels, ["nDCG@10"])
    assert found.mean["nDCG@10"] == pytest.approx(0.676, abs=0.005)
