"""Two and three processes with a part of a batch each do what one process does with the whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import build_student
from tests.models import tiny_cross_encoder, tiny_modernbert
from tests.recipe import ROOT
from tests.train_helpers import make_models, make_splade
from tests.warm_process import free_port, run_warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, shared in (("student", True), ("other", False)):
        student, _ = make_models(path, shared_tokens=shared)
        student.save_pretrained(str(path / name))
    make_splade(path).save_pretrained(str(path / "sparse"))
    base, modern = str(path / "base"), str(tiny_modernbert(path / "modernbert"))
    build_student(base, encoding="tct", document_length=64, scale=20.0).save_pretrained(str(path / "scaled"))
    plain = build_student(modern, document_length=64, pooling="cls")
    plain.save_pretrained(str(path / "plain"))
    tiny_cross_encoder(path / "cross-encoder")
    return path


FEW = [True, False, True, False, False, False, True, False, False, False, True, True]
# Of several processes the first has the most rows, and not every one a label.
UNEVEN: dict[str, Any] = {"uneven": True, "labelled": [True, *[False] * 10, True]}
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
    "plain encoding": {"student": "plain"},
    # With three labels the processes hold different numbers of them, with one a process holds none.
    "few labels": {"labelled": FEW, "hard_label_weight": 0.5},
    "few labels, own candidates": {"labelled": FEW, "hard_label_weight": 0.5, "candidates": "own"},
    "fewer rows, few labels, gradient cache": {**UNEVEN, "hard_label_weight": 0.5, "mini_batch_size": 2},
    "all parts": {"labelled": FEW, "margin_mse_weight": 0.1, "student_divisor": 2.0, "kl_direction": "reverse"},
    "sparse student": SPARSE,
    "sparse student, gradient cache": {**SPARSE, "mini_batch_size": 3},
    "sparse student, fewer rows, few labels": {**SPARSE, **UNEVEN, "margin_mse_weight": 0.1},
    "cross-encoder": {"teacher": "cross-encoder", "candidates": "own"},
    "cross-encoder, in-batch": {"teacher": "cross-encoder in-batch"},  # of passages that others have read
    "table of scores": {"teacher": "table", "candidates": "own"},
    "mixture, fewer rows": {"teacher": "mixture", "uneven": True},
    "embedding model": {"teacher": "dense"},
    "BM25, fewer rows": {"teacher": "bm25", "uneven": True},
    "log-linear, fewer rows": {"teacher": "log-linear", "uneven": True},
    "two data sets": {"two": True, "multi_dataset_batch_sampler": "round_robin"},  # one of them at a time
}


# Run with two processes by default; the others are slow, and so is everything with three.
BASIC = ("plain", "fewer rows, few labels, gradient cache", "sparse student")


@pytest.fixture(scope="module")
def steps(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    output = tmp_path_factory.mktemp("steps")

    def run(case: str, processes: int) -> Path:
        if not (output / str(processes) / case).exists():
            names = [name for name in CASES if (name in BASIC) is (case in BASIC)]
            cases = {name: {**CASES[name], "per_device_train_batch_size": 12 // processes} for name in names}
            words = ["-m", "tests.distributed_worker", str(models), str(output / str(processes)), json.dumps(cases)]
            done = run_warm(words, env=ENVIRONMENT, processes=processes)
            assert done.returncode == 0, done.stderr[-4000:]
        return output / str(processes) / case

    return run


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        pytest.param(case, processes, marks=() if case in BASIC and processes == 2 else pytest.mark.slow)
        for case in CASES
        for processes in (2, 3)
    ],
)
def test_processes_give_the_loss_gradients_and_weights_of_one(
    steps: Callable[[str, int], Path], case: str, processes: int
) -> None:
    alone, together = steps(case, 1), steps(case, processes)
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


@pytest.mark.slow
def test_one_of_two_is_killed_in_mid_step_and_the_run_resumes_bit_equal(with_dropout: Path, tmp_path: Path) -> None:
    def train(output: str, *, killed: bool = False) -> dict[str, str]:
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
        settings |= {"kill_in_step": 3, "rank": 1} if killed else {}
        words = ["-m", "tests.resume_worker", str(with_dropout), str(tmp_path / output), json.dumps(settings)]
        done = run_warm(words, env=ENVIRONMENT, processes=2)
        assert (done.returncode != 0) is killed, done.stderr[-3000:]
        keys = ("resumes", "weights", "losses")
        return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in keys)

    whole = train("whole")
    train("run", killed=True)
    again = train("run")
    assert (whole.pop("resumes"), again.pop("resumes")) == ("nothing", "checkpoint-2") and again == whole


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "multi_gpu.yaml"])
def test_the_configurations_start_as_many_processes_as_they_say(tmp_path: Path, config: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tct_hf.training.stages import process_state\n"
        "state = process_state()\n"
        "with open(f'{sys.argv[1]}/{state.process_index}', 'w') as file:\n"
        "    file.write(str(state.num_processes))\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n"
    )
    seen = tmp_path / "seen"
    seen.mkdir()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--main_process_port={free_port()}"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "--num_cpu_threads_per_process=1"]
    done = subprocess.run(
        [*launcher, str(script), str(seen)], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name: file.read_text() for file in seen.iterdir()} == {"0": "2", "1": "2"}
