"""Runs, {query id: {passage id: score}}, and the TREC six-column file they are kept in."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tct_hf.data.ids import is_utf8
from tct_hf.data.rows import BadRow, byte_lines, decode
from tct_hf.files import write_aside

Run = dict[str, dict[str, float]]


def rank(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Order one query's passages, (id, score): score descending, equal scores by passage id ascending."""
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def without_own(run: Mapping[str, Mapping[str, float]], depth: int | None = None) -> Run:
    """A run without the passages that have their query's own id, the best `depth` of the others."""
    return {
        query: dict(rank({passage: score for passage, score in scores.items() if passage != query})[:depth])
        for query, scores in run.items()
    }


def check_common(name: str, one: Mapping[str, Any], other_name: str, other: Mapping[str, Any]) -> None:
    """Refuse what is no run or judgements, and those without a query in common: ids of two kinds, or two splits'."""
    for what, given in ((name, one), (other_name, other)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{what} is a {type(given).__name__}; give a mapping of query id to its passages")
    if one and other and one.keys().isdisjoint(other):
        raise ValueError(
            f"{name}, {other_name}: no query in common (for instance {next(iter(one))!r} and {next(iter(other))!r}); "
            "take those of one split, with the same ids"
        )


def write_run(run: Mapping[str, Mapping[str, float]], path: str | Path, tag: str) -> None:
    """Write a run as a TREC file: `query Q0 passage rank score tag`.

    Queries keep their order; passages are ordered by `rank`. Scores are written so that reading gives the same
    floats. The file appears whole or not at all.

    Args:
        run: query id to passage id to score; a query without passages leaves no line.
        path: the file; compressed when its name ends in .gz.
        tag: the run's name, last column.

    Raises:
        ValueError: an id or the tag is empty, has white space or can't be written as UTF-8, or a score is not finite.
        OSError: the file can't be written.
    """
    path = Path(path)
    _check_word(tag, "tag", path)
    with write_aside(path) as aside, aside.open("xb") as raw:
        # Neither name nor time in gzip's header: the same run gives the same bytes.
        packed = path.name.endswith(".gz")
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if packed else nullcontext(raw) as file:
            file.writelines(_lines(run, tag, path))


def _lines(run: Mapping[str, Mapping[str, float]], tag: str, path: Path) -> Iterator[bytes]:
    for query_id, scores in run.items():
        _check_word(query_id, "query id", path)
        for passage_id, score in scores.items():
            _check_word(passage_id, "passage id", path)
            if not math.isfinite(score):
                raise ValueError(
                    f"{path}: query {query_id!r}, passage {passage_id!r}: score {score!r} is not finite; "
                    "look for NaN in the vectors or the scores that made this run"
                )
        for place, (passage_id, score) in enumerate(rank(scores), start=1):
            yield f"{query_id} Q0 {passage_id} {place} {float(score)!r} {tag}\n".encode()


def read_run(path: str | Path) -> Run:
    """Read a TREC run file of any system; ranks are ignored, the scores decide, as for trec_eval.

    Args:
        path: the file, plain or gzip.

    Returns:
        Query id to passage id to score, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another number of columns, a score is not a finite number, a passage comes twice for
            a query, or the file is truncated or not UTF-8; the message names file and line.
    """
    run: Run = {}
    for place, fields in _fields(Path(path)):
        if len(fields) != 6:
            raise ValueError(f"{place}: {len(fields)} columns instead of 6 (query Q0 passage rank score tag); fix it")
        query_id, _, passage_id, _, text, _ = fields
        try:
            # Python takes 1_0 and digits of other scripts for numbers; no other reader of runs does.
            score = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{place}: score {text!r} (column 5) is not a finite number; fix or remove the line")
        scores = run.setdefault(query_id, {})
        if passage_id in scores:
            raise ValueError(f"{place}: passage {passage_id!r} comes twice for query {query_id!r}; remove one line")
        scores[passage_id] = score
    return run


def read_tag(path: str | Path) -> str | None:
    """The name that a run file gives its run, the last column of the first line; None where there is no line."""
    return next((fields[-1] for _, fields in _fields(Path(path))), None)


def _fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The place ("file, line 3") and the columns of each line that has some, by ASCII white space as in trec_eval."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such run file; write one with write_run or give the right path")
    for number, line in byte_lines(path):
        place = f"{path}, line {number}"
        try:
            if columns := line.split():
                yield place, decode(b" ".join(columns)).split(" ")
        except BadRow as error:
            raise ValueError(error.at(place)) from None


def _check_word(text: str, what: str, path: Path) -> None:
    if text.split() != [text] or text.startswith("\ufeff") or not is_utf8(text):
        raise ValueError(
            f"{path}: {what} {text!r} is empty, or has white space, a byte order mark or a lone surrogate, which a "
            "TREC run can't hold; rename it first"
        )
