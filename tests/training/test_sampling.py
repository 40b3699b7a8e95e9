"""Batches of several data sets on several devices."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler, RoundRobinBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from tct_hf.training.collator import SameDatasetBatchSampler


@pytest.mark.parametrize("kind", [ProportionalBatchSampler, RoundRobinBatchSampler])
@pytest.mark.parametrize("world", [2, 3])
def test_batches_that_go_to_the_devices_together_are_of_one_data_set(kind: type, world: int) -> None:
    sizes = [26, 40, 14]
    parts = [Dataset.from_dict({"x": list(range(size))}) for size in sizes]
    whole = ConcatDataset(parts)
    generator = torch.Generator().manual_seed(3)
    samplers = [
        DefaultBatchSampler(RandomSampler(part, generator=generator), batch_size=4, drop_last=True) for part in parts
    ]
    inner = kind(dataset=whole, batch_samplers=samplers, generator=generator, seed=3)
    sampler = SameDatasetBatchSampler(inner, whole.cumulative_sizes, world)
    sampler.set_epoch(1)
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    starts = [0, *whole.cumulative_sizes]

    def source(batch: list[int]) -> int:
        [found] = {max(i for i, start in enumerate(starts) if row >= start) for row in batch}
        return found

    for first in range(0, len(batches), world):
        assert len({source(batch) for batch in batches[first : first + world]}) == 1
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows))
