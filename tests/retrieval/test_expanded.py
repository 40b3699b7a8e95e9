"""BM25 over passages with generated queries: what it finds, and what it says of itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from tct_hf import BM25Index, expanded_bm25, write_expansions
from tct_hf.data.expansion import SCORES_FOLDER, score_columns
from tct_hf.data.shards import run_shards
from tct_hf.retrieval.expanded import describe_expansion

PASSAGES = ["boats sail on rivers", "engines burn fuel", "rivers carry water to the sea"]
QUERIES = [
    ["how do ships move", "how do ships move"],
    ["what do motors need", "fuel for ships"],
    ["where water flows"],
]
IDS = ["p0", "p1", "p2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus() -> Dataset:
    return Dataset.from_dict({"id": IDS, "text": PASSAGES})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"id": name, "queries": queries} for name, queries in zip(IDS, QUERIES, strict=True)]
    write_expansions(rows, tmp_path / "queries", settings={"model": "a/writer", "num_queries": 2})
    return tmp_path / "queries"


def bm25(texts: list[str], word: str, *, k1: float, b: float) -> list[float]:
    """Scores of a single word by the formula of Lucene (Kamphuis et al., ECIR 2020), of words kept as they are."""
    bags = [Counter(text.split()) for text in texts]
    mean = sum(map(len, (text.split() for text in texts))) / len(texts)
    found = sum(word in bag for bag in bags)
    idf = math.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
    return [
        idf * bag[word] / (bag[word] + k1 * (1 - b + b * len(text.split()) / mean))
        for bag, text in zip(bags, texts, strict=True)
    ]


def test_scores_are_those_of_passages_with_their_queries(corpus: Dataset, folder: Path) -> None:
    index = expanded_bm25(corpus, folder, language="none", stemmer=None)
    texts = [" ".join([passage, *queries]) for passage, queries in zip(PASSAGES, QUERIES, strict=True)]
    wanted = bm25(texts, "ships", k1=2.18, b=0.86)
    assert index.run({"q": "ships"})["q"] == pytest.approx({"p0": wanted[0], "p1": wanted[1]}, rel=1e-5)
    fewer = expanded_bm25(corpus, folder, num_queries=1, language="none", stemmer=None)
    texts = [" ".join([passage, *queries[:1]]) for passage, queries in zip(PASSAGES, QUERIES, strict=True)]
    assert fewer.run({"q": "ships"})["q"] == pytest.approx({"p0": bm25(texts, "ships", k1=2.18, b=0.86)[0]}, rel=1e-5)


def test_k1_and_b_depend_on_what_is_indexed() -> None:
    plain = BM25Index.build(PASSAGES, IDS).settings
    assert (plain["k1"], plain["b"]) == (0.82, 0.68) and "expansion" not in plain
    expanded = BM25Index.build(PASSAGES, IDS, expansion={"model": "m"}).settings
    assert (expanded["k1"], expanded["b"]) == (2.18, 0.86)
    given = BM25Index.build(PASSAGES, IDS, expansion={"model": "m"}, k1=0.0, b=0.0).settings
    assert (given["k1"], given["b"]) == (0.0, 0.0)


def test_a_loaded_index_says_what_it_was_built_over(corpus: Dataset, folder: Path, tmp_path: Path) -> None:
    index = expanded_bm25(corpus, folder, num_queries=9, drop_repeats=True)
    index.save(tmp_path / "index")
    settings = BM25Index.load(tmp_path / "index").settings
    assert settings == index.settings
    expansion = settings["expansion"]
    assert (expansion["model"], expansion["num_queries"]) == ("a/writer", 2)  # there are no more
    assert expansion["drop_repeats"] is True and expansion["scores_sha256"] is None
    assert json.loads((tmp_path / "index" / "tct_bm25.json").read_text())["expansion"] == expansion


def test_scores_that_decide_are_recorded_and_other_passages_refused(corpus: Dataset, folder: Path) -> None:
    with pytest.raises(ValueError, match="they are not of this corpus"):
        expanded_bm25(Dataset.from_dict({"id": ["other"], "text": ["t"]}), folder)
    scores = [[1.0, 1.0], [2.0, -3.0], [0.5]]
    with pytest.raises(FileNotFoundError, match=r"drop_share is 0\.2, but the queries have no scores"):
        describe_expansion(folder, num_queries=None, drop_repeats=False, drop_share=0.2)
    run_shards(folder / SCORES_FOLDER, {"teacher": "t"}, [("x", IDS)], lambda ids: score_columns(ids, scores))
    index = expanded_bm25(corpus, folder, drop_share=0.2)
    assert index.settings["expansion"]["drop_share"] == 0.2 and index.settings["expansion"]["scores_sha256"]
    assert list(index.run({"q": "ships"})["q"]) == ["p0"]
