"""A run that is stopped, or killed, and started again ends with the same weights to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tct_hf import build_student
from tct_hf.training.resumable import last_whole_checkpoint, refuse_damaged
from tests.models import tiny_cross_encoder, tiny_modernbert
from tests.train_helpers import make_models, make_splade, make_teacher, make_trainer, with_scores
from tests.warm_process import run_warm

# 36 rows in batches of 8 make 5 batches an epoch, the last one short: 3 updates an epoch when two are accumulated.
BASE: dict[str, Any] = {
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path, dropout=0.1)  # dropout: the random state must come back too
    student.save_pretrained(str(path / "student"))
    make_splade(path, dropout=0.1).save_pretrained(str(path / "sparse"))
    scaled = build_student(str(path / "base"), encoding="tct", document_length=64, pooling="cls", scale=20.0)
    scaled.save_pretrained(str(path / "scaled"))
    modern = str(tiny_modernbert(path / "modern-base", dropout=0.1))
    small = build_student(modern, document_length=64, layers=[0, 2])
    small.save_pretrained(str(path / "small"))
    tiny_cross_encoder(path / "cross-encoder")
    return path


def run(models: Path, output: Path, *, anew: bool = False, **settings: Any) -> tuple[int, dict[str, str]]:
    words = ["-m", "tests.resume_worker", str(models), str(output), json.dumps({**BASE, **settings})]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if anew:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    else:
        done = run_warm(words, env=env)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in KEYS)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode, said


KEYS = ("resumes", "weights", "losses")

CASES = {
    # name: settings of both runs, how the first one is stopped, the checkpoint that must be resumed from
    "from epoch 2": ({}, {"kill_in_step": 7}, "checkpoint-6"),
    "in mid-accumulation": ({"gradient_accumulation_steps": 2}, {"kill_in_step": 9}, "checkpoint-4"),
    "sparse student in the regularisers' warm-up": (
        {"student": "sparse", "document_regularizer_weight": 0.02, "regularizer_warmup": 0.8},
        {"kill_in_step": 7},
        "checkpoint-6",
    ),
    "with a learned scale and Matryoshka sizes": (
        {"student": "scaled", "matryoshka_dims": [8, 16, 32], "learning_rate_mapping": {r"\.3\.linear": 0.1}},
        {"kill_in_step": 7},
        "checkpoint-6",
    ),
    "sparse student, gradient cache, table of scores": (
        {"student": "sparse", "mini_batch_size": 3, "teacher": "table", "candidates": "own"},
        {"kill_in_step": 7},
        "checkpoint-6",
    ),
    "smaller student of another family, cross-encoder in-batch": (
        {"student": "small", "teacher": "cross-encoder in-batch"},
        {"kill_in_step": 7},
        "checkpoint-6",
    ),
    "mixture": ({"teacher": "mixture"}, {"kill_in_step": 7}, "checkpoint-6"),
    "killed during a save with one checkpoint kept": (
        {"save_total_limit": 1, "num_train_epochs": 1},
        {"kill_in_save": 3},
        "checkpoint-2",
    ),
}


QUICK = "killed during a save with one checkpoint kept"
_GIVEN = [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


# The first case starts every interpreter anew.
@pytest.mark.parametrize("name", _GIVEN)
def test_resumed_run_is_bit_equal(models: Path, tmp_path: Path, name: str) -> None:
    settings, stop, checkpoint = CASES[name]
    anew = name == "from epoch 2"  # with hash seeds of their own
    code, undisturbed = run(models, tmp_path / "whole", anew=anew, **settings)
    assert code == 0
    code, said = run(models, tmp_path / "interrupted", anew=anew, **settings, **stop)
    assert code == -signal.SIGKILL and said["resumes"] == "nothing"
    code, resumed = run(models, tmp_path / "interrupted", anew=anew, **settings)
    assert code == 0
    assert resumed["resumes"] == checkpoint
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["weights"] == undisturbed["weights"]
    assert not (tmp_path / "interrupted" / ".unfinished").exists()


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "contents.json"],
)
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    models: Path, tmp_path: Path, name: str, cut: bool, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if cut else content)
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged \(.*delete it to go on from an earlier one"):
        refuse_damaged(tmp_path / "run" / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "checkpoint-2 is damaged" in caplog.text and "goes on from the checkpoint before it" in caplog.text
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        last_whole_checkpoint(tmp_path / "run")


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    student = SentenceTransformer(str(models / "student"), device="cpu")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(path, student, make_teacher(models, "stored"), with_scores(16), candidates="own", **settings).train()
    return path


def test_training_goes_on_from_the_whole_checkpoint(models: Path, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK")

    def trainer() -> Any:
        student = SentenceTransformer(str(models / "student"), device="cpu")
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "candidates": "own"}
        return make_trainer(tmp_path / "run", student, make_teacher(models, "stored"), with_scores(16), **settings)

    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ends = trainer()
    ends.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):  # the last weights are not the best
        ends._load_best_model()
    trainer().train(resume_from_checkpoint=True)
    weights = [load_file(one / "checkpoint-2" / "model.safetensors") for one in (tmp_path / "run", trained)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
