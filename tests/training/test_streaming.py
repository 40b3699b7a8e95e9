"""Streamed rows through the trainer's data loader: each once a pass, the same ones after a restart."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from tct_hf import load_triples
from tct_hf.training import streaming
from tct_hf.training.streaming import StreamedBatches
from tests.train_helpers import make_trainer

COLUMNS = ("query", "positive", "negative")


def write_rows(path: Path, rows: int, first: int = 0) -> Path:
    path.write_text("".join(f"query {i}\tpositive {i}\tnegative {i}\n" for i in range(first, first + rows)))
    return path


def numbers(batch: Any) -> list[int]:
    return [int(row["query"].split()[1]) for row in batch]


def passes(
    rows: IterableDataset, batch_size: int, processes: int, workers: int, *, steps: int, trained: int = 0
) -> list[list[int]]:
    """The row numbers of each step, of all processes together."""
    read = []
    for process in range(processes):
        batches = StreamedBatches(rows, batch_size, process=process, processes=processes)
        batches.trained = trained
        loader = iter(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers))
        read.append([next(loader) for _ in range(steps)])
    return [[number for batch in step if batch for number in numbers(batch)] for step in zip(*read, strict=True)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (3, 2)])
def test_processes_and_workers_share_every_row_once_a_pass(
    tmp_path: Path, processes: int, workers: int, shuffled: bool
) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 36), streaming=True)
    rows = rows.shuffle(seed=3, buffer_size=10) if shuffled else rows
    steps = passes(rows, 12 // processes, processes, workers, steps=6)  # two passes
    assert steps == passes(rows, 12, 1, 0, steps=6)
    once, again = [*chain(*steps[:3])], [*chain(*steps[3:])]
    assert sorted(once) == sorted(again) == list(range(36))
    assert (once == list(range(36))) == (not shuffled)
    assert (once == again) == (not shuffled)


def test_pass_is_filled_up_from_the_next(tmp_path: Path) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 10), streaming=True).shuffle(seed=3, buffer_size=4)
    steps = passes(rows, 2, 2, 1, steps=5)  # 20 rows in steps of 4
    taken = [*chain(*steps)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_done_are_not_read_again(tmp_path: Path, workers: int) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 10), streaming=True).shuffle(seed=3, buffer_size=4)
    whole = passes(rows, 2, 2, workers, steps=8)
    assert passes(rows, 2, 2, workers, steps=8, trained=4) == [[], [], [], [], *whole[4:]]


@pytest.mark.parametrize("trained", [7, 10, 12, 18])
def test_whole_passes_that_are_done_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: int) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 10), streaming=True).shuffle(seed=3, buffer_size=4)
    whole = passes(rows, 2, 2, 0, steps=22)
    begun: list[int] = []
    one_pass = streaming._one_pass
    monkeypatch.setattr(streaming, "_one_pass", lambda rows, n: begun.append(n) or one_pass(rows, n))
    assert passes(rows, 4, 1, 0, steps=22, trained=trained) == [*([[]] * trained), *whole[trained:]]
    assert begun == [0, *range(trained * 4 // 10, 9)]


def test_one_pass_ends_with_what_is_left(tmp_path: Path) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 10), streaming=True)
    assert [numbers(batch) for batch in StreamedBatches(rows, 4, passes=1)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    halves = [[*map(numbers, StreamedBatches(rows, 2, process=p, processes=2, passes=1))] for p in range(2)]
    assert halves == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    thirds = [[*map(numbers, StreamedBatches(rows, 3, process=p, processes=3, passes=1))] for p in range(3)]
    assert thirds == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]  # the row that is left is no batch for each of them


def test_fewer_rows_than_one_batch_of_every_process_are_refused(tmp_path: Path) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 2), streaming=True)
    with pytest.raises(ValueError, match=r"has 2 rows, fewer than one batch of 1 rows on each of 3 processes \(3\)"):
        next(iter(StreamedBatches(rows, 1, process=2, processes=3)))
    assert numbers(next(iter(StreamedBatches(rows, 8)))) == [0, 1]  # alone, it is a small batch


def test_outside_of_training_the_loader_gives_one_pass(student: Any, teacher: Any, tmp_path: Path) -> None:
    rows = load_triples(write_rows(tmp_path / "t.tsv", 20), streaming=True)
    trainer = make_trainer(tmp_path, student, teacher, rows, max_steps=1)
    assert [len(batch["query_input_ids"]) for batch in trainer.get_train_dataloader()] == [8, 8, 4]


def test_a_run_goes_on_with_the_rows_that_follow(student: Any, teacher: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.tsv", 40)
    taken: list[int] = []

    def train(steps: int, batch: int, *, resume: bool = True, **settings: Any) -> None:
        rows = load_triples(path, streaming=True).shuffle(seed=1, buffer_size=10)
        settings |= {"max_steps": steps, "per_device_train_batch_size": batch, "save_steps": 2}
        settings |= {"save_strategy": "steps", "save_total_limit": 1}
        trainer = make_trainer(tmp_path / "run", student, teacher, rows, **settings)
        loss = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            texts = student.tokenizer.batch_decode(inputs["query_input_ids"], skip_special_tokens=True)
            taken.extend(int(text.split()[-1]) for text in texts)
            return loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.train(resume_from_checkpoint=resume)

    train(2, 4, resume=False)
    assert len(taken) == 8
    train(10, 2, gradient_accumulation_steps=2)
    assert sorted(taken) == [*range(40)]
    train(10, 4)  # there is nothing left: the trainer takes one step more
    assert len(taken) == 44


@pytest.mark.parametrize(
    ("batch", "seed", "message"),
    [
        (2, 1, "the checkpoint has 4 rows a step, now 2"),
        (4, 2, "has other rows first: .* shuffle seed"),
    ],
)
def test_another_number_of_rows_a_step_or_another_order_is_refused(
    student: Any, teacher: Any, tmp_path: Path, batch: int, seed: int, message: str
) -> None:
    path = write_rows(tmp_path / "t.tsv", 40)

    def train(steps: int, batch: int, seed: int, resume: bool, **settings: Any) -> None:
        rows = load_triples(path, streaming=True).shuffle(seed=seed, buffer_size=10)
        settings |= {"max_steps": steps, "per_device_train_batch_size": batch, "save_strategy": "steps"}
        make_trainer(tmp_path / "run", student, teacher, rows, save_steps=2, **settings).train(
            resume_from_checkpoint=resume
        )

    train(2, 4, 1, resume=False)
    with pytest.raises(ValueError, match=rf"{message}.*ignore_data_skip=True"):
        train(4, batch, seed, resume=True)
    train(4, batch, seed, resume=True, ignore_data_skip=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_evaluation_has_the_loss_of_the_same_rows_in_memory(
    student: Any, teacher: Any, tmp_path: Path, workers: int
) -> None:
    path = write_rows(tmp_path / "t.tsv", 24)
    # One batch of all rows: those in memory are shuffled, and the candidates are those of a batch.
    settings = {"per_device_eval_batch_size": 24, "dataloader_num_workers": workers, "max_steps": 1}
    settings["dataloader_persistent_workers"] = workers > 0
    held = load_triples(path, cache_dir=tmp_path)
    trainers = [
        make_trainer(tmp_path, student, teacher, held, eval_dataset=rows, **settings)
        for rows in (load_triples(path, streaming=True), held)
    ]
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
