"""Relevance judgements: files of BEIR and TREC, data sets of the Hub; and all passages known to answer a query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.column_names import KNOWN, LABELLED
from tct_hf.data.file_sources import ROWS_A_BATCH, Source
from tct_hf.data.rows import (
    BadRow,
    SkippedRows,
    as_grade,
    as_id,
    byte_lines,
    decode,
    file_key,
    get,
    is_header,
    refuse_or_skip,
    shown,
    there_are,
)
from tct_hf.data.sources import DatasetSource, digest_of_rows

if TYPE_CHECKING:
    from datasets import Dataset

Qrels = dict[str, dict[str, int]]
Judgement = tuple[str, str, int]
HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Judgements:
    """Judgements of a split.

    Args:
        qrels: query id to passage id to grade, in the order of the source.
        places: query id to "file, line n" of its first judgement.
        count: judgements read, repeated ones included.
    """

    qrels: Qrels
    places: dict[str, str]
    count: int


def read_qrels(
    source: str | Path | Dataset | Source,
    name: str | None = None,
    *,
    allow_repeats: bool = False,
    skipped: SkippedRows | None = None,
) -> Judgements:
    """Read judgements and check each.

    Args:
        source: a file, plain or .gz, of query, passage, score (BEIR, tabs, maybe a header) or query, 0, passage, score
            (TREC, tabs or blanks); or a data set or raw rows with the columns of BEIR's header.
        name: the data set's, for messages.
        allow_repeats: pass over a judgement that repeats an earlier one.
        skipped: takes bad lines, which are left out; they are refused when None.

    Raises:
        ValueError: a malformed line, a pair judged twice, or no positive judgement; the message names file and line.
    """
    qrels: Qrels = {}
    places: dict[str, str] = {}
    count = 0
    if isinstance(source, (str, Path)):
        lines, name = _lines(Path(source)), str(source)
    else:
        opened = source if isinstance(source, Source) else DatasetSource(source, name or "qrels")
        lines, name = _rows(opened), opened.name
    for place, read in lines:
        count += 1
        try:
            query_id, passage_id, score = read()
            if passage_id in qrels.get(query_id, ()) and not (allow_repeats and qrels[query_id][passage_id] == score):
                fix = "remove one line"
                raise BadRow("judged twice", f"query {query_id!r} and passage {passage_id!r} are judged twice; {fix}")
        except BadRow as error:
            refuse_or_skip(skipped, error.kind, error.at(place))
        else:
            qrels.setdefault(query_id, {})[passage_id] = score
            places.setdefault(query_id, place)
    check_positives(qrels, name)
    return Judgements(qrels, places, count)


def _lines(path: Path) -> Iterator[tuple[str, Callable[[], Judgement]]]:
    """ "file, line n", and what reads the judgement there, or raises a BadRow."""
    lines = ((number, line) for number, line in byte_lines(path) if line.strip())
    head = list(islice(lines, ROWS_A_BATCH))
    # Most lines say what a line is.
    tabs = 2 * sum(b"\t" in line for _, line in head) >= len(head)
    widths = Counter(len(_fields(line, tabs)) for _, line in head)
    width = max((3, 4), key=widths.__getitem__)

    def read(line: bytes) -> Judgement:
        fields = [decode(field) for field in _fields(line, tabs)]
        if len(fields) != width:
            need = f"{width} are needed (query, {'0, ' * (width - 3)}passage, score)"
            raise BadRow("wrong number of fields", f"{len(fields)} fields where {need}")
        return _judgement(fields[0], fields[-2], fields[-1])

    for at, (number, line) in enumerate(chain(head, lines)):
        place = f"{path}, line {number}"
        if at or not _is_header(line, tabs, place):
            yield place, partial(read, line)


def _fields(line: bytes, tabs: bool) -> list[bytes]:
    # By ASCII white space, as trec_eval does: an id may have a no-break space.
    return line.split(b"\t") if tabs else line.split()


def _is_header(line: bytes, tabs: bool, place: str) -> bool:
    """Whether a line names the columns; words between blanks may be prose."""
    names = [name.decode(errors="replace") for name in _fields(line.lstrip(b"# "), tabs)]
    if len(names) not in (3, 4) or not is_header([names[0], *names[-2:]], unlike=tabs):
        return False
    if "query" in names[-2].lower() and "query" not in names[0].lower():
        raise ValueError(f"{place}: columns {names}, but the query comes first, then the passage; change their order")
    return True


def _judgement(query_id: Any, passage_id: Any, grade: Any) -> Judgement:
    if "" in (query_id, passage_id):
        raise BadRow("empty id", "empty query-id or corpus-id; fill it in or remove the line")
    return as_id(query_id, "query-id"), as_id(passage_id, "corpus-id"), as_grade(grade)


def _rows(source: Source) -> Iterator[tuple[str, Callable[[], Judgement]]]:
    if source.names is not None and (missing := [column for column in HEADER if column not in source.names]):
        raise ValueError(f"{source.name}: column {missing[0]!r} is missing ({there_are(source.names)})")

    def read(raw: Any) -> Judgement:
        row = source.parse(raw)
        return _judgement(*(get(row, column) for column in HEADER))

    for number, raw in source.raw(HEADER):
        yield source.place(number), partial(read, raw)


def checked_qrels(qrels: Mapping[Any, Mapping[Any, Any]], name: str) -> Qrels:
    """Judgements from memory with ids as text and whole grades; a ValueError names the query of a bad one."""
    checked: Qrels = {}
    for query, found in qrels.items():
        try:
            if not isinstance(found, Mapping):
                raise BadRow("mixed types", f"holds {shown(found)} where {{passage id: grade}} is needed")
            checked[as_id(query, "query id")] = {
                as_id(passage, "passage id"): as_grade(grade) for passage, grade in found.items()
            }
        except BadRow as error:
            raise ValueError(error.at(f"{name}, query {query!r}")) from None
    check_positives(checked, name)
    return checked


def check_positives(qrels: Mapping[str, Mapping[str, int]], place: str) -> None:
    """Refuse judgements of which none is positive."""
    if not any(grade >= 1 for grades in qrels.values() for grade in grades.values()):
        raise ValueError(
            f"{place}: no judgement with a score of 1 or more; this split can't train or measure anything"
        )


def ids_are_shared(qrels: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether a passage with a query's id is that query, as in ArguAna and Quora.

    Where one is judged relevant to the query of its id, queries and passages are numbered each for themselves.
    """
    return not any(grades.get(query_id, 0) >= 1 for query_id, grades in qrels.items())


