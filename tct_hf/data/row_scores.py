"""A teacher's scores of a row of triples, in whatever columns they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tct_hf.data.row_parsing import BadRow, get, shown, there_are
from tct_hf.data.score_table import check_score


class RowScores:
    """Reads one score a candidate of a source's rows, positive first.

    Args:
        name: a column of lists, or what follows each candidate's name ("teacher_score": positive_teacher_score and
            negative_teacher_score, or negative_1_teacher_score and so on).
        names: the columns of the source.
        candidates: names of the first row's positives and negatives.

    Attributes:
        columns: that are read.

    Raises:
        BadRow: they are not there.
    """

    def __init__(self, name: str, names: Sequence[str], candidates: tuple[Sequence[str], Sequence[str]]) -> None:
        self.listed = name in names
        if self.listed:
            self.columns = [name]
            return
        _, negatives = candidates
        self.columns = [f"positive_{name}"]
        if len(negatives) == 1 and f"negative_{name}" in names:
            self.columns.append(f"negative_{name}")
        else:
            self.columns += [f"negative_{place}_{name}" for place in range(1, len(negatives) + 1)]
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise BadRow(
                "missing column",
                f"there is neither a column {name!r} nor {missing[0]!r} ({there_are(names)}); give scores= the name "
                "of a list, one score a candidate and the positive first, or what follows positive_ and negative_",
            )

    def read(
        self, row: Mapping[str, Any], candidates: tuple[Sequence[str], Sequence[str]], wanted: int
    ) -> list[float]:
        """The scores of the first `wanted` candidates.

        Args:
            row: the source's.
            candidates: names of its positives and negatives.
            wanted: how many are kept.

        Raises:
            BadRow: a score is missing or not finite, or they are not as many as the candidates.
        """
        positives, negatives = candidates
        if len(positives) != 1:
            raise BadRow(
                "misaligned scores",
                f"{len(positives)} positives in a row with scores; write a row of each, with scores of its own",
                self.columns[0],
            )
        labels = [*positives, *negatives]
        values = [get(row, column) for column in self.columns]
        if self.listed:
            [values] = values
            if not isinstance(values, (list, tuple)):
                raise BadRow(
                    "mixed types",
                    f"holds {shown(values)}, where a list of {len(labels)} scores is needed, positive first",
                    self.columns[0],
                )
        if len(values) != len(labels):
            raise BadRow(
                "misaligned scores",
                f"{len(values)} scores for {len(labels)} candidates; give one each, positive first",
                self.columns[0],
            )
        query = next((f", query {row[name]!r}" for name in ("query_id", "query") if name in row), "")
        scores = []
        for place, (label, value) in enumerate(zip(labels, values, strict=True)):
            column = self.columns[0 if self.listed else place]
            try:
                scores.append(
                    check_score(value, label, f"column {column!r}{query}", "score it again, or remove the row")
                )
            except ValueError as error:
                raise BadRow("bad score", str(error)) from None
        return scores[:wanted]
