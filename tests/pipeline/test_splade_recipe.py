"""The training recipe with a sparse student: trained, saved, measured; impossible settings refused before anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import SparseEncoder

from tct_hf import read_run
from tct_hf.files import LOG_FILE
from tests.models import tiny_bert, tiny_mlm
from tests.recipe import RECIPE, STEPS, in_this_process, write_material

SPLADE = ["--student.kind=splade", "--student.initialise_from=base", "--student.layers=null"]
SPLADE += ["--student.training.document_regularizer_weight=0.003"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    file = write_material(folder)
    tiny_mlm(folder / "encoder", dropout=0.1)
    return file


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, settings: Path) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, monkeypatch)


def test_a_sparse_student_is_trained_saved_and_measured(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    options = [*SPLADE, "--student.training.query_regularizer_weight=0.002"]
    options += ["--student.training.eval_strategy=steps", "--student.training.eval_steps=3"]
    assert recipe(output, *options) == 0
    said = capsys.readouterr().out
    assert "active dimensions: " in said and "| student (weights of words)" in said
    assert f"SparseEncoder('{output / 'student'}')" in (output / "report.md").read_text()
    assert f"in the last batches of its training (step {STEPS}): " in (output / "report.md").read_text()
    log = json.loads((output / "student" / LOG_FILE).read_text())
    assert len([entry for entry in log if "document_active_dims" in entry]) == STEPS
    assert any("eval_dev_dot_mrr@10" in entry for entry in log)
    student = SparseEncoder(str(output / "student"), device="cpu")
    assert student.encode_query("dense tokens").is_sparse
    assert (student[0].query_length, student[0].document_length) == (16, 48)
    found = read_run(output / "runs" / "student.test.trec")
    assert len(found) == 12 and all(found.values())
    assert recipe(output, *options) == 0
    assert "student: skipped, it is trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--student.training.document_regularizer_weight=1"],
            "unexpected keyword argument 'document_regularizer_weight'",
        ),
        (
            [*SPLADE, "--student.initialise_from=teacher"],
            "there is no encoder to take for a sparse student",
        ),
        ([*SPLADE, "--student.training.regularizer_warmup=-1"], "regularizer_warmup must be"),
        ([*SPLADE, "--student.training.matryoshka_dims=[8]"], "matryoshka_dims is for dense"),
        (
            [*SPLADE, "--teacher.model=a/b", "--encoder.encoding=own", "--encoder.prompts={query: 'q: '}"],
            "encoder.prompts: a sparse student reads texts without any",
        ),
        (["--student.training.kl_direction=both"], "student.training: kl_direction must be"),
    ],
)
def test_settings_of_the_other_kind_are_refused_before_anything(
    recipe: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert recipe(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_base_without_its_head_is_refused_before_anything(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_bert(tmp_path / "plain")
    assert recipe(tmp_path / "new", *SPLADE, f"--encoder.base_model={plain}") == 2
    assert f"{plain} lacks cls.predictions" in capsys.readouterr().err
