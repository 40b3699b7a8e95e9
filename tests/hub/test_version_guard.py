"""A checkpoint of ours in older versions of sentence-transformers, installed for real: an error or right vectors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tct_hf import build_student, save_student
from tests.models import tiny_bert

TEXTS = ["what is a dense teacher", "the student of a query: tokens!", "retrieval " * 60]

SCRIPT = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.loads(sys.argv[2])
queries = model.encode_query(texts) if hasattr(model, "encode_query") else model.encode(texts, prompt_name="query")
print(json.dumps([queries.tolist(), model.encode(texts).tolist()]))
"""
# A tokenizer class or modules that it has not got, or the requirement that it reads.
REASON = r"TokenizersBackend|No module named 'sentence_transformers\.|sentence[-_]transformers.*>=\s*6"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("version", ["3.4.1", "5.1.2"])
@pytest.mark.parametrize("augmented", [True, False])
def test_an_old_version_fails_loudly_or_gives_the_right_vectors(tmp_path: Path, version: str, augmented: bool) -> None:
    student = build_student(str(tiny_bert(tmp_path / "base")), encoding="tct", query_augmentation=augmented)
    path = save_student(student, tmp_path / "student")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "old")], check=True)
    python = str(tmp_path / "old" / "bin" / "python")
    wanted = [f"sentence-transformers=={version}", "transformers<5", "torch==2.13.0", "numpy"]
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the wheels can't be had here: {installed.stderr.strip().splitlines()[-1]}")
    # What fails for a student must not fail for everything.
    subprocess.run([python, "-c", "import sentence_transformers, transformers"], check=True)
    done = subprocess.run([python, "-c", SCRIPT, str(path), json.dumps(TEXTS)], capture_output=True, text=True)
    if done.returncode:
        assert re.search(REASON, done.stderr), done.stderr
        return
    queries, passages = (np.array(vectors) for vectors in json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(queries - student.encode_query(TEXTS)).max() < 1e-4
    assert np.abs(passages - student.encode_document(TEXTS)).max() < 1e-4
