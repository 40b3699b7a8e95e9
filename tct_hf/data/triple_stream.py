"""One pass from raw rows to checked training rows: the same for files, data sets, whole or streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tct_hf.data.columns import RowReader
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

    def plan(self) -> RowReader:
        """Read from the start until a row can be used; it decides which columns there are.

        Returns:
            The reader of all rows.

        Raises:
            ValueError: a column is missing, the first row is bad (any row, with `skip_bad_rows`, when all are), or
                there is none.
        """
        if self.reader is not None:
            return self.reader
        bad, first_message = 0, ""
        for number, raw in self.source.rows():
            try:
                if isinstance(raw, BadRow):
                    raise raw
                names = self.source.names
                reader = self._reader(list(raw) if names is None else names, raw)
                list(reader.read(raw, self.source.place(number)))
            except BadRow as error:
                # Where the columns are known apart from the rows, one that is missing is missing in all of them.
                whole = self.source.names is not None and error.kind in ("missing column", "doubled column")
                message = error.at(self.source.name if whole else self.source.place(number))
                if whole or not self.skip_bad_rows:
                    raise ValueError(message) from None
                bad += 1
                first_message = first_message or message
            else:
                self.reader = reader
                if reader.left_out:
                    logger.info("%s: columns left out: %s", self.source.name, ", ".join(reader.left_out))
                return reader
        if bad:
            raise ValueError(f"{self.source.name}: no row to train on; the first of {bad:,} bad ones: {first_message}")
        raise ValueError(f"{self.source.name}: no row to train on; it is empty")

    def output_columns(self) -> list[str]:
        """The columns of the rows, in order.

        Raises:
            ValueError: as `plan`; or judgements are given, but rows have no ids to compare them with.
        """
        reader = self.plan()
        if self.known is not None and not (reader.has_query_id and reader.has_candidate_ids):
            lacks = "passage ids (positive_id, negative_id)" if reader.has_query_id else "query_id"
            raise ValueError(
                f"{self.source.name}: qrels= needs {lacks}, which is not there; map it with columns=, or leave "
                "qrels out"
            )
        return reader.output_columns(reader.has_known or self.known is not None)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Read the source from its start.

        Yields:
            Training rows.

        Raises:
            ValueError: a bad row, with its place and the mend; no row at all; judgements of other queries.
        """
        self.skipped.replace(SkippedRows())
        columns = self.output_columns()
        judged = count = 0
        for row in self._joined():
            if self.known is not None:
                judged += self.known.add(row)
            count += 1
            yield {name: row[name] for name in columns}
        if self.skipped.total:
            logger.warning("%s: %s", self.source.name, self.skipped.summary())
        if not count:
            first = next(iter(self.skipped.examples.values()))
            raise ValueError(
                f"{self.source.name}: no row to train on; the first of {self.skipped.total:,} bad ones: {first}"
            )
        self.check_judged(judged)

    def check_judged(self, judged: int) -> None:
        """Refuse judgements of which none belongs to a row.

        Args:
            judged: how many rows have a judged query.

        Raises:
            ValueError: judgements are given, and there is no such row.
        """
        if self.known is not None and not judged:
            raise ValueError(
                f"{self.source.name}: none of its queries is judged in {self.known.source}; give the qrels of the "
                "split it belongs to"
            )

    def _joined(self) -> Iterator[dict[str, Any]]:
        reader = self.plan()
        sources = {name: self.queries if name == "query_id" else self.passages for name in reader.to_look_up}
        join = TextJoin({name: texts for name, texts in sources.items() if texts is not None})
        rows = self._read(reader)
        while batch := list(islice(rows, ROWS_A_BATCH)):
            for (number, row), error in zip(batch, join([row for _, row in batch]), strict=True):
                if error is None:
                    yield row
                else:
                    self._refuse(error, number)

    def _read(self, reader: RowReader) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, raw in self.source.rows(reader.source_columns()):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                for row in reader.read(raw, self.source.place(number)):
                    yield number, row
            except BadRow as error:
                self._refuse(error, number)

    def _refuse(self, error: BadRow, number: int) -> None:
        message = error.at(self.source.place(number))
        if not self.skip_bad_rows:
            raise ValueError(message)
        self.skipped.add(error.kind, message)

    def _reader(self, names: list[str], first: Mapping[str, Any]) -> RowReader:
        return RowReader(
            names,
            first,
            columns=self.columns,
            num_negatives=self.num_negatives,
            has_queries=self.queries is not None,
            has_passages=self.passages is not None,
        )
