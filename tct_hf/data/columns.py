"""Raw rows of any source to training rows: which column is what, and checks of every value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tct_hf.data.column_names import KNOWN, KNOWN_TEXTS, LABELLED, SCORES, TEXT, is_ours, negative_columns
from tct_hf.data.near_duplicates import text_key
from tct_hf.data.rows import BadRow, as_id, as_score, as_text, get, plain, shown, there_are
from tct_hf.data.texts import Texts, joined

# What a row may hold, in the order of the training row's columns; of "positive" and "negative" one or several.
_PARTS = ("query", "positive", "negative", "query_id", "positive_id", "negative_id", KNOWN, LABELLED)
# What the ids of a column of passage objects are called once they are taken out of it.
_IDS_OF = "[].id"
_ID_KEYS = ("docid", "_id", "id", "passage_id", "psg_id")
# Bad rows of this kind show that a setting does not fit the source.
NOTHING = "nothing to look up"


@dataclass(frozen=True)
class _Field:
    """Columns of the source that hold one part; `listed`: a single column of lists."""

    columns: tuple[str, ...]
    listed: bool = False

    def items(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """(label for messages, value) of each item."""
        if not self.listed:
            return [(name, get(row, name)) for name in self.columns]
        name = self.columns[0]
        value = plain(get(row, name))
        if not isinstance(value, (list, tuple)):
            raise BadRow("mixed types", f"holds {shown(value)} where a list is needed, as in other rows", name)
        return [(f"{name}[{place}]", item) for place, item in enumerate(value)]


class RowReader:
    """Turns the rows of one source into training rows; the first row decides which columns there are.

    Options are those of `load_triples`; a BadRow says which column is missing or doubled.

    Attributes:
        fields: the columns of the source that hold each part of a row.
        negatives: the names of the negative columns.
        lookups: the id columns whose texts are not in the source, with where they are.
        like: what row the others must be like, for messages.
    """

    def __init__(
        self,
        names: Sequence[str],
        first: Mapping[str, Any],
        columns: Mapping[str, str | None] | None = None,
        num_negatives: int | None = None,
        queries: Texts | None = None,
        passages: Texts | None = None,
        scores: str | None = None,
    ) -> None:
        self.like = "the first row"
        self._names, self._columns, self._wanted = frozenset(names), dict(columns or {}), num_negatives
        self._source = self._mapped(names)
        self._objects = [
            theirs for ours, theirs in self._source.items() if TEXT.fullmatch(ours) and _is_passages(first.get(theirs))
        ]
        first = self._flat(first)
        self._add_object_ids(first)
        found = {part: self._find(part, first) for part in _PARTS}
        self.fields: dict[str, _Field] = {part: field for part, field in found.items() if field is not None}
        self._take_for_ids(first, ("query",), queries, "queries")
        self._take_for_ids(first, ("positive", "negative"), passages, "collection")
        self._check_complete(queries, passages)
        every = [self.fields.get(part) or self.fields.get(f"{part}_id") for part in ("positive", "negative")]
        # Also where none of them is taken: a row's scores are of all its candidates.
        self._candidates = [field for field in every if field is not None]
        if num_negatives == 0:
            self.fields = {part: field for part, field in self.fields.items() if not part.startswith("negative")}
        there = sum(len(field.items(first)) for field in self._candidates[1:])
        self.negatives = negative_columns(there if num_negatives is None else num_negatives)
        self._check_ids()
        self.lookups: dict[str, Texts] = {
            f"{name}_id": texts
            for name, texts in (("query", queries), *((name, passages) for name in ("positive", *self.negatives)))
            if texts is not None and name.partition("_")[0] not in self.fields
        }
        self._scores = None if scores is None else _score_columns(scores, names, there)

    @cached_property
    def has_known(self) -> bool:
        return KNOWN in self.fields or ("positive_id" in self.fields and self.fields["positive_id"].listed)

    @cached_property
    def _lists_texts(self) -> bool:
        """Each row of the source may have several positives, which have no ids."""
        return "positive_id" not in self.fields and not self.one_positive

    @cached_property
    def one_positive(self) -> bool:
        """Each row of the source makes one training row."""
        found = [self.fields[part] for part in ("positive", "positive_id") if part in self.fields]
        return not any(field.listed or len(field.columns) > 1 for field in found)

    def source_columns(self) -> list[str]:
        """The columns of the source that are read."""
        fields = [*self.fields.values(), *([] if self._scores is None else [*self._candidates, self._scores])]
        return sorted({name.removesuffix(_IDS_OF) for field in fields for name in field.columns})

    def output_columns(self, known: bool) -> list[str]:
        """The columns of the training rows, in order."""
        names = ["query", "positive", *self.negatives]
        if "query_id" in self.fields:
            names.append("query_id")
        if "positive_id" in self.fields:
            names += ["positive_id", *(f"{name}_id" for name in self.negatives)]
        more = {
            KNOWN: known,
            KNOWN_TEXTS: self._lists_texts,
            LABELLED: LABELLED in self.fields,
            SCORES: self._scores is not None,
        }
        return [*names, *(name for name, there in more.items() if there)]

    # Reading -------------------------------------------------------------------------------------------------------

    def read(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Check one row; a training row for each positive, without texts that are looked up later."""
        if not row.keys() <= self._names:
            self._check_names(row)
        row = self._flat(row)
        read = {part: self._values(part, field, row) for part, field in self.fields.items()}
        positives = [read[part] for part in ("positive", "positive_id") if part in read]
        if len({len(values) for values in positives}) > 1:
            texts, ids = map(len, positives)
            raise BadRow("different lengths", f"{texts} positives but {ids} positive ids; match them")
        if not positives[0]:
            column = self._candidates[0].columns[0]
            raise BadRow("no positive", "the list is empty; add a positive or remove the row", column)
        shared = {part: read[part][0] for part in ("query", "query_id", LABELLED) if part in read}
        for part, suffix in (("negative", ""), ("negative_id", "_id")):
            if part in read:
                shared.update(
                    (f"{name}{suffix}", value) for name, value in zip(self.negatives, read[part], strict=True)
                )
        if self.has_known:
            judged = read["positive_id"] if shared.get(LABELLED, True) else []
            shared[KNOWN] = list(dict.fromkeys([*judged, *read.get(KNOWN, ())]))
        if self._lists_texts:
            shared[KNOWN_TEXTS] = [text_key(text) for text in positives[0]] if shared.get(LABELLED, True) else []
        if self._scores is not None:
            scores, count = self._read_scores(row, self._scores), len(positives[0])
        for at in range(len(positives[0])):
            own: dict[str, Any] = {part: read[part][at] for part in ("positive", "positive_id") if part in read}
            if self._scores is not None:
                own[SCORES] = [scores[at], *scores[count : count + len(self.negatives)]]
            yield {**shared, **own}

    def _values(self, part: str, field: _Field, row: Mapping[str, Any]) -> list[Any]:
        items = field.items(row)
        if part.startswith("negative"):
            items = self._cut(items, field.columns[0])
        if part == LABELLED:
            return [_flag(label, value) for label, value in items]
        if part.endswith(("_id", "_ids")):
            return [as_id(value, label) for label, value in items]
        return [as_text(value, label) for label, value in items]

    def _cut(self, items: list[tuple[str, Any]], column: str) -> list[tuple[str, Any]]:
        count, wanted = len(items), len(self.negatives)
        if count < wanted:
            fix = "lower num_negatives or add some"
            raise BadRow("too few negatives", f"{count} negatives where {wanted} are needed; {fix}", column)
        if count > wanted and self._wanted is None:
            fix = f"pass num_negatives={wanted} to take the first ones"
            raise BadRow("too many negatives", f"{count} negatives where {self.like} has {wanted}; {fix}", column)
        return items[:wanted]

    def _check_names(self, row: Mapping[str, Any]) -> None:
        """Refuse what would be read otherwise, had it come first."""
        new = [name for name in row if name not in self._names and is_ours(name) and name not in self._columns]
        if new:
            fix = f"write the same keys in every row, or leave it out with columns={{{new[0]!r}: None}}"
            raise BadRow("other columns", f"{self.like} has no {new[0]!r}; {fix}")

    def _read_scores(self, row: Mapping[str, Any], found: _Field) -> list[float]:
        """A teacher's score of each candidate in the source's row."""
        each = [[label for label, _ in field.items(row)] for field in self._candidates]
        labels, column = [label for labels in each for label in labels], found.columns[0]
        if found.listed and not isinstance(value := get(row, column), (list, tuple)):
            what = f"a list of {len(labels)} scores is needed, positives first"
            raise BadRow("mixed types", f"holds {shown(value)}, where {what}", column)
        items = found.items(row)
        if len(items) != len(labels):
            fix = "give one each, positive first"
            raise BadRow("misaligned scores", f"{len(items)} scores for {len(labels)} candidates; {fix}", column)
        query = next((f" of query {row[name]!r}" for name in ("query_id", "query") if name in row), "")
        return [
            as_score(value, f"{label}{query}", name.split("[")[0])
            for label, (name, value) in zip(labels, items, strict=True)
        ]

    # Planning ------------------------------------------------------------------------------------------------------

    def _mapped(self, names: Sequence[str]) -> dict[str, str]:
        """Our names of the source's columns."""
        taken = set(self._columns.values())
        source = {name: name for name in names if is_ours(name) and name not in self._columns and name not in taken}
        for ours, theirs in self._columns.items():
            if not is_ours(ours):
                known = "query, positive, negative (or negatives, negative_1 ...), their _id, "
                raise ValueError(f"columns: {ours!r} is no column of training, such as {known}{KNOWN}, {LABELLED}")
            if theirs is None:
                continue
            if theirs not in self._names:
                what = f"column {theirs!r}, which columns= maps to {ours!r}, is missing"
                raise BadRow("missing column", f"{what} ({there_are(names)})")
            source[ours] = theirs
        return source

    def _find(self, part: str, first: Mapping[str, Any]) -> _Field | None:
        """One column, numbered columns or one column of lists."""
        base, suffix = (part.removesuffix("_id"), "_id") if part.endswith("_id") else (part, "")
        plural = f"{base}_ids" if suffix else f"{base}s"
        number = re.compile(rf"{base}_([1-9][0-9]*){suffix}")
        numbered = sorted(int(match.group(1)) for name in self._source if (match := number.fullmatch(name)))
        forms = [name for name in (part, plural) if name in self._source]
        if len(forms) + bool(numbered) > 1:
            there = [*forms, *(f"{base}_{place}{suffix}" for place in numbered)]
            fix = f"leave one out with columns={{{there[0]!r}: None}}"
            raise BadRow("doubled column", f"both {there[0]!r} and {there[1]!r} are there; {fix}")
        for place, found in enumerate(numbered, start=1):
            if place != found:
                raise BadRow("missing column", f"column {base}_{place}{suffix} is missing before {found}; add it")
        if numbered:
            return _Field(tuple(self._source[f"{base}_{place}{suffix}"] for place in numbered))
        if not forms:
            return None
        theirs = self._source[forms[0]]
        listed = forms[0] == plural or (base in ("positive", "negative") and _is_list(first.get(theirs)))
        return _Field((theirs,), listed=listed or part == KNOWN)

    def _take_for_ids(self, first: Mapping[str, Any], parts: Sequence[str], texts: Texts | None, setting: str) -> None:
        """Take text columns that hold ids of `texts` for columns of ids, as data sets of id triples name them.

        Nothing changes where the row is bad in itself; a BadRow where the columns hold no ids.
        """
        held = {part: self.fields[part] for part in parts if part in self.fields}
        looked_up = any(part not in held and f"{part}_id" in self.fields for part in parts)
        if texts is None or looked_up or parts[0] not in held:
            return
        items = [item for field in held.values() for item in field.items(first)]
        if not all(isinstance(value, (str, int)) and str(value).strip() for _, value in items):
            return
        has_ids = any(f"{part}_id" in self.fields for part in parts)
        ids = [str(value).encode(errors="replace").decode() for _, value in items]
        if not has_ids and any(text is not None for text in texts.get(ids)):
            self.fields.update((f"{part}_id", self.fields.pop(part)) for part in held)
            return
        label, value = items[0]
        fix = f"{parts[0]!r}: None" if has_ids else f"'{parts[0]}_id': ..."
        what = f"{setting}= has nothing to look up: this holds texts, such as {shown(value)}, no id of {texts.source}"
        raise BadRow(NOTHING, f"{what}; leave {setting}= out, or look ids up with columns={{{fix}}}", label)

    def _check_complete(self, queries: Texts | None, passages: Texts | None) -> None:
        there = there_are(sorted(self._names))
        for part, texts in (("query", queries), ("positive", passages), ("negative", passages)):
            if part in self.fields:
                continue
            if f"{part}_id" not in self.fields:
                if part != "negative" or self._wanted:
                    fix = f"name it with columns={{{part!r}: ...}}"
                    raise BadRow("missing column", f"column {part!r} is missing ({there}); {fix}")
            elif texts is None:
                what = f"column {part!r} is missing, though its ids are there ({there})"
                setting = "queries" if part == "query" else "collection"
                raise BadRow("missing column", f"{what}; pass {setting}= with the texts")

    def _check_ids(self) -> None:
        has = [name for name in ("positive", "negative") if f"{name}_id" in self.fields]
        if self.negatives and len(has) == 1:
            lacks = "negative" if has == ["positive"] else "positive"
            column = self.fields[f"{has[0]}_id"].columns[0]
            fix = f"map them, or leave {column!r} out, with columns={{'{has[0]}_id': None}}"
            raise BadRow("missing column", f"there are ids of the {has[0]}s but none of the {lacks}s; {fix}")
        if KNOWN in self.fields and "positive_id" not in self.fields:
            fix = f"map it, or leave {KNOWN} out, with columns={{{KNOWN!r}: None}}"
            raise BadRow("missing column", f"there is {KNOWN} but no positive_id it could be compared with; {fix}")

    # Lists of passages as objects {docid, title, text} -------------------------------------------------------------

    def _flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with lists of texts for lists of objects, and their ids (None where there is none) beside."""
        flat = dict(row) if self._objects else row
        for name in self._objects:
            value = get(row, name)
            if not _is_list(value) or (value and not _is_passages(value)):
                raise BadRow("mixed types", f"holds {shown(value)} where a list of objects is needed", name)
            for place, item in enumerate(value):
                if "text" not in item:
                    raise BadRow("missing column", "a passage without the key 'text'; add it", f"{name}[{place}]")
            texts = [_with_title(item["text"], item.get("title")) for item in value]
            ids = [next((item[key] for key in _ID_KEYS if key in item), None) for item in value]
            flat = {**flat, name: texts, name + _IDS_OF: ids}
        return flat

    def _add_object_ids(self, first: Mapping[str, Any]) -> None:
        for ours, theirs in list(self._source.items()):
            name = theirs + _IDS_OF
            if theirs not in self._objects or any(value is None for value in first[name]):
                continue
            id_name = "positive_ids" if ours.startswith("positive") else "negative_ids"
            if id_name not in self._source and self._columns.get(id_name, "") is not None:
                self._source[id_name] = name


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_passages(value: Any) -> bool:
    return _is_list(value) and bool(value) and all(isinstance(item, dict) for item in value)


def _with_title(text: Any, title: Any) -> Any:
    return joined(title.strip(), text.strip()) if isinstance(title, str) and isinstance(text, str) else text


def _flag(label: str, value: Any) -> bool:
    if not isinstance(value, bool):
        need = f"holds {shown(value)} where true is needed, or false for a row that is not judged"
        raise BadRow("mixed types", f"{need}; or leave it out with columns={{{LABELLED!r}: None}}", label)
    return value


def _score_columns(name: str, names: Sequence[str], negatives: int) -> _Field:
    """One column of lists, or one a candidate: positive_teacher_score and negative_teacher_score and so on."""
    if name in names:
        return _Field((name,), listed=True)
    one = ["negative"] if negatives == 1 and f"negative_{name}" in names else []
    numbered = one or [f"negative_{place + 1}" for place in range(negatives)]
    columns = tuple(f"{candidate}_{name}" for candidate in ("positive", *numbered))
    if missing := [column for column in columns if column not in names]:
        fix = "give scores= the name of a list, positive first, or what follows positive_ and negative_"
        raise BadRow("missing column", f"neither a column {name!r} nor {missing[0]!r} ({there_are(names)}); {fix}")
    return _Field(columns)
