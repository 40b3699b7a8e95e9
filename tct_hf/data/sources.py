"""What a source is: a file, a folder, a mapping, a data set in memory or on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from tct_hf.data.file_sources import ROWS_A_BATCH, CsvSource, LineSource, ParquetSource, Source
from tct_hf.data.irds import KINDS, IrdsSource, is_irds
from tct_hf.data.rows import (
    JSON_SUFFIXES,
    PICKLES,
    TSV_SUFFIXES,
    byte_lines,
    format_of,
    is_hub_id,
    plain,
    shown,
    there_are,
)

T = TypeVar("T")

_LINES = {*TSV_SUFFIXES, *JSON_SUFFIXES, ".csv"}
# What is data in a folder, be it that it must be unpacked first.
_DATA = (*_LINES, ".parquet", ".arrow", ".bz2", ".xz", ".zst", ".zip")


class FolderSource(Source):
    """Files of one kind, one after the other, each read as it would be by itself."""

    _ROOM = 1 << 40  # row numbers of a file

    def __init__(self, files: Sequence[Source], name: str) -> None:
        self.files, self.name = list(files), name
        self.names = self.files[0].names
        for file in self.files:
            if file.names != self.names or type(file) is not type(self.files[0]):
                wrong = f"{there_are(file.names or [])}, but in {self.files[0].name} {there_are(self.names or [])}"
                raise ValueError(f"{file.name}: {wrong}; write files of one kind, with the same columns in order")
        self.key = ["folder", *(file.key for file in self.files)]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        for at, file in enumerate(self.files):
            for number, raw in file.raw(columns):
                yield at * self._ROOM + number, raw

    def parse(self, raw: Any) -> Mapping[str, Any]:
        return self.files[0].parse(raw)

    def place(self, number: int) -> str:
        at, number = divmod(number, self._ROOM)
        return self.files[at].place(number)


def without_format(dataset: Any) -> Any:
    """A data set that gives Python values, not a format's arrays or frames; a transform of the user's own stays."""
    if not hasattr(dataset, "with_format") or getattr(dataset, "format", {}).get("type") == "custom":
        return dataset
    return dataset.with_format(None)


def rows_in_batches(rows: Any, keys: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a data set or any iterable; of a data set, only the columns `keys` where there are some."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    # A streamed data set would give its own iterator only a part of the rows in a data loader's worker.
    for batch in without_format(rows).iter(ROWS_A_BATCH):
        columns = {key: values for key, values in batch.items() if not keys or key in keys} or batch
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


class DatasetSource(Source):
    """The rows of a `datasets` data set in memory, or of a stream of it."""

    def __init__(self, dataset: Any, name: str) -> None:
        from datasets import Dataset

        self.name = name
        map_style = isinstance(dataset, Dataset)
        self.dataset = without_format(dataset)
        # A transform of the user's own makes the columns.
        self.names = None if map_style and dataset.format["type"] == "custom" else dataset.column_names
        self.key = ["dataset", dataset._fingerprint] if map_style else None

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        select = columns is not None and self.names is not None
        return enumerate(rows_in_batches(self.dataset.select_columns(list(columns or ())) if select else self.dataset))


class MappingSource(Source):
    """Rows made of a mapping that the user gave."""

    def __init__(self, rows: Callable[[], Iterable[dict[str, Any]]], setting: str) -> None:
        self.rows, self.name = rows, f"{setting} (a mapping)"
        digest = sha256()
        for row in rows():  # whatever they hold: values are checked when they are read
            digest.update(json.dumps(row, default=lambda value: repr(plain(value))).encode())
        self.key = ["mapping", digest.hexdigest()]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.rows())


def of_pairs(given: Mapping[Any, Mapping[Any, Any]], setting: str, names: Sequence[str]) -> MappingSource:
    """{query id: {passage id: value}} as rows of three columns."""

    def rows() -> Iterator[dict[str, Any]]:
        for query, found in given.items():
            if not isinstance(found, Mapping):
                raise ValueError(f"{setting} (query {query!r}): holds {shown(found)}, and no {{passage id: value}}")
            for passage, value in found.items():
                yield dict(zip(names, (query, passage, value), strict=True))

    return MappingSource(rows, setting)


def open_source(
    given: Any,
    setting: str,
    tsv: Callable[[Path], LineSource],
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Source:
    """Rows of a file, a data set, a Hub id (owner/name:config:split), "irds:ID", or a folder in the Hub's layout.

    `setting` named it, for messages; `tsv` opens a file of fields separated by tabs. Unless streamed, text files on
    the Hub are downloaded whole.
    """
    if isinstance(given, dict) and split is not None:  # DatasetDict and IterableDatasetDict
        given = one_split(given, split, "the data set")
    if not isinstance(given, (str, Path)):
        if not hasattr(given, "column_names") or isinstance(given, dict):
            what = f"a {type(given).__name__} can't be loaded"
            raise ValueError(f"{setting}: {what}; give a path, a Hub id, or a Dataset (Dataset.from_list makes one)")
        return DatasetSource(given, f"{setting} (a data set)")
    if is_irds(given):
        return IrdsSource(given, KINDS[setting.rpartition(".")[2]])
    path = Path(given)
    if path.is_dir() or is_hub_id(str(given)):
        named = ", ".join(filter(None, (config, split)))
        name = f"{given} ({named})" if named else str(given)
        given = str(given)
        if not path.is_dir():
            given, _, rest = given.partition(":")
            if rest:
                config, _, split = rest.partition(":")
        parts = parts_of(given, config or None, tsv, setting, revision=revision, streaming=streaming, name=name)
        return one_split(parts, split or None, f"{given} ({config})" if config else given)()
    suffix = format_of(path)
    if suffix in PICKLES:
        fix = "Convert it where you trust it, to a parquet or JSONL file"
        raise ValueError(f"{setting}: {path}: a pickle, which may run code when it is read. {fix}")
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: {path}: no such file; give the right path")
    readers = {**dict.fromkeys(TSV_SUFFIXES, tsv), **dict.fromkeys(JSON_SUFFIXES, LineSource), ".csv": CsvSource}
    if suffix != ".parquet" and suffix not in readers:
        known = f"known are {', '.join(readers)} (plain or .gz) and .parquet"
        raise ValueError(f"{setting}: {path}: ends in {suffix or 'nothing'}; {known}. Unpack archives first.")
    return readers.get(suffix, ParquetSource)(path)


def named_by_header(path: Path) -> LineSource:
    """A tab-separated file whose first line names its columns."""
    first = next((line for _, line in byte_lines(path)), b"")
    return LineSource(path, first.decode(errors="replace").split("\t"), header=True)


def parts_of(
    place: str,
    config: str | None,
    tsv: Callable[[Path], LineSource] = named_by_header,
    setting: str = "data",
    *,
    revision: str | None = None,
    streaming: bool = False,
    name: str | None = None,
) -> dict[str, Callable[[], Source]]:
    """What opens each split of a Hub data set, or of a folder in the Hub's layout.

    Files of text are read by our own readers, which infer no types; by `datasets` what is streamed from the Hub, and
    what our readers don't read.
    """
    name = name or (f"{place} ({config})" if config else place)

    def load() -> Mapping[Any, Any]:
        from datasets import load_dataset

        options = {name: value for name, value in (("revision", revision), ("streaming", streaming)) if value}
        return reach(place, lambda: load_dataset(place, config, **options))

    def read(split: str) -> Source:
        from datasets.utils.file_utils import cached_path

        formats, here = {format_of(Path(file)) for file in files[split]}, Path(place).is_dir()
        if formats <= {".arrow"} or not (here or (formats <= _LINES and not streaming)):
            return DatasetSource(load()[split], name)
        local = [Path(reach(name, partial(cached_path, file))) for file in files[split]]
        if not here and any(map(_is_list, local)):
            return DatasetSource(load()[split], name)
        return FolderSource([open_source(file, setting, tsv) for file in local], name)

    files = _data_files(place, config, revision)
    if files:
        return {split: partial(read, split) for split in files}
    return {str(split): partial(DatasetSource, rows, name) for split, rows in load().items()}


def _data_files(place: str, config: str | None, revision: str | None) -> dict[str, list[str]]:
    """The files of each split, by path or URL; none where `datasets` has to say."""
    from datasets import load_dataset_builder
    from datasets.data_files import DataFilesDict, get_data_patterns

    card = Path(place) / "README.md"
    if Path(place).is_dir() and config is None and not (card.is_file() and b"configs:" in card.read_bytes()):
        # All kinds there are: `datasets` takes those of one kind.
        every = reach(place, lambda: DataFilesDict.from_patterns(get_data_patterns(place), place))
        found = {split: [file for file in files if _holds_rows(Path(file))] for split, files in every.items()}
        return {str(split): files for split, files in found.items() if files}
    try:
        builder = reach(place, lambda: load_dataset_builder(place, config, revision=revision))
    except OSError:
        if Path(place).is_dir():
            raise
        return {}
    found = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    kinds = {format_of(Path(file)) for files in found.values() for file in files}
    usual = {"sep": "\t"} if kinds == {".tsv"} else {}
    return found if Path(place).is_dir() or _options(builder.config) == usual else {}


def _options(config: Any) -> dict[str, Any]:
    """What a data set's card has its files read with, other than usual."""
    usual, about = vars(type(config)()), ("name", "version", "description", "data_dir", "data_files", "features")
    return {name: value for name, value in vars(config).items() if name not in about and value != usual.get(name)}


