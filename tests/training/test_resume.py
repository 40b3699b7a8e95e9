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

from tct_hf.training.checkpoints import last_whole_checkpoint, refuse_damaged
from tests.train_helpers import EVERY_STEP, make_teacher, make_trainer, with_scores
from tests.warm_process import run_warm

# 36 rows in batches of 8 make 5 batches an epoch, the last one short: 3 updates an epoch when two are accumulated.
BASE: dict[str, Any] = {**EVERY_STEP, "num_train_epochs": 3, "lr_scheduler_type": "linear"}


def run(models: Path, output: Path, *, anew: bool = False, processes: int = 1, **settings: Any) -> tuple[int, Any]:
    """The exit status, and what the worker said."""
    words = ["-m", "tests.resume_worker", str(models), str(output), json.dumps({**BASE, **settings})]
    if anew:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    else:
        done = run_warm(words, env=os.environ, processes=processes)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    return done.returncode, {line[0]: line[1] for line in lines if line[0] in ("resumes", "weights", "losses")}


IN_STEP_7 = {"kill_in_step": 7}
STREAMED = {"rows": 22, "shuffle_buffer": 6, "per_device_train_batch_size": 4, "max_steps": 12}
QUICK = "killed during a save with one checkpoint kept"
CASES: dict[str, Any] = {
    # name: settings of both runs, how the first one is stopped, the last whole checkpoint
    "from epoch 2": ({"anew": True}, IN_STEP_7, 6),  # in interpreters with hash seeds of their own
    "in mid-accumulation": ({"gradient_accumulation_steps": 2}, {"kill_in_step": 9}, 4),
    "sparse student in the regularisers' warm-up": (
        {"student": "sparse", "document_regularizer_weight": 0.02, "regularizer_warmup": 0.8},
        IN_STEP_7,
        6,
    ),
    "with a learned scale and Matryoshka sizes": (
        {"student": "scaled", "matryoshka_dims": [8, 16, 32], "learning_rate_mapping": {r"\.3\.linear": 0.1}},
        IN_STEP_7,
        6,
    ),
    "sparse student, gradient cache, table of scores": (
        {"student": "sparse", "mini_batch_size": 3, "teacher": "table", "candidates": "own"},
        IN_STEP_7,
        6,
    ),
    "smaller student of another family, cross-encoder in-batch": (
        {"student": "small", "teacher": "cross-encoder in-batch"},
        IN_STEP_7,
        6,
    ),
    "vectors in few dimensions": ({"teacher": "narrow", "embedding_weight": 2.0}, IN_STEP_7, 6),
    "mixture": ({"teacher": "mixture"}, IN_STEP_7, 6),
    QUICK: ({"save_total_limit": 1, "num_train_epochs": 1}, {"kill_in_save": 3}, 2),
    # 22 streamed rows in batches of 4: the second pass begins in the sixth step.
    "streamed, in the second pass, shuffled, with workers": (
        {**STREAMED, "dataloader_num_workers": 2},
        {"kill_in_step": 9},
        8,
    ),
    "streamed, at the end of a pass, in mid-accumulation": (
        {**STREAMED, "max_steps": 6, "gradient_accumulation_steps": 2},
        {"kill_in_step": 8},
        3,
    ),
    "one of two processes": (
        {"processes": 2, "max_steps": 4, "per_device_train_batch_size": 4},
        {"kill_in_step": 3, "rank": 1},
        2,
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in CASES])
def test_resumed_run_is_bit_equal(with_dropout: Path, tmp_path: Path, name: str) -> None:
    settings, stop, checkpoint = CASES[name]
    code, undisturbed = run(with_dropout, tmp_path / "whole", **settings)
    assert code == 0 and undisturbed.keys() == {"resumes", "weights", "losses"}
    code, said = run(with_dropout, tmp_path / "interrupted", **settings, **stop)
    assert code == -signal.SIGKILL and said["resumes"] == "nothing"
    code, resumed = run(with_dropout, tmp_path / "interrupted", **settings)
    assert code == 0
    assert resumed == undisturbed | {"resumes": f"checkpoint-{checkpoint}"}
    assert not (tmp_path / "interrupted" / ".unfinished").exists()


def small_run(models: Path, path: Path) -> Any:
    """A trainer of two steps."""
    student = SentenceTransformer(str(models / "student"), device="cpu")
    settings = {**EVERY_STEP, "max_steps": 2, "candidates": "own"}
    return make_trainer(path, student, make_teacher(models, "stored"), with_scores(16), **settings)


@pytest.fixture(scope="module")
def trained(with_dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    small_run(with_dropout, path).train()
    return path


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "contents.json"],
)
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, cut: bool, trained: Path, caplog: pytest.LogCaptureFixture
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


def test_training_goes_on_from_the_whole_checkpoint(with_dropout: Path, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "checkpoint-2"
    (damaged / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        small_run(with_dropout, tmp_path).train(resume_from_checkpoint=str(damaged))
    ends = small_run(with_dropout, tmp_path)
    ends.state.best_model_checkpoint = str(damaged)
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):  # the last weights are not the best
        ends._load_best_model()
    small_run(with_dropout, tmp_path).train(resume_from_checkpoint=True)
    found, expected = (load_file(one / "checkpoint-2" / "model.safetensors") for one in (tmp_path, trained))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
