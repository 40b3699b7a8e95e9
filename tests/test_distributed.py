"""Two processes with half a batch each do what one process does with the whole."""

from __future__ import annotations

import json
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


def step(models: Path, output: Path, processes: int, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    launch = [sys.executable]
    if processes > 1:
        # accelerate starts several processes for --multi_gpu only; use_cpu in the arguments then keeps them on the CPU
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        launch += [
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            f"--main_process_port={free_port()}",
        ]
        launch += ["--num_cpu_threads_per_process=1"]
    settings["per_device_train_batch_size"] = 8 // processes
    done = subprocess.run(
        [*launch, "-m", "tests.distributed_worker", str(models), str(output), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads((output / "losses.json").read_text())
    return losses, torch.load(output / "gradients.pt", weights_only=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_size": 3},
        {"student": "other"},  # the teacher has tokens of its own, of other widths on each process
        {"streaming": True},
    ],
    ids=["plain", "gradient cache", "separate tokens", "streamed"],
)
def test_two_processes_give_the_loss_and_gradients_of_one(
    models: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ([one], _), whole = step(models, tmp_path / "one", 1, **settings)
    ([two], evaluated), halves = step(models, tmp_path / "two", 2, **settings)
    assert two == pytest.approx(one, abs=1e-5)
    assert halves.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, atol=1e-5, rtol=0)
    assert evaluated == evaluated  # not nan: six rows in two halves still make a batch
    assert (tmp_path / "two" / "checkpoint-1" / "rng_state_1.pth").is_file()
