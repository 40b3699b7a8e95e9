"""A query tower for the passages of another arm's student, from end to end; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from tct_hf import DenseIndex
from tests.recipe import Check, Run

RECIPE = "compare"
TRAINING = "{per_device_train_batch_size: 8, max_steps: 2, learning_rate: 1.0e-3, logging_steps: 1}"
SETTINGS = f"""
precision: fp32
stages: [student]
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{base_model: FOLDER/mean, document_length: 24}}
student: {{training: {TRAINING}}}
evaluation: {{depth: 20, measures: [RR@10]}}
arms:
  whole: {{}}
  tower:
    student:
      tower_of: ${{output_dir}}/arms/whole/seed-13/student
      layers: [1]
      training: {{embedding_weight: 1.0}}
    against: [whole]
  stock:
    stages: [stock]
    student.kind: static
    student.tower_of: ${{output_dir}}/arms/whole/seed-13/student
"""


def test_a_tower_is_trained_for_the_passages_of_another_arm(recipe: Run, tmp_path: Path) -> None:
    recipe(tmp_path)
    student, tower = (
        SentenceTransformer(str(tmp_path / "arms" / name / "seed-13" / "student"), device="cpu")
        for name in ("whole", "tower")
    )
    texts = ["dense retrieval", "of tokens"]
    assert np.array_equal(student.encode_document(texts), tower.encode_document(texts))
    assert not np.allclose(student.encode_query(texts), tower.encode_query(texts), atol=1e-3)
    [folder] = (tmp_path / "passages").iterdir()
    assert (folder / "manifest.json").is_file()
    log = json.loads((tmp_path / "arms" / "tower" / "seed-13" / "student" / "training_log.json").read_text())
    assert 0 < log[0]["embedding"] < 1
    assert "| tower" in (tmp_path / "report.test.md").read_text()
    said = recipe(tmp_path).stdout  # the weights of the model that stays are on record
    assert said.count("skipped, it is trained") == 3


def test_settings_that_no_tower_takes_are_refused(refused: Check, material: Any) -> None:
    refused(["--student.passages=somewhere"], "student.passages: vectors of which model?")
    mean, codes = (str(material.folder / name) for name in ("mean", "codes"))
    DenseIndex.build(np.eye(32, dtype=np.float32), [str(row) for row in range(32)]).save(codes)
    tower = [f"--student.tower_of={mean}", f"--student.passages={codes}"]
    refused(tower, "student.passages: the index: does not say which model built it")
    refused(["--student.tower_of=a/b", "--student.kind=splade"], "student.kind: a query tower")
    refused(["--student.tower_of=a/b", "--teacher.kind=self"], "teacher.kind: a query tower")
