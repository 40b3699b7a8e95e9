from __future__ import annotations

import math
import os
import random
import re
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import BM25Index, evaluate_run, expanded_bm25, load_beir, write_expansions
from tct_hf.data.expansion import SCORES_FOLDER, score_columns
from tct_hf.data.shards import run_shards
from tct_hf.evaluation.workspace import Workspace
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.settings import DataSettings
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.words import analyser
from tests.recipe import write_beir

TEXTS = ["red apples and green apples", "green pears", "red wine", "the of and"]
IDS = ["a", "b", "c", "d"]


def build(texts: list[str] = TEXTS, ids: list[str] = IDS, **options: Any) -> BM25Index:
    return BM25Index.build(texts, ids, **{"backend": "numpy", **options})


def lucene_bm25(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """The formula of Kamphuis et al., ECIR 2020 (Lucene, exact document lengths), written out."""
    documents = [Counter(re.findall(r"\w+", text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    average = sum(lengths) / len(lengths)
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for word in re.findall(r"\w+", query):
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
    assert ids == [["a"], [], ["b"]] and [len(values) for values in scores] == [1, 0, 1]
    run = build().run({"q1": "zebra", "q2": "wine", "q3": "", "q4": "red green"}, k=1000)
    assert {name: set(found) for name, found in run.items()} == {"q1": set(), "q2": {"c"}, "q3": set(), "q4": {*"abc"}}


# Languages and scripts


@pytest.mark.parametrize(
    ("language", "query", "found", "other"),
    [
        ("chinese", "中国的首都在哪里", "北京是中华人民共和国的首都", "上海有很多高楼和公园"),
        ("chinese", "猫", "这只猫睡在沙发上", "那只狗跑得很快"),
        ("none", "東京タワーの高さ", "東京タワーは333メートルです", "京都には寺が多い"),
        ("none", "เมืองหลวงของไทย", "กรุงเทพเป็นเมืองหลวงของประเทศไทย", "แมวกินปลา"),
        ("hindi", "भारत की राजधानी", "नई दिल्ली भारत की राजधानी है", "बिल्ली दूध पीती है"),
        ("hindi", "काल", "काल बीत गया", "कुल मिलाकर कील"),  # they differ in vowel signs alone
        ("french", "l'e\u0301cole", "une \u00e9cole de village", "cole"),
        ("french", "\u00e9cole", "une e\u0301cole de village", "cole"),
        ("turkish", "istanbul", "İSTANBUL büyük", "ankara"),
        ("english", "vitamin C", "sources of vitamin C", "sources of vitamin D"),
        ("none", "iPhone手机壳", "买一个手机壳", "买一台电脑"),
        ("German", "Häuser", "das alte Haus", "ein Garten"),
        ("german", "STRASSE", "eine lange Straße", "ein Garten"),
        ("hebrew", "שלום", "שָׁלוֹם רב", "תודה רבה"),
        ("arabic", "كتاب", "كِتَابٌ كبير", "بيت كبير"),
        ("none", "محمد", "مُحَمَّد هنا", "بيت كبير"),
        ("japanese", "タワー", "東京ﾀﾜｰの高さ", "京都には寺が多い"),
        ("greek", "ΛΟΓΟΣ", "λόγος του", "ένα σπίτι"),
        ("none", "ΛΟΓΟΣ", "λογος του", "ένα σπίτι"),
        ("english", "retrieval", "about retr\u2060iev\u200cal", "about something else"),
        ("korean", "서울", "서울은 큰 도시", "부산은 항구"),
    ],
)
def test_passages_are_found_in_any_script(language: str, query: str, found: str, other: str) -> None:
    ids, scores = build([other, found], ["other", "found"], language=language).search([query], k=2)
    assert ids[0][0] == "found" and (len(ids[0]) == 1 or scores[0][0] > scores[0][1])


def test_terms_are_words_with_their_marks_or_letters_and_pairs() -> None:
    terms = analyser("none", None)
    assert terms("don't I'm Malcolm X's 'C'") == ["don", "i", "malcolm", "x", "c"]
    assert terms("हिन्दी भाषा") == ["हिन्दी", "भाषा"] and terms("co\u00adop") == ["coop"]
    assert terms("ab猫犬 12") == ["ab", "猫", "犬", "猫犬", "12"] and terms("ดีที่") == ["ดี", "ที่", "ดีที่"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("使用Python编程", ["使", "用", "使用", "python", "编", "程", "编程"]),
        ("ﾊﾟﾝ", ["パ", "ン", "パン"]),
        ("\uff30\uff39 \uff13", ["py", "3"]),
        ("서울은 대한 A", ["서울은", "서울", "울은", "대한", "a"]),
        ("١٢٣ १२", ["123", "12"]),
        ("بی\u200cبی", ["بی", "بی"]),
        ("क्\u200cष", ["क्ष"]),
        ("1\ufe0f\u20e3 👨\u200d👩 ❤\ufe0f ok", ["1", "ok"]),
        ("\ufb01ne Windows™ \U0001d401old \ufeffnews", ["fine", "windows", "bold", "news"]),
        ("មែរ", ["មែ", "រ", "មែរ"]),
        ("မာ", ["မာ"]),
        ("Tiếng Việt 😀", ["tiếng", "việt"]),
    ],
)
def test_scripts_that_are_mixed_or_written_in_other_forms_give_plain_terms(text: str, terms: list[str]) -> None:
    analyse = analyser("none", None)
    assert analyse(text) == terms == analyse(unicodedata.normalize("NFD", text))


@pytest.mark.parametrize(
    ("language", "stemmer", "kept"),
    [
        ("german", "auto", "german"),
        ("none", "auto", "english"),
        ("chinese", "auto", None),
        ("german", None, None),
        ("German", "English", "english"),
    ],
)
def test_the_stemmer_is_that_of_the_language_unless_it_is_named(
    language: str, stemmer: str | None, kept: str | None, tmp_path: Path
) -> None:
    assert build(language=language, stemmer=stemmer).settings["stemmer"] == kept
    collection = read_collection(DataSettings(str(write_beir(tmp_path)), language=language, stemmer=stemmer))
    student = Mock(SentenceTransformer, similarity_fn_name="dot")
    for index in (
        collection_bm25(collection),
        Workspace(collection, student, "any", precision="fp32", in_memory=True).bm25().index,
        collection_bm25(collection.part(queries=1)),
    ):
        assert {"language": language, "stemmer": kept}.items() <= index.settings.items()
    assert collection.fingerprint["sha256"] != read_collection(DataSettings(str(tmp_path))).fingerprint["sha256"]


@pytest.mark.parametrize("k", [1, 100, 1000])
def test_most_queries_that_find_next_to_nothing_are_told_of_once(k: int) -> None:
    index = build(backend="numba")
    with pytest.warns(UserWarning, match="next to nothing for 2 of 3 queries.*language is 'english'"):
        index.search(["grüne Äpfel", "Birnen", "red wine"], k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.search(["grüne Äpfel", "Birnen", "red wine"])
        build().search(["apple", "red", "Birnen", "pears"], k)
        names = [f"name{at}" for at in range(1200)]
        build(names, names).search(names[:3], k)


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
        ({"texts": ["one", None, "b", "c"]}, r"texts, number 1: no text \(null\)"),
        ({"texts": ["one", b"two", "b", "c"]}, "texts, number 1: holds b'two'"),
        ({"texts": {"a": "one"}}, "texts: a mapping; pass a list"),
        ({"k1": math.inf}, r"k1=inf, b=0\.68: k1 must be finite"),
        ({"b": 1.5}, "b=1.5"),
        ({"stemmer": "klingon"}, "stemmer: 'klingon'"),
        ({"language": "klingon"}, "language: no stop words"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("queries", ["same", {"q": "same"}, [None], ["same", 3], [["same"]]])
def test_queries_that_are_no_list_are_refused(queries: Any) -> None:
    with pytest.raises(ValueError, match=r"queries(: .*; pass |, number \d)"):
        build().search(queries)
    with pytest.raises(ValueError, match="queries must be a mapping"):
        build().run(["same"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: 0"):
        build().search(["red"], k=0)
    assert build().search([]) == ([], []) and build().run({}) == {}


# Passages with generated queries

QUERIES = [["how do apples grow", "how do apples grow"], [], ["wine for pears", "red"], ["d"]]


@pytest.fixture
def expansion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    rows = [{"id": name, "queries": queries} for name, queries in zip(IDS, QUERIES, strict=True)]
    write_expansions(rows, tmp_path / "queries", settings={"model": "a/writer", "num_queries": 2})
    return tmp_path / "queries"


def test_scores_are_those_of_passages_with_their_queries(expansion: Path, tmp_path: Path) -> None:
    corpus = Dataset.from_dict({"id": IDS, "text": TEXTS})
    for used in (2, 1):
        index = expanded_bm25(corpus, expansion, num_queries=used, language="none", stemmer=None)
        texts = [" ".join([text, *queries[:used]]) for text, queries in zip(TEXTS, QUERIES, strict=True)]
        wanted = dict(zip(IDS, lucene_bm25(texts, "red apples", 2.18, 0.86), strict=True))
        assert index.run({"q": "red apples"})["q"] == pytest.approx({k: v for k, v in wanted.items() if v}, rel=1e-5)
    index = expanded_bm25(corpus, expansion, num_queries=9, drop_repeats=True)
    index.save(tmp_path / "index")
    settings = BM25Index.load(tmp_path / "index").settings
    assert settings == index.settings
    expected = {"model": "a/writer", "num_queries": 2, "drop_repeats": True, "scores_sha256": None}
    assert expected.items() <= settings["expansion"].items()
    with pytest.raises(ValueError, match="they are not of this corpus"):
        expanded_bm25(Dataset.from_dict({"id": ["other"], "text": ["t"]}), expansion)
    with pytest.raises(ValueError, match=r"drop_share is 0\.2, but the queries have no scores"):
        expanded_bm25(corpus, expansion, drop_share=0.2)
    scores = [[1.0, 1.0], [], [-3.0, 2.0], [0.5]]
    run_shards(expansion / SCORES_FOLDER, {"teacher": "t"}, [("x", IDS)], lambda ids: score_columns(ids, scores))
    index = expanded_bm25(corpus, expansion, drop_share=0.2)
    assert index.settings["expansion"]["drop_share"] == 0.2 and index.settings["expansion"]["scores_sha256"]
    assert list(index.run({"q": "pears"})["q"]) == ["b"]  # the query of c that has the word was dropped


def test_k1_and_b_depend_on_what_is_indexed() -> None:
    expanded: dict[str, Any] = {"expansion": {"model": "m"}}
    zeros = {**expanded, "k1": 0.0, "b": 0.0}
    for options, expected in (({}, (0.82, 0.68)), (expanded, (2.18, 0.86)), (zeros, (0.0, 0.0))):
        settings = build(**options).settings
        assert (settings["k1"], settings["b"]) == expected and ("expansion" in settings) is bool(options)


@pytest.mark.data
def test_scifact_comes_out_as_published(tmp_path: Path) -> None:
    root = Path(os.environ.get("TCT_HF_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
    if not (root / "scifact").is_dir():
        pytest.skip("scifact is not here; set TCT_HF_DATA to the folder that holds it")
    corpus, queries, qrels = load_beir(root / "scifact", "test", cache_dir=tmp_path)
    index = BM25Index.build(corpus["text"], corpus["id"], k1=0.9, b=0.4)
    found = evaluate_run(index.run(queries, 100), qrels, ["nDCG@10"])
    assert found.mean["nDCG@10"] == pytest.approx(0.676, abs=0.005)
