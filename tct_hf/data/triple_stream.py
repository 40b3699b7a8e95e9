"""One pass from raw rows to checked training rows: the same for files, data sets, whole or streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tct_hf.data.columns import KNOWN, RowReader
from tct_hf.data.known_positives import KnownPositives
from tct_hf.data.lookups import TextJoin, Texts
from tct_hf.data.row_parsing import BadRow, SkippedRows
from tct_hf.data.sources import Source

logger = logging.getLogger(__name__)

ROWS_A_BATCH = 1000


@dataclass
class TripleStream:
    """Checked training rows of a source.

    Args:
        source: the raw rows.
        columns: our name to the source's.
        num_negatives: negatives a row; None takes what the first row has.
        queries: texts by query id.
        passages: texts by passage id.
        known: positives from judgements.
        skip_bad_rows: leave bad rows out and count them.
        skipped: takes the counts, anew in each pass.
    """

    source: Source
    columns: Mapping[str, str | None] | None = None
    num_negatives: int | None = None
    queries: Texts | None = None
    passages: Texts | None = None
    known: KnownPositives | None = None
    skip_bad_rows: bool = False
    skipped: SkippedRows = field(default_factory=SkippedRows)
    reader: RowReader | None = field(default=None, init=False)

    def output_columns(self) -> list[str]:
        """The columns of the rows; known once the first row was read."""
        assert self.reader is not None
        return self.reader.output_columns(self.reader.has_known or self.known is not None)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Read the source from its start.

        Yields:
            Training rows.

        Raises:
            ValueError: a bad row, with its place and the mend; no row at all; judgements of other queries.
        """
        self.skipped.replace(SkippedRows())
        judged = count = 0
        for place, row in self._joined():
            if self.known is not None:
                judged += self.known.add(row)
            del place
            count += 1
            yield row
        if self.skipped.total:
            logger.warning("%s: %s", self.source.name, self.skipped.summary())
        if not count:
            first = next(iter(self.skipped.examples.values()), None)
            raise ValueError(
                f"{self.source.name}: no row to train on"
                + (f"; the first of {self.skipped.total} bad ones: {first}" if first else "; it is empty")
            )
        self.check_judged(judged)

    def check_judged(self, judged: int) -> None:
        """Refuse judgements of which none belongs to a row."""
        if self.known is not None and not judged:
            raise ValueError(
                f"{self.source.name}: none of its queries is judged in {self.known.source}; give the qrels of this split"
            )

    def _joined(self) -> Iterator[tuple[str, dict[str, Any]]]:
        join: TextJoin | None = None
        batch: list[tuple[int, dict[str, Any]]] = []
        for number, row in self._rows():
            batch.append((number, row))
            if len(batch) >= ROWS_A_BATCH:
                join = join or self._join()
                yield from self._finish(join, batch)
                batch = []
        if batch:
            yield from self._finish(join or self._join(), batch)

    def _join(self) -> TextJoin:
        assert self.reader is not None
        sources = {name: self.queries if name == "query_id" else self.passages for name in self.reader.to_look_up}
        return TextJoin({name: texts for name, texts in sources.items() if texts is not None})

    def _finish(self, join: TextJoin, batch: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for (number, row), error in zip(batch, join([row for _, row in batch]), strict=True):
            if error is None:
                yield "", row
            else:
                self._refuse(error, number)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        needed: list[str] | None = None
        self.reader = None
        if self.source.names is not None:
            needed = self._plan_by_names()
        for number, raw in self.source.rows(needed):
            if isinstance(raw, BadRow):
                self._refuse(raw, number)
                continue
            try:
                if self.reader is None:
                    self.reader = self._plan(raw)
                for row in self.reader.read(raw, self.source.place(number)):
                    yield number, row
            except BadRow as error:
                self._refuse(error, number)
