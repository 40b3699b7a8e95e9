"""Triples as other libraries write them, in the columns of `load_triples`: see the table of docs/data.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tct_hf.data.column_names import LABELLED, SCORES
from tct_hf.data.file_sources import LineSource, Source
from tct_hf.data.rows import BadRow, get, parse_json_line, shown

# Their columns and ours, where ours are not there.
_RENAMED = {
    **dict.fromkeys(("anchor", "question", "query_text"), "query"),
    **dict.fromkeys(("pos", "answer", "passage", "positive_passages", "positive_ctxs"), "positive"),
    **dict.fromkeys(("neg", "negative_passages"), "negative"),
    "positive_document_ids": "positive_ids",
    "negative_document_ids": "negative_ids",
}
_SUFFIX = re.compile("(_id)?s?$")
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class JsonArray(LineSource):
    """A file that is one JSON array, as DPR has them: an element a row."""

    unit = "element"

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, bytes]]:
        parts: list[bytes] = []  # of the element that is being read: no string spans lines
        depth = number = 0
        for _, line in super().raw():
            start = 0
            for token in _TOKENS.finditer(line):
                if token[0] in (b"{", b"["):
                    depth += 1
                    start = token.start() if depth == 2 else start
                elif token[0] in (b"}", b"]"):
                    depth -= 1
                    if depth == 1:
                        number += 1
                        yield number, b"\n".join([*parts, line[start : token.end()]])
                        parts = []
            if depth > 1:
                parts.append(line[start:])
        if depth:
            raise ValueError(f"{self.path}, after element {number}: the list is not closed; copy the file again")


class ListLines(LineSource):
    """Lines of ColBERT: [query, positive, negative, ...] or [query, [positive, score], [negative, score], ...]."""

    def parse(self, raw: bytes) -> Mapping[str, Any]:
        row = parse_json_line(b'{"row": %b}' % raw)["row"]
        if not isinstance(row, list) or len(row) < 3:
            raise BadRow("mixed types", f"{shown(row)} where [query, positive, negative, ...] is needed")
        query, *candidates = row
        scored = [one for one in candidates if isinstance(one, list) and len(one) == 2]
        if scored and len(scored) < len(candidates):
            raise BadRow("mixed types", "candidates with and without scores in one row; write [id, score] for each")
        ids = [one[0] for one in scored] or candidates
        return {"query": query, "positive": ids[0], "negatives": ids[1:], **_scores(one[1] for one in scored)}


class Renamed(Source):
    """Rows of another library in our columns; labelled pairs of one query, one after another, are one row."""

    def __init__(self, source: Source, pairs: bool) -> None:
        self._source, self._pairs, self.name = source, pairs, source.name
        self.key = source.key and ["renamed", source.key]

    def place(self, number: int) -> str:
        return self._source.place(number)

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        if not self._pairs:
            return self._source.raw()
        groups = groupby(self._source.raw(), key=lambda stored: self._query_of(stored[1]))
        return ((one[0][0], [raw for _, raw in one]) for one in (list(group) for _, group in groups))

    def _query_of(self, raw: Any) -> Any:
        try:
            return _ours(self._source.parse(raw)).get("query")
        except BadRow:
            return None

    def parse(self, raw: Any) -> Mapping[str, Any]:
        if not self._pairs:
            return _checked(self._source.parse(raw))
        rows = [_ours(self._source.parse(one)) for one in raw]
        labels, passages = ([get(row, name) for row in rows] for name in ("label", "positive"))
        return {"query": get(rows[0], "query"), **_by_label(passages, labels, "label")}


def in_our_columns(source: Source, columns: Mapping[str, str | None] | None) -> Source:
    """A source of triples, in our columns where it is another library's and `columns` names none."""
    if type(source) is LineSource and source.names is None:
        first = next((line.strip() for _, line in source.raw()), b"")
        if first.startswith(b"["):
            kind = JsonArray if first[1:].lstrip()[:1] in (b"", b"{") else ListLines
            source = kind(source.path)
    for _, raw in () if columns else source.raw():
        try:
            row = source.parse(raw)
        except BadRow:  # said when it is read
            continue
        try:
            ours = _checked(row)
        except BadRow:
            return Renamed(source, False)
        pairs = {"query", "positive", "label"} <= ours.keys() and not any(name.startswith("negative") for name in ours)
        return Renamed(source, pairs) if pairs or ours.keys() != row.keys() else source
    return source


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _converted(_ours(row))
    except BadRow:
        raise
    except (TypeError, ValueError) as error:
        raise BadRow("mixed types", f"columns {', '.join(row)} of another shape than usual ({error})") from None


