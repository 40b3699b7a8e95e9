"""Tables of scores: whatever form they come in, the same look-ups; what is wrong is named by row and query."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tct_hf.data.rows import is_hub_id, is_score_file
from tct_hf.data.scores import ScoreTable
from tests import rows

ROWS = [("1", "7", 0.5), ("1", "8", -2.25), ("2", "7", 3.0)]


def write(path: Path, form: str) -> Any:
    dicts = [{"query_id": q, "passage_id": p, "score": s} for q, p, s in ROWS]
    if form == "parquet":
        Dataset.from_list(dicts).to_parquet(path / "s.parquet")
        return path / "s.parquet"
    if form == "jsonl.gz":
        return rows.write(path / "s.jsonl.gz", rows.jsonl(dicts))
    if form in ("tsv", "header"):
        head = "qid\tpid\tscore\n" if form == "header" else ""
        return rows.write(path / "s.tsv", head + "".join(f"{q}\t{p}\t{s}\n" for q, p, s in ROWS))
    if form == "lists":
        lists = [{"query_id": 1, "corpus_ids": [7, 8], "scores": [0.5, -2.25]}]
        return Dataset.from_list([*lists, {"query_id": 2, "corpus_ids": [7], "scores": [3.0]}])
    if form == "mapping":
        return {"1": {"7": 0.5, "8": -2.25}, "2": {"7": 3.0}}
    return Dataset.from_list([{"qid": q, "doc_id": p, "score": s} for q, p, s in ROWS])


@pytest.mark.parametrize("form", ["parquet", "jsonl.gz", "tsv", "header", "lists", "mapping", "data set"])
def test_every_form_gives_the_same_scores(tmp_path: Path, form: str) -> None:
    table = ScoreTable.open(write(tmp_path, form))
    wanted = [("1", "7"), ("2", "8"), ("1", "8"), ("2", "7"), ("17", ""), ("", "17")]
    assert table.get(wanted) == [0.5, None, -2.25, 3.0, None, None]


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
IDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4).filter(str.strip)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=st.dictionaries(st.tuples(IDS, IDS), FLOATS, min_size=1, max_size=40))
def test_any_pairs_are_found_again(tmp_path: Path, scores: dict[tuple[str, str], float]) -> None:
    mapping: dict[str, dict[str, float]] = {}
    for (query, passage), score in scores.items():
        mapping.setdefault(query, {})[passage] = score
    table = ScoreTable.open(mapping)
    assert table.get(list(scores)) == list(scores.values())
    assert table.get([("nobody", "none")]) == [None]


def test_a_mapping_may_hold_what_models_give(tmp_path: Path) -> None:
    given: Any = {1: {7: np.float32(0.5), 8: torch.tensor(-2.25)}, 2: {7: np.float64(3.0)}}
    assert ScoreTable.open(given).get([("1", "7"), ("1", "8"), ("2", "7")]) == [0.5, -2.25, 3.0]
    wrong: Any
    for wrong, message in (({"1": 0.5}, "query '1'.: holds 0.5"), ({"1": {"7": "x"}}, "'7' of query '1' is 'x'")):
        with pytest.raises(ValueError, match=message):
            ScoreTable.open(wrong)


def test_the_prepared_form_is_made_once_a_content(tmp_path: Path) -> None:
    path = write(tmp_path, "tsv")
    first = ScoreTable.open(path)
    assert ScoreTable.open(path).folder == first.folder
    assert {file.name for file in first.folder.iterdir()} == {"keys.npy", "scores.npy", "contents.json"}
    path.write_text("1\t7\t99.0\n")
    assert ScoreTable.open(path).get([("1", "7")]) == [99.0]


LISTS = '{"query_id": 4, "passage_ids": [1, 2], '
PAIR = '{"query_id": "1", "passage_id": "7", "score": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIR.replace("1}", "null}"), "line 1, column 'score': passage '7' of query '1' has no"),
        (PAIR.replace("1}", "1e999}"), "line 1, .*query '1' is inf, which is not finite"),
        (PAIR.replace("1}", "NaN}"), "line 1: not JSON"),
        (PAIR.replace("1}", '"x"}'), "is 'x', which is no number"),
        (PAIR + '{"query_id": "1", "score": 1}\n', "line 2: column 'passage"),
        ('{"a": 1}\n', "column 'query_id' is missing .there are: a.; name it so"),
        (PAIR.replace('"1"', "null"), "column 'query_id': no id .null.; fill it in"),
        (LISTS + '"scores": [0.5]}\n', "line 1: 2 passages in .* but 1 scores .*query '4'"),
        (LISTS + '"scores": 0.5}\n', "must both be lists"),
        (PAIR + PAIR.replace("1}", "2}"), "comes twice with different scores, such as 1 and 2"),
        ("", "it holds no score"),
        ("1\t7\t1\n1\t8\tnan\n", "line 2, .*is 'nan', which is no number"),
        *((f"1\t7\t1e0\n1\t8\t{no}\n", "line 2, .*is .*, which is no number") for no in ("x", "1_0", " 1", "\uff11")),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, cache: Path, text: str, message: str) -> None:
    path = tmp_path / ("s.tsv" if "\t" in text else "s.jsonl")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ScoreTable.open(path)
    assert not list(cache.glob("scores-*"))  # nothing half-made is left


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "scores.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({1: {7: 0.5}})))
    for wrong, message in (
        (path, r"a pickle, which may run code .*Convert it where you trust it, to a parquet"),
        (tmp_path / "s.csv", "s.csv"),
        (Dataset.from_dict({"a": [1]}).to_iterable_dataset(), "give a Dataset"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            ScoreTable.open(wrong)  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set of the published form, lists of passages and scores, under its Hub id."""
    folder = tmp_path / "owner" / "scores-L6-v1.5"
    (folder / "list").mkdir(parents=True)
    lists = {"query_id": [1, 2], "corpus_id": [[10, 11], [11]], "score": [[1.5, -2.0], [0.25]]}
    Dataset.from_dict(lists).to_parquet(folder / "list" / "train.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: list\n  data_files: list/*.parquet\n---\n")
    (tmp_path / "owner" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def test_a_setting_names_a_file_a_hub_table_or_columns(here: Path) -> None:
    for name in ("owner/name", "owner/name:list", "owner/scores-L6-v1.5:list:train"):
        assert is_hub_id(name) and is_score_file(name)
    for name in ("s.parquet", "a/s.jsonl.gz", "owner/s.tsv", "s.pkl", "s.pkl.gz"):
        assert is_score_file(name) and not is_hub_id(name)
    for name in ("scores", "teacher_score", "./owner/name", "/owner/name", "a/b/c", "owner/file"):
        assert not is_hub_id(name)
    assert not any(is_score_file(name) for name in ("scores", "teacher_score", "label"))


def test_scores_are_read_from_lists_of_a_hub_table(here: Path) -> None:
    for name in ("owner/scores-L6-v1.5:list:train", "owner/scores-L6-v1.5:list"):
        table = ScoreTable.open(name)
        assert table.name == name
        assert table.get([("1", "10"), ("1", "11"), ("2", "11"), ("2", "10")]) == [1.5, -2.0, 0.25, None]
    with pytest.raises(FileNotFoundError, match="no split 'dev'; splits there: train"):
        ScoreTable.open("owner/scores-L6-v1.5:list:dev")
    with pytest.raises(OSError, match="nobody/nothing: not a folder here, and"):
        ScoreTable.open("nobody/nothing:list:train")
