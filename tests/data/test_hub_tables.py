"""Tables named by a Hub id: what is one, and scores that are read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from tct_hf.data.rows import is_hub_id, is_score_file
from tct_hf.data.scores import ScoreTable


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set of the published form, lists of passages and scores, under its Hub id."""
    folder = tmp_path / "owner" / "scores-L6-v1.5"
    (folder / "list").mkdir(parents=True)
    rows = {"query_id": [1, 2], "corpus_id": [[10, 11], [11]], "score": [[1.5, -2.0], [0.25]]}
    Dataset.from_dict(rows).to_parquet(folder / "list" / "train.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: list\n  data_files: list/*.parquet\n---\n")
    (tmp_path / "owner" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("owner/name:list", True),
        ("owner/scores-L6-v1.5:list:train", True),
        ("scores", False),
        ("teacher_score", False),
        ("owner/scores.parquet", False),
        ("owner/scores.tsv.gz", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("owner/file", False),
    ],
)
def test_what_a_hub_table_is(here: Path, name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
    assert not expected or is_score_file(name)


@pytest.mark.parametrize("name", ["owner/scores-L6-v1.5:list:train", "owner/scores-L6-v1.5:list"])
def test_scores_are_read_from_lists_of_a_hub_table(here: Path, name: str) -> None:
    table = ScoreTable.open(name, cache_dir=here / "cache")
    assert table.name == name
    assert table.get([("1", "10"), ("1", "11"), ("2", "11"), ("2", "10")]) == [1.5, -2.0, 0.25, None]


def test_a_split_that_is_not_there_is_named(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no split 'dev'; splits there: train"):
        ScoreTable.open("owner/scores-L6-v1.5:list:dev", cache_dir=here / "cache")


def test_a_table_that_is_nowhere_is_one_message(here: Path) -> None:
    with pytest.raises(OSError, match="nobody/nothing: not a folder here, and"):
        ScoreTable.open("nobody/nothing:list:train", cache_dir=here / "cache")
