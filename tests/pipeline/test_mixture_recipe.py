"""The quickstart's way on a tiny embedding model: with and without labels, stock beside it, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import validate_checkpoint
from tests.recipe import ROOT, Check, Run

RECIPE = "train"
SYSTEMS = ["bm25", "base-native", "base-maxsim", "stock", "unlabelled", "labelled"]
FUSED = ["base-native-bm25", "stock-bm25", "unlabelled-bm25", "labelled-bm25"]


SETTINGS = f"""
extends: {ROOT / "recipes" / "quickstart.yaml"}
precision: fp32
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{base_model: FOLDER/mean, document_length: 24}}
student:
  training: {{per_device_train_batch_size: 8, max_steps: 4, warmup_steps: 1, logging_steps: 1, save_steps: 2}}
evaluation: {{depth: 20, measures: [RR@10, nDCG@10]}}
"""


@pytest.mark.usefixtures("warm_checks")
def test_students_with_and_without_labels_are_measured_beside_the_base_and_stock(
    recipe: Run, trained: list[Any], tmp_path: Path
) -> None:
    recipe(tmp_path, "--student.training.max_steps=2")
    assert {file.name.split(".")[0] for file in (tmp_path / "runs").glob("*.trec")} == {*SYSTEMS, *FUSED}
    unlabelled = next(rows for rows in trained if not any(rows["labelled"]))
    assert all(0 < weight <= 1 for weight in unlabelled["label_weight"])
    assert unlabelled["known_positive_ids"][:] == [[]] * len(unlabelled)  # no judgement is looked at
    # Without labels the default weights, with labels those that dev is calibrated to.
    weights = [json.loads((tmp_path / f"mixture-{n}" / "weights.json").read_text()) for n in ("unlabelled", "student")]
    assert weights[0] == [6.0, 0.33, 12.0] != weights[1]
    assert (tmp_path / "mixture-student" / "tct_calibration.json").is_file()
    assert not (tmp_path / "mixture-unlabelled" / "tct_calibration.json").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["measured"]["test"]) == {*SYSTEMS, *FUSED}
    models = [SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("unlabelled", "stock", "student")]
    assert [model.max_seq_length for model in models] == [24] * 3
    validate_checkpoint(tmp_path / "unlabelled")
    # Any client's default call gives the same vectors.
    texts = ["dense retrieval", "of tokens " * 30]
    for encode in (models[-1].encode_query, models[-1].encode_document):
        np.testing.assert_allclose(encode(texts), models[-1].encode(texts), atol=1e-6)


def test_a_self_coupled_student_is_trained_beside_bm25(recipe: Run, tmp_path: Path) -> None:
    recipe(tmp_path, "--stages=student", "--teacher.kind=self")
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert [entry["token_hard_label"] > 0 for entry in log if "token_hard_label" in entry] == [True] * 4


@pytest.mark.slow
def test_a_run_that_was_killed_after_the_search_does_not_search_again(apart: Run, tmp_path: Path) -> None:
    assert "the mixture searches" in apart(tmp_path, kill_at="step     3 of 4   loss").stdout
    again = apart(tmp_path, "--stages=unlabelled").stdout
    assert "the mixture searches" not in again and "step     4 of 4" in again


def test_dev_without_a_positive_among_the_candidates_leaves_the_default_weights(
    recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("calibrate: none of the 10 dev queries has a judged positive among its candidates.")

    monkeypatch.setattr("tct_hf.pipeline.models.calibrate", refuse)
    said = recipe(tmp_path, "--stages=student", "--student.training.max_steps=1").stdout
    assert "not calibrated, the default weights stay: calibrate: none of the 10 dev" in said
    assert json.loads((tmp_path / "mixture-student" / "weights.json").read_text()) == [6.0, 0.33, 12.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.negatives=teacher", "--teacher.kind=bm25"], "data.negatives: only a mixture searches the corpus"),
        (["--data.made_questions=3", "--stages=student"], "data.made_questions: questions without labels"),
        (["--teacher.mixture_weights=[1, 2]"], "teacher.mixture_weights: give three numbers"),
        (["--teacher.weight=2"], "teacher.weight has no effect on a mixture"),
        (["--student.training.preset=paper"], "student.training.preset: its temperature belongs to the paper's"),
    ],
)
def test_wrong_settings_are_one_message_before_anything(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
