"""Streamed triples: the order of the rows is settled while they are bytes, and only those asked for are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from datasets import Features, IterableDataset

from tct_hf.data.lookups import TextJoin
from tct_hf.data.row_parsing import BadRow
from tct_hf.data.triple_stream import ROWS_A_BATCH, TripleStream

# Takes a value; raises what is wrong with it.
Check = Callable[[Any], object]


def can_wait(stream: TripleStream) -> bool:
    """Whether each row of the source makes one training row, so that their order is settled before they are read."""
    return stream.plan().one_positive and not stream.skip_bad_rows


class RowsAsStored:
    """What a source holds, row by row, without a look inside; or training rows, where reading them can't wait.

    Args:
        stream: over the source.
    """

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
        """Training rows.

        Args:
            stored: rows of :class:`RowsAsStored`.

        Raises:
            ValueError: a bad row, with its place and the mend.
        """
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
        """A batch of columns in place of rows, for `IterableDataset.map`."""
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

        Args:
            seed: 0 when None, where datasets would draw another one in every process.
            *args: as there.
            **kwargs: as there.
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
