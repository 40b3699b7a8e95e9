from __future__ import annotations

import builtins
import json
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


def test_query_without_a_known_word_is_empty_and_keeps_its_place() -> None:
    run = build().run({"q1": "zebra", "q2": "wine", "q3": ""}, k=2)
    assert [(name, list(found)) for name, found in run.items()] == [("q1", []), ("q2", ["c"]), ("q3", [])]


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


def test_asking_for_more_than_there_is_gives_what_matches() -> None:
    assert set(build().search({"q": "red green"}, k=1000)[0][0]) == {"a", "b", "c"}


@pytest.mark.parametrize("mmap", [False, True])
def test_saved_index_answers_alike(tmp_path: Path, mmap: bool) -> None:
    index = build(k1=0.9, b=0.4)
    index.save(tmp_path / "index")
    loaded = BM25Index.load(tmp_path / "index", mmap=mmap)
    queries = {"1": "red apple", "2": "green", "3": "nothing"}
    assert loaded.run(queries, 3) == index.run(queries, 3)
    assert loaded.settings == index.settings and loaded.ids == IDS


def test_saving_again_replaces_the_whole_index(tmp_path: Path) -> None:
    build().save(tmp_path / "index")
    build(["only one"], ["x"]).save(tmp_path / "index")
    assert BM25Index.load(tmp_path / "index").ids == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_folder_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="holds something other"):
        build().save(tmp_path)


def test_damaged_or_foreign_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no BM25 index here"):
        BM25Index.load(tmp_path)
    build().save(tmp_path / "index")
    settings = tmp_path / "index" / "tct_bm25.json"
    settings.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        BM25Index.load(tmp_path / "index")


@pytest.mark.parametrize("name", ["ids.json", "data.csc.index.npy", "vocab.index.json"])
def test_truncated_or_altered_file_is_named(tmp_path: Path, name: str) -> None:
    build().save(tmp_path / "index")
    file = tmp_path / "index" / name
    whole = file.read_bytes()
    for broken, message in ((whole[:-1], "truncated or altered"), (whole[:-1] + bytes([whole[-1] ^ 1]), "checksum")):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            BM25Index.load(tmp_path / "index", mmap=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": ["a"]}, "1 ids for 4 texts"),
        ({"ids": ["a", "b", "a", "d"]}, "'a' comes twice"),
        ({"ids": ["a", "b", 3, "d"]}, "number 2 is 3, not a string"),
        ({"texts": [], "ids": []}, "nothing to index"),
        ({"texts": ["the", "of", "and", "."]}, "no passage has a word"),
        ({"k1": -1.0}, "k1=-1.0"),
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


def test_wrong_search_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="k: 0"):
        build().search(["red"], k=0)
    with pytest.raises(ValueError, match="one string"):
        build().search("red", k=1)


def test_missing_numba_says_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_settings_and_ids_that_no_index_can_keep_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k1=inf, b=0\.5: k1 must be finite"):
        BM25Index.build(["dense"], ["a"], k1=float("inf"), b=0.5)
    with pytest.raises(ValueError, match=r"ids: 'a\\ud800' \(number 0\) has a lone surrogate"):
        BM25Index.build(["dense"], ["a\ud800"], backend="numpy")
