"""Two processes with half a batch each do what one process does with the whole."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, shared in (("student", True), ("other", False)):
        student, _ = make_models(path, shared_tokens=shared)
        student.save_pretrained(str(path / name))
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "many passes": {"padding": 3},  # another number of forward passes on each process
    "gradient cache": {"mini_batch_size": 3},
    # The teacher has tokens of its own, of other widths on each process.
    "separate tokens": {"student": "other"},
    "streamed": {"streaming": True},
    "two data sets": {"two": True, "multi_dataset_batch_sampler": "round_robin"},  # one of them at a time
}


def launch(models: Path, output: Path, processes: int) -> None:
    command = [sys.executable]
    if processes > 1:
        # accelerate starts several processes for --multi_gpu only; use_cpu in the arguments then keeps them on the CPU
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        command += [f"--main_process_port={free_port()}", "--num_cpu_threads_per_process=1", "-m"]
    else:
        command += ["-m"]
    cases = {name: {**case, "per_device_train_batch_size": 8 // processes} for name, case in CASES.items()}
    done = subprocess.run(
        [*command, "tests.distributed_worker", str(models), str(output), json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def steps(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("steps")
    launch(models, output / "one", 1)
    launch(models, output / "two", 2)
    return output


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_loss_and_gradients_of_one(steps: Path, case: str) -> None:
    [one], _ = json.loads((steps / "one" / case / "losses.json").read_text())
    [two], evaluated = json.loads((steps / "two" / case / "losses.json").read_text())
    assert two == pytest.approx(one, abs=1e-5)
    whole, halves = (torch.load(steps / side / case / "gradients.pt", weights_only=True) for side in ("one", "two"))
    assert halves.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, atol=1e-5, rtol=0)
    assert math.isfinite(evaluated)  # six rows in two halves still make a batch
    assert (steps / "two" / case / "checkpoint-1" / "rng_state_1.pth").is_file()
