"""Batches for several devices whose passages become one set of candidates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler


class SameDatasetBatchSampler(BatchSampler):
    """Regroups batches so that every `world` in a row, which go to `world` devices, come from one data set.

    Args:
        sampler: sentence-transformers' sampler over several data sets: batches of row numbers, each of one data set.
        ends: row number after the last of each data set.
        world: devices. Batches of a data set that fill no group at the end are dropped.
    """

    def __init__(self, sampler: Any, ends: Sequence[int], world: int) -> None:
        self.inner: Any = sampler
        self.ends = list(ends)
        self.world = world
        self.batch_size = getattr(sampler, "batch_size", 1)
        self.drop_last = True

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[list[int]]] = {}
        for batch in self.inner:
            group = waiting.setdefault(bisect_right(self.ends, batch[0]), [])
            group.append(batch)
            if len(group) == self.world:
                yield from group
                group.clear()

    def __len__(self) -> int:
        counts = [len(part) for part in self.inner.batch_samplers]
        if len(self.inner) != sum(counts):  # in turn, until the smallest data set is used up
            counts = [len(self.inner) // len(counts)] * len(counts)
        return sum(count // self.world * self.world for count in counts)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch it shuffles for."""
        self.inner.set_epoch(epoch)
