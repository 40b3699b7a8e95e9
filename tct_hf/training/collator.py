"""From rows to a batch: the student's tokens, the teacher's, and which candidates are known positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

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

    Args:
        teacher: of the batch's score matrix.
        prompts: the student's prompts, `{"query": ..., "document": ...}`.

    A batch holds the student's columns and, under "tct", `teacher` (what :meth:`Teacher.collate` returned),
    `candidate_ids (queries, columns)` int64 and, where the data set has them, `known_positive_ids (queries, most)`
    int64 padded with -1, `labelled (queries,)` bool and `label_weight (queries,)` float32. Ids are hashes of the data
    set's passage ids; without ids, of the texts. A row whose column labelled is false has passages in all its
    candidate columns, but nobody has said that the one in column positive answers its query.
    """

    teacher: Teacher | None = None

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return "query" if column_name == "query" else "document"

    def _get_prompt_for_column(self, prompts: Any, column_name: str) -> str | None:
        return (prompts or {}).get("query" if column_name == "query" else "document")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Make one batch of `(queries,)` rows."""
        if not features:
            return {}
        dataset = features[0].get("dataset_name")
        there = list(features[0])
        columns = candidate_columns(there, read=self.teacher.columns_read(there) if self.teacher is not None else ())
        texts = {name: [row[name] for row in features] for name in ("query", *columns)}
        for name, values in texts.items():
            if not all(isinstance(value, str) for value in values):
                bad = next(value for value in values if not isinstance(value, str))
                raise ValueError(f"Column {name!r} holds {bad!r}, which is no text: remove such rows before training.")
        batch = super().__call__([dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)])
        if dataset is not None:
            batch["dataset_name"] = dataset
        rest: dict[str, Any] = {"candidate_ids": _candidate_ids(features, columns)}
        known = _known_positive_ids(features, columns)
        if known is not None:
            rest["known_positive_ids"] = known
        if "labelled" in features[0]:
            rest["labelled"] = torch.tensor([_flag(row["labelled"]) for row in features], dtype=torch.bool)
        if "label_weight" in features[0]:
            rest["label_weight"] = torch.tensor([row["label_weight"] for row in features], dtype=torch.float32)
        if self.teacher is not None:
            prepared = self.teacher.collate(texts["query"], [texts[name] for name in columns], features)
            if prepared is not None:
                rest["teacher"] = prepared
        batch[BATCH_KEY] = rest
        return batch


def _has_ids(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    present = [f"{name}_id" in row for name in columns]
    if any(present) and not all(present):
        missing = [f"{name}_id" for name, there in zip(columns, present, strict=True) if not there]
        raise ValueError(
            f"The data set has passage ids for some columns only: add {', '.join(missing)}, or remove the other ids."
        )
    return all(present)


def _candidate_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Tensor:
    names = [f"{name}_id" for name in columns] if _has_ids(rows[0], columns) else list(columns)
    return torch.tensor([[stable_id(str(row[name])) for name in names] for row in rows], dtype=torch.int64)


def _known_positive_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Tensor | None:
    if "known_positive_ids" not in rows[0]:
        return None
    if not _has_ids(rows[0], columns):
        raise ValueError(
            "known_positive_ids are there, but not the candidates' ids they are compared with: add "
            f"{', '.join(f'{name}_id' for name in columns)}, or remove known_positive_ids."
        )
    known = [[stable_id(str(key)) for key in row["known_positive_ids"] or ()] for row in rows]
    width = max(1, max(len(row) for row in known))
    return torch.tensor([row + [NO_ID] * (width - len(row)) for row in known], dtype=torch.int64)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"Column 'labelled' holds {value!r}: give true, or false for a row without a label.")
    return value
