"""The scoring recipe on tiny teachers: it goes on where it was killed, its scores are the teacher's and train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder

from tct_hf import ColBERTTeacher, CrossEncoderTeacher, StoredScores, TeacherEnsemble, load_triples, score_triples
from tct_hf.teachers.base import write_training_scale
from tests.recipe import Check, Run
from tests.reranker import relevance, serving
from tests.searching import Material
from tests.train_helpers import triples

RECIPE = "score"


SETTINGS = """
kind: cross-encoder
teacher: FOLDER/cross-encoder
dtype: float32
rows_a_shard: 6
batch_size: 4
triples: {path: FOLDER/to-score.parquet}
"""


@pytest.fixture(scope="module", autouse=True)
def source(material: Material) -> Dataset:
    rows = triples(20, negatives=2)
    rows.to_parquet(material.folder / "to-score.parquet")
    return rows


def test_a_killed_run_goes_on_and_ends_with_the_scores_of_the_teacher(
    settings: Path, source: Dataset, recipe: Run, apart: Run, tmp_path: Path
) -> None:
    teacher = settings.parent / "cross-encoder"
    apart(tmp_path / "killed", kill_at="shard 2 of 4")
    shards = sorted((tmp_path / "killed" / "triples").glob("*.parquet"))
    assert len(shards) == 2 and not (tmp_path / "killed" / "summary.json").exists()
    made = [shard.stat().st_mtime_ns for shard in shards]
    said = recipe(tmp_path / "killed").stdout
    assert [shard.stat().st_mtime_ns for shard in shards] == made
    recipe(tmp_path / "whole")
    files = [{f.name: f.read_bytes() for f in (tmp_path / n / "triples").iterdir()} for n in ("killed", "whole")]
    assert files[0] == files[1] and len(files[0]) == 4
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    [row] = [line for line in said.splitlines() if line.startswith(f"| {teacher}")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["20", "3", f"{summary['positive_on_top']:.1%}"]

    rows = load_triples(tmp_path / "whole" / "triples", scores="teacher_score", cache_dir=tmp_path / "cache")
    assert [list(rows[name]) for name in ("query", "positive_id")] == [source["query"][:], source["positive_id"][:]]
    columns = [list(rows[name]) for name in ("positive", "negative_1", "negative_2")]
    live, stored = CrossEncoderTeacher(str(teacher), dtype="float32"), StoredScores()
    expected, found = (
        one.score_matrix(one.collate(list(rows["query"]), columns, list(rows)), gather=False) for one in (live, stored)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    scores = np.array(list(rows["scores"]), dtype=np.float64)
    assert summary["teacher"] == str(teacher)
    assert summary["scores"] == {
        **{"kind": "logit", "training_scale": 1.0, "count": 60},
        **{"min": scores.min(), "max": scores.max(), "mean": pytest.approx(scores.mean())},
    }
    assert f"{scores.min():.2f} to {scores.max():.2f} ({scores.mean():.2f})" in said


def test_a_colbert_scores_too_and_other_settings_are_refused(recipe: Run, material: Material, tmp_path: Path) -> None:
    colbert = shutil.copytree(material.teacher, tmp_path / "colbert")
    write_training_scale(colbert, 2.0)
    recipe(tmp_path / "out", "--kind=colbert", f"--teacher={colbert}")
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]
    assert said["kind"] == "MaxSim" and said["training_scale"] == 2.0
    rows = load_triples(tmp_path / "out" / "triples", scores="teacher_score", cache_dir=tmp_path / "cache")
    model = MultiVectorEncoder(str(colbert), device="cpu")
    expected = model.similarity(model.encode_query([rows[7]["query"]]), model.encode_document([rows[7]["negative_2"]]))
    assert rows[7]["scores"][2] == pytest.approx(float(expected), abs=1e-5)
    assert "choose another folder" in recipe(tmp_path / "out", code=1).stderr  # the cross-encoder again


def test_a_server_scores_too(recipe: Run, tmp_path: Path) -> None:
    with serving() as server:
        recipe(tmp_path / "out", "--kind=url", f"--teacher={server.url}", f"--options={{cache_dir: {tmp_path}}}")
    rows = load_triples(tmp_path / "out" / "triples", scores="teacher_score", cache_dir=tmp_path / "cache")
    expected = [relevance(rows[7]["query"], rows[7][name]) for name in ("positive", "negative_1", "negative_2")]
    assert list(rows[7]["scores"]) == pytest.approx(expected)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]["kind"] == "relevance score"


def test_scores_that_would_depend_on_the_other_rows_of_a_batch_are_refused(material: Material, tmp_path: Path) -> None:
    colbert = ColBERTTeacher(str(material.teacher))
    every = CrossEncoderTeacher(str(material.folder / "cross-encoder"), candidates="in-batch")
    for teacher, message in (
        (TeacherEnsemble({colbert: 1.0}), "depend on the rows beside a row: score with each teacher alone"),
        (every, 'load it with candidates="own"'),
    ):
        with pytest.raises(ValueError, match=message):
            score_triples(teacher, triples(4), tmp_path / "out", depends={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher=null"], "teacher: name the folder or Hub id"),
        (["--triples.path=null"], "triples.path: name the triples"),
        (["--triples.streaming"], "triples.streaming: shards"),
        (["--teacher=./nowhere"], "teacher: ./nowhere is not there"),
    ],
)
def test_wrong_settings_are_one_message(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
