"""Texts by id: collections and queries that id-only training data refer to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from tct_hf.data.beir import prepare_corpus
from tct_hf.data.rows import BadRow, there_are
from tct_hf.data.sources import LineSource, Source, open_source

if TYPE_CHECKING:
    from datasets import Dataset

# What `collection=` and `queries=` take.
TextSource: TypeAlias = Union[str, Path, "Dataset", Mapping[str, str]]


@dataclass(frozen=True)
class Texts:
    """Texts by id.

    Args:
        source: their origin, for messages.
        dataset: columns id and text, both text, ids unique.
        key: JSON-ready, identifies the content.
    """

    source: str
    dataset: Dataset
    key: list[Any]

    def has_any(self, ids: Sequence[str]) -> bool:
        """Whether there is a text of one of these ids."""
        wanted = pa.array(ids, pa.string())
        return any(pc.any(pc.is_in(part, value_set=wanted)).as_py() for part in self.dataset.data.column("id").chunks)


def open_texts(source: TextSource, what: str, setting: str, cache_dir: str | Path | None) -> Texts:
    """Open texts by id: checked and converted once, then memory-mapped.

    Args:
        source: a TSV file (id, text), a JSONL file of the BEIR layout (_id, title, text), a parquet file, each but
            parquet plain or .gz; a data set or a mapping; a Hub id "owner/name", "owner/name:configuration" or
            "owner/name:configuration:split".
        what: "passage" or "query", for messages.
        setting: the setting that named it, for messages.
        cache_dir: folder of the converted form.
    """
    opened, names = text_rows(source, setting)
    dataset = prepare_corpus(opened, cache_dir, names=names, allow_empty=True, what=what)
    return Texts(opened.name, dataset, opened.key or [])


def text_rows(source: TextSource, setting: str) -> tuple[Source, Sequence[str]]:
    """The raw rows of texts by id, and the columns of id, text and perhaps title where they have other names."""
    if isinstance(source, Mapping):
        return _Pairs(source, f"{setting} (a mapping)"), ()
    opened = open_source(source, setting, lambda path: LineSource(path, ("id", "text")))
    if opened.key is None:
        raise ValueError(
            f"{opened.name}: an IterableDataset, which can't be looked up by id; give a Dataset or a file"
        )
    if isinstance(opened, LineSource) and opened.names is None:  # JSONL
        return opened, ()
    return opened, _text_columns(opened.names or [], opened.name, setting)


class _Pairs(Source):
    unit = "text"

    def __init__(self, texts: Mapping[str, str], name: str) -> None:
        self.texts, self.name = texts, name
        digest = sha256()
        for pair in texts.items():
            digest.update(json.dumps(pair).encode())
        self.key = ["mapping", digest.hexdigest()]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        return enumerate({"_id": text_id, "text": text} for text_id, text in self.texts.items())


def _text_columns(names: Sequence[str], source: str, setting: str) -> tuple[str, ...]:
    """(id, text) or (id, text, title): by name, else the one that ends in _id and the one that is left."""
    ids = [name for name in ("id", "_id") if name in names] or [name for name in names if name.endswith("_id")]
    rest = [name for name in names if name not in ids[:1]]
    texts = ["text"] if "text" in rest else rest
    if not ids or len(texts) != 1 or (len(ids) > 1 and "id" not in ids and "_id" not in ids):
        raise ValueError(
            f"{setting}: {source} has other columns ({there_are(names)}); name them id and text (and title, if there "
            "is one)"
        )
    title = ["title"] if "title" in rest and texts == ["text"] else []
    return (ids[0], texts[0], *title)


class TextJoin:
    """Fills in the texts of ids, batch by batch.

    Args:
        columns: id column to where its texts are, for instance {"positive_id": passages}. The text goes to the
            column of the same name without "_id".
    """

    def __init__(self, columns: Mapping[str, Texts]) -> None:
        self._columns = dict(columns)
        self._transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The index of millions of ids is made again where it is needed: cheaper than to send it to a worker.
        return {"_columns": self._columns, "_transform": None}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[BadRow | None]:
        """Add the texts to the rows, in place; for each row None, or its error: an unknown id, or one without text."""
        if not self._columns or not rows:
            return [None] * len(rows)
        errors: list[BadRow | None] = [None] * len(rows)
        good = []
        for at, row in enumerate(rows):
            # resolve_ids takes such text for a list of ids.
            column = next((name for name in self._columns if row[name][0] == "["), None)
            if column is None:
                good.append(at)
            else:
                errors[at] = self._unknown(column, row[column])
        for at, error in zip(good, self._resolve([rows[at] for at in good]), strict=True):
            errors[at] = error
        return errors

    def _resolve(self, rows: Sequence[dict[str, Any]]) -> list[BadRow | None]:
        if not rows:
            return []
        if self._transform is None:
            from sentence_transformers.util import resolve_ids  # heavy: torch and transformers

            self._transform = resolve_ids(
                {name: (texts.dataset, "id", "text") for name, texts in self._columns.items()}, keep_columns=()
            )
        try:
            found = self._transform({name: [row[name] for row in rows] for name in self._columns})
        except KeyError as error:
            if len(rows) > 1:
                # Halves, until the rows that are to blame stand alone.
                middle = len(rows) // 2
                return [*self._resolve(rows[:middle]), *self._resolve(rows[middle:])]
            for name in self._columns:
                if str(error.args[0]).startswith(f"ID {rows[0][name]!r} from input column {name!r}"):
                    return [self._unknown(name, rows[0][name])]
            return [BadRow("unknown id", str(error.args[0]))]
        errors: list[BadRow | None] = [None] * len(rows)
        for name, texts in self._columns.items():
            out = name.removesuffix("_id")
            for at, text in enumerate(found[out]):
                rows[at][out] = text
                if not text or text.isspace():
                    errors[at] = errors[at] or BadRow(
                        "empty text", f"{rows[at][name]!r} has no text in {texts.source}; fill it in", name
                    )
        return errors

    def _unknown(self, column: str, text_id: str) -> BadRow:
        return BadRow(
            "unknown id", f"{text_id!r} is not in {self._columns[column].source}; add it, or remove the row", column
        )
