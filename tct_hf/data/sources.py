"""Where raw rows come from: files of lines, parquet, data sets in memory and on the Hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tct_hf.data.lookups import file_key
from tct_hf.data.row_parsing import BadRow, byte_lines, parse_json_line, parse_tsv_line

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 1000
_BYTES_AT_ONCE = 1 << 20  # of each column of a parquet file


class Source(ABC):
    """Raw rows, read from the start each time they are asked for.

    Attributes:
        name: for messages.
        names: the columns, where they are known before a row is read.
        key: JSON-ready, identifies the content; None where nothing does.
    """

    name: str
    names: list[str] | None = None
    key: list[Any] | None = None

    @abstractmethod
    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        """The number of each row, and the row as it is stored; `columns` names those that are needed."""

    def parse(self, raw: Any) -> Mapping[str, Any]:
        """The content of a row as it is stored.

        Raises:
            BadRow: it can't be read.
        """
        return cast("Mapping[str, Any]", raw)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """The number and the content of each row; `columns` names those that are needed."""
        for number, raw in self.raw(columns):
            try:
                yield number, self.parse(raw)
            except BadRow as error:
                yield number, error

    @abstractmethod
    def place(self, number: int) -> str:
        """ "file, line 3"."""


class JsonSource(Source):
    """JSONL, plain or .gz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.key = ["jsonl", *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in byte_lines(self.path) if line.strip())

    def parse(self, raw: bytes) -> Mapping[str, Any]:
        return parse_json_line(raw)

    def place(self, number: int) -> str:
        return f"{self.path}, line {number}"


class TsvSource(Source):
    """Fields separated by tabs, plain or .gz.

    Args:
        path: the file.
        names: what the fields are, by position.
        header: the first line is a header of these names, and not a row.
    """

    def __init__(self, path: Path, names: Sequence[str], *, header: bool) -> None:
        self.path = path
        self.name = str(path)
        self.names = self.fields = list(names)
        self.header = header
        self.key = ["tsv", header, *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        header = int(self.header)
        return ((number, line) for number, line in byte_lines(self.path) if line and number > header)

    def parse(self, raw: bytes) -> Mapping[str, Any]:
        return parse_tsv_line(raw, self.fields)

    def place(self, number: int) -> str:
        return f"{self.path}, line {number}"


class ParquetSource(Source):
    """A parquet file, read a row group's part at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.path = path
        self.name = str(path)
        try:
            self.names = list(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a whole parquet file ({error}); copy or download it again") from error
        self.key = ["parquet", *file_key(path)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        number = 0
        try:
            # By default all that has been read of the file stays in memory until its end.
            with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BYTES_AT_ONCE) as file:
                for batch in file.iter_batches(_ROWS_A_BATCH, columns=columns):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{self.path}, after row {number}: {error}; write, copy or download the file again"
            ) from error

    def place(self, number: int) -> str:
        return f"{self.path}, row {number}"


class DatasetSource(Source):
    """A `datasets.Dataset` or `IterableDataset`."""

    def __init__(self, dataset: Any, name: str) -> None:
        from datasets import Dataset

        self.name = name
        self._map_style = isinstance(dataset, Dataset)
        self._custom = self._map_style and dataset.format["type"] == "custom"
        # A format such as "torch" would give arrays for lists; a transform of the user's own makes the columns.
        self.dataset = dataset if self._custom or not self._map_style else dataset.with_format(None)
        self.names = None if self._custom else dataset.column_names
        self.key = ["dataset", dataset._fingerprint] if self._map_style else None

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = self.dataset
        if columns is not None and self.names is not None:
            dataset = dataset.select_columns(list(columns))
        number = 0
        # A streamed data set would give its own iterator only a part of the rows in a data loader's worker.
        for batch in dataset.iter(_ROWS_A_BATCH):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield number, dict(zip(names, values, strict=True))
                number += 1

    def place(self, number: int) -> str:
        return f"{self.name}, row {number}"


def load_from_hub(
    hub_id: str,
    config: str | None = None,
    split: str | None = None,
    *,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset:
    """Load one split of a Hub data set, or of a folder in the Hub's layout, with `datasets.load_dataset`.

    Args:
        hub_id: the id or folder.
        config: the configuration, where there are several.
        split: the split; None takes the only one.
        revision: branch, tag or commit.
        streaming: give an IterableDataset.

    Raises:
        FileNotFoundError: the data set, configuration or split is not there.
        ValueError: it can't be read.
        OSError: the Hub can't be reached.
    """
    from datasets import load_dataset

    from tct_hf.data.beir_hub import _reach

    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        parts = _reach(hub_id, lambda: load_dataset(hub_id, config, streaming=streaming, **options))
    except FileNotFoundError as error:
        if not Path(hub_id).is_dir():
            raise
        raise FileNotFoundError(
            f"{hub_id}: no data files that can be read ({error.__cause__}); a folder holds parquet or JSONL files in "
            "the Hub's layout, or corpus.jsonl, queries.jsonl and qrels/"
        ) from error
    source = f"{hub_id} ({config})" if config else hub_id
    there = ", ".join(map(str, parts))
    if split is None:
        if len(parts) != 1:
            raise ValueError(f"{source}: name one of its splits: {there}")
        return next(iter(parts.values()))
    if split not in parts:
        raise FileNotFoundError(f"{source}: no split {split!r}; splits there: {there}")
    return parts[split]
