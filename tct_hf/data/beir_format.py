"""The records of the BEIR layout, checked one by one; every complaint names its file and line."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.cache import build_once, read_corpus, write_corpus
from tct_hf.data.row_parsing import BadRow, byte_lines, decode, parse_json_line

if TYPE_CHECKING:
    from datasets import Dataset

Qrels = dict[str, dict[str, int]]
# (place, id, text): the place is "file, line n", for messages.
Records = Iterable[tuple[str, str, str]]

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 1
HEADER = ["query-id", "corpus-id", "score"]


class MissingSplitError(FileNotFoundError):
    """A collection is there, but has no judgements of the split that was asked for."""


def read_qrels(path: str | Path) -> tuple[Qrels, dict[str, str]]:
    """Read judgements: query id, passage id and integer score, separated by tabs, with or without the header.

    Args:
        path: the file, plain or .gz.

    Returns:
        The judgements in the order of the file, and for each query the place ("file, line n") of its first one.

    Raises:
        ValueError: a malformed line, a pair judged twice, or no positive judgement; the message names file and line.
    """
    path = Path(path)
    qrels: Qrels = {}
    lines: dict[str, str] = {}
    for number, line in byte_lines(path):
        place = f"{path}, line {number}"
        try:
            fields = decode(line).split("\t")
        except BadRow as error:
            raise ValueError(error.at(place)) from None
        if (number == 1 and fields == HEADER) or fields == [""]:
            continue
        if len(fields) != 3:
            raise ValueError(
                f"{place}: {len(fields)} fields where 3 separated by tabs are needed (query-id, corpus-id, score)"
            )
        add_judgement(fields, place, qrels, lines)
    check_positives(qrels, str(path))
    return qrels, lines


def add_judgement(fields: list[str], place: str, qrels: Qrels, lines: dict[str, str]) -> None:
    """Check one judgement and add it.

    Args:
        fields: query id, passage id, score as text.
        place: where it was read, for messages.
        qrels: the judgements so far; gains this one.
        lines: the place of each query's first judgement; gains this one's.

    Raises:
        ValueError: an empty id, a score that is not an integer, or a pair judged before.
    """
    query_id, passage_id, text = fields
    if not query_id or not passage_id:
        raise ValueError(f"{place}: empty query-id or corpus-id; fill it in or remove the line")
    try:
        score = int(text)
    except ValueError:
        raise ValueError(f"{place}: score {text!r} is not an integer; write 0, 1, 2, ...") from None
    grades = qrels.setdefault(query_id, {})
    if passage_id in grades:
        raise ValueError(f"{place}: query {query_id!r} and passage {passage_id!r} are judged twice; remove one line")
    grades[passage_id] = score
    lines.setdefault(query_id, place)


def check_positives(qrels: Qrels, place: str) -> None:
    """Refuse judgements without a positive.

    Args:
        qrels: the judgements of a split.
        place: where they were read, for the message.

    Raises:
        ValueError: no score is 1 or more.
    """
    if not any(grade >= 1 for grades in qrels.values() for grade in grades.values()):
        raise ValueError(
            f"{place}: no judgement with a score of 1 or more; this split can't train or measure anything"
        )


def check_queries(records: Records, qrels: Qrels, lines: Mapping[str, str], source: str | Path) -> dict[str, str]:
    """Keep the judged queries, in the order of the judgements.

    Args:
        records: all queries.
        qrels: the judgements of a split.
        lines: the place of each query's first judgement.
        source: where the queries come from, for messages.

    Returns:
        Query id to text.

    Raises:
        ValueError: a malformed record, an id that comes twice, or a judged query that is not there.
    """
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, query_id, text in records:
        if query_id in places:
            raise ValueError(f"{place}: query id {query_id!r} was used before, in {places[query_id]}; make ids unique")
        places[query_id] = place
        if query_id in qrels:
            texts[query_id] = text
    for query_id in qrels:
        if query_id not in texts:
            raise ValueError(
                f"{lines[query_id]}: query {query_id!r} is not in {source}; add the query or remove its judgements"
            )
    return {query_id: texts[query_id] for query_id in qrels}


def check_passages(corpus: Dataset, qrels: Qrels, lines: Mapping[str, str], source: str) -> None:
    """Refuse judgements of passages that the corpus lacks.

    Args:
        corpus: the prepared corpus.
        qrels: the judgements of a split.
        lines: the place of each query's first judgement.
        source: where the corpus comes from, for the message.

    Raises:
        ValueError: a judged passage is not in the corpus.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    wanted = {passage_id: query_id for query_id, grades in qrels.items() for passage_id in grades}
    # One batch of ids at a time: the corpus stays on disk.
    values = pa.array(list(wanted), pa.string())
    for batch in corpus.data.column("id").chunks:
        for passage_id in batch.filter(pc.is_in(batch, value_set=values)).to_pylist():
            del wanted[passage_id]
    for passage_id, query_id in wanted.items():
        raise ValueError(
            f"{lines[query_id]} and after: query {query_id!r} is judged with passage {passage_id!r}, which is not in "
            f"{source}; add the passage or remove the judgement ({len(wanted)} passages are missing)"
        )


