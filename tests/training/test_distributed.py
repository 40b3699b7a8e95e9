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

from tests.recipe import ROOT
from tests.warm_process import free_port, run_warm

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
    "codes": {"matryoshka_dims": [8, 32], "passage_bits": [32, 1], "query_bits": 4},
    "plain encoding": {"student": "plain"},
    # With three labels the processes hold different numbers of them, with one a process holds none.
    "few labels": {"labelled": FEW, "hard_label_weight": 0.5},
    "few labels, own candidates": {"labelled": FEW, "hard_label_weight": 0.5, "candidates": "own"},
    "fewer rows, few labels, gradient cache": {**UNEVEN, "hard_label_weight": 0.5, "mini_batch_size": 2},
    "all parts": {"labelled": FEW, "margin_mse_weight": 0.1, "student_divisor": 2.0, "kl_direction": "reverse"},
    "sparse student": SPARSE,
    "sparse student, gradient cache": {**SPARSE, "mini_batch_size": 3},
    "sparse student, fewer rows, few labels, gradient cache": {
        **SPARSE,
        **UNEVEN,
        "hard_label_weight": 0.5,
        "margin_mse_weight": 0.1,
        "mini_batch_size": 2,
    },
    "cross-encoder": {"teacher": "cross-encoder", "candidates": "own"},
    "cross-encoder, in-batch": {"teacher": "cross-encoder in-batch"},  # of passages that others have read
    "table of scores": {"teacher": "table", "candidates": "own"},
    "mixture, fewer rows": {"teacher": "mixture", "uneven": True},
    "embedding model": {"teacher": "dense"},
    "vectors in few dimensions, gradient cache": {"teacher": "narrow", "embedding_weight": 2.0, "mini_batch_size": 3},
    "vectors, fewer rows": {"teacher": "dense", "embedding_weight": 2.0, "uneven": True},
    "BM25, fewer rows": {"teacher": "bm25", "uneven": True},
    "log-linear, fewer rows": {"teacher": "log-linear", "uneven": True},
    "two data sets": {"two": True, "multi_dataset_batch_sampler": "round_robin"},  # one of them at a time
}


# Run with two processes by default; the others are slow, and so is everything with three.
BASIC = ("plain", "sparse student, fewer rows, few labels, gradient cache")


@pytest.fixture(scope="module")
def steps(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    output = tmp_path_factory.mktemp("steps")

    def run(case: str, processes: int) -> Path:
        folder = output / str(processes)
        if not (folder / case).exists():
            size = {"per_device_train_batch_size": 12 // processes}
            cases = {name: CASES[name] | size for name in CASES if (name in BASIC) is (case in BASIC)}
            words = ["-m", "tests.distributed_worker", str(models), str(folder), json.dumps(cases)]
            done = run_warm(words, env=os.environ, processes=processes)
            assert done.returncode == 0, done.stderr[-4000:]
        return folder / case

    return run


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        pytest.param(case, processes, marks=() if case in BASIC and processes == 2 else pytest.mark.slow)
        for case in CASES
        for processes in (2, 3)
    ],
)
def test_processes_train_as_one(steps: Callable[[str, int], Path], case: str, processes: int) -> None:
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
@pytest.mark.parametrize("config", ["cpu.yaml", "multi_gpu.yaml"])
def test_the_configurations_start_as_many_processes_as_they_say(tmp_path: Path, config: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\n"
        "from tct_hf.training.stages import process_state\n"
        "state = process_state()\n"
        "pathlib.Path(sys.argv[1], str(state.process_index)).write_text(str(state.num_processes))\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n"
    )
    seen = tmp_path / "seen"
    seen.mkdir()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--main_process_port={free_port()}"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "--num_cpu_threads_per_process=1"]
    done = subprocess.run([*launcher, str(script), str(seen)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name: file.read_text() for file in seen.iterdir()} == {"0": "2", "1": "2"}