def _is_list(path: Path) -> bool:
    """Whether a file is a list in JSON instead of lines."""
    lines = (line.strip() for _, line in byte_lines(path)) if format_of(path) in JSON_SUFFIXES else iter(())
    return next(filter(None, lines), b"").startswith(b"[")


def _holds_rows(path: Path) -> bool:
    """Whether a file of a folder is data by its suffix, and not a licence, a README or settings in indented JSON."""
    if format_of(path) not in _DATA or path.name in ("dataset_infos.json", "dataset_info.json", "state.json"):
        return False
    if format_of(path) == ".txt":
        return path.stem.lower() not in ("readme", "license", "licence", "notice")
    return format_of(path) != ".json" or next(byte_lines(path), (1, b""))[1].strip() not in (b"{", b"{}")


class MissingSplitError(FileNotFoundError):
    """The source is there, but has no split of the name that was asked for."""


def one_split(parts: Mapping[Any, Any], split: str | None, source: str) -> Any:
    """The split of a name, or the only one when None."""
    there = ", ".join(map(str, parts))
    if split is None and len(parts) != 1:
        raise ValueError(f"{source}: name one of its splits: {there}")
    if split is not None and split not in parts:
        raise MissingSplitError(f"{source}: no split {split!r}; splits there: {there}")
    return next(iter(parts.values())) if split is None else parts[split]


def reach(name: str, load: Callable[[], T]) -> T:
    """What `load` returns; its errors say the fix when the Hub has no such data set or can't be reached."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is one of these
        missing = isinstance(error, FileNotFoundError)
        if missing and Path(name).is_dir():
            why = "no data files that can be read; give parquet or JSONL files in the Hub's layout, or a BEIR folder"
        elif missing:
            why = "not a folder here, and not found on the Hub; check the name, or log in for a private data set"
        else:
            why = "not a folder here, and the Hub can't be reached; check the path or the network"
        raise (FileNotFoundError if missing else OSError)(f"{name}: {why} ({error})") from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{name}: {error}") from error


def write_rows(path: Path, schema: Any, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as an Arrow stream, in constant memory; their number."""
    count, rows = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, ROWS_A_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            count += len(batch)
    return count
