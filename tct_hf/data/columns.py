"""Raw rows of any source to training rows: which column is what, and checks of every value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tct_hf.data.beir import joined
from tct_hf.data.column_names import KNOWN, LABELLED, SCORES, TEXT, is_ours, negative_columns
from tct_hf.data.ids import is_utf8
from tct_hf.data.rows import BadRow, get, shown, there_are
from tct_hf.data.scores import check_score

# What the ids of a column of passage objects are called once they are taken out of it.
_IDS_OF = "[].id"
_ID_KEYS = ("docid", "_id", "id")


@dataclass(frozen=True)
class _Field:
    """Columns of the source that hold one thing; `listed`: a single column of lists."""

    columns: tuple[str, ...]
    listed: bool = False

    def values(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """(label for messages, value) of each item."""
        if not self.listed:
            return [(name, get(row, name)) for name in self.columns]
        name = self.columns[0]
        value = get(row, name)
        if not isinstance(value, (list, tuple)):
            raise BadRow("mixed types", f"holds {shown(value)} where a list is needed, as in the first row", name)
        return [(f"{name}[{place}]", item) for place, item in enumerate(value)]


class RowReader:
    """Turns the rows of one source into training rows; the first row decides which columns there are.

    Args:
        names: the columns of the source, or the keys of its first row.
        first: the first row; shows which columns hold lists.
        columns, num_negatives, scores: as in `load_triples`.
        has_queries: query texts can be found by query_id.
        has_passages: passage texts can be found by id.

    Raises:
        BadRow: a column is missing or doubled; the message lists what there is, and the fix.
    """

    def __init__(
        self,
        names: Sequence[str],
        first: Mapping[str, Any],
        *,
        columns: Mapping[str, str | None] | None = None,
        num_negatives: int | None = None,
        has_queries: bool = False,
        has_passages: bool = False,
        scores: str | None = None,
    ) -> None:
        self._names = frozenset(names)
        self._columns = dict(columns or {})
        self._source = self._mapped(names)
        self._objects = [
            theirs for ours, theirs in self._source.items() if TEXT.fullmatch(ours) and _is_passages(first.get(theirs))
        ]
        first = self._flat(first)
        self._add_object_ids(first)
        self._query, self._query_id = self._single("query"), self._single("query_id")
        self._labelled = self._single(LABELLED)
        self._positive, self._positive_id = self._several("positive", first), self._several("positive_id", first)
        negative, negative_id = self._several("negative", first), self._several("negative_id", first)
        self._known = _Field((self._source[KNOWN],), listed=True) if KNOWN in self._source else None
        self._wanted = num_negatives
        self._every_negative = negative or negative_id  # also where none of them is taken
        if num_negatives == 0:
            negative = negative_id = None
        self._negative, self._negative_id = negative, negative_id
        present = self._negative_id if self._negative is None else self._negative
        count = 0 if present is None else len(present.values(first))
        self.num_negatives = count if num_negatives is None else num_negatives
        self._check_complete(has_queries, has_passages)
        self._check_ids()
        self._kinds: dict[str, tuple[str, str]] = {}
        self._scores = None if scores is None else _score_columns(scores, names, len(self._in_source(first)[1]))

    # What the output has -------------------------------------------------------------------------------------------

    @property
    def negatives(self) -> list[str]:
        """The names of the negative columns."""
        return negative_columns(self.num_negatives)

    @property
    def has_query_id(self) -> bool:
        return self._query_id is not None

    @property
    def has_candidate_ids(self) -> bool:
        return self._positive_id is not None

    @property
    def has_known(self) -> bool:
        return self._known is not None or (self._positive_id is not None and self._positive_id.listed)

    @property
    def one_positive(self) -> bool:
        """Each row of the source makes one training row."""
        found = [field for field in (self._positive, self._positive_id) if field is not None]
        return not any(field.listed or len(field.columns) > 1 for field in found)

    @property
    def to_look_up(self) -> list[str]:
        """The id columns whose texts are not in the source."""
        found = ["query_id"] if self._query is None else []
        if self._positive is None:
            found.append("positive_id")
        if self._negative is None:
            found.extend(f"{name}_id" for name in self.negatives)
        return found

    @property
    def left_out(self) -> list[str]:
        """Columns of the source that training does not take."""
        return sorted(self._names - {name for name in self._used() if name in self._names})

    def text_columns(self, what: str) -> dict[str, str]:
        """Our names of the text columns of "query" or "passage", each to the source's name."""
        return {
            ours: theirs
            for ours, theirs in self._source.items()
            if TEXT.fullmatch(ours) and (ours == "query") == (what == "query")
        }

    def source_columns(self) -> list[str]:
        """The columns of the source that are read."""
        return sorted({name.removesuffix(_IDS_OF) for name in self._used()})

    def output_columns(self, known: bool) -> list[str]:
        """The columns of the training rows, in order."""
        names = ["query", "positive", *self.negatives]
        if self.has_query_id:
            names.append("query_id")
        if self.has_candidate_ids:
            names += ["positive_id", *(f"{name}_id" for name in self.negatives)]
        if known:
            names.append(KNOWN)
        if self._labelled is not None:
            names.append(LABELLED)
        return [*names, SCORES] if self._scores is not None else names

    # Reading -------------------------------------------------------------------------------------------------------

    def read(self, row: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
        """Check one row read at a place; a training row for each positive, without texts that are looked up later."""
        if not row.keys() <= self._names:
            self._check_names(row)
        row = self._flat(row)
        shared: dict[str, Any] = {}
        if self._query is not None:
            shared["query"] = self._text(*self._query.values(row)[0])
        if self._query_id is not None:
            shared["query_id"] = self._id(*self._query_id.values(row)[0], place)
        if self._negative is not None:
            for name, item in zip(self.negatives, self._cut(self._negative.values(row), self._negative), strict=True):
                shared[name] = self._text(*item)
        if self._negative_id is not None:
            cut = self._cut(self._negative_id.values(row), self._negative_id)
            for name, item in zip(self.negatives, cut, strict=True):
                shared[f"{name}_id"] = self._id(*item, place)
        if self._known is not None:
            shared[KNOWN] = [self._id(label, value, place) for label, value in self._known.values(row)]
        if self._labelled is not None:
            shared[LABELLED] = _flag(*self._labelled.values(row)[0])
        if self._scores is not None:
            shared[SCORES] = _read_scores(row, self._scores, *self._in_source(row))[: 1 + self.num_negatives]
        texts = None if self._positive is None else self._positive.values(row)
        ids = None if self._positive_id is None else self._positive_id.values(row)
        if texts is not None and ids is not None and len(texts) != len(ids):
            raise BadRow("different lengths", f"{len(texts)} positives but {len(ids)} positive ids; match them")
        count = len(texts if texts is not None else ids or ())
        if not count:
            name = next(found.columns[0] for found in (self._positive, self._positive_id) if found is not None)
            raise BadRow("no positive", "the list is empty; add a positive or remove the row", name)
        if ids is not None and self.has_known:
            judged = shared.get(LABELLED, True)
            every = [self._id(label, value, place) for label, value in ids] if judged else []
            shared[KNOWN] = list(dict.fromkeys([*every, *shared.get(KNOWN, ())]))
        out = [dict(shared) for _ in range(count)]
        for at, one in enumerate(out):
            if texts is not None:
                one["positive"] = self._text(*texts[at])
            if ids is not None:
                one["positive_id"] = self._id(*ids[at], place)
        yield from out

    def _in_source(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The source's names of a row's positives and of its negatives, more than one of which may be a list's."""
        positives, negatives = self._positive or self._positive_id, self._every_negative
        return (
            [label for label, _ in positives.values(row)] if positives is not None else [],
            [label for label, _ in negatives.values(row)] if negatives is not None else [],
        )

    def _cut(self, values: list[tuple[str, Any]], source: _Field) -> list[tuple[str, Any]]:
        wanted = self.num_negatives
        if len(values) < wanted:
            raise BadRow(
                "too few negatives",
                f"{len(values)} negatives where {wanted} are needed; lower num_negatives or add some",
                source.columns[0],
            )
        if len(values) > wanted and self._wanted is None:
            raise BadRow(
                "too many negatives",
                f"{len(values)} negatives where the first row has {wanted}; pass num_negatives={wanted} to take the "
                "first ones",
                source.columns[0],
            )
        return values[:wanted]

    def _text(self, label: str, value: Any) -> str:
        if value is None:
            raise BadRow("empty text", "no text (null); fill it in or remove the row", label)
        if not isinstance(value, str):
            raise BadRow("mixed types", f"holds {shown(value)} where text is needed; write it as text", label)
        if not value or value.isspace():
            raise BadRow("empty text", "the text is empty; fill it in or remove the row", label)
        _check_encodable(value, label)
        return value

    def _id(self, label: str, value: Any, place: str) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            if value is None:
                raise BadRow("empty id", "no id (null); fill it in or remove the row", label)
            raise BadRow(
                "mixed types", f"holds {shown(value)} where an id is needed; write ids as text or integers", label
            )
        column = label.split("[")[0]
        kind = "text" if isinstance(value, str) else "a number"
        first, where = self._kinds.setdefault(column, (kind, place))
        if kind != first:
            raise BadRow(
                "mixed types",
                f"holds {shown(value)}, {kind}, but {first} in {where}; write all ids of a column as one type",
                label,
            )
        if kind == "text":
            if not value or str(value).isspace():
                raise BadRow("empty id", "the id is empty; fill it in or remove the row", label)
            if "\0" in str(value):
                raise BadRow("empty id", f"the id {value!r} holds a NUL character; remove it", label)
            _check_encodable(str(value), label)
        return str(value)

    # Planning ------------------------------------------------------------------------------------------------------

    def _mapped(self, names: Sequence[str]) -> dict[str, str]:
        source = {}
        taken = set(self._columns.values())
        for name in names:
            if is_ours(name) and name not in self._columns and name not in taken:
                source[name] = name
        for ours, theirs in self._columns.items():
            if theirs is None:
                continue
            if theirs not in self._names:
                raise BadRow(
                    "missing column",
                    f"column {theirs!r}, which columns= maps to {ours!r}, is missing ({there_are(names)})",
                )
            source[ours] = theirs
        return source

    def _single(self, ours: str) -> _Field | None:
        return _Field((self._source[ours],)) if ours in self._source else None

    def _several(self, ours: str, first: Mapping[str, Any]) -> _Field | None:
        """Find one column, numbered columns or one column of lists."""
        base, suffix = (ours[:-3], "_id") if ours.endswith("_id") else (ours, "")
        plural = f"{base}_ids" if suffix else f"{base}s"
        numbered = sorted(
            int(match.group(1))
            for name in self._source
            if (match := re.fullmatch(rf"{base}_([1-9][0-9]*){suffix}", name))
        )
        forms = [name for name in (ours, plural) if name in self._source]
        if len(forms) + bool(numbered) > 1:
            there = forms + [f"{base}_{place}{suffix}" for place in numbered]
            raise BadRow(
                "doubled column",
                f"both {there[0]!r} and {there[1]!r} are there; leave one out with columns={{{there[0]!r}: None}}",
            )
        if numbered:
            for place, found in enumerate(numbered, start=1):
                if place != found:
                    raise BadRow("missing column", f"column {base}_{place}{suffix} is missing before {found}; add it")
            return _Field(tuple(self._source[f"{base}_{place}{suffix}"] for place in numbered))
        if not forms:
            return None
        theirs = self._source[forms[0]]
        return _Field((theirs,), listed=isinstance(first.get(theirs), (list, tuple)) or forms[0] == plural)

    def _check_complete(self, has_queries: bool, has_passages: bool) -> None:
        there = there_are(sorted(name for name in self._names))
        for text, by_id, name, can, setting in (
            (self._query, self._query_id, "query", has_queries, "queries"),
            (self._positive, self._positive_id, "positive", has_passages, "collection"),
            (self._negative, self._negative_id, "negative", has_passages, "collection"),
        ):
            if text is not None:
                continue
            if by_id is None:
                if name != "negative" or self._wanted:
                    raise BadRow(
                        "missing column",
                        f"column {name!r} is missing ({there}); name it with columns={{{name!r}: ...}}",
                    )
            elif not can:
                raise BadRow(
                    "missing column",
                    f"column {name!r} is missing, though its ids are there ({there}); pass {setting}= with the texts",
                )

    def _check_ids(self) -> None:
        if self.num_negatives and (self._positive_id is None) != (self._negative_id is None):
            has, lacks = ("positive", "negative") if self._positive_id else ("negative", "positive")
            kept = self._positive_id or self._negative_id
            assert kept is not None
            raise BadRow(
                "missing column",
                f"there are ids of the {has}s but none of the {lacks}s; map them with columns=, or leave "
                f"{kept.columns[0]!r} out with columns={{'{has}_id': None}}",
            )
        if self._known is not None and self._positive_id is None:
            raise BadRow(
                "missing column",
                f"there is {KNOWN} but no positive_id it could be compared with; map it with columns=, or leave it "
                f"out with columns={{{KNOWN!r}: None}}",
            )

    def _used(self) -> set[str]:
        fields = (
            self._query, self._query_id, self._positive, self._positive_id, self._negative, self._negative_id,
            self._known, self._labelled,
        )  # fmt: skip
        return {name for found in (*fields, self._scores) if found is not None for name in found.columns}

    def _check_names(self, row: Mapping[str, Any]) -> None:
        """Refuse what would be read otherwise, had it come first."""
        new = [name for name in row if name not in self._names and is_ours(name) and name not in self._columns]
        if new:
            raise BadRow(
                "other columns",
                f"the first row has no {new[0]!r}; write the same keys in every row, or leave it out with "
                f"columns={{{new[0]!r}: None}}",
            )

    def _flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return _split_passages(row, self._objects) if self._objects else row

    def _add_object_ids(self, first: Mapping[str, Any]) -> None:
        for ours, theirs in list(self._source.items()):
            name = theirs + _IDS_OF
            if theirs not in self._objects or any(value is None for value in first[name]):
                continue
            id_name = "positive_ids" if ours.startswith("positive") else "negative_ids"
            if id_name not in self._source and self._columns.get(id_name, "") is not None:
                self._source[id_name] = name


def _flag(label: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRow(
            "mixed types",
            f"holds {shown(value)} where true is needed, or false for a row that is not judged; write one of them "
            f"(not as text), or leave the column out with columns={{{LABELLED!r}: None}}",
            label,
        )
    return value


def _check_encodable(value: str, label: str) -> None:
    if not is_utf8(value):
        raise BadRow("not UTF-8", "half a surrogate pair; it is not text in any encoding", label)


# Lists of passages as objects {docid, title, text} ----------------------------------------------------------------


def _is_passages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, dict) for item in value)


def _split_passages(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The row with lists of texts for lists of objects, and their ids (None where there is none) in columns beside."""
    flat = dict(row)
    for name in columns:
        value = get(row, name)
        if (value and not _is_passages(value)) or not isinstance(value, (list, tuple)):
            raise BadRow("mixed types", f"holds {shown(value)} where a list of objects is needed", name)
        for place, item in enumerate(value):
            if "text" not in item:
                raise BadRow("missing column", "a passage without the key 'text'; add it", f"{name}[{place}]")
        flat[name] = [_joined(item["text"], item.get("title")) for item in value]
        flat[name + _IDS_OF] = [next((item[key] for key in _ID_KEYS if key in item), None) for item in value]
    return flat


def _joined(text: Any, title: Any) -> Any:
    return joined(title.strip(), text.strip()) if isinstance(title, str) and isinstance(text, str) else text


# A teacher's scores of a row ---------------------------------------------------------------------------------------


def _score_columns(name: str, names: Sequence[str], negatives: int) -> _Field:
    """One column of lists, or one a candidate: positive_teacher_score and negative_teacher_score and so on."""
    if name in names:
        return _Field((name,), listed=True)
    one = ["negative"] if negatives == 1 and f"negative_{name}" in names else []
    numbered = one or [f"negative_{place + 1}" for place in range(negatives)]
    columns = tuple(f"{candidate}_{name}" for candidate in ("positive", *numbered))
    if missing := [column for column in columns if column not in names]:
        raise BadRow(
            "missing column",
            f"there is neither a column {name!r} nor {missing[0]!r} ({there_are(names)}); give scores= the name "
            "of a list, one score a candidate and the positive first, or what follows positive_ and negative_",
        )
    return _Field(columns)


def _read_scores(row: Mapping[str, Any], found: _Field, positives: list[str], negatives: list[str]) -> list[float]:
    labels, column = [*positives, *negatives], found.columns[0]
    if len(positives) != 1:
        raise BadRow(
            "misaligned scores",
            f"{len(positives)} positives in a row with scores; write a row of each, with scores of its own",
            column,
        )
    if found.listed and not isinstance(get(row, column), (list, tuple)):
        raise BadRow(
            "mixed types",
            f"holds {shown(row[column])}, where a list of {len(labels)} scores is needed, positive first",
            column,
        )
    values = found.values(row)
    if len(values) != len(labels):
        raise BadRow(
            "misaligned scores",
            f"{len(values)} scores for {len(labels)} candidates; give one each, positive first",
            column,
        )
    query = next((f", query {row[name]!r}" for name in ("query_id", "query") if name in row), "")
    try:
        return [
            check_score(value, label, f"column {name.split('[')[0]!r}{query}", "score it again, or remove the row")
            for label, (name, value) in zip(labels, values, strict=True)
        ]
    except ValueError as error:
        raise BadRow("bad score", str(error)) from None
