"""Batches of data sets that are read while they train: every row once a pass, and the same ones after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.utils import data
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tct_hf.batches import sizes_of_all
from tct_hf.data.ids import stable_id
from tct_hf.data.streamed import StreamedTriples

Row = dict[str, Any]
_ROWS_AT_ONCE = 100


class StreamedBatches(data.IterableDataset[list[Row]]):
    """One process's batches of a stream of rows, pass after pass; without end where passes is None.

    All processes and workers go through the rows in the same order, and each parses and looks up its own part of every
    `processes * batch_size` rows: a step trains on the same rows however many share them. A batch that a pass ends in
    is filled up from the next pass. Rows that reading leaves out have others in their place, those of the step that
    follows first: processes have equally many.
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
        self.rows, self.batch_size = rows, batch_size
        self.process, self.processes, self.passes = process, processes, passes
        self.first_pass = 0  # each has its own order where the rows are shuffled
        self.trained = 0  # batches that a resumed run has trained on: they are passed over, empty

    def set_epoch(self, epoch: int) -> None:
        self.first_pass = epoch

    def __iter__(self) -> Iterator[list[Row]]:
        info = data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        batches = chain(self._filled(self.batch_size * self.processes), [list[Row]()])
        for number, (batch, following) in enumerate(pairwise(batches)):
            if number % workers == worker:  # the data loader takes one batch of each worker in turn
                yield [] if number < self.trained else self._read(self._own(batch), self._own(following))

    def _own(self, batch: list[Row]) -> list[Row]:
        start, end = (len(batch) * part // self.processes for part in (self.process, self.process + 1))
        return batch[start:end]

    def _read(self, rows: list[Row], following: list[Row]) -> list[Row]:
        if not isinstance(self.rows, StreamedTriples):
            return rows
        read = self.rows.stream.rows(rows)
        if len(read) == len(rows):
            return read
        others = chain(following, _one_pass(self.rows, 0))
        while len(read) < len(rows) and (other := next(others, None)) is not None:
            read += [row for row in self.rows.stream.rows([other]) if row not in read]
        if not read:
            raise ValueError("The streamed data set has no row to train on: all are left out.")
        return read

    def _filled(self, size: int) -> Iterator[list[Row]]:
        """Batches of `size` rows, filled up from the next pass."""
        batch: list[Row] = []
        number, read = self.first_pass, 0
        while self.passes is None or number < self.first_pass + self.passes:
            count = 0
            for row in _one_pass(self.rows, number):
                count += 1
                batch.append(row)
                if len(batch) == size:
                    yield batch
                    batch = []
            number, read = number + 1, read + count
            if count < size:  # filled up, a batch would hold a row twice
                if not count or (self.processes > 1 and (self.passes is None or count < self.processes)):
                    raise ValueError(
                        f"The streamed data set has {count:,} rows, fewer than one batch of {self.batch_size} rows on "
                        f"each of {self.processes} processes ({size}): give it more rows, or smaller batches."
                    )
                yield batch
                batch = []
            elif (skipped := (self.trained * size - read) // count) > 0:
                # Every pass has as many rows: of whole passes that are trained on only the number counts.
                number, read, rows = number + skipped, read + skipped * count, len(batch) + skipped * count
                batch = [{}] * size
                yield from (batch for _ in range(rows // size))
                batch = batch[: rows % size]
        if len(batch) >= self.processes:
            yield batch


def _one_pass(rows: IterableDataset, number: int) -> Iterator[Row]:
    # Each process and worker goes through all rows, but reads only its own.
    # An IterableDataset's epoch is in memory that all workers share: each of them needs its own.
    own = (rows.ordered if isinstance(rows, StreamedTriples) else rows).with_format(None)
    own.set_epoch(number)
    # Iterated row by row in a worker, it would be divided among the workers once more.
    for batch in own.iter(_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _collate(collate: Callable[[list[Row]], dict[str, Any]], batch: list[Row]) -> dict[str, Any]:
    return collate(batch) if batch else {}


class PassOver(TrainerCallback, ExportableState):
    """Lets a resumed run skip the batches it has trained on; refuses other batches or another order than before."""

    steps: dict[str, int] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if not isinstance(batches, StreamedBatches):
            return
        rows = batches.batch_size * batches.processes * args.gradient_accumulation_steps
        now = {"rows a step": rows, "first rows": _order(batches.rows)}
        if state.global_step and not args.ignore_data_skip:
            kept = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
            before = kept.get("attributes", {}).get("steps") or now
            if before != now:
                what = "other rows first: the file or the shuffle seed is another one"
                if before["rows a step"] != rows:
                    what = f"{before['rows a step']} rows a step, now {rows}"
                raise ValueError(
                    f"train_dataset is streamed, and the checkpoint has {what}; rows would be lost or repeated. Keep "
                    "rows a step and seed, or begin with the first row: ignore_data_skip=True."
                )
            # As the trainer counts: a run that goes on after its last step begins again.
            batches.trained = state.global_step % state.max_steps * args.gradient_accumulation_steps
        self.steps = now


def _order(rows: IterableDataset) -> int:
    """A number for the rows that a first pass begins with, and their order."""
    return stable_id(repr([*islice(_one_pass(rows, 0), _ROWS_AT_ONCE)]))


def same_order_everywhere(rows: IterableDataset, device: torch.device) -> None:
    """Refuse rows that begin otherwise in each process."""
    if len(set(sizes_of_all(_order(rows), device))) > 1:
        raise ValueError(
            "train_dataset is shuffled in another order in each process: shuffle it with a seed, .shuffle(seed=...)."
        )


def streamed_loader(trainer: Any, rows: IterableDataset, size: int, passes: int | None) -> data.DataLoader[Any]:
    """A trainer's data loader of streamed rows, in batches of this process's own."""
    args, accelerator = trainer.args, trainer.accelerator
    processes = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    loader: data.DataLoader[Any] = data.DataLoader(
        StreamedBatches(rows, size, **processes, passes=passes),
        batch_size=None,
        collate_fn=partial(_collate, trainer.data_collator),
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
