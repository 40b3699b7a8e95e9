"""All passages that are known to answer a query, so that none of them trains as a negative."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.beir_format import HEADER, Qrels, add_judgement, check_positives
from tct_hf.data.column_names import KNOWN, LABELLED
from tct_hf.data.lookups import file_key
from tct_hf.data.row_parsing import BadRow, byte_lines, decode

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 1000


class KnownPositives:
    """Positives by query id, from judgements.

    Args:
        qrels: a file (BEIR: query, passage, score; TREC: query, 0, passage, score; plain or .gz), or a mapping
            {query id: {passage id: grade}}; 1 and more is positive.

    Attributes:
        key: JSON-ready, identifies the content.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line, or no positive at all.
    """

    def __init__(self, qrels: str | Path | Mapping[str, Mapping[str, int]]) -> None:
        if isinstance(qrels, Mapping):
            self.source = "qrels (a mapping)"
            grades: Mapping[str, Mapping[str, int]] = qrels
            self.key: list[Any] = ["mapping", sha256(json.dumps(qrels).encode()).hexdigest()]
        else:
            path = Path(qrels)
            if not path.is_file():
                raise FileNotFoundError(f"qrels: {path}: no such file; give the right path")
            self.source = str(path)
            grades = read_any_qrels(path)
            self.key = file_key(path)
        check_positives({query: dict(found) for query, found in grades.items()}, self.source)
        self.positives = {
            str(query): [str(passage) for passage, grade in found.items() if grade >= 1]
            for query, found in grades.items()
        }

    def add(self, row: dict[str, Any]) -> bool:
        """Set a row's known positives; its own is one of them, unless the row is not labelled.

        Returns:
            Whether the query is judged.
        """
        judged = self.positives.get(row["query_id"])
        row[KNOWN] = list(dict.fromkeys([*(judged or ()), *row.get(KNOWN, ()), *_own(row)]))
        return judged is not None


def read_any_qrels(path: Path) -> Qrels:
    """Read judgements of three fields (BEIR, tabs, maybe a header) or four (TREC, tabs or blanks).

    Args:
        path: the file, plain or .gz.

    Raises:
        ValueError: a malformed line, with its number.
    """
    qrels: Qrels = {}
    places: dict[str, str] = {}
    for place, fields in judgement_lines(path):
        add_judgement(fields, place, qrels, places)
    return qrels


def judgement_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The lines of a file of judgements, as :func:`read_any_qrels` takes them.

    Args:
        path: the file, plain or .gz.

    Yields:
        ("file, line n", [query id, passage id, score as text]).

    Raises:
        ValueError: a malformed line, with its number.
    """
    width = 0
    for number, line in byte_lines(path):
        place = f"{path}, line {number}"
        try:
            text = decode(line)
        except BadRow as error:
            raise ValueError(error.at(place)) from None
        fields = text.split("\t")
        if not text.strip() or (number == 1 and fields == HEADER):
            continue
        if len(fields) == 1:
            fields = text.split()
        if len(fields) not in (3, 4) or len(fields) != (width or len(fields)):
            raise ValueError(
                f"{place}: {len(fields)} fields where {width or '3 or 4'} are needed (query, passage, score; or "
                "query, 0, passage, score)"
            )
        width = len(fields)
        yield place, [fields[0], *fields[-2:]]


def _own(row: Mapping[str, Any]) -> list[str]:
    return [row["positive_id"]] if row.get(LABELLED, True) else []


class SeenPositives:
    """Positives by query, gathered from the triples themselves.

    It holds each (query, positive) pair once, not each row: memory grows with the judgements, not with the file.
    """

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._of_query: list[dict[str, None]] = []
        # Which query each row has, in the order of the rows.
        self._rows = array("Q")

    def add(self, row: Mapping[str, Any]) -> None:
        """Note one row; queries without an id are told apart by their text."""
        query = row.get("query_id", row.get("query"))
        assert isinstance(query, str)
        at = self._number.setdefault(query, len(self._of_query))
        if at == len(self._of_query):
            self._of_query.append({})
        self._of_query[at].update(dict.fromkeys((*_own(row), *row.get(KNOWN, ()))))
        self._rows.append(at)

    def write(self, path: Path) -> Dataset:
        """Write the known positives of each row as a column of its own.

        Args:
            path: the Arrow file.

        Returns:
            The column, memory-mapped.
        """
        import pyarrow as pa  # type: ignore[import-untyped]

        schema = pa.schema([(KNOWN, pa.list_(pa.string()))])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, len(self._rows), _ROWS_A_BATCH):
                part = [list(self._of_query[at]) for at in self._rows[start : start + _ROWS_A_BATCH]]
                writer.write_batch(pa.record_batch([pa.array(part, schema.field(0).type)], schema))
        from datasets import Dataset

        return Dataset.from_file(str(path))