def _ours(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with our names of columns."""
    names = {name: ours for name in row if (ours := _RENAMED.get(name)) and not {ours, f"{ours}s"} & row.keys()}
    if len({*names.values()}) < len(names):
        what = f"more than one of {', '.join(names)} may be the query or the positive"
        raise BadRow("doubled column", f"{what}; leave one out, or say which with columns=")
    return {names.get(name, name): value for name, value in row.items()}


def _converted(row: dict[str, Any]) -> dict[str, Any]:
    """A row with our names, its scores and labels as ours, too."""
    if "hard_negative_ctxs" in row:  # DPR; the harder ones first
        row["negative"] = [*row.pop("hard_negative_ctxs"), *(row.pop("negative_ctxs", None) or ())]
    candidates = next((name for name in ("document_ids", "documents") if name in row), None)
    if candidates and SCORES in row and "positive" not in row:  # PyLate: no labels, and the teacher's best is first
        passages, scores = (_listed(row.pop(name)) for name in (candidates, SCORES))
        ranked = sorted(zip(scores, passages, strict=True), key=lambda pair: pair[0], reverse=True)
        names = ("positive_id", "negative_ids") if candidates == "document_ids" else ("positive", "negatives")
        best, others = [passage for _, passage in ranked][:1], [passage for _, passage in ranked][1:]
        row |= {names[0]: best[0] if best else None, names[1]: others, LABELLED: False}
        return row | _scores(score for score, _ in ranked)
    if isinstance(row.get("positive"), list) and "labels" in row:  # sentence-transformers, labeled-list
        return row | _by_label(row.pop("positive"), row.pop("labels"), "labels")
    if isinstance(row.get("positive"), list) and SCORES in row and not any("negative" in name for name in row):
        first, *others = row["positive"] or [None]  # the same with scores
        return {**row, "positive": first, "negatives": others}
    # By their texts or their ids.
    negatives = {_SUFFIX.sub("", name): value for name, value in row.items() if name.startswith("negative")}
    count = sum(len(one) if isinstance(one, (list, tuple)) else 1 for one in negatives.values())
    if not count and {"positive", "score"} <= row.keys() and "label" not in row:  # sentence-transformers' scored pairs
        fix = "give labels (1 or 0), or columns= where all are positives"
        raise BadRow("mixed types", f"a pair with a score may be a negative; {fix}", "score")
    if SCORES not in row:
        if row.get("pos_scores") is not None and row.get("neg_scores") is not None:  # FlagEmbedding
            if isinstance(row["positive"], list) and len(row["positive"]) != len(row["pos_scores"]):
                raise ValueError(f"{len(row['pos_scores'])} pos_scores of {len(row['positive'])} pos")
            row |= _scores([*row["pos_scores"], *row["neg_scores"]])
        elif "margin" in row:  # GPL
            row |= _scores([_number(row["margin"]), 0.0])
        elif "label" in row and count:  # sentence-transformers: scores, or positive minus negative
            label = row["label"] if isinstance(row["label"], (list, tuple)) else [_number(row["label"])]
            margins = len(label) == count and all(isinstance(one, (int, float)) for one in label)
            row |= _scores([0.0, *(-one for one in label)] if margins else label)
    return row


def _scores(scores: Any) -> dict[str, Any]:
    found = list(scores)
    return {SCORES: found} if found else {}


def _listed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):  # said when it is read
        return value


def _by_label(passages: Sequence[Any], labels: Sequence[Any], column: str) -> dict[str, Any]:
    """Passages of label 1 as positives, those of label 0 as negatives."""
    found: dict[float, list[Any]] = {1.0: [], 0.0: []}
    for passage, label in zip(passages, labels, strict=True):
        if _number(label) not in found:
            raise BadRow("mixed types", f"holds {shown(label)} where 1 (relevant) or 0 is needed", column)
        found[_number(label)].append(passage)
    return {"positives": found[1.0], "negatives": found[0.0]}
