"""The quickstart's way on a tiny embedding model: with and without labels, stock beside it, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import build_student, validate_checkpoint
from tct_hf.pipeline import train as pipeline
from tests.models import tiny_bert
from tests.recipe import RECIPE, ROOT, in_this_process, killed_at, run, write_beir

SYSTEMS = ["bm25", "base-native", "base-maxsim", "stock", "unlabelled", "labelled"]
STORED = "--teacher.mixed_with=[{kind: stored, scores: SCORES}]"
FUSED = ["base-native-bm25", "stock-bm25", "unlabelled-bm25", "labelled-bm25"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    base = build_student(str(tiny_bert(folder / "encoder")))
    base.similarity_fn_name = "cosine"
    base.save_pretrained(str(folder / "base"))
    write_beir(folder / "collection")
    (folder / "tiny.yaml").write_text(
        f"""
extends: {ROOT / "recipes" / "quickstart.yaml"}
precision: fp32
data: {{source: {folder / "collection"}, negative_depth: 10}}
encoder: {{base_model: {folder / "base"}, document_length: 24}}
student:
  training: {{per_device_train_batch_size: 8, max_steps: 4, warmup_steps: 1, logging_steps: 1, save_steps: 2}}
evaluation: {{depth: 20, measures: [RR@10, nDCG@10]}}
"""
    )
    return folder / "tiny.yaml"


@pytest.fixture
def recipe(settings: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, monkeypatch)


@pytest.mark.usefixtures("warm_checks")
def test_students_with_and_without_labels_are_measured_beside_the_base_and_stock(
    recipe: Callable[..., int], settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = pipeline.collection_triples

    def recorded(*args: Any, **options: Any) -> Any:
        made.append((options, original(*args, **options)))
        return made[-1][1]

    monkeypatch.setattr(pipeline, "collection_triples", recorded)
    assert recipe(tmp_path) == 0
    assert {file.name.split(".")[0] for file in (tmp_path / "runs").glob("*.trec")} == {*SYSTEMS, *FUSED}
    unlabelled = next(rows for options, rows in made if options["unlabelled"])
    assert not any(unlabelled["labelled"]) and all(0 < weight <= 1 for weight in unlabelled["label_weight"])
    assert unlabelled["known_positive_ids"][:] == [[]] * len(unlabelled)  # no judgement is looked at
    # Without labels the default weights, with labels those that dev is calibrated to.
    weights = {
        name: json.loads((tmp_path / f"mixture-{name}" / "weights.json").read_text())
        for name in ("unlabelled", "student")
    }
    assert weights["unlabelled"] == [6.0, 0.33, 12.0] != weights["student"]
    assert (tmp_path / "mixture-student" / "tct_calibration.json").is_file()
    assert not (tmp_path / "mixture-unlabelled" / "tct_calibration.json").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["measured"]["test"]) == {*SYSTEMS, *FUSED}
    for name in ("unlabelled", "student", "stock"):
        model = SentenceTransformer(str(tmp_path / name), device="cpu")
        assert model.max_seq_length == 24
    validate_checkpoint(tmp_path / "unlabelled")
    # Any client's default call gives the same vectors.
    student, texts = (
        SentenceTransformer(str(tmp_path / "student"), device="cpu"),
        ["dense retrieval", "of tokens " * 30],
    )
    for encode in (student.encode_query, student.encode_document):
        np.testing.assert_allclose(encode(texts), student.encode(texts), atol=1e-6)


def test_a_self_coupled_student_is_trained_beside_bm25(recipe: Callable[..., int], tmp_path: Path) -> None:
    assert recipe(tmp_path, "--stages=student", "--teacher.kind=self") == 0
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert [entry["token_hard_label"] > 0 for entry in log if "token_hard_label" in entry] == [True] * 4


@pytest.mark.slow
def test_a_run_that_was_killed_after_the_search_does_not_search_again(settings: Path, tmp_path: Path) -> None:
    said = killed_at("step     3 of 4   loss", settings, tmp_path)
    assert "the mixture searches" in said
    again = run(settings, tmp_path, "--stages=unlabelled").stdout
    assert "the mixture searches" not in again and "step     4 of 4" in again


def test_dev_without_a_positive_among_the_candidates_leaves_the_default_weights(
    recipe: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("calibrate: none of the 10 dev queries has a judged positive among its candidates.")

    monkeypatch.setattr("tct_hf.pipeline.mixture.calibrate", refuse)
    assert recipe(tmp_path, "--stages=student", "--student.training.max_steps=1") == 0
    assert "not calibrated, the default weights stay: calibrate: none of the 10 dev" in capsys.readouterr().out
    assert json.loads((tmp_path / "mixture-student" / "weights.json").read_text()) == [6.0, 0.33, 12.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.unlabelled=true", STORED], "data.unlabelled: the"),
        (
            ["--stages=student", "--data.negatives=teacher", "--teacher.mixed_with=[{kind: stored, scores: SCORES}]"],
            "data.negatives: the",
        ),
        (["--data.negatives=teacher", "--teacher.kind=bm25"], "data.negatives: only a mixture searches the corpus"),
        (["--data.made_questions=3", "--stages=student"], "data.made_questions: questions without labels"),
        (["--teacher.mixture_weights=[1, 2]"], "teacher.mixture_weights: give three numbers"),
        (["--teacher.weight=2"], "teacher.weight has no effect on a mixture"),
        (["--student.training.preset=paper"], "student.training.preset: its temperature belongs to the paper's"),
    ],
)
def test_settings_that_a_mixture_cannot_keep_are_refused_before_anything(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "scores.jsonl").write_text("")
    options = [option.replace("SCORES", str(tmp_path / "scores.jsonl")) for option in options]
    assert recipe(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "new").exists()
