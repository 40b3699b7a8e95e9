"""From raw rows to checked training rows; streamed, their order is settled before they are read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import islice
from typing import Any

from datasets import Features, IterableDataset

from tct_hf.data.column_names import LABELLED, is_ours
from tct_hf.data.columns import NOTHING, RowReader
from tct_hf.data.file_sources import ROWS_A_BATCH, Source
from tct_hf.data.near_duplicates import is_query, same
from tct_hf.data.qrels import KnownPositives
from tct_hf.data.rows import BadRow, SkippedRows, refuse_or_skip
from tct_hf.data.texts import Texts, add_texts

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Takes a value; raises what is wrong with it: a BadRow leaves the row out.
Check = Callable[[Any], object]
# Rows of these kinds teach nothing, and public triples hold some: they are always left out.
_LEFT_OUT = ("positive is the query", "positive as negative")


@dataclass
class TripleStream:
    """Checked training rows of a source, with the arguments of `load_triples`, opened.

    `skipped` takes the counts anew in each pass, after those `of_texts` and judgements.
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
    of_texts: SkippedRows = field(default_factory=SkippedRows)
    names: Sequence[str] = ()  # columns of the streamed rows
    checks: Sequence[tuple[Check, str]] = ()  # of the streamed rows, each of one column; a BadRow leaves the row out
    reader: RowReader | None = None
    said: set[str] = field(default_factory=set)  # kinds of rows left out that were logged

    def plan(self) -> RowReader:
        """The reader of all rows: made from a row that most are like, which decides the columns there are."""
        if self.reader is not None:
            return self.reader
        bad, stored = SkippedRows(), self.source.raw()
        while batch := list(islice(stored, ROWS_A_BATCH)):
            for number, raw in self._most_alike(batch):
                try:
                    self.reader = self._reader_of(self.source.parse(raw))
                except BadRow as error:
                    # Where the columns are known apart from the rows, one that is missing is missing in all of them.
                    known = self.source.names is not None and error.kind in ("missing column", "doubled column")
                    whole = known or error.kind == NOTHING
                    message = error.at(self.source.name if whole else self.source.place(number))
                    refuse_or_skip(bad if self.skip_bad_rows and not whole else None, "", message)
                else:
                    if number != batch[0][0]:
                        self.reader.like = self.source.place(number)
                    return self.reader
        raise self._nothing(bad)

    def _most_alike(self, batch: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """The rows as they are stored, those of the most usual keys and types first; rows without negatives last."""
        kinds = [self._kind(raw) for _, raw in batch]
        if None in kinds[:1] and not self.skip_bad_rows:
            return list(batch)  # a first row that can't be parsed is refused first
        counts = Counter(kinds)
        order = [(kind is None, 0 in (kind or ()), -counts[kind]) for kind in kinds]
        return [batch[at] for at in sorted(range(len(batch)), key=order.__getitem__)]

    def _kind(self, raw: Any) -> tuple[Any, ...] | None:
        """What a row's columns for training hold, and how many negatives; None where it can't be parsed."""
        try:
            row = self.source.parse(raw)
        except BadRow:
            return None
        ours = {theirs: name for name, theirs in (self.columns or {}).items()}
        kind: list[Any] = []
        for column in sorted(column for column in row if column in ours or is_ours(column)):
            value = row[column]
            kind += [column, type(value)]
            if isinstance(value, (list, tuple)) and ours.get(column, column).startswith("negative"):
                kind.append(len(value) if self.num_negatives is None else None)
        return tuple(kind)

    def _reader_of(self, first: Mapping[str, Any]) -> RowReader:
        names = list(first) if self.source.names is None else self.source.names
        sources = self.queries, self.passages
        reader = RowReader(names, first, self.columns, self.num_negatives, *sources, self.scores)
        row = next(reader.read(first))
        texts = [row[name] for name in ("query", "positive", *reader.negatives) if name in row]
        if not reader.lookups and all(map(str.isdigit, texts)):
            raise BadRow(NOTHING, f"{texts} look like ids, not texts; pass queries= and collection= with their texts")
        if left_out := sorted({*names} - {*reader.source_columns()}):
            logger.info("%s: columns left out: %s", self.source.name, ", ".join(left_out))
        return reader

    def _nothing(self, bad: SkippedRows) -> ValueError:
        first = next(iter(bad.examples.values()), None)
        why = "it is empty" if first is None else f"the first of {bad.total:,} bad ones: {first}"
        return ValueError(f"{self.source.name}: no row to train on; {why}")

    def output_columns(self) -> list[str]:
        """The columns of the rows, in order; refuses judgements where rows have no ids to compare with them."""
        reader = self.plan()
        if self.known is not None and not {"query_id", "positive_id"} <= reader.fields.keys():
            lacks = "passage ids (positive_id, negative_id)" if "query_id" in reader.fields else "query_id"
            fix = "map it with columns=, or leave qrels out"
            raise ValueError(f"{self.source.name}: qrels= needs {lacks}, which is not there; {fix}")
        return reader.output_columns(reader.has_known or self.known is not None)

    def __call__(self, most: int | None = None) -> Iterator[Row]:
        """Training rows from the source's start; refuses bad rows, no row at all, and judgements of other queries."""
        self.skipped.replace(self.of_texts)
        columns = self.output_columns()
        stored = self.source.raw(self.plan().source_columns())
        judged = count = 0
        while batch := list(islice(stored, ROWS_A_BATCH)):
            for row in self.read(batch):
                judged += self.known is not None and row["query_id"] in self.known.positives
                count += 1
                yield {name: row[name] for name in columns}
                if count == most:
                    return self._check_judged(judged)
        if self.skipped.total:
            logger.warning("%s: %s", self.source.name, self.skipped.summary())
        if not count:
            raise self._nothing(self.skipped)
        self._check_judged(judged)

    def _check_judged(self, judged: int) -> None:
        if self.known is not None and not judged:
            what = f"{self.source.name}: none of its queries is judged in {self.known.source}"
            raise ValueError(f"{what}; give the qrels of the split it belongs to")

    def read(self, stored: Iterable[tuple[int, Any]]) -> list[Row]:
        """Checked and complete training rows of rows as they are stored, each with its number.

        A bad row is a ValueError with its place, or is counted as skipped, as those that teach nothing always are.
        """
        reader, rows = self.plan(), list[tuple[int, Row]]()
        for number, raw in stored:
            try:
                rows.extend((number, row) for row in reader.read(self.source.parse(raw)))
            except BadRow as error:
                self._refuse(error, number)
        errors = add_texts([row for _, row in rows], reader.lookups)
        positives: dict[int, list[str]] = {}
        for number, row in rows:
            known = row["positive"] if row.get(LABELLED, True) else None  # where its text is not there, too
            positives.setdefault(number, []).extend([known] if known else [])
        good = []
        for (number, row), missing in zip(rows, errors, strict=True):
            if bad := missing or _of_itself(row, reader.negatives, positives[number]):
                self._refuse(bad, number)
                continue
            if self.known is not None:
                self.known.add(row)
            good.append(row)
        return good

    def _refuse(self, error: BadRow, number: int) -> None:
        skips = self.skip_bad_rows or error.kind in _LEFT_OUT
        refuse_or_skip(self.skipped if skips else None, error.kind, error.at(self.source.place(number)))

    @property
    def can_wait(self) -> bool:
        """Whether a row of the source makes one training row at most: their order is settled before they are read."""
        return self.plan().one_positive and not self.skip_bad_rows

    def stored(self) -> Iterator[Row]:
        """What the source holds, row by row, without a look inside; or training rows, where reading can't wait."""
        rows: Iterable[tuple[int, Any]] = enumerate(self())
        if self.can_wait:
            self.skipped.replace(self.of_texts)
            rows = self.source.raw(self.plan().source_columns())
        for number, stored in rows:
            yield {"number": number, "stored": stored}

    def rows(self, stored: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Training rows of what :meth:`stored` gives, without those left out; a bad row is a ValueError."""
        rows, good = [one["stored"] for one in stored], list[Row]()
        if self.can_wait:
            rows = self.read((one["number"], one["stored"]) for one in stored)
        for row in rows:
            try:
                for check, name in self.checks:
                    check(row[name])
            except BadRow as error:
                self.skipped.add(error.kind, error.at(self.source.name))
            else:
                good.append({name: row[name] for name in self.names})
        for kind in sorted(self.skipped.counts.keys() - self.said):
            logger.warning("rows are left out, counted as %s; the first: %s", kind, self.skipped.examples[kind])
        self.said.update(self.skipped.counts)
        return good

    def columns_of(self, stored: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The same for a batch of columns, as `IterableDataset.map` has them."""
        rows = self.rows([dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)])
        return {name: [row[name] for row in rows] for name in self.names}


def _of_itself(row: Row, negatives: Sequence[str], positives: Sequence[str]) -> BadRow | None:
    """What is wrong with a row of which a passage is the query itself, or a negative one of the query's positives."""
    for name in ("positive", *negatives):
        same_id = "query_id" in row and row.get(f"{name}_id") == row["query_id"]
        if is_query(row[name], row["query"], same_id=same_id):
            what = "positive is the query" if name == "positive" else "query itself"
            return BadRow(what, "this passage is the query itself; take another, or remove the row", name)
        id_of_positive = row.get(f"{name}_id", "") == row.get("positive_id")
        if name != "positive" and (id_of_positive or any(same(row[name], one) for one in positives)):
            return BadRow("positive as negative", "this passage is a positive of its query; take another", name)
    return None


class StreamedTriples(IterableDataset):
    """An `IterableDataset` of training rows that can say their order without reading them.

    Many processes and workers then agree on the order of all rows, each at the price of reading lines, and parse,
    check and look up only their own.
    """

    ordered: IterableDataset  # rows as they are stored, in the order of the training rows, one for each of them
    stream: TripleStream

    @classmethod
    def of(cls, ordered: IterableDataset, stream: TripleStream, features: Features) -> StreamedTriples:
        features = Features({name: features[name] for name in stream.names})
        batches: dict[str, Any] = {"batched": True, "batch_size": ROWS_A_BATCH, "features": features}
        rows = ordered.map(stream.columns_of, remove_columns=["number", "stored"], **batches)
        made = cls.__new__(cls)
        made.__dict__.update(rows.__dict__)
        made.ordered, made.stream = ordered, stream
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
        return self.of(self.ordered.shuffle(seed, *args, **kwargs), self.stream, self.features)

    def select_columns(self, column_names: str | list[str]) -> StreamedTriples:
        names = [column_names] if isinstance(column_names, str) else list(column_names)
        if missing := [name for name in names if name not in self.stream.names]:
            raise ValueError(f"no column {missing[0]!r}; there are {', '.join(self.stream.names)}")
        return self.of(self.ordered, replace(self.stream, names=names), self.features)

    def checked(self, check: Check, column: str) -> StreamedTriples:
        """Let `check` see the column of every row before the row is given."""
        checks = [*self.stream.checks, (check, column)]
        return self.of(self.ordered, replace(self.stream, checks=checks), self.features)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.ordered.set_epoch(epoch)