class KnownPositives:
    """Positives by query id, from judgements, so that none of them trains as a negative.

    Args:
        qrels: a file, see :func:`read_qrels`, or {query id: {passage id: grade}}; 1 and more is positive.
        skipped: as of :func:`read_qrels`.

    Attributes:
        key: JSON-ready, identifies the content.
    """

    def __init__(
        self, qrels: str | Path | Mapping[str, Mapping[str, int]], skipped: SkippedRows | None = None
    ) -> None:
        if isinstance(qrels, Mapping):
            self.source, grades = "qrels (a mapping)", checked_qrels(qrels, "qrels (a mapping)")
            self.key: list[Any] = ["mapping", digest_of_rows([grades])]
        else:
            path = Path(qrels)
            if not path.is_file():
                raise FileNotFoundError(f"qrels: {path}: no such file; give the right path")
            self.source, grades, self.key = str(path), read_qrels(path, skipped=skipped).qrels, file_key(path)
        self.positives = {
            query: [passage for passage, grade in found.items() if grade >= 1] for query, found in grades.items()
        }

    def add(self, row: dict[str, Any]) -> None:
        """Set a row's known positives, its own among them if it is labelled."""
        judged = self.positives.get(row["query_id"], ())
        row[KNOWN] = list(dict.fromkeys([*judged, *row.get(KNOWN, ()), *own_positive(row)]))


def own_positive(row: Mapping[str, Any]) -> list[str]:
    """The id of a row's positive; none where the row is not labelled."""
    return [row["positive_id"]] if row.get(LABELLED, True) else []
