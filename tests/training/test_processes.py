"""What happens to a run of several processes when one of them dies or stands still."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tct_hf import StallWatch
from tests.recipe import ROOT
from tests.train_helpers import make_models
from tests.warm_process import free_port, run_warm

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    student, _ = make_models(path, dropout=0.1)
    student.save_pretrained(str(path / "student"))
    return path


def two(*words: str, config: str = "cpu.yaml") -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "recipes" / "accelerate" / config), f"--main_process_port={free_port()}"]
    return subprocess.run(
        [*launch, "--num_cpu_threads_per_process=1", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(
    models: Path, output: Path, *, launched: bool = False, **settings: Any
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """By accelerate's launcher, or by processes that meet without it."""
    words = ["-m", "tests.resume_worker", str(models), str(output), json.dumps({**SETTINGS, **settings})]
    done = two(*words) if launched else run_warm(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, processes=2)
    keys = ("resumes", "weights", "losses")
    return done, dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in keys)


def test_one_of_two_is_killed_in_mid_step_and_the_run_resumes_bit_equal(models: Path, tmp_path: Path) -> None:
    whole, expected = train(models, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed, _ = train(models, tmp_path / "run", kill_in_step=3, rank=1)
    assert killed.returncode != 0
    again, found = train(models, tmp_path / "run")
    assert again.returncode == 0, again.stderr[-3000:]
    assert found["resumes"] == "checkpoint-2" and expected["resumes"] == "nothing"
    assert (found["weights"], found["losses"]) == (expected["weights"], expected["losses"])


def test_a_process_that_stands_still_is_named_and_the_run_ends(models: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    done, _ = train(models, tmp_path / "run", launched=True, stall_in_step=3, rank=1, watch=5)
    assert done.returncode != 0 and time.monotonic() - begun < 200
    said = [line for line in done.stderr.splitlines() if "Training stands still" in line]
    assert said and all(
        "process 1 (pid " in line and "in step 2, stands at " in line and "(score_and_die)" in line for line in said
    ), done.stderr[-2000:]
    assert not any("process 0" in line for line in said)


@pytest.mark.parametrize("config", ["cpu.yaml", pytest.param("multi_gpu.yaml", marks=pytest.mark.slow)])
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
    done = two(str(script), str(seen), config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name: file.read_text() for file in seen.iterdir()} == {"0": "2", "1": "2"}


def test_a_run_of_one_process_is_not_watched() -> None:
    watch = StallWatch(0.01, end=lambda message: pytest.fail(message))
    watch.on_train_begin(None, type("State", (), {"global_step": 0}), None)
    assert watch._thread is None
    with pytest.raises(ValueError, match="seconds must be greater than 0"):
        StallWatch(0)
    with pytest.raises(ValueError, match="evaluation_seconds must be greater than 0"):
        StallWatch(evaluation_seconds=-1)


def test_an_evaluation_and_a_save_may_take_longer_than_a_step() -> None:
    watch = StallWatch(60, evaluation_seconds=900)
    state = type("State", (), {"global_step": 1})

    def limit(evaluates: bool, saves: bool) -> float:
        watch.on_step_begin(None, state, None)
        watch.on_step_end(None, state, type("Control", (), {"should_evaluate": evaluates, "should_save": saves}))
        return watch._limit

    assert [limit(False, False), limit(True, False), limit(False, True)] == [60, 900, 900]
    watch.on_step_begin(None, state, None)
    assert watch._limit == 60


def test_a_watch_whose_store_is_gone_still_ends_its_process() -> None:
    class Gone:
        def wait(self, *args: Any) -> None:
            raise RuntimeError("connection reset")

        set = get = wait

    said: list[str] = []
    watch = StallWatch(0.02, end=said.append)
    watch._store, watch._world = Gone(), 2
    watch._watch()
    assert len(said) == 1 and "process 0 has told nothing, or keeps what the others tell" in said[0]
