"""Collections in the BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, in a folder or on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.data.ids import SeenIds, is_utf8
from tct_hf.data.qrels import Judgements, Qrels, read_qrels
from tct_hf.data.rows import BadRow, is_hub_id, there_are
from tct_hf.data.sources import ROWS_A_BATCH, DatasetSource, LineSource, Source, reach, write_rows

if TYPE_CHECKING:
    from datasets import Dataset

# "file, line n", id, title, text.
Record = tuple[str, str, str, str]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 2
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "title")])


class MissingSplitError(FileNotFoundError):
    """A collection is there, but has no judgements of the split that was asked for."""


def load_beir(
    path_or_hub_id: str | Path, split: str, *, allow_empty: bool = False, cache_dir: str | Path | None = None
) -> tuple[Dataset, dict[str, str], Qrels]:
    """Load a collection in the BEIR layout.

    Files may be plain or compressed (.gz). A passage's text is its title and text joined by a space. The corpus is
    converted once, in constant memory, and kept in the cache under the file's path, size and time.

    Args:
        path_or_hub_id: a folder, or a Hub data set with configurations "corpus" and "queries" whose judgements are
            in `<id>-qrels`, or in its own configuration "default" or "qrels".
        split: the judgements to load, for instance "test".
        allow_empty: keep passages without any text (some published collections have them) instead of refusing them.
        cache_dir: folder of the prepared corpus; by default `default_cache_dir()`.

    Returns:
        The corpus (memory-mapped, columns id and text), the queries judged in the split {query id: text} and the
        judgements {query id: {passage id: relevance}}, both in the order of the judgements.

    Raises:
        FileNotFoundError: a missing folder or file, and `MissingSplitError` for a split; the message lists what
            there is.
        ValueError: a malformed file, named with its line, or a split without positives.
        OSError: the cache can't be written, or the Hub can't be reached.
    """
    collection = open_beir(path_or_hub_id)
    corpus, queries, qrels = collection.load(split, allow_empty=allow_empty, cache_dir=cache_dir)
    return corpus.select_columns(["id", "text"]), queries, qrels


def load_beir_corpus(
    path_or_hub_id: str | Path, *, allow_empty: bool = False, cache_dir: str | Path | None = None
) -> Dataset:
    """Load the passages alone of a collection in the BEIR layout; the arguments are those of `load_beir`."""
    corpus = open_beir(path_or_hub_id).corpus(allow_empty=allow_empty, cache_dir=cache_dir)
    return corpus.select_columns(["id", "text"])


def open_beir(path_or_hub_id: str | Path) -> BeirFolder:
    """The collection of a folder or Hub id, not read yet."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return BeirFolder(folder)
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds corpus.jsonl, queries.jsonl and qrels/")
    if is_hub_id(str(path_or_hub_id)):
        return BeirOnHub(str(path_or_hub_id))
    raise FileNotFoundError(f"{folder}: no such folder, and not a Hub id (owner/name) either; give the right path")


class BeirFolder:
    """A folder with corpus.jsonl, queries.jsonl and qrels/."""

    def __init__(self, place: Path | str) -> None:
        self.place = place

    def part(self, name: str) -> Source:
        """The raw rows of "corpus" or "queries"."""
        folder = Path(self.place)
        for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if path.is_file():
                return LineSource(path)
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder}: neither {name}.jsonl nor {name}.jsonl.gz is there (there is: {there})")

    def judgements(self, split: str) -> Judgements:
        """The judgements of a split."""
        folder = Path(self.place) / "qrels"
        for path in (folder / f"{split}.tsv", folder / f"{split}.tsv.gz"):
            if path.is_file():
                return read_qrels(path)
        splits = sorted({path.name.split(".tsv")[0] for path in folder.glob("*.tsv*")})
        raise MissingSplitError(
            f"{folder}: no {split}.tsv or {split}.tsv.gz; splits there: {', '.join(splits) or 'none'}"
        )

    def load(
        self, split: str, *, allow_empty: bool = False, cache_dir: str | Path | None = None
    ) -> tuple[Dataset, dict[str, str], Qrels]:
        """As :func:`load_beir`; the corpus has a column title besides, empty where a passage has none."""
        judged = self.judgements(split)
        passages = self.part("corpus")
        source = self.part("queries")
        queries = _check_queries(records_of(source, title=False), judged, source.name)
        corpus = prepare_corpus(passages, cache_dir, allow_empty=allow_empty)
        _check_passages(corpus, judged, passages.name)
        return corpus, queries, judged.qrels

    def corpus(self, *, allow_empty: bool = False, cache_dir: str | Path | None = None) -> Dataset:
        """The passages alone: id, text and title."""
        return prepare_corpus(self.part("corpus"), cache_dir, allow_empty=allow_empty)


class BeirOnHub(BeirFolder):
    """The same on the Hub."""

    def part(self, name: str) -> Source:
        from datasets import load_dataset

        # A configuration "corpus" or "queries", whose only split usually has the same name.
        parts = reach(str(self.place), lambda: load_dataset(self.place, name))
        if name not in parts and len(parts) != 1:
            raise FileNotFoundError(f"{self.place} ({name}): no split {name!r}; splits there: {', '.join(parts)}")
        rows = parts[name] if name in parts else next(iter(parts.values()))
        return DatasetSource(rows, f"{self.place} ({name})")

    def judgements(self, split: str) -> Judgements:
        from datasets import load_dataset

        own = [name for name in hub_configurations(str(self.place)) if name in ("default", "qrels")]
        source = f"{self.place} ({own[0]})" if own else f"{self.place}-qrels"
        try:
            parts = reach(source, lambda: load_dataset(self.place, own[0]) if own else load_dataset(source))
        except FileNotFoundError as error:
            raise error if own else MissingSplitError(str(error)) from error
        if split not in parts:
            raise MissingSplitError(f"{source}: no split {split!r}; splits there: {', '.join(parts)}")
        return read_qrels(parts[split], source)


