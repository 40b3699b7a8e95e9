"""Folders of generated queries, and how they are joined to passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tct_hf import expanded_texts, load_expansions, write_expansions
from tct_hf.data import shards
from tct_hf.data.expansion import SCORES_FOLDER, score_columns

QUERIES = [["what is a", "where is a", "What  is a"], [], ["how b", "how b", "who c"], ["d"]]


def rows() -> list[dict[str, Any]]:
    return [{"id": f"p{row}", "queries": queries} for row, queries in enumerate(QUERIES)]


def corpus(count: int = 4) -> list[dict[str, str]]:
    return [{"id": f"p{row}", "text": f"text {row}"} for row in range(count)]


def score(folder: Path, scores: list[list[float]], shard_size: int) -> None:
    """As `score_expansions` would."""
    rows = [(f"p{row}", of_row) for row, of_row in enumerate(scores)]
    parts = (("x", rows[start : start + shard_size]) for start in range(0, len(rows), shard_size))
    make = lambda part: score_columns(*zip(*part, strict=True))  # noqa: E731
    shards.run_shards(folder / SCORES_FOLDER, {"teacher": "t"}, parts, make)


@settings(max_examples=10, deadline=None)
@given(queries=st.lists(st.lists(st.text(st.characters(codec="utf-8")), max_size=4), min_size=1, max_size=9))
def test_any_text_survives_in_its_order(tmp_path_factory: pytest.TempPathFactory, queries: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = [{"id": f"p{row}", "queries": texts} for row, texts in enumerate(queries)]
    manifest = write_expansions(made, folder / "out", settings={"source": "hand"}, shard_size=2)
    assert manifest["source"] == "hand" and sum(entry["count"] for entry in manifest["shards"]) == len(queries)
    assert load_expansions(folder / "out").to_list() == made


def test_passages_are_followed_by_their_first_queries(tmp_path: Path) -> None:
    write_expansions(rows(), tmp_path / "out", settings={})
    found = load_expansions(tmp_path / "out")
    whole = ["text 0 what is a where is a What  is a", "text 1", "text 2 how b how b who c", "text 3 d"]
    assert list(expanded_texts(corpus(), found)) == whole
    assert list(expanded_texts(iter(corpus()), found, num_queries=1))[2] == "text 2 how b"
    assert list(expanded_texts(corpus(), found, num_queries=0)) == [f"text {row}" for row in range(4)]
    distinct = list(expanded_texts(corpus(), found, drop_repeats=True))
    assert distinct[0] == "text 0 what is a where is a" and distinct[2] == "text 2 how b who c"


def test_the_lowest_scores_of_the_whole_corpus_are_left_out(tmp_path: Path) -> None:
    write_expansions(rows(), tmp_path / "out", settings={}, shard_size=3)
    score(tmp_path / "out", [[0.5, -2.0, 0.1], [], [-0.25, -0.3, 3.0], [-7.0]], shard_size=3)
    found = load_expansions(tmp_path / "out")
    assert found[2]["scores"] == pytest.approx([-0.25, -0.3, 3.0])
    texts = list(expanded_texts(corpus(), found, drop_share=0.5))  # 3 of 7: -7, -2, -0.3
    assert texts == ["text 0 what is a What  is a", "text 1", "text 2 how b who c", "text 3"]
    # Repeats go first, of the queries that are asked for: 0.5, -2.0; -0.25, 3.0; -7.0.
    texts = list(expanded_texts(corpus(), found, drop_share=0.25, drop_repeats=True))
    assert texts == ["text 0 what is a where is a", "text 1", "text 2 how b who c", "text 3"]


SCORE = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.5])


@settings(max_examples=20, deadline=None)
@given(scores=st.lists(st.lists(SCORE, max_size=5), min_size=1), share=st.floats(0.0, 1.0, exclude_max=True))
def test_what_is_kept_reaches_the_score_of_that_rank(
    tmp_path_factory: pytest.TempPathFactory, scores: list[list[float]], share: float
) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = [{"id": f"p{at}", "queries": [f"q{n}" for n in range(len(row))]} for at, row in enumerate(scores)]
    write_expansions(made, folder, settings={})
    score(folder, scores, shard_size=99)
    flat = sorted(np.float32(value) for row in scores for value in row)
    texts = expanded_texts(corpus(len(scores)), load_expansions(folder), drop_share=share)
    for text, row in zip(texts, scores, strict=True):
        kept = [f"q{n}" for n, value in enumerate(row) if value >= flat[int(share * len(flat))]]
        assert text.split()[2:] == kept


def test_another_corpus_is_one_message_that_names_passages(tmp_path: Path) -> None:
    write_expansions(rows(), tmp_path / "out", settings={})
    found = load_expansions(tmp_path / "out")
    for texts, message in (
        (corpus(5), "at passage number 4 the corpus has 'p4' there and the expansion ends before it"),
        (corpus()[1:], "at passage number 0 the corpus has 'p1' there and the expansion has 'p0' there"),
        (corpus(2), "at passage number 2 the corpus ends before it and the expansion has 'p2' there"),
    ):
        with pytest.raises(ValueError, match=message):
            expanded_texts(Dataset.from_list(texts), found)  # before any text is taken
        with pytest.raises(ValueError, match=message):
            list(expanded_texts(iter(texts), found))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    write_expansions(rows(), tmp_path / "out", settings={})
    found = load_expansions(tmp_path / "out")
    for options, message in (
        ({"drop_share": 0.5}, "the queries have no scores: score them with score_expansions"),
        ({"drop_share": 1.0}, "drop_share must be at least 0 and below 1"),
        ({"num_queries": -1}, "num_queries must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            expanded_texts(corpus(), found, **options)  # type: ignore[arg-type]
    for bad, message in (
        ([{"id": 1, "queries": []}], "number 0 has id = 1"),
        ([{"id": "a", "queries": "what"}], "'a' .number 0. has queries = 'what'"),
        ([{"id": "a", "queries": [b"what"]}], "queries = .b'what'., no list of texts"),
        ([{"id": "a", "queries": ["what", "half \ud83d"]}], "id and queries, number 2: half a surrogate pair"),
        ([], "nothing to write, the corpus or the rows are empty"),
    ):
        with pytest.raises(ValueError, match=message):
            write_expansions(bad, tmp_path / "bad", settings={})
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        write_expansions(rows(), tmp_path / "bad", settings={}, shard_size=0)


def test_rows_in_another_format_are_written_alike(tmp_path: Path) -> None:
    listed = Dataset.from_list([{"id": "a", "queries": ["what", "why"]}])
    write_expansions(listed.with_format("numpy"), tmp_path / "numpy", settings={})
    assert load_expansions(tmp_path / "numpy")[:] == listed[:]


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            load_expansions(out)

    refused("no such folder of expansions", FileNotFoundError)
    write_expansions(rows(), out, settings={}, shard_size=3)
    with pytest.raises(ValueError, match="made of other passages"):
        write_expansions(rows()[::-1], out, settings={}, shard_size=3)
    shard = out / "00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    refused(r"00001.arrow is damaged or was altered")
    shard.unlink()
    write_expansions(rows(), out, settings={}, shard_size=3)
    assert shard.read_bytes() == whole
    score(out, [[0.5, 1.0], [], [1.0, 2.0, 3.0], [1.0]], shard_size=3)
    refused(r"scores/00000.arrow: it has not one score a query")
    (out / "manifest.json").unlink()
    refused("not finished; run again", FileNotFoundError)
    (out / "manifest.json").write_text('{"count": 0, "shards": []}')
    refused("another version of tct_hf")
