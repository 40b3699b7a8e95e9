"""A query tower for the passages of another arm's student, from end to end; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import DenseIndex
from tct_hf.pipeline.settings import StudentSettings, TrainSettings
from tct_hf.pipeline.train import Training
from tct_hf.retrieval.encode import encode_texts
from tests.recipe import Check, Run

RECIPE = "compare"
PLOTS = False
TRAINING = "{per_device_train_batch_size: 8, max_steps: 2, learning_rate: 1.0e-3, logging_steps: 1}"
VECTORS = "max_steps: 6, logging_steps: 1, per_device_train_batch_size: 128"  # all texts
SETTINGS = f"""
precision: fp32
stages: [student]
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{base_model: FOLDER/mean, document_length: 24}}
student: {{training: {TRAINING}}}
teacher: {{mixture_weights: [6, 0.33, 12]}}
evaluation: {{depth: 20, measures: [RR@10]}}
arms:
  whole: {{}}
  tower:
    student:
      tower_of: ${{output_dir}}/arms/whole/seed-13/student
      layers: [1]
      training: {{embedding_weight: 1.0}}
    against: [whole]
  vectors alone:
    student: &alone
      tower_of: ${{output_dir}}/arms/whole/seed-13/student
      layers: [1]
      from_vectors: {{texts: 40, training: {{{VECTORS}, learning_rate: 1.0e-3}}}}
      training: {{max_steps: 0}}
  vectors first:
    student: {{<<: *alone, training: {{max_steps: 2}}}}
  static:
    student:
      kind: static
      tower_of: ${{output_dir}}/arms/whole/seed-13/student
      from_vectors: {{texts: 40, training: {{{VECTORS}}}}}
      training: {{max_steps: 0}}
  stock:
    stages: [stock]
    student.kind: static
    student.tower_of: ${{output_dir}}/arms/whole/seed-13/student
"""


@pytest.mark.slow
def test_a_tower_is_trained_for_the_passages_of_another_arm(
    recipe: Run, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, tower = (
        SentenceTransformer(str(whole / "arms" / name / "seed-13" / "student"), device="cpu")
        for name in ("whole", "tower")
    )
    texts = ["dense retrieval", "of tokens"]
    assert np.array_equal(student.encode_document(texts), tower.encode_document(texts))
    assert not np.allclose(student.encode_query(texts), tower.encode_query(texts), atol=1e-3)
    [folder] = (whole / "passages").iterdir()
    assert (folder / "manifest.json").is_file()
    log = json.loads((whole / "arms" / "tower" / "seed-13" / "student" / "training_log.json").read_text())
    assert 0 < log[0]["embedding"] < 1
    assert "| tower" in (whole / "report.test.md").read_text()
    shutil.rmtree(whole / "arms" / "tower" / "seed-13" / "runs")

    def encoded(*args: Any, task: str, **options: Any) -> Any:
        assert task == "query", "its passages are encoded already"
        return encode_texts(*args, task=task, **options)

    monkeypatch.setattr("tct_hf.evaluation.workspace.encode_texts", encoded)
    said = recipe(whole).stdout  # the weights of the model that stays are on record
    assert said.count("skipped, it is trained") == 6


def test_what_vectors_alone_teach_is_learned_once_for_all_that_begin_so(whole: Path) -> None:
    logs = [json.loads(file.read_text()) for file in (whole / "towers").glob("*/training_log.json")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert [len(one) for one in losses] == [6, 6] and all(one[-1] < one[0] for one in losses)
    assert len([*(whole / "texts").glob("*/vectors.npy")]) == 1
    models: list[Any] = [
        SentenceTransformer(str(whole / "arms" / name / "seed-13" / "student"))
        for name in ("vectors-alone", "vectors-first", "static")
    ]
    alone, first, _ = (model.encode_query(["dense retrieval"]) for model in models)
    assert not np.allclose(alone, first, atol=1e-4)
    assert type(models[2][0].sub_modules["query"][0]).__name__ == "StaticEmbedding"


def test_a_static_tower_begins_with_the_weights_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tct_hf.pipeline.train.prepared", lambda kind, made_of, *rest: made_of["start"])
    run: Any = SimpleNamespace(
        of_teacher={}, teacher_model=None, shared=tmp_path, collection=SimpleNamespace(corpus=[])
    )
    run.settings, starts = TrainSettings(), set[Any]()
    for weights in (b"", b"other"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        starts.add(Training._untrained(run, StudentSettings(kind="static", tower_of=str(tmp_path))))
    assert len(starts) == 2 and str(tmp_path) not in starts


def test_settings_that_no_tower_takes_are_refused(refused: Check, material: Any) -> None:
    refused(["--student.passages=somewhere"], "student.passages: vectors of which model?")
    mean, codes = (str(material.folder / name) for name in ("mean", "codes"))
    DenseIndex.build(np.eye(32, dtype=np.float32), [str(row) for row in range(32)]).save(codes)
    tower = [f"--student.tower_of={mean}", f"--student.passages={codes}"]
    refused(tower, "student.passages: the index: does not say which model built it")
    refused(["--student.from_vectors.texts=9"], "student.from_vectors: vectors of which model?")
    for wrong in ("texts=-1", "training={max_steps: 9}"):
        refused([f"--student.from_vectors.{wrong}"], "student.from_vectors.texts=")
    refused(["--student.training.max_steps=0"], "student.training.max_steps: 0 is for a query tower")
    tower = [f"--student.tower_of={mean}", "--student.from_vectors.texts=9"]
    refused([*tower, "--student.training.max_steps=0"], "arms.stock: student.training.max_steps: 0 is for")
    for wrong in ("max_steps=0 makes no step", "eval_strategy=steps: there is no dev set of vectors"):
        refused([*tower, f"--student.from_vectors.training.{wrong.split(maxsplit=1)[0].strip(':')}"], wrong)
    tower.append("--student.from_vectors.training.lr_scheduler_type=steep")
    refused(tower, "student.from_vectors.training: steep is not a valid SchedulerType")
    refused(["--student.tower_of=a/b", "--student.kind=splade"], "student.kind: a query tower")
    refused(["--student.tower_of=a/b", "--teacher.kind=self"], "teacher.kind: a query tower")
