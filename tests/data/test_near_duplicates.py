from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tct_hf.data.near_duplicates import folded, groups, near_duplicate_pairs, shingles

LONG = "return the sum of the values over the requested axis and skip missing values unless told otherwise"


def test_texts_that_share_most_words_are_paired() -> None:
    texts = [LONG, "compute the singular value decomposition of a matrix", LONG.replace("sum", "mean")]
    assert list(near_duplicate_pairs(texts, width=3, threshold=0.5)) == [(0, 2)]


def test_boilerplate_bucket_still_pairs_neighbours() -> None:
    assert list(near_duplicate_pairs([LONG] * 4, width=3, threshold=0.6, max_bucket=2)) == [(0, 1), (1, 2), (2, 3)]


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=1, max_size=8).map(" ".join)


@given(st.lists(words, max_size=8), st.sampled_from([0.3, 0.6, 1.0]))
def test_pairs_equal_brute_force_when_the_sketch_holds_every_shingle(texts: list[str], threshold: float) -> None:
    sets = [shingles(text, 2) for text in texts]
    expected = [
        (left, right)
        for left in range(len(texts))
        for right in range(left + 1, len(texts))
        if len(sets[left] & sets[right]) >= threshold * len(sets[left] | sets[right])
    ]
    assert list(near_duplicate_pairs(texts, width=2, threshold=threshold)) == expected


def test_group_is_named_by_its_smallest_member() -> None:
    assert groups([(4, 2), (2, 3), (0, 3)], 5) == [0, 1, 0, 0, 0]
    assert groups([], 2) == [0, 1]


def test_case_punctuation_and_white_space_are_folded_away_and_nothing_else() -> None:
    same = ("What is\u00a0it?", "what IS (it)", "\u00bfWhat -- is it\u3002", "what_is it")
    assert len({folded(text) for text in same}) == 1
    assert len({folded(text) for text in ("c", "c++", "\u0915\u093f", "\u0915\u0940", "?", "!")}) == 6
