"""From rows to a batch: which rows go together, the student's tokens, the teacher's, and known positives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor
from torch.utils.data import BatchSampler

from tct_hf.data.column_names import candidate_columns
from tct_hf.teachers.base import Teacher

# Everything that is not the student's own columns goes under this one key, out of the base collator's sight.
BATCH_KEY = "tct"

NO_ID = -1


def stable_id(key: str) -> int:
    """A non-negative 63-bit number for an id or a text, the same on every machine and in every process."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


@dataclass
class TCTDataCollator(SentenceTransformerDataCollator):
    """Tokenises rows for the student, lets the teacher prepare what it needs, and numbers the candidates.

    A batch holds the student's columns and, under "tct", `teacher` (what :meth:`Teacher.collate` returned),
    `candidate_ids (queries, columns)` int64 and, where the data set has them, `known_positive_ids (queries, most)`
    int64 padded with -1, `labelled (queries,)` bool and `label_weight (queries,)` float32. Ids are hashes of the data
    set's passage ids; without ids, of the texts. A row whose column labelled is false has passages in all its
    candidate columns, but no judgement says that the one in column positive answers its query.

    Args:
        teacher: the teacher that scores the batch.
    """

    teacher: Teacher | None = None

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return "query" if column_name == "query" else "document"

    def _get_prompt_for_column(self, prompts: Any, column_name: str) -> str | None:
        return (prompts or {}).get("query" if column_name == "query" else "document")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Make one batch of `(queries,)` rows."""
        first = features[0]
        columns = candidate_columns(list(first), read=self.teacher.columns_read(list(first)) if self.teacher else ())
        texts = {name: [row[name] for row in features] for name in ("query", *columns)}
        for name, values in texts.items():
            for value in values:
                if not isinstance(value, str):
                    raise ValueError(f"Column {name!r} holds {value!r}, not text: remove such rows before training.")
        batch = super().__call__([dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)])
        if first.get("dataset_name") is not None:
            batch["dataset_name"] = first["dataset_name"]
        rest: dict[str, Any] = _ids(features, columns)
        if "labelled" in first:
            for row in features:
                if not isinstance(row["labelled"], bool):
                    raise ValueError(
                        f"Column 'labelled' holds {row['labelled']!r}: give true, or false for a row without a label."
                    )
            rest["labelled"] = torch.tensor([row["labelled"] for row in features], dtype=torch.bool)
        if "label_weight" in first:
            rest["label_weight"] = torch.tensor([row["label_weight"] for row in features], dtype=torch.float32)
        if self.teacher is not None:
            prepared = self.teacher.collate(texts["query"], [texts[name] for name in columns], features)
            if prepared is not None:
                rest["teacher"] = prepared
        batch[BATCH_KEY] = rest
        return batch


def _ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Tensor]:
    missing = [f"{name}_id" for name in columns if f"{name}_id" not in rows[0]]
    known = "known_positive_ids" in rows[0]
    if missing and (known or len(missing) < len(columns)):
        what = "known_positive_ids" if known else "passage ids for some columns"
        raise ValueError(f"The data set has {what}, but no {', '.join(missing)}: add these ids, or remove the others.")
    names = columns if missing else [f"{name}_id" for name in columns]
    ids = {"candidate_ids": torch.tensor([[stable_id(str(row[name])) for name in names] for row in rows])}
    if known:
        found = [[stable_id(str(key)) for key in row["known_positive_ids"] or ()] for row in rows]
        width = max(1, *map(len, found))
        ids["known_positive_ids"] = torch.tensor([row + [NO_ID] * (width - len(row)) for row in found])
    return ids


class SameDatasetBatchSampler(BatchSampler):
    """Regroups batches so that every `world` in a row, which go to `world` devices, come from one data set."""

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
