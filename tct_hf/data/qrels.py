"""Relevance judgements: files of BEIR and TREC, data sets of the Hub; and all passages known to answer a query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tct_hf.data.column_names import KNOWN, LABELLED
from tct_hf.data.file_sources import ROWS_A_BATCH, LineSource, Source
from tct_hf.data.irds import IrdsSource, is_irds
from tct_hf.data.rows import BadRow, SkippedRows, as_grade, as_id, decode, get, is_header, refuse_or_skip, there_are
from tct_hf.data.sources import of_pairs

Qrels = dict[str, dict[str, int]]
HEADER = ["query-id", "corpus-id", "score"]


class JudgementLines(LineSource):
    """Lines of query, passage, score (BEIR, perhaps below a header) or query, 0, passage, score (TREC)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, HEADER)
        head = list(islice(self.raw(), ROWS_A_BATCH))
        # Most lines say what a line is.
        self.tabs = 2 * sum(b"\t" in line for _, line in head) >= len(head)
        widths = Counter(len(self._fields(line)) for _, line in head)
        self.width = max((3, 4), key=widths.__getitem__)
        if head and self._is_header(*head[0]):
            self.header = head[0][0]

    def _fields(self, line: bytes) -> list[bytes]:
        # By ASCII white space, as trec_eval does: an id may have a no-break space.
        return line.split(b"\t") if self.tabs else line.split()

    def _is_header(self, number: int, line: bytes) -> bool:
        """Whether a line names the columns; words between blanks may be prose."""
        names = [name.decode(errors="replace") for name in self._fields(line.lstrip(b"# "))]
        if len(names) not in (3, 4) or not is_header([names[0], *names[-2:]], unlike=self.tabs):
            return False
        if "query" in names[-2].lower() and "query" not in names[0].lower():
            raise ValueError(f"{self.place(number)}: columns {names}, but the query comes first, then the passage")
        return True

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in super().raw() if line.strip())

    def parse(self, raw: bytes) -> Mapping[str, Any]:
        fields = [decode(field) for field in self._fields(raw)]
        if len(fields) != self.width:
            need = f"{self.width} are needed (query, {'0, ' * (self.width - 3)}passage, score)"
            raise BadRow("wrong number of fields", f"{len(fields)} fields where {need}")
        return dict(zip(HEADER, (fields[0], *fields[-2:]), strict=True))


@dataclass(frozen=True)
class Judgements:
    """Judgements of a split, in the order of the source."""

    qrels: Qrels
    places: dict[str, str]  # query id to "file, line n" of its first judgement
    count: int  # of those read, repeated ones included


def read_qrels(
    source: str | Path | Source, *, allow_repeats: bool = False, skipped: SkippedRows | None = None
) -> Judgements:
    """Read judgements and check each.

    Args:
        source: a file, see :class:`JudgementLines`, or raw rows with the columns of BEIR's header.
        allow_repeats: pass over a judgement that repeats an earlier one.
        skipped: takes bad lines, which are left out; they are refused when None.
    """
    source = source if isinstance(source, Source) else JudgementLines(Path(source))
    if missing := [column for column in HEADER if column not in (source.names or HEADER)]:
        raise ValueError(f"{source.name}: column {missing[0]!r} is missing ({there_are(source.names or [])})")
    qrels: Qrels = {}
    places: dict[str, str] = {}
    count = 0
    for place, (query_id, passage_id, grade) in source.read(_judgement, HEADER, skipped):
        count += 1
        before = qrels.get(query_id, {}).get(passage_id)
        if before is not None and not (allow_repeats and before == grade):
            message = f"{place}: query {query_id!r} and passage {passage_id!r} are judged twice; remove one line"
            refuse_or_skip(skipped, "judged twice", message)
            continue
        qrels.setdefault(query_id, {})[passage_id] = grade
        places.setdefault(query_id, place)
    check_positives(qrels, source.name)
    return Judgements(qrels, places, count)


def _judgement(row: Mapping[str, Any]) -> tuple[str, str, int]:
    query_id, passage_id, grade = (get(row, column) for column in HEADER)
    return as_id(query_id, HEADER[0]), as_id(passage_id, HEADER[1]), as_grade(grade)


def check_positives(qrels: Mapping[str, Mapping[str, int]], place: str) -> None:
    """Refuse judgements of which none is positive."""
    if not any(grade >= 1 for grades in qrels.values() for grade in grades.values()):
        raise ValueError(f"{place}: no judgement with a score of 1 or more; it can't train or measure anything")


def ids_are_shared(qrels: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether a passage with a query's id is that query, as in ArguAna and Quora.

    Where one is judged relevant to the query of its id, queries and passages are numbered each for themselves.
    """
    return not any(grades.get(query_id, 0) >= 1 for query_id, grades in qrels.items())


class KnownPositives:
    """Positives (grade 1 and more) by query id, of a file, "irds:ID" or {query id: {passage id: grade}}.

    Attributes:
        key: JSON-ready, identifies the content.
    """

    def __init__(
        self, qrels: str | Path | Mapping[str, Mapping[str, int]], skipped: SkippedRows | None = None
    ) -> None:
        source: Source
        if isinstance(qrels, Mapping):
            source = of_pairs(qrels, "qrels", HEADER)
        elif not is_irds(qrels) and not Path(qrels).is_file():
            raise FileNotFoundError(f"qrels: {qrels}: no such file; give the right path")
        else:
            source = IrdsSource(qrels, "qrels") if is_irds(qrels) else JudgementLines(Path(qrels))
        self.source, self.key, repeats = source.name, source.key, is_irds(qrels)
        self.positives = {
            query: [passage for passage, grade in found.items() if grade >= 1]
            for query, found in read_qrels(source, skipped=skipped, allow_repeats=repeats).qrels.items()
        }

    def add(self, row: dict[str, Any]) -> None:
        """Set a row's known positives, its own among them if it is labelled."""
        judged = self.positives.get(row["query_id"], ())
        row[KNOWN] = list(dict.fromkeys([*judged, *row.get(KNOWN, ()), *own_positive(row)]))


def own_positive(row: Mapping[str, Any]) -> list[str]:
    """The id of a row's positive, none where it is not judged."""
    return [row["positive_id"]] if row.get(LABELLED, True) else []
