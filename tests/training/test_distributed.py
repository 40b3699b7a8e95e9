"""Two and three processes with a part of a batch each do what one process does with the whole."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import build_student, student_from_teacher
from tests.models import tiny_cross_encoder, tiny_modernbert
from tests.train_helpers import make_models, make_splade
from tests.warm_process import run_warm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, shared in (("student", True), ("other", False)):
        student, teacher = make_models(path, shared_tokens=shared)
        student.save_pretrained(str(path / name))
    student_from_teacher(teacher.model, layers=[1]).save_pretrained(str(path / "small"))
    make_splade(path).save_pretrained(str(path / "sparse"))
    base, modern = str(path / "base"), str(tiny_modernbert(path / "modernbert"))
    build_student(base, encoding="tct", document_length=64, scale=20.0).save_pretrained(str(path / "scaled"))
    plain = build_student(modern, document_length=64, pooling="cls")
    plain.save_pretrained(str(path / "plain"))
    tiny_cross_encoder(path / "cross-encoder")
    return path


SPARSE: dict[str, Any] = {
    "student": "sparse",
    "document_regularizer_weight": 0.05,
    "query_regularizer_weight": 0.05,
    "document_regularizer_threshold": 100,  # which some passages of the batch are below
    "regularizer_warmup": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "many passes": {"padding": 3},  # another number of forward passes on each process
    "gradient cache": {"mini_batch_size": 3},
    # The teacher has tokens of its own, of other widths on each process.
    "separate tokens": {"student": "other"},
    "streamed": {"streaming": True},
    "learned scale, Matryoshka sizes": {"student": "scaled", "matryoshka_dims": [8, 16, 32]},
    "learned scale, gradient cache": {"student": "scaled", "mini_batch_size": 3},
    "plain encoding": {"student": "plain"},
    # With three labels the processes hold different numbers of them, with one a process holds none.
    "few labels": {
        "labelled": [True, False, True, False, False, False, True, False, False, False, True, True],
        "hard_label_weight": 0.5,
    },
    "one label, gradient cache": {"labelled": [True, *[False] * 11], "hard_label_weight": 0.5, "mini_batch_size": 3},
    "few labels, own candidates": {
        "labelled": [True, False, True, False, False, False, True, False, False, False, True, True],
        "hard_label_weight": 0.5,
        "candidates": "own",
    },
    "fewer rows": {"uneven": True},
    "fewer rows, few labels, gradient cache": {
        "uneven": True,
        "labelled": [True, *[False] * 10, True],
        "hard_label_weight": 0.5,
        "mini_batch_size": 2,
    },
    "all parts, few labels": {
        "labelled": [True, False, True, False, False, False, True, False, False, False, True, True],
        "margin_mse_weight": 0.1,
        "student_divisor": 2.0,
        "kl_direction": "reverse",
    },
    "sparse student": SPARSE,
    "sparse student, gradient cache": {**SPARSE, "mini_batch_size": 3},
    "sparse student, fewer rows, few labels": {
        **SPARSE,
        "uneven": True,
        "labelled": [True, *[False] * 10, True],
        "margin_mse_weight": 0.1,
    },
    "cross-encoder": {"teacher": "cross-encoder", "candidates": "own"},
    "cross-encoder, in-batch": {"teacher": "cross-encoder in-batch"},  # of passages that others have read
    "stored scores": {"teacher": "stored", "candidates": "own"},
    "table of scores": {"teacher": "table", "candidates": "own"},
    "smaller student": {"student": "small"},
    "mixture": {"teacher": "mixture", "mini_batch_size": 3},
    "mixture, fewer rows": {"teacher": "mixture", "uneven": True},
    "embedding model": {"teacher": "dense"},
    "BM25": {"teacher": "bm25"},
    "BM25, fewer rows": {"teacher": "bm25", "uneven": True},
    "log-linear, fewer rows": {"teacher": "log-linear", "uneven": True},
    "two data sets": {"two": True, "multi_dataset_batch_sampler": "round_robin"},  # one of them at a time
}


def launch(models: Path, output: Path, processes: int) -> None:
    cases = {name: {**case, "per_device_train_batch_size": 12 // processes} for name, case in CASES.items()}
    words = ["-m", "tests.distributed_worker", str(models), str(output), json.dumps(cases)]
    done = run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def steps(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("steps")
    for processes in (1, 2, 3):
        launch(models, output / str(processes), processes)
    return output


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_loss_gradients_and_weights_of_one(steps: Path, case: str, processes: int) -> None:
    alone, together = steps / "1" / case, steps / str(processes) / case
    one, _ = json.loads((alone / "losses.json").read_text())
    several, evaluated = json.loads((together / "losses.json").read_text())
    assert several == pytest.approx(one, abs=1e-5)
    for name in ("gradients.pt",) if "uneven" in CASES[case] else ("gradients.pt", "weights.pt"):
        expected, found = (torch.load(side / name, weights_only=True) for side in (alone, together))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
    assert math.isfinite(evaluated)  # six rows in parts still make a batch
    if "uneven" not in CASES[case]:
        assert (together / "checkpoint-2" / f"rng_state_{processes - 1}.pth").is_file()
