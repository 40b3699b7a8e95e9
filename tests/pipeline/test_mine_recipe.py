"""The mining recipe on a tiny student: its triples train, it goes on where it was killed, wrong settings are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tct_hf import build_student, load_triples, save_student, write_run
from tct_hf.data.collection import load_collection
from tct_hf.retrieval.negatives import collection_bm25
from tests.models import tiny_bert
from tests.recipe import ROOT, in_this_process, killed_at, run, write_beir

RECIPE = ROOT / "recipes" / "mine.py"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    write_beir(folder / "collection", train=30)
    base = tiny_bert(folder / "encoder")
    save_student(build_student(str(base), encoding="tct", query_length=16, document_length=48), folder / "student")
    (folder / "mine.yaml").write_text(
        f"precision: fp32\ndepth: 10\nmodel: {folder / 'student'}\ndata: {{source: {folder / 'collection'}}}\n"
    )
    return folder / "mine.yaml"


@pytest.fixture
def recipe(settings: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, monkeypatch)


def test_a_killed_run_goes_on_and_ends_with_the_triples_of_an_undisturbed_one(
    settings: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = killed_at("[3/3] mine", settings, tmp_path / "killed", RECIPE)
    assert "60 passages" in said and not (tmp_path / "killed" / "mined" / "summary.json").exists()
    shard = tmp_path / "killed" / "search" / "vectors" / "00000.arrow"
    made = shard.stat().st_mtime_ns
    assert recipe(tmp_path / "killed") == 0 and shard.stat().st_mtime_ns == made
    said = capsys.readouterr().out
    assert recipe(tmp_path / "whole") == 0
    tables = [pq.read_table(tmp_path / name / "mined" / "triples.parquet") for name in ("killed", "whole")]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 30
    assert tables[0]["origin"].to_pylist() == [f"student {settings.parent / 'student'}"] * 30
    counts = json.loads((tmp_path / "whole" / "mined" / "summary.json").read_text())["counts"]
    [row] = [line for line in said.splitlines() if line.startswith("| student ")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["30", "30", str(counts["positives_found"])]
    rows = load_triples(tmp_path / "whole" / "mined" / "triples.parquet", cache_dir=tmp_path / "cache")
    assert rows.column_names == tables[0].column_names[:7]


@pytest.mark.slow
def test_two_processes_mine_the_rows_of_one(settings: Path, recipe: Callable[..., int], tmp_path: Path) -> None:
    done = run(settings, tmp_path / "two", "--queries_a_part=4", processes=2, recipe=RECIPE)
    assert "part 1 of 8" in done.stdout and "part 3 of 8" in done.stdout  # the other process mines those between
    assert "part 2 of 8" not in done.stdout and done.stdout.count("[3/3] mine") == 1
    assert recipe(tmp_path / "one") == 0
    tables = [pq.read_table(tmp_path / name / "mined" / "triples.parquet") for name in ("two", "one")]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 30
    counts = [json.loads((tmp_path / n / "mined" / "summary.json").read_text())["counts"] for n in ("two", "one")]
    assert counts[0] == counts[1]


def test_bm25_and_a_run_give_triples_and_other_settings_are_refused(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Path
) -> None:
    def mined(name: str) -> list[dict]:
        rows: list[dict] = pq.read_table(tmp_path / name / "mined" / "triples.parquet").to_pylist()
        return rows

    assert recipe(tmp_path / "bm25", "--model=null", "--num_negatives=2") == 0
    collection = load_collection(str(settings.parent / "collection"))
    write_run(collection_bm25(collection).run(collection.splits["train"].queries, 10), tmp_path / "run.trec", "bm25")
    assert recipe(tmp_path / "run", "--model=null", "--num_negatives=2", f"--run={tmp_path / 'run.trec'}") == 0
    assert mined("run") == mined("bm25") and mined("bm25")[0]["origin"] == "bm25"
    capsys.readouterr()
    assert recipe(tmp_path / "bm25", "--model=null", "--num_negatives=1") == 1
    assert "holds a run with num_negatives = 2, but now num_negatives = 1" in capsys.readouterr().err


def test_a_folder_without_a_test_split_is_mined(recipe: Callable[..., int], tmp_path: Path, settings: Path) -> None:
    folder = tmp_path / "collection"
    shutil.copytree(settings.parent / "collection", folder)
    for file in (folder / "qrels").glob("test.tsv*"):
        file.unlink()
    assert recipe(tmp_path / "out", "--model=null", f"--data.source={folder}") == 0
    assert (tmp_path / "out" / "mined" / "triples.parquet").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=x.trec"], "model, run: candidates come from one of them"),
        (["--margin=1.0"], "margin, teacher: the ColBERT judges by the margin; give both"),
        (["--depth=1", "--num_negatives=2"], "depth=1: too few candidates"),
        (["--queries_a_part=0"], "queries_a_part: 0 is below 1"),
        (["--data.labels=0.0"], "has no judged train queries"),
    ],
)
def test_wrong_settings_are_one_message(
    recipe: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert recipe(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
