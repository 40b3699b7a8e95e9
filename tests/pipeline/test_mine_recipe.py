"""The mining recipe on a tiny student: its triples train, it goes on where it was killed, wrong settings are named."""

from __future__ import annotations

import json
import shutil
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
from tests.recipe import Check, Run
from tests.searching import Material

RECIPE = "mine"


SETTINGS = "precision: fp32\ndepth: 10\nmodel: FOLDER/student\ndata: {source: FOLDER/beir}\n"


def mined(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "mined" / "triples.parquet").to_pylist()
    return rows


def counts(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "mined" / "summary.json").read_text())["counts"]
    return found


def test_a_killed_run_goes_on_and_ends_with_the_triples_of_an_undisturbed_one(
    settings: Path, recipe: Run, apart: Run, tmp_path: Path
) -> None:
    said = apart(tmp_path / "killed", kill_at="[3/3] mine").stdout
    assert "60 passages" in said and not (tmp_path / "killed" / "mined" / "summary.json").exists()
    shard = tmp_path / "killed" / "search" / "vectors" / "00000.arrow"
    made = shard.stat().st_mtime_ns
    said = recipe(tmp_path / "killed").stdout
    assert shard.stat().st_mtime_ns == made
    recipe(tmp_path / "whole")
    rows = mined(tmp_path / "whole")
    assert mined(tmp_path / "killed") == rows and len(rows) == 40
    [row] = [line for line in said.splitlines() if line.startswith("| student ")]
    found = counts(tmp_path / "whole")["positives_found"]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["40", "40", str(found)]
    loaded = load_triples(tmp_path / "whole" / "mined" / "triples.parquet", cache_dir=tmp_path / "cache")
    assert loaded.column_names == list(rows[0])[:7]
    # Candidates are those that exact search with the student finds.
    collection, student = load_collection(str(settings.parent / "beir")), settings.parent / "student"
    model = SentenceTransformer(str(student), device="cpu")
    exact = Workspace(collection, model, "student", precision="fp32", in_memory=True)
    search = exact.search(collection.splits["train"].queries, 10)
    for one in rows:
        assert one["origin"] == f"student {student}" and one["negative_id"] in search[one["query_id"]]
    again = recipe(tmp_path / "whole", f"--model={settings.parent / 'mean'}", code=1)  # another student
    assert "choose another folder" in again.stderr


def test_bm25_and_a_run_give_triples_and_other_settings_are_refused(
    recipe: Run, tmp_path: Path, settings: Path
) -> None:
    options = ["--model=null", "--num_negatives=2"]
    recipe(tmp_path / "bm25", *options)
    collection = load_collection(str(settings.parent / "beir"))
    write_run(collection_bm25(collection).run(collection.splits["train"].queries, 10), tmp_path / "run.gz", "theirs")
    recipe(tmp_path / "run", *options, f"--run={tmp_path / 'run.gz'}")
    rows = [{**row, "origin": "theirs"} for row in mined(tmp_path / "bm25")]
    assert mined(tmp_path / "run") == rows and mined(tmp_path / "bm25")[0]["origin"] == "bm25"
    again = recipe(tmp_path / "bm25", "--model=null", "--num_negatives=1", code=1)
    assert "holds a run with num_negatives = 2, but now num_negatives = 1" in again.stderr


def test_of_a_folder_without_a_test_split_the_labels_that_are_used_are_mined_for(
    recipe: Run, tmp_path: Path, settings: Path
) -> None:
    folder = tmp_path / "collection"
    shutil.copytree(settings.parent / "beir", folder)
    for file in (folder / "qrels").glob("test.tsv*"):
        file.unlink()
    recipe(tmp_path / "out", "--model=null", f"--data.source={folder}", "--data.labels=0.5")
    queries = load_collection(str(settings.parent / "beir")).labelled(0.5)
    assert {row["query_id"] for row in mined(tmp_path / "out")} == set(queries)
    assert counts(tmp_path / "out")["queries"] == len(queries) == 20


def test_a_margin_refuses_what_the_teacher_prefers_to_the_positive(
    recipe: Run, material: Material, tmp_path: Path
) -> None:
    recipe(tmp_path, "--model=null", "--margin=0.0", f"--teacher={material.teacher}")
    assert counts(tmp_path)["above_margin"] > 0 and counts(tmp_path)["rows"] == 40
    row = next(row for row in mined(tmp_path) if row["negative_teacher_score"] is not None)
    model = load_colbert(material.teacher)
    passages = model.encode_document([row["positive"], row["negative"]])
    [[own, other]] = model.similarity(model.encode_query([row["query"]]), passages).tolist()
    assert (row["positive_teacher_score"], row["negative_teacher_score"]) == pytest.approx((own, other), abs=1e-5)
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
def test_wrong_settings_are_one_message(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