def hub_configurations(hub_id: str) -> list[str]:
    """Names of the configurations of a Hub data set."""
    from datasets import get_dataset_config_names

    return list(reach(hub_id, lambda: get_dataset_config_names(hub_id)))


# Records -----------------------------------------------------------------------------------------------------------


def records_of(
    source: Source, names: Sequence[str] = (), *, title: bool = True, allow_empty: bool = False
) -> Iterator[Record]:
    """Check a source's texts one by one; `names` are its columns of _id, text, title if named otherwise."""
    for number, row in source.rows(names or None):
        place = source.place(number)
        if isinstance(row, BadRow):
            raise ValueError(row.at(place))
        if names:
            row = dict(zip(("_id", "text", "title"), (row[name] for name in names), strict=False))
        yield _checked(row, place, title, allow_empty)


def _checked(row: Mapping[str, Any], place: str, title: bool, allow_empty: bool) -> Record:
    for key in ("_id", "text"):
        if key not in row:
            raise ValueError(f"{place}: key {key!r} is missing ({there_are(list(row))}); add it")
    record_id, text = row["_id"], row["text"]
    if isinstance(record_id, int) and not isinstance(record_id, bool):
        record_id = str(record_id)
    if not isinstance(record_id, str) or not record_id.strip() or "\0" in record_id:
        raise ValueError(f"{place}: _id is {record_id!r}; it must be a string that is not empty and has no NUL")
    # A title may be null, as in data sets where only some have one.
    heading = row.get("title") if title else None
    if not isinstance(text, str) or not isinstance(heading, (str, type(None))):
        raise ValueError(f"{place}: title and text must be strings")
    heading, text = (heading or "").strip(), text.strip()
    if not is_utf8(f"{record_id}{heading}{text}"):
        raise ValueError(
            f"{place}: half a surrogate pair (\\ud800 to \\udfff) in the id or text; it is not text in any encoding"
        )
    if not heading and not text and not allow_empty:
        fix = "fill it in, remove the line, or pass allow_empty=True" if title else "fill it in or remove the line"
        raise ValueError(f"{place}: the text of {record_id!r} is empty; {fix}")
    return place, record_id, heading, text


def joined(title: str, text: str) -> str:
    """The text that is searched: title and text joined by a space."""
    return f"{title} {text}" if title and text else title or text


def _check_queries(records: Iterable[Record], judged: Judgements, source: str) -> dict[str, str]:
    """The judged queries, in the order of the judgements."""
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, query_id, _, text in records:
        if query_id in places:
            raise ValueError(f"{place}: query id {query_id!r} was used before, in {places[query_id]}; make ids unique")
        places[query_id] = place
        if query_id in judged.qrels:
            texts[query_id] = text
    for query_id, place in judged.places.items():
        if query_id not in texts:
            raise ValueError(f"{place}: query {query_id!r} is not in {source}; add the query or remove its judgements")
    return {query_id: texts[query_id] for query_id in judged.qrels}


def _check_passages(corpus: Dataset, judged: Judgements, source: str) -> None:
    """Refuse judgements of passages that the corpus lacks."""
    wanted = {passage_id: query_id for query_id, grades in judged.qrels.items() for passage_id in grades}
    # One batch of ids at a time: the corpus stays on disk.
    values = pa.array(list(wanted), pa.string())
    for batch in corpus.data.column("id").chunks:
        for passage_id in batch.filter(pc.is_in(batch, value_set=values)).to_pylist():
            del wanted[passage_id]
    for passage_id, query_id in wanted.items():
        raise ValueError(
            f"{judged.places[query_id]} and after: query {query_id!r} is judged with passage {passage_id!r}, which is "
            f"not in {source}; add the passage or remove the judgement ({len(wanted)} passages are missing)"
        )


def prepare_corpus(
    source: Source,
    cache_dir: str | Path | None = None,
    *,
    names: Sequence[str] = (),
    allow_empty: bool = False,
    what: str = "passage",
) -> Dataset:
    """Convert texts by id once, in constant memory, and open the converted form: memory-mapped id, text, title.

    Refuses a malformed record, an id that comes twice, and no record; `what` is "passage" or "query", for messages.
    """
    from datasets import Dataset

    def records() -> Iterator[Record]:
        return records_of(source, names, allow_empty=allow_empty)

    def unique() -> Iterator[dict[str, str]]:
        seen, every = SeenIds(), records()
        while batch := list(islice(every, ROWS_A_BATCH)):
            again = seen.add([record_id for _, record_id, _, _ in batch])
            if again is not None:
                place, twice, _, _ = batch[again]
                first = next(where for where, record_id, _, _ in records() if record_id == twice)
                raise ValueError(f"{place}: {what} id {twice!r} was used before, in {first}; make ids unique")
            for _, record_id, title, text in batch:
                yield {"id": record_id, "text": joined(title, text), "title": title}

    def build(staging: Path) -> None:
        if not write_rows(staging / "corpus.arrow", _SCHEMA, unique()):
            raise ValueError(f"{source.name}: no {what} in it; write one JSON object with _id, title and text a line")

    key = json.dumps([_FORMAT, source.key, list(names), allow_empty])
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = build_once(cache / f"beir-{sha256(key.encode()).hexdigest()[:16]}", build)
    return Dataset.from_file(str(folder / "corpus.arrow"))
