"""From raw rows to checked training rows, in one pass or streamed.

Streamed, the order of the rows is settled while they are bytes, and only those asked for are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from typing import Any

from datasets import Features, IterableDataset

from tct_hf.data.columns import RowReader
from tct_hf.data.qrels import KnownPositives
from tct_hf.data.rows import BadRow, SkippedRows, shown
from tct_hf.data.sources import ROWS_A_BATCH, Source
from tct_hf.data.texts import TextJoin, Texts

logger = logging.getLogger(__name__)

# Takes a value; raises what is wrong with it.
Check = Callable[[Any], object]
# Bad rows of this kind show that a setting does not fit the source.
_NOTHING = "nothing to look up"


@dataclass
class TripleStream:
    """Checked training rows of a source.

    The fields are the arguments of `load_triples`, opened; `skipped` takes the counts anew in each pass.
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
        """The reader of all rows: made from the first row that can be used, which decides the columns there are."""
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
        """The columns of the rows, in order; refuses judgements where rows have no ids to compare with them."""
        reader = self.plan()
        if self.known is not None and not (reader.has_query_id and reader.has_candidate_ids):
            lacks = "passage ids (positive_id, negative_id)" if reader.has_query_id else "query_id"
            raise ValueError(
                f"{self.source.name}: qrels= needs {lacks}, which is not there; map it with columns=, or leave "
                "qrels out"
            )
        return reader.output_columns(reader.has_known or self.known is not None)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Training rows from the source's start; refuses bad rows, no row at all, and judgements of other queries."""
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
        """Refuse judgements where no row has a judged query."""
        if self.known is not None and not judged:
            raise ValueError(
                f"{self.source.name}: none of its queries is judged in {self.known.source}; give the qrels of the "
                "split it belongs to"
            )

    def join(self) -> TextJoin:
        """The lookup that fills in the texts of ids."""
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
        def read(columns: Mapping[str, str | None]) -> RowReader:
            return RowReader(
                names,
                first,
                columns=columns,
                num_negatives=self.num_negatives,
                has_queries=self.queries is not None,
                has_passages=self.passages is not None,
                scores=self.scores,
            )

        given = dict(self.columns or {})
        reader, columns = read(given), dict(given)
        for what, texts, setting in (("query", self.queries, "queries"), ("passage", self.passages, "collection")):
            if texts is not None and not any((name == "query_id") == (what == "query") for name in reader.to_look_up):
                columns |= _as_ids(reader, what, first, texts, setting)
        return reader if columns == given else read(columns)

    def _refuse_numbers(self, reader: RowReader, row: Mapping[str, Any]) -> None:
        texts = [row[name] for name in ("query", "positive", *reader.negatives) if name in row]
        if not reader.to_look_up and all(map(str.isdigit, texts)):
            raise BadRow(_NOTHING, f"{texts} look like ids, not texts; pass queries= and collection= with their texts")


def _as_ids(
    reader: RowReader, what: str, first: Mapping[str, Any], texts: Texts, setting: str
) -> dict[str, str | None]:
    """What the mapping of columns gains where text columns hold ids of `texts`, as data sets of id triples name them.

    Nothing where the row is bad in itself; a BadRow where the columns hold no ids.
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
    fix = f"{ours!r}: None" if there else f"'{what if what == 'query' else 'positive'}_id': ..."
    raise BadRow(
        _NOTHING,
        f"{setting}= has nothing to look up: this holds texts, such as {shown(first[theirs])}, and no id of "
        f"{texts.source}; leave {setting}= out, or look ids up with columns={{{fix}}}",
        theirs,
    )


# Streamed ------------------------------------------------------------------------------------------------------------


def can_wait(stream: TripleStream) -> bool:
    """Whether each row of the source makes one training row, so that their order is settled before they are read."""
    return stream.plan().one_positive and not stream.skip_bad_rows


class RowsAsStored:
    """What a source holds, row by row, without a look inside; or training rows, where reading them can't wait."""

    def __init__(self, stream: TripleStream) -> None:
        self.stream = stream

    def __call__(self) -> Iterator[dict[str, Any]]:
        stream = self.stream
        rows: Iterable[tuple[int, Any]] = (
            stream.source.raw(stream.plan().source_columns()) if can_wait(stream) else enumerate(stream())
        )
        for number, stored in rows:
            yield {"number": number, "stored": stored}


