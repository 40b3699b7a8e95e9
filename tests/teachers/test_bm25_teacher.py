"""Lexical scores of a batch, against the index they come from and against the formula written out."""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tct_hf import BM25Index, BM25Teacher
from tests.train_helpers import PASSAGES, QUERIES, score

GERMAN = [
    "die häuser der stadt und die gärten",
    "ein haus, zwei häuser: haus und hof",
    "der garten",
    "lange straßen ohne bäume",
    "bäume der gärten, bäume der straßen und ein baum",
]


def index_of(texts: list[str], **options: Any) -> BM25Index:
    return BM25Index.build(texts, map(str, range(len(texts))), backend="numpy", **options)


@pytest.mark.parametrize(
    ("texts", "language", "queries"),
    [
        (PASSAGES, "english", [*QUERIES, "token tokens tokens zebra", "zebra", "", "the of"]),
        (GERMAN, "german", ["häuser häuser garten", "bäumen und hof", "unbekannt straße"]),
    ],
    ids=["english", "german"],
)
def test_scores_of_passages_of_the_corpus_are_those_of_a_search(
    tmp_path: Path, texts: list[str], language: str, queries: list[str]
) -> None:
    index = index_of(texts, language=language, stemmer=language, k1=1.1, b=0.6)
    expected = np.zeros((len(queries), len(index)))  # where nothing is found
    for row, (ids, scores) in enumerate(zip(*index.search(queries, k=len(index)), strict=True)):
        expected[row, [int(name) for name in ids]] = scores
    assert expected.any()
    index.save(tmp_path)
    for one in (index, BM25Index.load(tmp_path)):
        found = BM25Teacher(one).scores(queries, texts)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def formula(texts: list[str], query: str, passage: str, k1: float, b: float) -> float:
    documents = [re.findall(r"\w+", text) for text in texts]
    words, average = re.findall(r"\w+", passage), sum(map(len, documents)) / len(documents)
    total = 0.0
    for word in re.findall(r"\w+", query):
        holders, frequency = sum(word in document for document in documents), Counter(words)[word]
        if holders and frequency:
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            total += idf * frequency / (frequency + k1 * (1 - b + b * len(words) / average))
    return total


def test_scores_of_other_texts_follow_the_formula_with_the_corpus_statistics() -> None:
    index = index_of(PASSAGES, language="none", stemmer=None, k1=0.9, b=0.4)
    others = ["teacher teacher zebra of tokens and zebras", "nothing known", "", "distillation " * 9]
    queries = ["teacher tokens tokens", "zebra distillation", "of the student"]
    expected = [[formula(PASSAGES, query, text, 0.9, 0.4) for text in others] for query in queries]
    np.testing.assert_allclose(BM25Teacher(index).scores(queries, others), expected, rtol=1e-6, atol=1e-7)


def test_the_matrix_of_a_batch_has_all_positives_first_in_a_spawned_worker_and_under_autocast() -> None:
    teacher = pickle.loads(pickle.dumps(BM25Teacher(index_of(PASSAGES))))
    columns = [PASSAGES[:3], PASSAGES[4:7]]
    expected = BM25Teacher(index_of(PASSAGES)).scores(QUERIES[:3], columns[0] + columns[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(teacher, QUERIES[:3], columns), expected)
    assert expected.shape == (3, 6) and expected.any()


def test_a_passage_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(PASSAGES)
    seen: list[str] = []
    analyse = index._analyse
    monkeypatch.setattr(index, "_analyse", lambda text: seen.append(text) or analyse(text))
    teacher = BM25Teacher(index)
    for _ in range(3):
        teacher.collate(QUERIES[:2], [PASSAGES[:2], PASSAGES[1:3]], [{}] * 2)
    assert sorted(seen) == sorted(QUERIES[:2] + PASSAGES[:3])
