"""A teacher of stored scores: from the data set's columns, or from a table by ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tct_hf.batches import spread_own
from tct_hf.data.column_names import candidate_columns
from tct_hf.data.rows import BadRow, as_score, plain, shown
from tct_hf.data.scores import ScoreSource, ScoreTable
from tct_hf.files import command
from tct_hf.teachers.base import Columns, Rows, Teacher, Texts, check_scale

if TYPE_CHECKING:
    from datasets import Dataset

_FIX = "score the pair, or remove the row"

# What is looked for where no column is named: a list of this name, or columns of candidates' names and this.
_SEARCHED = ("scores", "teacher_score", "label", "score")


class StoredScores(Teacher):
    """Scores that were made before training: cheap, of whatever teacher, for a query's own candidates.

    Args:
        table: rows of query id, passage id and score (see :meth:`ScoreTable.open`) in a file, on the Hub or in a data
            set, found by the triples' query_id, positive_id, negative_id ...; None: the scores are in the triples' own
            columns.
        column: column of the triples: a list of one score a candidate, positive first; or what follows a candidate's
            name, "teacher_score" for positive_teacher_score and negative_teacher_score (or negative_1_teacher_score
            ...). None looks for scores, then _teacher_score, label, and _score.
        training_scale: factor of the scores in the teacher's own training, see :class:`Teacher`.
        cache_dir: folder of a table's prepared form, 12 bytes a pair; by default that of `load_triples`.

    Raises:
        FileNotFoundError: no such table.
        ValueError: both a table and a column, or a table that can't be used; in training, a row whose scores are
            missing, not finite or not one a candidate, with its query id, the column and the fix.
    """

    covers = "own"
    score_kind = "stored score"

    def __init__(
        self,
        table: ScoreSource | None = None,
        *,
        column: str | None = None,
        training_scale: float = 1.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        if table is not None and column is not None:
            raise ValueError(f"Scores come from a table or from the column {column!r}: leave one of them out.")
        self.table = None if table is None else ScoreTable.open(table, cache_dir=cache_dir)
        self.column = column
        self.training_scale = check_scale(training_scale)

    def check(self, columns: Sequence[str], *, candidates: str) -> None:
        super().check(columns, candidates=candidates)
        names = candidate_columns(columns, read=columns)
        if self.table is None:
            self._score_columns(columns, names)
            return
        missing = [name for name in ("query_id", *(f"{name}_id" for name in names)) if name not in columns]
        if missing:
            raise ValueError(
                f"The scores of {self.table.name} are found by ids, but the data set has no {', '.join(missing)}."
            )

    def check_rows(self, rows: Dataset, *, fix: str = _FIX) -> None:
        """Look all rows up in the table, which training would do as it comes to them; refuse the first without."""
        names = candidate_columns(rows.column_names, read=rows.column_names)
        for batch in rows.select_columns(["query_id", *(f"{name}_id" for name in names)]).iter(10_000):
            self._looked_up(batch["query_id"], [batch[f"{name}_id"] for name in names], names, fix)

    def columns_read(self, names: Sequence[str]) -> list[str]:
        if self.table is not None:
            return []
        found = self._score_columns(names, candidate_columns(names, read=names))
        return [found] if isinstance(found, str) else found

    def _score_columns(self, there: Sequence[str], names: Sequence[str]) -> list[str] | str:
        """The columns of one score a candidate, or the column that lists them."""
        for name in _SEARCHED if self.column is None else [self.column]:
            if name in there:
                return name
            each = [f"{candidate}_{name}" for candidate in names]
            if each[0] not in there:
                continue
            if missing := [column for column in each if column not in there]:
                raise ValueError(f"The data set has scores in {each[0]!r}, but no {', '.join(missing)}: add it.")
            if self.column is None and name == "score" and "origin" in there:
                raise ValueError(
                    f"{each[0]!r} holds what the miner found candidates by, and there is no {names[0]}_teacher_score: "
                    f'score the triples with {command("score")}, or name these with column="score".'
                )
            return each
        wanted = "scores (a list, positive first)" if self.column is None else f"{self.column!r}"
        raise ValueError(
            f"The data set has the columns {list(there)}, but no {wanted}: name the scores with column=, keep them "
            f"with load_triples(..., scores=...), or make them with {command('score')}."
        )

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        there = list(rows[0])
        names = candidate_columns(there, read=there)
        if self.table is not None:
            self.check(there, candidates="own")
            ids = [[row[f"{name}_id"] for row in rows] for name in names]
            scores = self._looked_up([row["query_id"] for row in rows], ids, names)
        else:
            from_columns = self._score_columns(there, names)
            scores = [_values(row, from_columns, names) for row in rows]
        return {"scores": torch.tensor(scores, dtype=torch.float32)}

    def _looked_up(
        self, queries: Sequence[Any], passages: Sequence[Sequence[Any]], names: Sequence[str], fix: str = _FIX
    ) -> list[list[float]]:
        """`(queries, columns)` scores of the ids of queries and of each column."""
        assert self.table is not None
        pairs = [(str(ids[0]), str(one)) for ids in zip(queries, *passages, strict=True) for one in ids[1:]]
        scores = self.table.get(pairs)
        if None in scores:
            number = scores.index(None)
            query, passage = pairs[number]
            raise ValueError(
                f"query {query!r}, column {names[number % len(names)] + '_id'!r}: {self.table.name} has no score of "
                f"passage {passage!r}: {fix}."
            )
        return [scores[start : start + len(names)] for start in range(0, len(scores), len(names))]  # type: ignore[misc]

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        return spread_own(inputs["scores"], gather=gather)


def _values(row: Mapping[str, Any], columns: list[str] | str, names: Sequence[str]) -> list[float]:
    """The score of each candidate of a row."""
    place = f"query {row.get('query_id', row['query'])!r}"
    if isinstance(columns, str):
        listed = plain(row[columns])
        if not isinstance(listed, (list, tuple)) or len(listed) != len(names):
            raise ValueError(
                f"{place}, column {columns!r}: holds {shown(listed)}, where a list of {len(names)} scores is needed "
                f"({', '.join(names)}); of a margin, store both scores."
            )
        found = [(columns, value) for value in listed]
    else:
        found = [(column, plain(row[column])) for column in columns]
    try:
        return [as_score(value, name, column) for name, (column, value) in zip(names, found, strict=True)]
    except BadRow as error:
        raise ValueError(error.at(place)) from None