class RowsRead:
    """Reads, checks and completes rows of :class:`RowsAsStored`, each into one training row.

    Args:
        stream: over the source.
        names: columns of the training rows.
        checks: of the training rows, each of one column.
    """

    def __init__(self, stream: TripleStream, names: Sequence[str], checks: Sequence[tuple[Check, str]] = ()) -> None:
        self.stream = stream
        self.names = list(names)
        self.checks = tuple(checks)
        self._join: TextJoin | None = None

    def rows(self, stored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Training rows of rows of :class:`RowsAsStored`; a bad row is a ValueError with its place."""
        if not can_wait(self.stream):
            return self._chosen([one["stored"] for one in stored])
        stream, reader, source = self.stream, self.stream.plan(), self.stream.source
        if self._join is None:
            self._join = stream.join()
        rows: list[dict[str, Any]] = []
        try:
            for one in stored:
                rows.extend(reader.read(source.parse(one["stored"]), source.place(one["number"])))
        except BadRow as error:
            raise ValueError(error.at(source.place(stored[len(rows)]["number"]))) from None
        for one, bad in zip(stored, self._join(rows), strict=True):
            if bad is not None:
                raise ValueError(bad.at(source.place(one["number"])))
        if stream.known is not None:
            for row in rows:
                stream.known.add(row)
        return self._chosen(rows)

    def _chosen(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for check, name in self.checks:
            for row in rows:
                check(row[name])
        return [{name: row[name] for name in self.names} for row in rows]

    def __call__(self, stored: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A batch of columns instead of rows, for `IterableDataset.map`."""
        pairs = zip(stored["number"], stored["stored"], strict=True)
        rows = self.rows([{"number": number, "stored": raw} for number, raw in pairs])
        return {name: [row[name] for row in rows] for name in self.names}


class StreamedTriples(IterableDataset):
    """An `IterableDataset` of training rows that can say their order without reading them.

    Many processes and workers then agree on the order of all rows, each at the price of reading lines, and parse,
    check and look up only their own.

    Attributes:
        ordered: rows as they are stored, in the order of the training rows, one for each of them.
        reader: makes training rows of them.
    """

    ordered: IterableDataset
    reader: RowsRead

    @classmethod
    def of(cls, ordered: IterableDataset, reader: RowsRead, features: Features) -> StreamedTriples:
        """Training rows of `ordered`, with the features that `reader` sees to."""
        rows = ordered.map(
            reader,
            batched=True,
            batch_size=ROWS_A_BATCH,
            remove_columns=["number", "stored"],
            features=Features({name: features[name] for name in reader.names}),
        )
        made = cls.__new__(cls)
        made.__dict__.update(rows.__dict__)
        made.ordered, made.reader = ordered, reader
        return made

    def shuffle(self, seed: int | None = None, *args: Any, **kwargs: Any) -> StreamedTriples:
        """Shuffle with a buffer, as `datasets.IterableDataset.shuffle`; `set_epoch` gives another order.

        The seed is 0 when None, where datasets would draw another one in every process.
        """
        if seed is None and not args and kwargs.get("generator") is None:
            seed = 0
        if "max_buffer_input_shards" in signature(IterableDataset.shuffle).parameters:
            # There is one shard; to mix several, datasets has a thread fetch each row, ten times as slowly.
            kwargs.setdefault("max_buffer_input_shards", 1)
        return self.of(self.ordered.shuffle(seed, *args, **kwargs), self.reader, self.features)

    def select_columns(self, column_names: str | list[str]) -> StreamedTriples:
        """Keep some of the columns."""
        names = [column_names] if isinstance(column_names, str) else list(column_names)
        if missing := [name for name in names if name not in self.reader.names]:
            raise ValueError(f"no column {missing[0]!r}; there are {', '.join(self.reader.names)}")
        reader = RowsRead(self.reader.stream, names, self.reader.checks)
        return self.of(self.ordered, reader, self.features)

    def checked(self, check: Check, column: str) -> StreamedTriples:
        """Let `check` see the column of every row before the row is given."""
        reader = RowsRead(self.reader.stream, self.reader.names, [*self.reader.checks, (check, column)])
        return self.of(self.ordered, reader, self.features)

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the rows are shuffled."""
        super().set_epoch(epoch)
        self.ordered.set_epoch(epoch)
