"""Batches of data sets that are read while they train: every row once a pass, and the same ones after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.utils import data
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tct_hf.batches import sizes_of_all
from tct_hf.data.streamed import StreamedTriples

Row = dict[str, Any]
_ROWS_AT_ONCE = 100


class StreamedBatches(data.IterableDataset[list[Row] | None]):
    """One process's batches of a stream of rows, pass after pass.

    All processes, and all data-loader workers of each, go through the rows in the same order. Of every
    `processes * batch_size` rows each process has its part, and its workers take turns, so that a step trains on the
    same rows however many processes and workers share them. Each of them goes through the whole source for that, but
    parses and looks up only its own rows of `load_triples`: files need neither be many nor equally long.

    A batch that a pass ends in is filled up from the next pass: no row is left out, whatever the batch size.
    """

    def __init__(
        self,
        rows: IterableDataset,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        passes: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: such batches would never be full.")
        self.rows, self.batch_size = rows, batch_size
        self.process, self.processes = process, processes
        self.passes = passes
        self.first_pass = 0
        self.trained = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin with this pass, from 0: each has its own order where the rows are shuffled."""
        self.first_pass = epoch

    def __iter__(self) -> Iterator[list[Row] | None]:
        """Read from the start of the first pass."""
        info = data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        for number, batch in enumerate(self._filled(self.batch_size * self.processes)):
            if number % workers == worker:  # the data loader takes one batch of each worker in turn
                start, end = (len(batch) * part // self.processes for part in (self.process, self.process + 1))
                yield None if number < self.trained else self._read(batch[start:end])

    def _read(self, rows: list[Row]) -> list[Row]:
        return self.rows.reader.rows(rows) if isinstance(self.rows, StreamedTriples) else rows

    def _filled(self, size: int) -> Iterator[list[Row]]:
        """Batches of `size` rows, filled up from the next pass; of the first `trained` ones the content is void."""
        batch: list[Row] = []
        number = self.first_pass
        given = 0
        while self.passes is None or number < self.first_pass + self.passes:
            count = 0
            for row in _one_pass(self.rows, number):
                count += 1
                batch.append(row)
                if len(batch) == size:
                    yield batch
                    given += 1
                    batch = []
            if count < size:
                self._check_few(count, size)
                if len(batch) >= self.processes:
                    yield batch  # filled up, it would hold a row twice
                    given += 1
                batch = []
            elif given < self.trained:
                # Whole passes that are trained on need not be read: every pass has as many rows.
                passed = (self.trained * size - given * size - len(batch)) // count
                ends = given * size + len(batch) + passed * count
                while given < ends // size:
                    yield batch
                    given += 1
                batch = [{} for _ in range(ends % size)]
                number += passed
            number += 1
        if len(batch) >= self.processes:
            yield batch

    def _check_few(self, count: int, size: int) -> None:
        if count and (self.processes == 1 or (self.passes is not None and count >= self.processes)):
            return
        share = f" of {self.batch_size} rows on each of {self.processes} processes ({size})"
        raise ValueError(
            f"The streamed data set has {count:,} rows, fewer than one batch{share if self.processes > 1 else ''}: "
            "give it more rows, smaller batches or fewer processes."
        )


def _one_pass(rows: IterableDataset, number: int) -> Iterator[Row]:
    # Each process and worker goes through all rows, but reads only its own.
    rows = rows.ordered if isinstance(rows, StreamedTriples) else rows
    # An IterableDataset's epoch is in memory that all workers share: each of them needs its own.
    own = rows.with_format(None)
    own.set_epoch(number)
    # Iterated row by row in a worker, it would be divided among the workers once more.
    for batch in own.iter(_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class _Collate:
    """Gives the collator the batches that are not trained on yet."""

    def __init__(self, collate: Callable[[list[Row]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, batch: list[Row] | None) -> dict[str, Any]:
        return {} if batch is None else self.collate(batch)


class PassOver(TrainerCallback, ExportableState):
    """Lets a resumed run skip the batches it has trained on: these are read, but not tokenised again.

    Every checkpoint says what a step was made of: with other steps now, the rows that follow are not known.
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer's state keeps of this callback."""
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if not isinstance(batches, StreamedBatches):
            return
        rows = batches.batch_size * batches.processes * args.gradient_accumulation_steps
        now = {"rows a step": rows, "order of the rows": _order(batches.rows)}
        if state.global_step and not args.ignore_data_skip:
            before = _steps_before(state)
            if before is not None and before != now:
                name = next(name for name in now if before.get(name) != now[name])
                raise ValueError(
                    f"train_dataset is streamed, and the checkpoint has another number for the {name} "
                    f"({before.get(name)}, now {now[name]}), so that rows would be lost or repeated. Go on with as "
                    "many rows a step (per_device_train_batch_size * processes * gradient_accumulation_steps), "
                    "shuffled with the same seed, or begin with the first row: ignore_data_skip=True."
                )
            # As the trainer counts: a run that goes on after its last step begins again.
            batches.trained = state.global_step % state.max_steps * args.gradient_accumulation_steps
        self.steps = now


def _steps_before(state: TrainerState) -> dict[str, int] | None:
    """What a checkpoint says of its steps; None where it does not."""
    callbacks: Any = state.stateful_callbacks or {}
    kept = callbacks.get(PassOver.__name__)
    kept = kept[0] if isinstance(kept, list) and kept else kept
    return kept.get("attributes", {}).get("steps") if isinstance(kept, dict) else None


def _order(rows: IterableDataset) -> int:
    """A number for what rows are shuffled by, as far as `datasets` shows it."""
    digest, step = blake2b(digest_size=7), getattr(rows, "_ex_iterable", None)
    while step is not None:
        generator = getattr(step, "generator", None)
        if isinstance(generator, np.random.Generator):
            digest.update(repr(generator.bit_generator.state).encode())
        step = getattr(step, "ex_iterable", None)
    return int.from_bytes(digest.digest(), "big")


def check_streamed(rows: Any, args: Any) -> None:
    """Refuse streamed rows that a trainer can't train on: one stream of several data sets, or no number of steps."""
    for name, one in rows.items() if isinstance(rows, dict) else ():
        if isinstance(one, IterableDataset):
            raise ValueError(
                f"train_dataset: {name!r} is streamed, and one of several: which comes next is drawn by their "
                "lengths. Join the streams with datasets.interleave_datasets or concatenate_datasets, or load "
                "them whole."
            )
    if isinstance(rows, IterableDataset) and (args is None or args.max_steps <= 0):
        raise ValueError(
            "max_steps is not set, and train_dataset is streamed: it has no length, so num_train_epochs can't say "
            "when training ends. Set max_steps (for e passes over n rows: e * n / (per_device_train_batch_size * "
            "processes * gradient_accumulation_steps))."
        )


def same_order_everywhere(rows: IterableDataset, device: torch.device) -> None:
    """Refuse rows that are shuffled in another order in each process."""
    if len(set(sizes_of_all(_order(rows), device))) > 1:
        raise ValueError(
            "train_dataset is shuffled in another order in each process: rows would be lost and repeated. Shuffle "
            "it with a seed, .shuffle(seed=...), the same one everywhere."
        )


def streamed_loader(trainer: Any, rows: IterableDataset, size: int, passes: int | None) -> data.DataLoader[Any]:
    """A trainer's data loader of streamed rows, in batches of this process's own.

    Without a length, the base class counts a last, shorter batch of streamed rows like a whole one.
    """
    args, accelerator = trainer.args, trainer.accelerator
    processes = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    loader: data.DataLoader[Any] = data.DataLoader(
        StreamedBatches(rows, size, **processes, passes=passes),
        batch_size=None,
        collate_fn=_Collate(trainer.data_collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and passes is None,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
    )