def prepare_corpus(
    records: Callable[[], Records], source: str, cache_dir: Path, key: Sequence[Any], *, what: str = "passage"
) -> Dataset:
    """Convert a corpus once, in constant memory, and open the converted form.

    Args:
        records: gives the passages from the start, each time it is called.
        source: where they come from, for messages.
        cache_dir: where the converted corpus is kept.
        key: what the conversion depends on, JSON-ready.
        what: the texts are, for messages.

    Returns:
        A memory-mapped data set with the columns id and text.

    Raises:
        ValueError: a malformed record, an id that comes twice, or no record.
        OSError: the cache can't be written.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:16]

    def build(staging: Path) -> None:
        # A set of millions of strings doesn't fit in memory: compare 64-bit hashes, then look at the equal ones.
        hashes = array("Q")

        def passages() -> Iterator[tuple[str, str]]:
            for _, passage_id, text in records():
                hashes.append(_hash(passage_id))
                yield passage_id, text

        if not write_corpus(staging / "corpus.arrow", passages()):
            raise ValueError(f"{source}: no {what} in it; write one JSON object with _id, title and text a line")
        _refuse_repeated(hashes, records, what)

    return read_corpus(build_once(cache_dir / f"beir-{digest}", build) / "corpus.arrow")


def _refuse_repeated(hashes: array[int], records: Callable[[], Records], what: str) -> None:
    import numpy as np

    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    places: dict[str, str] = {}
    for place, passage_id, _ in records():
        if _hash(passage_id) in suspects:
            if passage_id in places:
                raise ValueError(
                    f"{place}: {what} id {passage_id!r} was used before, in {places[passage_id]}; make ids unique"
                )
            places[passage_id] = place


def _hash(passage_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "big")


def read_records(path: Path, *, title: bool, allow_empty: bool = False) -> Iterator[tuple[str, str, str]]:
    """Read and check a JSONL file record by record.

    Args:
        path: the file, plain or .gz.
        title: put a record's title before its text.
        allow_empty: let records without text pass.

    Yields:
        ("file, line n", id, text).

    Raises:
        ValueError: see `check_record`; also a line that is no JSON object or has a key twice, not UTF-8, or a broken
            .gz.
    """
    for number, line in byte_lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = parse_json_line(line)
        except BadRow as error:
            raise ValueError(error.at(place)) from None
        yield check_record(record, place, title=title, allow_empty=allow_empty)


def check_record(record: Mapping[str, Any], place: str, *, title: bool, allow_empty: bool) -> tuple[str, str, str]:
    """Check one record and join its texts.

    Args:
        record: a mapping with _id, text and maybe title.
        place: where it was read, for messages.
        title: put the title before the text.
        allow_empty: let a record without text pass.

    Returns:
        The place, the id and the text.

    Raises:
        ValueError: a missing key, an id or text that is not a string, or no text.
    """
    for key in ("_id", "text"):
        if key not in record:
            raise ValueError(f"{place}: key {key!r} is missing (there are: {', '.join(map(str, record))}); add it")
    record_id = record["_id"]
    if isinstance(record_id, int) and not isinstance(record_id, bool):
        record_id = str(record_id)
    if not isinstance(record_id, str) or not record_id:
        raise ValueError(f"{place}: _id is {record_id!r}; it must be a string that is not empty")
    # A title may be null, as in data sets where only some have one.
    titles = [record["title"]] if title and record.get("title") is not None else []
    parts = [*titles, record["text"]]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{place}: title and text must be strings")
    text = " ".join(part.strip() for part in parts if part.strip())
    try:
        f"{record_id}{text}".encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}: half a surrogate pair (\\ud800 to \\udfff) in the id or text; it is not text in any encoding"
        ) from None
    if not text and not allow_empty:
        mend = (
            "; fill it in, remove the line, or pass allow_empty=True" if title else "; fill it in or remove the line"
        )
        raise ValueError(f"{place}: the text of {record_id!r} is empty{mend}")
    return place, record_id, text
