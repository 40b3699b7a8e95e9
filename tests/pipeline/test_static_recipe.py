"""The recipe of static students: made of the base, trained with and without labels, reported, released, encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import encode_corpus, load_vectors
from tct_hf.hub.cards import CardFacts, write_card
from tests.recipe import ROOT, Check

RECIPE = "train"
PLOTS = False
SETTINGS = f"""
extends: {ROOT / "recipes" / "static.yaml"}
precision: fp32
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{base_model: FOLDER/mean, document_length: 48}}
student:
  dim: 16
  training: {{per_device_train_batch_size: 8, max_steps: 4, mini_batch_size: 4, matryoshka_dims: [8, 16]}}
evaluation: {{depth: 20, measures: [RR@10]}}
"""


def rows(folder: Path) -> Any:
    table: Any = SentenceTransformer(str(folder))[0]
    return table.embedding.weight.detach().numpy()


@pytest.mark.slow
def test_a_static_student_goes_through_all_that_a_dense_one_does(whole: Path, tmp_path: Path) -> None:
    measured = json.loads((whole / "metrics.json").read_text())["measured"]["test"]
    assert set(measured) >= {"untrained", "stock", "unlabelled", "labelled", "labelled-first-8", "labelled-bm25"}
    assert "Models keep 48 tokens of a passage, static students all." in (whole / "report.md").read_text()
    [start] = filter(Path.is_dir, whole.glob("untrained-*"))
    untrained, *others = (rows(whole / name) for name in (start.name, "stock", "unlabelled", "student"))
    for other in others:
        assert untrained.shape == other.shape and untrained.shape[1] == 16 and (untrained != other).any()

    corpus: list[Any] = [{"id": str(row), "text": "the passage " * row} for row in range(1, 9)]
    model = SentenceTransformer(str(whole / "student"))
    encode_corpus(model, corpus, tmp_path)
    _, vectors, _ = load_vectors(tmp_path)
    texts = [row["text"] for row in corpus]
    np.testing.assert_allclose(vectors, model.encode_document(texts), atol=1e-6)

    facts = CardFacts(license="mit", base_model="a/b").completed_by(whole / "student")
    card = write_card(whole / "student", "student", "me/static", facts)
    assert "one 16-dimensional vector a text" in card and "no encoder runs" in card and "cut at" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student.layers=[0]"], "student.layers is of dense students: leave it out"),
        (["--student.kind=dense"], "student.dim is of static students: leave it out"),
        (["--teacher.kind=self"], "teacher.kind: a static student has no token vectors to teach itself"),
    ],
)
def test_settings_of_other_students_are_refused(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
