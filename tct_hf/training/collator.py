"""From rows to a batch: which rows go together, the student's tokens, the teacher's, and known positives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor
from torch.utils.data import BatchSampler

from tct_hf.data.column_names import KNOWN, KNOWN_TEXTS, LABELLED, candidate_columns
from tct_hf.data.ids import stable_id
from tct_hf.data.near_duplicates import text_key
from tct_hf.data.rows import BadRow, as_text
from tct_hf.teachers.base import Teacher

# Everything that is not the student's own columns goes under this one key, out of the base collator's sight.
BATCH_KEY = "tct"

NO_ID = -1


@dataclass
class TCTDataCollator(SentenceTransformerDataCollator):
    """Tokenises rows for the student, lets the teacher prepare what it needs, and numbers the candidates.

    A batch holds the student's columns and, under "tct", `teacher` (what :meth:`Teacher.collate` returned),
    `candidate_ids (queries, columns)` int64, `query_ids (queries,)` int64, under which a passage is the query itself,
    `asked (queries,)` int64, the same for the labelled rows of one query, and, where the data set has them,
    `known_positive_ids (queries, most)` int64 padded with -1, `labelled (queries,)` bool and `label_weight (queries,)`
    float32. Ids are hashes of the data set's passage ids, or of the texts where it has none. With ids,
    `candidate_texts`, `query_texts` and `known_positive_texts` are hashes of the texts: a passage is a known positive,
    or the query itself, by either.

    Args:
        teacher: the teacher that scores the batch.
    """

    teacher: Teacher | None = None

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return "query" if column_name == "query" else "document"

    def _get_prompt_for_column(self, prompts: Any, column_name: str) -> str | None:
        return (prompts or {}).get("query" if column_name == "query" else "document")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        first = features[0]
        columns = candidate_columns(list(first), read=self.teacher.columns_read(list(first)) if self.teacher else ())
        texts = {name: [row[name] for row in features] for name in ("query", *columns)}
        for row in features:
            try:
                for name in texts:
                    as_text(row[name], name, allow_empty=True)
            except BadRow as error:
                raise ValueError(error.at(f"The row of query {row['query']!r}")) from None
        batch = super().__call__([dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)])
        if first.get("dataset_name") is not None:
            batch["dataset_name"] = first["dataset_name"]
        rest: dict[str, Any] = _ids(features, columns)
        for name, fits, dtype, wanted in (
            ("labelled", lambda value: isinstance(value, bool), torch.bool, "true, or false without a label"),
            ("label_weight", _is_weight, torch.float32, "a finite number, 0 or greater"),
        ):
            if name in first:
                values = [row[name] for row in features]
                if wrong := [value for value in values if not fits(value)]:
                    raise ValueError(f"Column {name!r} holds {wrong[0]!r}: give {wanted}.")
                rest[name] = torch.tensor(values, dtype=dtype)
        if self.teacher is not None:
            prepared = self.teacher.collate(texts["query"], [texts[name] for name in columns], features)
            if prepared is not None:
                rest["teacher"] = prepared
        batch[BATCH_KEY] = rest
        return batch


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0.0 <= value < float("inf")


def _ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Tensor]:
    missing = [f"{name}_id" for name in columns if f"{name}_id" not in rows[0]]
    known_ids = KNOWN in rows[0]
    if missing and (known_ids or len(missing) < len(columns)):
        what = KNOWN if known_ids else "passage ids for some columns"
        raise ValueError(f"The data set has {what}, but no {', '.join(missing)}: add these ids, or remove the others.")
    names = [] if missing else [f"{name}_id" for name in columns]
    for row, name in ((row, name) for row in rows for name in names if row[name] is None):
        raise ValueError(f"Query {row['query']!r} has no {name}: fill it in, or remove the row or the column.")
    for row, name in ((row, name) for row in rows for name in (KNOWN, KNOWN_TEXTS)):
        if (listed := row.get(name)) is not None and (isinstance(listed, str) or None in listed):
            raise ValueError(f"Query {row['query']!r} has {name} = {listed!r}: give a list of ids without nulls.")
    texts = [[text_key(row[name]) for name in columns] for row in rows]
    asked = [text_key(row["query"]) for row in rows]
    labelled = [row.get(LABELLED, True) for row in rows]
    found = {
        "asked": torch.tensor([one if judged else NO_ID for one, judged in zip(asked, labelled, strict=True)]),
        **_keys("ids" if missing else "texts", texts, asked, [row.get(KNOWN_TEXTS) for row in rows]),
    }
    if not missing:
        ids = [[stable_id(str(row[name])) for name in names] for row in rows]
        itself = [stable_id(str(row.get("query_id", ""))) for row in rows]
        known = [None if (of := row.get(KNOWN)) is None else [stable_id(str(one)) for one in of] for row in rows]
        found |= _keys("ids", ids, itself, known)
    return found


def _keys(
    kind: str, candidates: list[list[int]], itself: Sequence[int], known: Sequence[Sequence[int] | None]
) -> dict[str, Tensor]:
    """Hashes of ids, or of texts, under which candidates are known."""
    # Where a query has the id of its own positive, queries and passages are numbered each for themselves.
    query = [NO_ID if one == own[0] else one for one, own in zip(itself, candidates, strict=True)]
    found = {f"candidate_{kind}": torch.tensor(candidates), f"query_{kind}": torch.tensor(query)}
    if any(of is not None for of in known):
        width = max(1, *(len(of or ()) for of in known))
        rows = [[*(of or ()), *[NO_ID] * (width - len(of or ()))] for of in known]
        found[f"known_positive_{kind}"] = torch.tensor(rows)
    return found


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
        self.inner.set_epoch(epoch)
