"""A corpus as a stream of passages: ids and texts that are checked, one by one or in shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from tct_hf.data.ids import SeenIds, is_utf8

Passage = tuple[str, str]


def checked_passages(corpus: Iterable[Mapping[str, Any]], allow_empty: bool) -> Iterator[Passage]:
    """Id and text of each passage, checked.

    Args:
        corpus: rows with "id" and "text"; a data set, or any iterable, read once.
        allow_empty: passages without words may pass.

    Raises:
        ValueError: a row that is no passage, with its number and id.
    """
    for number, row in enumerate(rows_in_batches(corpus, ("id", "text"))):
        for key in ("id", "text"):
            if not isinstance(row.get(key), str):
                raise ValueError(
                    f"corpus: passage number {number} (id {row.get('id')!r}) has {key} = {row.get(key)!r}: it must "
                    "be a string; name the columns id and text, or repair the row."
                )
        if not allow_empty and not row["text"].strip():
            raise ValueError(
                f"corpus: passage {row['id']!r} (number {number}) has no words: leave it out, or encode it as it is "
                "with allow_empty=True."
            )
        if not is_utf8(row["id"]):
            raise ValueError(
                f"corpus: the id {row['id']!r} (number {number}) has a lone surrogate, which no file can hold as "
                "UTF-8: rename the passage."
            )
        yield row["id"], row["text"]


def rows_in_batches(rows: Any, keys: Collection[str] = ()) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set or any iterable; of a data set, only the columns `keys` where there are some."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    for batch in rows.iter(1000):  # a data set gives a thousand rows in little more time than one
        columns = {key: values for key, values in batch.items() if not keys or key in keys}
        for place in range(len(next(iter(batch.values())))):
            yield {key: values[place] for key, values in columns.items()}


def passage_shards(passages: Iterator[Passage], size: int) -> Iterator[list[Passage]]:
    """Consecutive passages, so many at a time; memory holds them and 16 bytes of every id before.

    Raises:
        ValueError: two passages have one id, naming it.
    """
    seen, count = SeenIds(), 0
    while shard := list(islice(passages, size)):
        again = seen.add([passage_id for passage_id, _ in shard])
        if again is not None:
            raise ValueError(
                f"corpus: two passages have the id {shard[again][0]!r} (again at number {count + again}): give each "
                "its own id."
            )
        count += len(shard)
        yield shard
