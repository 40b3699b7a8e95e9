"""A streamed run that is killed and started again trains on the same rows, to the same weights."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train_helpers import make_models
from tests.warm_process import run_warm

# 22 rows in batches of 4: the second pass begins in the sixth step, the third in the eleventh.
BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
}
ROWS = 22
CASES: dict[str, dict[str, Any]] = {
    "in the second pass, shuffled, with workers": {
        "kill_in_step": 9,
        "shuffle_buffer": 6,
        "dataloader_num_workers": 2,
    },
    "at the end of a pass, in mid-accumulation": {
        "kill_in_step": 4,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "shuffle_buffer": 6,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path, dropout=0.1)  # dropout: the random state must come back too
    student.save_pretrained(str(path / "student"))
    lines = [f"query {i}\tpositive {i}\tnegative {i}\n" for i in range(ROWS)]
    (path / "t.tsv").write_text("".join(lines))
    return path


def run(models: Path, output: Path, cases: dict[str, dict[str, Any]], code: int = 0) -> None:
    words = ["-m", "tests.streaming_worker", str(models), str(output), json.dumps(cases)]
    done = run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr[-3000:]


def read(folder: Path) -> tuple[dict[str, Any], list[list[int]]]:
    rows = [json.loads(line) for line in (folder / "rows-0.txt").read_text().splitlines()]
    return json.loads((folder / "said.json").read_text()), rows


@pytest.mark.slow
def test_resumed_run_trains_on_the_rows_that_follow(models: Path, tmp_path: Path) -> None:
    whole = {name: {**BASE, "path": str(models / "t.tsv"), **case} for name, case in CASES.items()}
    stops = {name: case["kill_in_step"] for name, case in whole.items()}
    for name, case in whole.items():
        run(models, tmp_path / "again", {name: case}, code=-signal.SIGKILL)
    whole = {name: {key: case[key] for key in case if key != "kill_in_step"} for name, case in whole.items()}
    run(models, tmp_path / "whole", whole)
    run(models, tmp_path / "again", whole)
    for name in CASES:
        undisturbed, expected = read(tmp_path / "whole" / name)
        resumed, rows = read(tmp_path / "again" / name)
        assert resumed["resumes"] == f"checkpoint-{stops[name] - 1}", name
        assert rows == expected, name
        assert resumed["weights"] == undisturbed["weights"], name
        taken = [number for batch in expected for number in batch]
        for start in range(0, len(taken), ROWS):
            part = taken[start : start + ROWS]
            assert len(set(part)) == len(part), name
