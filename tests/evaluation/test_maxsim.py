from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tct_hf.evaluation import maxsim
from tct_hf.evaluation.maxsim import late_interaction_run, rerank_run
from tct_hf.retrieval.runs import rank
from tests.models import load_colbert, tiny_colbert
from tests.train_helpers import PASSAGES, QUERIES

IDS = [f"p{row}" for row in range(len(PASSAGES))]
CORPUS = dict(zip(IDS, PASSAGES, strict=True))
ASKED = {f"q{row}": text for row, text in enumerate(QUERIES)}
# Every query has another order of all passages; p0 is among the first three of some queries only.
RUN = {
    query: {name: float((place * 3 + row) % len(IDS)) for place, name in enumerate(IDS)}
    for row, query in enumerate(ASKED)
}


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_colbert(tiny_colbert(tmp_path_factory.mktemp("colbert")))


@pytest.fixture(scope="module")
def scores(colbert: Any) -> np.ndarray:
    """In plain loops: the sum over query tokens of the best passage token (queries, passages)."""
    queries = [np.asarray(v) for v in colbert.encode_query(QUERIES)]
    passages = [np.asarray(v) for v in colbert.encode_document(PASSAGES)]
    return np.array([[sum(max(float(t @ s) for s in p) for t in q) for p in passages] for q in queries])


def check(run: dict[str, dict[str, float]], scores: np.ndarray, k: int) -> None:
    """The run holds the k best of `scores` (queries, passages)."""
    assert list(run) == list(ASKED)
    for row, hits in enumerate(run.values()):
        order = np.argsort(-scores[row], kind="stable")[:k]
        assert sorted(hits, key=lambda name: -hits[name]) == [IDS[column] for column in order]
        assert [hits[IDS[column]] for column in order] == pytest.approx(scores[row][order].tolist(), abs=1e-4)


@pytest.mark.parametrize(("chunk", "k"), [(1, 3), (3, 50), (1024, 3)])
def test_late_interaction_run_is_max_sim_whatever_the_chunks(
    colbert: Any, scores: np.ndarray, monkeypatch: pytest.MonkeyPatch, k: int, chunk: int
) -> None:
    monkeypatch.setattr(maxsim, "_PASSAGES_PER_CHUNK", chunk)
    check(late_interaction_run(colbert, IDS, PASSAGES, ASKED, k=k), scores, k)
    run = late_interaction_run(colbert, [*"edcba"], [PASSAGES[0]] * 5, {"q": QUERIES[0]}, k=2)
    assert list(run["q"]) == ["a", "b"]  # equal scores at the cut are chosen by id


@pytest.mark.parametrize(("chunk", "k"), [(1, 3), (3, 1), (1024, 50)])
def test_top_k_is_ordered_by_max_sim_and_the_rest_stays_below_in_its_order(
    colbert: Any, scores: np.ndarray, monkeypatch: pytest.MonkeyPatch, chunk: int, k: int
) -> None:
    monkeypatch.setattr(maxsim, "_PASSAGES_PER_CHUNK", chunk)
    found = rerank_run(colbert, RUN, CORPUS, ASKED, k)
    assert list(found) == list(ASKED)
    for row, (query, hits) in enumerate(found.items()):
        expected = dict(zip(IDS, scores[row], strict=True))
        before = [name for name, _ in rank(RUN[query])]
        top = sorted(before[:k], key=lambda name: -expected[name])
        assert list(hits) == [name for name, _ in rank(hits)] == top + before[k:]
        assert [hits[name] for name in top] == pytest.approx([expected[name] for name in top], abs=1e-4)


def test_only_the_top_k_need_texts_and_each_is_encoded_once(colbert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = colbert.encode_document
    monkeypatch.setattr(colbert, "encode_document", lambda texts, **more: seen.extend(texts) or encode(texts, **more))
    run = {"q0": {"p1": 3.0, "p2": 2.0, "gone": 1.0}, "q1": {"p2": 2.0, "p1": 1.0}}
    rerank_run(colbert, run, CORPUS, ASKED, 2)
    assert sorted(seen) == sorted([CORPUS["p1"], CORPUS["p2"]])
    found = rerank_run(colbert, {"q1": {"p0": 1.0}, "q2": {}}, CORPUS, ASKED, 5)
    assert {query: len(hits) for query, hits in found.items()} == dict.fromkeys(ASKED, 0) | {"q1": 1}
    assert rerank_run(colbert, {}, CORPUS, ASKED) == {query: {} for query in ASKED}


@pytest.mark.parametrize("bad", [None, 7, b"x", "\ud800"])
def test_a_text_that_is_none_is_refused_before_texts_are_sorted(colbert: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="document texts, number 1: "):
        late_interaction_run(colbert, ["a", "b"], ["x", bad], ASKED)
    with pytest.raises(ValueError, match="document texts, number 0: "):
        rerank_run(colbert, {"q0": {"a": 1.0, "b": 2.0}}, {"a": "x", "b": bad}, ASKED, 1)


def test_bfloat16_scores_nearly_the_same(colbert: Any, scores: np.ndarray) -> None:
    searched = late_interaction_run(colbert, IDS, PASSAGES, ASKED, bf16=True)
    for half in (searched, rerank_run(colbert, RUN, CORPUS, ASKED, len(IDS), bf16=True)):
        np.testing.assert_allclose([[half[query][name] for name in IDS] for query in ASKED], scores, rtol=0.03)
