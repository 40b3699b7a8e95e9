"""The mining recipe on a tiny student: its triples train, it goes on where it was killed, wrong settings are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import load_triples, write_run
from tct_hf.data.collection import load_collection
from tct_hf.evaluation.workspace import Workspace
from tct_hf.retrieval.negatives import collection_bm25
from tests.models import load_colbert
from tests.recipe import ROOT, killed_at, run
from tests.searching import Material

RECIPE = ROOT / "recipes" / "mine.py"


SETTINGS = "precision: fp32\ndepth: 10\nmodel: FOLDER/student\ndata: {source: FOLDER/collection}\n"


def mined(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "mined" / "triples.parquet").to_pylist()
    return rows


def counts(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "mined" / "summary.json").read_text())["counts"]
    return found


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
    rows = mined(tmp_path / "whole")
    assert mined(tmp_path / "killed") == rows and len(rows) == 40
    [row] = [line for line in said.splitlines() if line.startswith("| student ")]
    found = counts(tmp_path / "whole")["positives_found"]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["40", "40", str(found)]
    loaded = load_triples(tmp_path / "whole" / "mined" / "triples.parquet", cache_dir=tmp_path / "cache")
    assert loaded.column_names == list(rows[0])[:7]
    # Candidates are those that exact search with the student finds.
    collection, student = load_collection(str(settings.parent / "collection")), settings.parent / "student"
    model = SentenceTransformer(str(student), device="cpu")
    exact = Workspace(collection, model, "student", precision="fp32", in_memory=True)
    search = exact.search(collection.splits["train"].queries, 10)
    for one in rows:
        assert one["origin"] == f"student {student}" and one["negative_id"] in search[one["query_id"]]
    assert recipe(tmp_path / "whole", f"--model={settings.parent / 'mean'}") == 1  # another student
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_mine_the_rows_of_one(settings: Path, recipe: Callable[..., int], tmp_path: Path) -> None:
    done = run(settings, tmp_path / "two", "--queries_a_part=4", processes=2, recipe=RECIPE)
    assert "part 1 of 10" in done.stdout and "part 3 of 10" in done.stdout  # the other process mines those between
    assert "part 2 of 10" not in done.stdout and done.stdout.count("[3/3] mine") == 1
    assert recipe(tmp_path / "one") == 0
    assert mined(tmp_path / "two") == mined(tmp_path / "one") and len(mined(tmp_path / "one")) == 40
    assert counts(tmp_path / "two") == counts(tmp_path / "one")


def test_bm25_and_a_run_give_triples_and_other_settings_are_refused(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Path
) -> None:
    options = ["--model=null", "--num_negatives=2"]
    assert recipe(tmp_path / "bm25", *options) == 0
    collection = load_collection(str(settings.parent / "collection"))
    write_run(collection_bm25(collection).run(collection.splits["train"].queries, 10), tmp_path / "run.gz", "theirs")
    assert recipe(tmp_path / "run", *options, f"--run={tmp_path / 'run.gz'}") == 0
    rows = [{**row, "origin": "theirs"} for row in mined(tmp_path / "bm25")]
    assert mined(tmp_path / "run") == rows and mined(tmp_path / "bm25")[0]["origin"] == "bm25"
    capsys.readouterr()
    assert recipe(tmp_path / "bm25", "--model=null", "--num_negatives=1") == 1
    assert "holds a run with num_negatives = 2, but now num_negatives = 1" in capsys.readouterr().err


def test_of_a_folder_without_a_test_split_the_labels_that_are_used_are_mined_for(
    recipe: Callable[..., int], tmp_path: Path, settings: Path
) -> None:
    folder = tmp_path / "collection"
    shutil.copytree(settings.parent / "collection", folder)
    for file in (folder / "qrels").glob("test.tsv*"):
        file.unlink()
    assert recipe(tmp_path / "out", "--model=null", f"--data.source={folder}", "--data.labels=0.5") == 0
    queries = load_collection(str(settings.parent / "collection")).labelled(0.5)
    assert {row["query_id"] for row in mined(tmp_path / "out")} == set(queries)
    assert counts(tmp_path / "out")["queries"] == len(queries) == 20


def test_a_margin_refuses_what_the_teacher_prefers_to_the_positive(
    recipe: Callable[..., int], material: Material, tmp_path: Path
) -> None:
    assert recipe(tmp_path, "--model=null", "--margin=0.0", f"--teacher={material.teacher}") == 0
    assert counts(tmp_path)["above_margin"] > 0 and counts(tmp_path)["rows"] == 40
    model = load_colbert(material.teacher)
    for row in mined(tmp_path):
        if row["negative_teacher_score"] is not None:
            passages = model.encode_document([row["positive"], row["negative"]])
            [[own, other]] = model.similarity(model.encode_query([row["query"]]), passages).tolist()
            assert (own, other) == pytest.approx(
                (row["positive_teacher_score"], row["negative_teacher_score"]), abs=1e-5
            )
            assert other <= own + 1e-5


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
def test_wrong_settings_are_one_message(refused: Callable[..., None], options: list[str], message: str) -> None:
    refused(options, message)
