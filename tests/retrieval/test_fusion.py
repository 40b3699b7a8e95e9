from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import rank

# Few names and few values, so that lists overlap and scores tie.
names = st.sampled_from([f"d{at}" for at in range(12)])
scores = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
runs = st.dictionaries(st.sampled_from(["q0", "q1"]), st.dictionaries(names, scores, max_size=12), max_size=2)
common = st.tuples(runs, runs).filter(lambda pair: not pair[0] or not pair[1] or pair[0].keys() & pair[1].keys())

SPARSE = {"q": {"a": 10.0, "b": 6.0, "c": 2.0}}
DENSE = {"q": {"b": 3.0, "d": 2.5, "a": 1.0}}


def naive(sparse_run: dict, dense_run: dict, alpha: float, normalize: bool = False) -> dict:
    """The rule passage by passage."""
    fused: dict[str, dict[str, float]] = {}
    for query in set(sparse_run) | set(dense_run):
        fused[query] = {}
        lists = [sparse_run.get(query, {}), dense_run.get(query, {})]
        for passage in set(lists[0]) | set(lists[1]):
            total = 0.0
            for weight, found in zip((alpha, 1.0), lists, strict=True):
                if not found:
                    continue
                score = found.get(passage, min(found.values()))
                if normalize:
                    low, high = min(found.values()), max(found.values())
                    score = 0.0 if low == high else (score - (low + high) / 2) / (high - low)
                total = total + weight * score
            fused[query][passage] = total
    return fused


def test_fused_scores_as_worked_out_by_hand() -> None:
    # c lacks in the dense list, whose lowest score is 1; d in the sparse list, whose lowest score is 2.
    expected = {"b": 0.5 * 6 + 3, "a": 0.5 * 10 + 1, "d": 0.5 * 2 + 2.5, "c": 0.5 * 2 + 1}
    found = fuse(SPARSE, DENSE, 0.5)
    assert found == {"q": expected}
    assert list(found["q"]) == ["a", "b", "d", "c"]  # a and b are equal
    # Sparse 10 6 2 become .5 0 -.5; dense 3 2.5 1 become .5 .25 -.5.
    normalized = {"b": 0.0 + 0.5, "a": 0.5 * 0.5 - 0.5, "d": -0.25 + 0.25, "c": -0.25 - 0.5}
    assert fuse(SPARSE, DENSE, 0.5, normalize=True)["q"] == pytest.approx(normalized)


@settings(deadline=None)
@given(pair=common, alpha=st.floats(0, 100), normalize=st.booleans(), k=st.integers(1, 14))
def test_fusion_is_the_rule_passage_by_passage_whatever_their_order(
    pair: tuple[dict, dict], alpha: float, normalize: bool, k: int
) -> None:
    turned = [{query: dict(reversed(hits.items())) for query, hits in run.items()} for run in pair]
    found, expected = fuse(*pair, alpha, normalize=normalize), naive(*pair, alpha, normalize)
    assert found == expected
    for query, hits in found.items():
        assert list(hits.items()) == rank(hits)
        assert list(fuse(*turned, alpha, normalize=normalize, k=k)[query].items()) == rank(hits)[:k]


def test_equal_scores_and_empty_lists_survive_normalisation() -> None:
    assert fuse({"q": {"a": 7.0, "b": 7.0}}, {"q": {"a": 1.0}}, 0.3, normalize=True) == {"q": {"a": 0.0, "b": 0.0}}
    assert fuse({"q": {}}, {"q": {"a": 1.0, "b": 3.0}}, 0.3, normalize=True) == {"q": {"b": 0.5, "a": -0.5}}
    assert fuse({"q": {}}, {"q": {}}, 0.3, normalize=True) == {"q": {}}
    found = fuse({"q1": {"a": 4.0}, "q2": {"b": 2.0}}, {"q2": {"c": 5.0}, "q3": {"d": 3.0}}, 0.5)
    assert found == {"q1": {"a": 2.0}, "q2": {"c": 6.0, "b": 6.0}, "q3": {"d": 3.0}}
    assert list(found) == ["q1", "q2", "q3"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: fuse(SPARSE, DENSE, -0.1), "alpha: -0.1"),
        (lambda: fuse(SPARSE, DENSE, math.nan), "alpha: nan"),
        (lambda: fuse(SPARSE, DENSE, 0.1, k=0), "k: 0"),
        (lambda: fuse(SPARSE, {"other": {"a": 1.0}}, 0.1), "no query in common"),
        (lambda: fuse({"q": {"a": math.nan}}, DENSE, 0.1), "query 'q', passage 'a': score nan"),
        (lambda: fuse(SPARSE, {"q": {"z": 1.0, "y": math.inf}}, 0.1, normalize=True), "passage 'y': score inf"),
        (lambda: reciprocal_rank_fusion([SPARSE, {"other": {"a": 1.0}}]), r"runs\[0\], runs\[1\]: no query in common"),
        (lambda: reciprocal_rank_fusion([]), "one or more runs"),
        (lambda: reciprocal_rank_fusion(SPARSE), "one or more runs"),  # type: ignore[arg-type]
        (lambda: reciprocal_rank_fusion([SPARSE], k=-1), "k: -1"),
        (lambda: reciprocal_rank_fusion([SPARSE], depth=0), "depth: 0"),
        (lambda: reciprocal_rank_fusion([{"q": {"a": math.nan}}]), "passage 'a': score nan"),
    ],
)
def test_what_cannot_be_fused_is_named(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_reciprocal_ranks_as_worked_out_by_hand() -> None:
    found = reciprocal_rank_fusion([SPARSE, DENSE])
    expected = {"a": 1 / 61 + 1 / 63, "b": 1 / 62 + 1 / 61, "c": 1 / 63, "d": 1 / 62}
    assert found["q"] == pytest.approx(expected)
    assert list(found["q"]) == ["b", "a", "d", "c"]
    assert reciprocal_rank_fusion([SPARSE], k=0)["q"] == {"a": 1.0, "b": 1 / 2, "c": 1 / 3}
    assert list(reciprocal_rank_fusion([SPARSE, DENSE], depth=2)["q"]) == ["b", "a"]


@settings(deadline=None)
@given(several=st.lists(runs, min_size=1, max_size=3), k=st.integers(0, 100))
def test_reciprocal_rank_fusion_is_the_sum_over_lists(several: list[dict], k: int) -> None:
    assume(all(not one or not other or one.keys() & other.keys() for one, other in combinations(several, 2)))
    found = reciprocal_rank_fusion(several, k)
    assert set(found) == {query for run in several for query in run}
    for query, hits in found.items():
        assert list(hits.items()) == rank(hits)
        ordered = [[name for name, _ in rank(run.get(query, {}))] for run in several]
        for passage, score in hits.items():
            assert score == pytest.approx(sum(1 / (k + 1 + o.index(passage)) for o in ordered if passage in o))
        assert set(hits) == {passage for order in ordered for passage in order}
