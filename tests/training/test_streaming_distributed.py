"""Streamed training in several processes: every row once a pass, the steps of a single process, and restarts."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.train_helpers import make_models
from tests.warm_process import run_warm

ROWS = 24
# 24 rows in steps of 12 make two steps a pass; in steps of 18, the second step ends one pass and begins the next.
CASES: dict[str, dict[str, Any]] = {
    "in order": {"step": 12},
    "shuffled, two workers": {"step": 12, "shuffle_buffer": 7, "dataloader_num_workers": 2},
    "over the end of a pass": {"step": 18, "shuffle_buffer": 7},
    "evaluated": {"step": 12, "eval_strategy": "steps", "eval_steps": 2, "evaluated": "e.tsv"},
}
EVALUATED = 18  # one step of 12, and half of one


def launch(models: Path, output: Path, processes: int, cases: dict[str, dict[str, Any]]) -> None:
    given = {}
    for name, case in cases.items():
        batch = case["step"] // processes
        rest = {key: value for key, value in case.items() if key != "step"}
        given[name] = {
            "max_steps": 4,
            "path": str(models / "t.tsv"),
            "per_device_train_batch_size": batch,
            **rest,
            **({"evaluated": str(models / case["evaluated"])} if "evaluated" in case else {}),
        }
    words = ["-m", "tests.streaming_worker", str(models), str(output), json.dumps(given)]
    done = run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]


def steps_of(folder: Path, processes: int, file_name: str = "rows") -> list[list[int]]:
    """The rows of each step, of all processes together, in the order of the processes."""
    read = [
        [json.loads(line) for line in (folder / f"{file_name}-{process}.txt").read_text().splitlines()]
        for process in range(processes)
    ]
    return [[*chain(*parts)] for parts in zip(*read, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path)
    student.save_pretrained(str(path / "student"))
    (path / "t.tsv").write_text("".join(f"query {i}\tpositive {i}\tnegative {i}\n" for i in range(ROWS)))
    wide = [f"query {i}\t{'positive ' * (i + 1)}{i}\tnegative {i}\n" for i in range(EVALUATED)]  # no two batches alike
    (path / "e.tsv").write_text("".join(wide))
    return path


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    launch(models, output, 1, CASES)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_on_the_rows_of_one(models: Path, alone: Path, tmp_path: Path, processes: int) -> None:
    launch(models, tmp_path, processes, CASES)
    for name, case in CASES.items():
        expected = steps_of(alone / name, 1)
        assert steps_of(tmp_path / name, processes) == expected, name
        taken = [*chain(*expected)]
        assert len(taken) == 4 * case["step"]
        for start in range(0, len(taken), ROWS):
            assert sorted(taken[start : start + ROWS]) == list(range(ROWS)), name
        if "shuffle_buffer" in case:
            assert taken[:ROWS] != taken[ROWS : 2 * ROWS], name  # another order in each pass
    seen = steps_of(tmp_path / "evaluated", processes, "evaluated")
    assert seen == 2 * [[*range(12)], [*range(12, EVALUATED)]] == steps_of(alone / "evaluated", 1, "evaluated")
    losses = [
        json.loads((folder / "evaluated" / "said.json").read_text())["eval_losses"] for folder in (tmp_path, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
