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
from tct_hf.data.row_parsing import BadRow, SkippedRows, shown
from tct_hf.data.sources import Source

logger = logging.getLogger(__name__)

ROWS_A_BATCH = 1000
# Bad rows of this kind show that a setting does not fit the source.
_NOTHING = "nothing to look up"


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
        scores: the name of a teacher's scores, see `load_triples`.
    """

    source: Source
    columns: Mapping[str, str | None] | None = None
    num_negatives: int | None = None
    queries: Texts | None = None
    passages: Texts | None = None
    known: KnownPositives | None = None
    skip_bad_rows: bool = False
    skipped: SkippedRows = field(default_factory=SkippedRows)
    scores: str | None = None
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
                self._refuse_numbers(reader, next(reader.read(raw, self.source.place(number))))
            except BadRow as error:
                # Where the columns are known apart from the rows, one that is missing is missing in all of them.
                known = self.source.names is not None and error.kind in ("missing column", "doubled column")
                whole = known or error.kind == _NOTHING
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

    def join(self) -> TextJoin:
        """What fills in the texts of ids."""
        sources = {name: self.queries if name == "query_id" else self.passages for name in self.plan().to_look_up}
        return TextJoin({name: texts for name, texts in sources.items() if texts is not None})

    def _joined(self) -> Iterator[dict[str, Any]]:
        join = self.join()
        rows = self._read(self.plan())
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
        columns = dict(self.columns or {})
        reader = self._reader_of(names, first, columns)
        to_look_up = reader.to_look_up
        for what, texts, setting in (("query", self.queries, "queries"), ("passage", self.passages, "collection")):
            if texts is not None and not any((name == "query_id") == (what == "query") for name in to_look_up):
                columns |= _as_ids(reader, what, first, texts, setting)
        return reader if columns == (self.columns or {}) else self._reader_of(names, first, columns)

    def _reader_of(self, names: list[str], first: Mapping[str, Any], columns: Mapping[str, str | None]) -> RowReader:
        return RowReader(
            names,
            first,
            columns=columns,
            num_negatives=self.num_negatives,
            has_queries=self.queries is not None,
            has_passages=self.passages is not None,
            scores=self.scores,
        )

    def _refuse_numbers(self, reader: RowReader, row: Mapping[str, Any]) -> None:
        texts = [row[name] for name in ("query", "positive", *reader.negatives) if name in row]
        if not reader.to_look_up and all(map(str.isdigit, texts)):
            raise BadRow(_NOTHING, f"{texts} look like ids, not texts; pass queries= and collection= with their texts")


def _as_ids(
    reader: RowReader, what: str, first: Mapping[str, Any], texts: Texts, setting: str
) -> dict[str, str | None]:
    """Take text columns that hold ids of `texts`, as data sets of id triples name them, for columns of ids.

    Args:
        reader: which finds nothing to look up in `texts`.
        what: "query" or "passage".
        first: the first row.
        texts: by id.
        setting: that gave them, for the message.

    Returns:
        What the mapping of columns gains; nothing where the row is bad in itself.

    Raises:
        BadRow: the columns do not hold ids.
    """
    columns = reader.text_columns(what)
    values = [
        value
        for name in columns.values()
        for value in (first[name] if isinstance(first[name], (list, tuple)) else [first[name]])
        if not isinstance(value, dict)
    ]
    if any(isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip() for value in values):
        return {}
    there = reader.has_query_id if what == "query" else reader.has_candidate_ids
    if not there and texts.has_any([str(value).encode(errors="replace").decode() for value in values]):
        ids = {name: f"{name[:-1]}_ids" if name.endswith("s") else f"{name}_id" for name in columns}
        return {**dict.fromkeys(columns), **{ids[ours]: theirs for ours, theirs in columns.items()}}
    ours, theirs = next(iter(columns.items()))
    mend = f"{ours!r}: None" if there else f"'{what if what == 'query' else 'positive'}_id': ..."
    raise BadRow(
        _NOTHING,
        f"{setting}= has nothing to look up: this holds texts, such as {shown(first[theirs])}, and no id of "
        f"{texts.source}; leave {setting}= out, or look ids up with columns={{{mend}}}",
        theirs,
    )
