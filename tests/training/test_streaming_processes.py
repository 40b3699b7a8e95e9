"""Streamed training in processes of their own: every row once a pass, and the same rows after a kill."""

from __future__ import annotations

import json
import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.warm_process import run_warm

ROWS = 24
EVALUATED = 18  # one step of 12, and half of one
KILLED_ROWS = 22


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Files by their number of rows; no two batches of one are alike."""
    path, files = tmp_path_factory.mktemp("rows"), {}
    for count in (ROWS, EVALUATED, KILLED_ROWS):
        lines = [f"query {i}\t{'positive ' * (i % 18 + 1)}{i}\tnegative {i}\n" for i in range(count)]
        (path / f"{count}.tsv").write_text("".join(lines))
        files[count] = str(path / f"{count}.tsv")
    return files


def run(models: Path, output: Path, cases: dict[str, dict[str, Any]], *, processes: int = 1, code: int = 0) -> None:
    words = ["-m", "tests.streaming_worker", str(models), str(output), json.dumps(cases)]
    done = run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, processes=processes)
    assert done.returncode == code, done.stderr[-4000:]


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return found


def steps_of(folder: Path, processes: int = 1, file_name: str = "rows") -> list[list[int]]:
    """The rows of each step, of all processes together, in the order of the processes."""
    read = [
        [json.loads(line) for line in (folder / f"{file_name}-{process}.txt").read_text().splitlines()]
        for process in range(processes)
    ]
    return [[*chain(*parts)] for parts in zip(*read, strict=True)]


# 24 rows in steps of 12 make two steps a pass; in steps of 18, the second step ends one pass and begins the next.
SHARED: dict[str, dict[str, Any]] = {
    "in order": {"step": 12},
    "shuffled, two workers": {"step": 12, "shuffle_buffer": 7, "dataloader_num_workers": 2},
    "over the end of a pass": {"step": 18, "shuffle_buffer": 7},
    "evaluated": {"step": 12, "eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.slow
def test_processes_train_on_the_rows_of_one(models: Path, rows: dict[int, str], tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        cases: dict[str, dict[str, Any]] = {}
        for name, case in SHARED.items():
            cases[name] = {"path": rows[ROWS], "max_steps": 4, **case}
            cases[name]["per_device_train_batch_size"] = cases[name].pop("step") // processes
        cases["evaluated"]["evaluated"] = rows[EVALUATED]
        run(models, tmp_path / str(processes), cases, processes=processes)
    for name, case in SHARED.items():
        expected = steps_of(tmp_path / "1" / name)
        assert all(steps_of(tmp_path / str(several) / name, several) == expected for several in (2, 3)), name
        taken = [*chain(*expected)]
        assert len(taken) == 4 * case["step"]
        for start in range(0, len(taken), ROWS):
            assert sorted(taken[start : start + ROWS]) == list(range(ROWS)), name
        if "shuffle_buffer" in case:
            assert taken[:ROWS] != taken[ROWS : 2 * ROWS], name  # another order in each pass
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes) / "evaluated"
        assert steps_of(folder, processes, "evaluated") == 2 * [[*range(12)], [*range(12, EVALUATED)]]
        assert said(folder)["eval_losses"] == pytest.approx(
            said(tmp_path / "1" / "evaluated")["eval_losses"], rel=1e-4
        )


# 22 rows in batches of 4: the second pass begins in the sixth step.
KILLED: dict[str, dict[str, Any]] = {
    "in the second pass, shuffled, with workers": {"kill_in_step": 9, "dataloader_num_workers": 2},
    "at the end of a pass, in mid-accumulation": {
        "kill_in_step": 4,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.slow
def test_a_killed_run_trains_on_the_rows_that_follow(with_dropout: Path, rows: dict[int, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"path": rows[KILLED_ROWS], "shuffle_buffer": 6, "per_device_train_batch_size": 4}
    settings |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = {name: {**settings, **case} for name, case in KILLED.items()}
    stops = {}
    for name, case in whole.items():
        run(with_dropout, tmp_path / "again", {name: case}, code=-signal.SIGKILL)
        stops[name] = case.pop("kill_in_step")
    run(with_dropout, tmp_path / "whole", whole)
    run(with_dropout, tmp_path / "again", whole)
    for name, stop in stops.items():
        undisturbed, resumed = (said(tmp_path / place / name) for place in ("whole", "again"))
        assert resumed["resumes"] == f"checkpoint-{stop - 1}", name
        assert resumed["weights"] == undisturbed["weights"], name
        expected = steps_of(tmp_path / "whole" / name)
        assert steps_of(tmp_path / "again" / name) == expected, name
        taken = [*chain(*expected)]
        for start in range(0, len(taken), KILLED_ROWS):
            part = taken[start : start + KILLED_ROWS]
            assert len(set(part)) == len(part), name
