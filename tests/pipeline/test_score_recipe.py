"""The scoring recipe on tiny teachers: it goes on where it was killed, its scores are the teacher's and train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from tct_hf import (
    ColBERTTeacher,
    CrossEncoderTeacher,
    StoredScores,
    TeacherEnsemble,
    load_triples,
    score_triples,
)
from tct_hf.teachers.base import write_training_scale
from tests.models import tiny_colbert, tiny_cross_encoder
from tests.recipe import ROOT, in_this_process, killed_at
from tests.train_helpers import triples

RECIPE = ROOT / "recipes" / "score.py"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    triples(20, negatives=2).to_parquet(folder / "triples.parquet")
    teacher = tiny_cross_encoder(folder / "cross-encoder")
    (folder / "score.yaml").write_text(
        f"kind: cross-encoder\nteacher: {teacher}\ndtype: float32\nrows_a_shard: 6\nbatch_size: 4\n"
        f"triples: {{path: {folder / 'triples.parquet'}}}\n"
    )
    return folder / "score.yaml"


@pytest.fixture
def recipe(settings: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, monkeypatch)


def test_a_killed_run_goes_on_and_ends_with_the_scores_of_the_teacher(
    settings: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at("shard 2 of 4", settings, tmp_path / "killed", RECIPE)
    shards = sorted((tmp_path / "killed" / "triples").glob("*.parquet"))
    assert len(shards) == 2 and not (tmp_path / "killed" / "summary.json").exists()
    made = [shard.stat().st_mtime_ns for shard in shards]
    assert recipe(tmp_path / "killed") == 0 and [shard.stat().st_mtime_ns for shard in shards] == made
    said = capsys.readouterr().out
    assert recipe(tmp_path / "whole") == 0
    files = [{f.name: f.read_bytes() for f in (tmp_path / n / "triples").iterdir()} for n in ("killed", "whole")]
    assert files[0] == files[1] and len(files[0]) == 4
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    [row] = [line for line in said.splitlines() if line.startswith(f"| {settings.parent / 'cross-encoder'}")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["20", "3", f"{summary['positive_on_top']:.1%}"]

    rows = load_triples(tmp_path / "whole" / "triples", scores="teacher_score", cache_dir=tmp_path / "cache")
    source = triples(20, negatives=2)
    for name in ("query", "positive_id"):
        assert list(rows[name]) == list(source[name])
    columns = [list(rows[name]) for name in ("positive", "negative_1", "negative_2")]
    live = CrossEncoderTeacher(str(settings.parent / "cross-encoder"), dtype="float32")
    expected = live.score_matrix(live.collate(list(rows["query"]), columns, list(rows)), gather=False)
    stored = StoredScores()
    found = stored.score_matrix(stored.collate(list(rows["query"]), columns, list(rows)), gather=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    scores = np.array(list(rows["scores"]), dtype=np.float64)
    assert summary["teacher"] == str(settings.parent / "cross-encoder")
    assert summary["scores"] == {
        **{"kind": "logit", "training_scale": 1.0, "count": 60},
        **{"min": scores.min(), "max": scores.max(), "mean": pytest.approx(scores.mean())},
    }
    assert f"{scores.min():.2f} to {scores.max():.2f} ({scores.mean():.2f})" in said


def test_a_colbert_scores_too_and_other_settings_are_refused(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colbert = tiny_colbert(tmp_path / "colbert")
    write_training_scale(colbert, 2.0)
    assert recipe(tmp_path / "out", "--kind=colbert", f"--teacher={colbert}") == 0
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]
    assert said["kind"] == "MaxSim" and said["training_scale"] == 2.0
    rows = load_triples(tmp_path / "out" / "triples", scores="teacher_score", cache_dir=tmp_path / "cache")
    model = MultiVectorEncoder(str(colbert), device="cpu")
    expected = model.similarity(model.encode_query([rows[7]["query"]]), model.encode_document([rows[7]["negative_2"]]))
    assert rows[7]["scores"][2] == pytest.approx(float(expected), abs=1e-5)
    capsys.readouterr()
    assert recipe(tmp_path / "out") == 1  # the cross-encoder again
    assert "choose another --output_dir" in capsys.readouterr().err


def test_scores_that_would_depend_on_the_other_rows_of_a_batch_are_refused(settings: Path, tmp_path: Path) -> None:
    colbert = ColBERTTeacher(str(tiny_colbert(tmp_path / "colbert")))
    every = CrossEncoderTeacher(str(settings.parent / "cross-encoder"), candidates="in-batch")
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
def test_wrong_settings_are_one_message(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert recipe(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
