"""Tables of scores: whatever form they come in, the same look-ups; what is wrong is named by row and query."""

from __future__ import annotations

import gzip
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tct_hf.data import scores as score_table
from tct_hf.data.rows import is_score_file
from tct_hf.data.scores import ScoreTable

ROWS = [("1", "7", 0.5), ("1", "8", -2.25), ("2", "7", 3.0)]


def write(path: Path, form: str) -> Any:
    dicts = [{"query_id": q, "passage_id": p, "score": s} for q, p, s in ROWS]
    if form == "parquet":
        Dataset.from_list(dicts).to_parquet(path / "s.parquet")
        return path / "s.parquet"
    if form == "jsonl.gz":
        (path / "s.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in dicts).encode()))
        return path / "s.jsonl.gz"
    if form in ("tsv", "header"):
        head = "qid\tpid\tscore\n" if form == "header" else ""
        (path / "s.tsv").write_text(head + "".join(f"{q}\t{p}\t{s}\n" for q, p, s in ROWS))
        return path / "s.tsv"
    if form == "lists":
        lists = [{"query_id": 1, "corpus_ids": [7, 8], "scores": [0.5, -2.25]}]
        return Dataset.from_list([*lists, {"query_id": 2, "corpus_ids": [7], "scores": [3.0]}])
    if form == "mapping":
        return {"1": {"7": 0.5, "8": -2.25}, "2": {"7": 3.0}}
    return Dataset.from_list([{"qid": q, "doc_id": p, "score": s} for q, p, s in ROWS])


@pytest.mark.parametrize("form", ["parquet", "jsonl.gz", "tsv", "header", "lists", "mapping", "data set"])
def test_every_form_gives_the_same_scores(tmp_path: Path, form: str) -> None:
    table = ScoreTable.open(write(tmp_path, form), cache_dir=tmp_path / "cache")
    wanted = [("1", "7"), ("2", "8"), ("1", "8"), ("2", "7"), ("17", ""), ("", "17")]
    assert table.get(wanted) == [0.5, None, -2.25, 3.0, None, None]
    assert len(table) == 3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.dictionaries(
        st.tuples(st.text(min_size=1, max_size=4), st.text(min_size=1, max_size=4)),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=40,
    ),
    block=st.integers(1, 7),
)
def test_any_pairs_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: dict[tuple[str, str], float], block: int
) -> None:
    monkeypatch.setattr(score_table, "_ROWS_A_BLOCK", block)
    mapping: dict[str, dict[str, float]] = {}
    for (query, passage), score in scores.items():
        mapping.setdefault(query, {})[passage] = score
    table = ScoreTable.open(mapping, cache_dir=tmp_path / "cache")
    assert table.get(list(scores)) == list(scores.values())
    assert table.get([("nobody", "none")]) == [None]


def test_a_mapping_may_hold_what_models_give(tmp_path: Path) -> None:
    import numpy as np
    import torch

    given: Any = {1: {7: np.float32(0.5), 8: torch.tensor(-2.25)}, 2: {7: np.float64(3.0)}}
    assert ScoreTable.open(given, cache_dir=tmp_path).get([("1", "7"), ("1", "8"), ("2", "7")]) == [0.5, -2.25, 3.0]
    for wrong, message in (({"1": 0.5}, "query '1'.: holds 0.5 where"), ({"1": {"7": "x"}}, "passage '7' is 'x'")):
        with pytest.raises(ValueError, match=message):
            ScoreTable.open(wrong, cache_dir=tmp_path)  # type: ignore[arg-type]


def test_the_prepared_form_is_made_once_a_content(tmp_path: Path) -> None:
    path = write(tmp_path, "tsv")
    first = ScoreTable.open(path, cache_dir=tmp_path / "cache")
    assert ScoreTable.open(path, cache_dir=tmp_path / "cache").folder == first.folder
    assert {file.name for file in first.folder.iterdir()} == {"keys.npy", "scores.npy"}
    path.write_text("1\t7\t99.0\n")
    assert ScoreTable.open(path, cache_dir=tmp_path / "cache").get([("1", "7")]) == [99.0]


def test_names_are_mapped(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"a": "1", "b": "7", "c": 1.0}])
    table = ScoreTable.open(rows, columns={"query_id": "a", "passage_id": "b", "score": "c"}, cache_dir=tmp_path)
    assert table.get([("1", "7")]) == [1.0]
    with pytest.raises(ValueError, match=r"column 'query_id' is missing .*columns=\{'query_id'"):
        ScoreTable.open(rows, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="'text' is no field of a score table"):
        ScoreTable.open(rows, columns={"text": "a"}, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"query_id": "1", "passage_id": "7", "score": null}'],
            "line 1 .query '1'., column 'score': passage '7' has no",
        ),
        (['{"query_id": "1", "passage_id": "7", "score": 1e999}'], "line 1 .query '1'.*is inf, which is not finite"),
        (['{"query_id": "1", "passage_id": "7", "score": NaN}'], "line 1: not JSON"),
        (['{"query_id": "1", "passage_id": "7", "score": "x"}'], "is 'x', which is no number"),
        (
            ['{"query_id": "1", "passage_id": "7", "score": 1}', '{"query_id": "1", "score": 1}'],
            "line 2: column 'passage",
        ),
        (['{"query_id": null, "passage_id": "7", "score": 1}'], "column 'query_id': holds None where an id"),
        (
            ['{"query_id": 4, "passage_ids": [1, 2], "scores": [0.5]}'],
            "line 1 .query '4'.: 2 passages in 'passage_ids' but 1 scores in 'scores'",
        ),
        (['{"query_id": 4, "passage_ids": [1], "scores": 0.5}'], "must both be lists"),
        (
            ['{"query_id": "1", "passage_id": "7", "score": 1}', '{"query_id": "1", "passage_id": "7", "score": 2}'],
            "comes twice with different scores, such as 1 and 2",
        ),
        ([], "it holds no score"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "s.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        ScoreTable.open(tmp_path / "s.jsonl", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("scores-*"))  # nothing half-made is left


def test_tsv_scores_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for text, message in (
        ("1\t7\t1\n1\t8\tnan\n", "line 2 .*is nan"),
        ("1\t7\t1\n1\t8\tx\n", "line 2 .*'x' is no score"),
    ):
        (tmp_path / "s.tsv").write_text(text)
        with pytest.raises(ValueError, match=message):
            ScoreTable.open(tmp_path / "s.tsv", cache_dir=tmp_path / "cache")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "scores.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({1: {7: 0.5}})))
    with pytest.raises(
        ValueError, match=r"a pickle, which may run code .*Convert it where you trust it, to a parquet"
    ):
        ScoreTable.open(path, cache_dir=tmp_path)
    for name in ("no.parquet", "s.csv"):
        with pytest.raises((FileNotFoundError, ValueError)):
            ScoreTable.open(tmp_path / name, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="give a Dataset"):
        ScoreTable.open(Dataset.from_dict({"a": [1]}).to_iterable_dataset(), cache_dir=tmp_path)  # type: ignore[arg-type]


def test_a_setting_names_a_file_or_columns() -> None:
    assert [is_score_file(name) for name in ("scores", "teacher_score", "label")] == [False] * 3
    assert all(is_score_file(name) for name in ("s.parquet", "a/s.jsonl.gz", "s.tsv", "s.pkl", "s.pkl.gz"))
    assert math.isfinite(score_table.check_score(1, "x", "here", "mend"))
