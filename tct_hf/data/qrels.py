"""Relevance judgements: files of BEIR and TREC, data sets of the Hub; and all passages known to answer a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.column_names import KNOWN, LABELLED
from tct_hf.data.rows import file_key, text_lines, there_are
from tct_hf.data.sources import digest_of_rows

if TYPE_CHECKING:
    from datasets import Dataset

Qrels = dict[str, dict[str, int]]
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


def read_qrels(source: str | Path | Dataset, name: str | None = None, *, allow_repeats: bool = False) -> Judgements:
    """Read judgements and check each.

    Args:
        source: a file, plain or .gz, of query, passage, score (BEIR, tabs, maybe a header) or query, 0, passage, score
            (TREC, tabs or blanks); or a data set with the columns of BEIR's header.
        name: the data set's, for messages.
        allow_repeats: pass over a judgement that repeats an earlier one.

    Raises:
        ValueError: a malformed line, a pair judged twice, or no positive judgement; the message names file and line.
    """
    qrels: Qrels = {}
    places: dict[str, str] = {}
    count = 0
    lines = _lines(Path(source)) if isinstance(source, (str, Path)) else _rows(source, name or "qrels")
    for place, query_id, passage_id, text in lines:
        count += 1
        if not query_id or not passage_id:
            raise ValueError(f"{place}: empty query-id or corpus-id; fill it in or remove the line")
        try:
            score = int(text)
        except ValueError:
            raise ValueError(f"{place}: score {text!r} is not an integer; write 0, 1, 2, ...") from None
        grades = qrels.setdefault(query_id, {})
        if passage_id in grades and not (allow_repeats and grades[passage_id] == score):
            raise ValueError(
                f"{place}: query {query_id!r} and passage {passage_id!r} are judged twice; remove one line"
            )
        grades[passage_id] = score
        places.setdefault(query_id, place)
    _check_positives(qrels, str(source) if name is None else name)
    return Judgements(qrels, places, count)


def _lines(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """ "file, line n", query id, passage id, score as text."""
    width, tabs = 0, False
    for place, text in text_lines(path):
        fields = text.split("\t")
        if not text.strip() or (not width and fields == HEADER):
            continue
        if len(fields) == 1 and not tabs:
            fields = text.split()
        tabs = tabs or "\t" in text
        if len(fields) not in (3, 4) or len(fields) != (width or len(fields)):
            raise ValueError(
                f"{place}: {len(fields)} fields where {width or '3 or 4'} are needed (query, passage, score; or "
                "query, 0, passage, score)"
            )
        width = len(fields)
        yield place, fields[0], fields[-2], fields[-1]


def _rows(rows: Any, name: str) -> Iterator[tuple[str, str, str, str]]:
    if missing := [column for column in HEADER if column not in rows.column_names]:
        raise ValueError(f"{name}: column {missing[0]!r} is missing ({there_are(rows.column_names)})")
    for number, row in enumerate(rows):
        query_id, passage_id, score = (row[column] for column in HEADER)
        score = int(score) if isinstance(score, float) and score.is_integer() else score
        yield f"{name}, row {number}", str(query_id), str(passage_id), str(score)


def _check_positives(qrels: Mapping[str, Mapping[str, int]], place: str) -> None:
    if not any(grade >= 1 for grades in qrels.values() for grade in grades.values()):
        raise ValueError(
            f"{place}: no judgement with a score of 1 or more; this split can't train or measure anything"
        )


class KnownPositives:
    """Positives by query id, from judgements, so that none of them trains as a negative.

    Args:
        qrels: a file, see :func:`read_qrels`, or {query id: {passage id: grade}}; 1 and more is positive.

    Attributes:
        key: JSON-ready, identifies the content.
    """

    def __init__(self, qrels: str | Path | Mapping[str, Mapping[str, int]]) -> None:
        if isinstance(qrels, Mapping):
            self.source, grades = "qrels (a mapping)", qrels
            self.key: list[Any] = ["mapping", digest_of_rows([qrels])]
            _check_positives(grades, self.source)
        else:
            path = Path(qrels)
            if not path.is_file():
                raise FileNotFoundError(f"qrels: {path}: no such file; give the right path")
            self.source, grades, self.key = str(path), read_qrels(path).qrels, file_key(path)
        self.positives = {
            str(query): [str(passage) for passage, grade in found.items() if grade >= 1]
            for query, found in grades.items()
        }

    def add(self, row: dict[str, Any]) -> None:
        """Set a row's known positives, its own among them if it is labelled."""
        judged = self.positives.get(row["query_id"], ())
        row[KNOWN] = list(dict.fromkeys([*judged, *row.get(KNOWN, ()), *own_positive(row)]))


def own_positive(row: Mapping[str, Any]) -> list[str]:
    """The id of a row's positive; none where the row is not labelled."""
    return [row["positive_id"]] if row.get(LABELLED, True) else []
