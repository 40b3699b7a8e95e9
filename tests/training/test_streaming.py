"""Streamed rows through the trainer: each once a pass, the same ones after a restart."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tct_hf import load_triples
from tct_hf.training import streaming
from tests.train_helpers import EVERY_STEP, make_trainer
from tests.warm_process import run_warm

COLUMNS = ("query", "positive", "negative")


def write_rows(path: Path, rows: int) -> Path:
    """Rows of a file, no two batches of which are alike."""
    lines = [f"query {i}\t{'positive ' * (i % 18 + 1)}{i}\tnegative {i}\n" for i in range(rows)]
    path.write_text("".join(lines))
    return path


def taken_by(trainer: Any, **options: Any) -> list[int]:
    """Trains; the numbers of the rows it took."""
    taken: list[int] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        texts = trainer.model.tokenizer.batch_decode(inputs["query_input_ids"], skip_special_tokens=True)
        taken.extend(int(text.split()[-1]) for text in texts)
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train(**options)
    return taken


@pytest.fixture
def train(student: Any, teacher: Any, tmp_path: Path) -> Any:
    """Trains a run of 40 shuffled rows to a step; the numbers of the rows it took."""
    path = write_rows(tmp_path / "t.tsv", 40)

    def train(steps: int, batch: int, *, seed: int = 1, resume: bool = True, **settings: Any) -> list[int]:
        rows = load_triples(path, streaming=True).shuffle(seed=seed, buffer_size=10)
        settings |= {"max_steps": steps, "per_device_train_batch_size": batch, "save_steps": 2}
        trainer = make_trainer(tmp_path / "run", student, teacher, rows, **{**EVERY_STEP, **settings})
        return taken_by(trainer, resume_from_checkpoint=resume)

    return train


def test_a_run_goes_on_with_the_rows_that_follow(train: Any) -> None:
    taken = train(2, 4, resume=False)
    assert len(taken) == 8
    taken += train(10, 2, gradient_accumulation_steps=2, save_total_limit=1)
    assert sorted(taken) == [*range(40)]
    assert len(train(10, 4)) == 4  # there is nothing left: the trainer takes one step more


@pytest.mark.parametrize(
    ("batch", "seed", "message"),
    [
        (2, 1, "the checkpoint has 4 rows a step, now 2"),
        (4, 2, "has other rows first: .* shuffle seed"),
    ],
)
def test_another_batch_size_or_order_is_refused(train: Any, batch: int, seed: int, message: str) -> None:
    train(2, 4, resume=False)
    with pytest.raises(ValueError, match=rf"{message}.*ignore_data_skip=True"):
        train(4, batch, seed=seed)
    train(4, batch, seed=seed, ignore_data_skip=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_evaluation_has_the_loss_of_rows_in_memory(trainer_of: Any, tmp_path: Path, workers: int) -> None:
    path = write_rows(tmp_path / "t.tsv", 24)
    # One batch of all rows: those in memory are shuffled, and the candidates are those of a batch.
    settings = {"per_device_eval_batch_size": 24, "dataloader_num_workers": workers, "max_steps": 1}
    settings["dataloader_persistent_workers"] = workers > 0
    held = load_triples(path, cache_dir=tmp_path)
    trainers = [trainer_of(held, eval_dataset=rows, **settings) for rows in (load_triples(path, streaming=True), held)]
    streamed, again, expected = (one.evaluate()["eval_loss"] for one in (trainers[0], *trainers))
    assert streamed == again == pytest.approx(expected, rel=1e-5)


def test_rows_shuffled_otherwise_in_every_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Dataset.from_dict({name: [f"{name} {i}" for i in range(24)] for name in COLUMNS}).to_iterable_dataset(3)
    streamed = load_triples(write_rows(tmp_path / "t.tsv", 24), streaming=True)
    for rows in (plain, streamed, streamed.select_columns(["query", "positive"])):
        first: list[int] = []
        monkeypatch.setattr(streaming, "sizes_of_all", lambda own, device: first.append(own) or first)  # noqa: B023
        for seed in (1, 1):
            streaming.same_order_everywhere(rows.shuffle(seed=seed), torch.device("cpu"))
        with pytest.raises(ValueError, match=r"in another order in each process.*\.shuffle\(seed=\.\.\.\)"):
            streaming.same_order_everywhere(rows.shuffle(seed=2), torch.device("cpu"))


# 24 rows in steps of 12 make two steps a pass; in steps of 18, the second step ends one pass and begins the next.
SHARED: dict[str, dict[str, Any]] = {
    "in order": {"step": 12},
    "shuffled, two workers": {"step": 12, "shuffle_buffer": 7, "dataloader_num_workers": 2},
    "over the end of a pass": {"step": 18, "shuffle_buffer": 7},
    "evaluated": {"step": 12, "eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.slow
def test_processes_train_on_and_evaluate_the_rows_of_one(models: Path, tmp_path: Path) -> None:
    def steps_of(case: str, processes: int, file_name: str = "rows") -> list[list[int]]:
        """The rows of each step, of all processes together, in the order of the processes."""
        files = [tmp_path / str(processes) / case / f"{file_name}-{process}.txt" for process in range(processes)]
        read = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[*chain(*parts)] for parts in zip(*read, strict=True)]

    trained, evaluated = (str(write_rows(tmp_path / f"{rows}.tsv", rows)) for rows in (24, 18))
    for processes in (1, 2, 3):
        cases: dict[str, dict[str, Any]] = {}
        for name, case in SHARED.items():
            cases[name] = {"path": trained, "max_steps": 4, **case}
            cases[name]["per_device_train_batch_size"] = cases[name].pop("step") // processes
        cases["evaluated"]["evaluated"] = evaluated  # one step of 12, and half of one
        words = ["-m", "tests.streaming_worker", str(models), str(tmp_path / str(processes)), json.dumps(cases)]
        done = run_warm(words, env=os.environ, processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in SHARED:
        expected = steps_of(name, 1)
        assert all(steps_of(name, several) == expected for several in (2, 3)), name
        taken = [*chain(*expected)]
        assert all(sorted(taken[at : at + 24]) == list(range(24)) for at in range(0, len(taken), 24)), name
    losses = []
    for processes in (1, 2, 3):
        assert steps_of("evaluated", processes, "evaluated") == 2 * [[*range(12)], [*range(12, 18)]]
        losses.append(json.loads((tmp_path / str(processes) / "evaluated" / "eval_losses.json").read_text()))
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-4)] * 2
