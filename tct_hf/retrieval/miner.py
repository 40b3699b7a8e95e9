"""The rules of mining: which of a query's candidates may train as negatives, and which of these a row takes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from tct_hf.data.column_names import negative_columns
from tct_hf.data.near_duplicates import folded, is_query, share_most, shingles
from tct_hf.data.qrels import ids_are_shared
from tct_hf.data.rows import BadRow, as_id, as_text
from tct_hf.retrieval.checks import check_ids

if TYPE_CHECKING:
    from datasets import Dataset

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
# (query text, passage text) pairs to a score each; the `predict` of a CrossEncoder is one.
PairScorer: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float]]

_WIDTH = 3  # words a shingle, as in the built-in corpus


@dataclass
class MiningCounts:
    """What mining did.

    A row draws from its candidates in random order until it has its negatives: a candidate that is not drawn is not
    looked at. `drawn` counts these looks, and the causes of refusal are shares of it.
    """

    queries: int = 0  # with positives
    rows: int = 0
    positives_found: int = 0  # rows whose positive is among the candidates of its query
    drawn: int = 0
    known_positives: int = 0  # refused as a known positive of the query
    themselves: int = 0  # refused as the query itself
    near_duplicates: int = 0  # refused as nearly the same text as a positive of the query
    repeated: int = 0  # refused as the same text as another negative of the row
    above_margin: int = 0  # refused as the teacher scores them above the positive by more than the margin
    short_rows: int = 0  # rows with too few candidates left
    random_negatives: int = 0  # random passages that filled such rows up
    skipped_rows: int = 0  # such rows that were left out

    def add(self, other: MiningCounts) -> None:
        """Add the figures of another part."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def summary(self) -> str:
        """Rows, what was refused, and which rows had too few candidates, in words."""

        def share(count: int) -> str:
            return f"{count:,} ({count / self.drawn:.1%})" if self.drawn else str(count)

        lines = [
            f"{self.rows:,} triples of {self.queries:,} queries; {self.positives_found:,} rows have their positive "
            "among the candidates",
            f"{self.drawn:,} candidates drawn; refused as known positive {share(self.known_positives)}, "
            f"the query itself {share(self.themselves)}, near-duplicate of a positive {share(self.near_duplicates)}, "
            f"repeated {share(self.repeated)}, above the margin {share(self.above_margin)}",
        ]
        if self.short_rows:
            done = f"filled up with {self.random_negatives:,} random passages"
            if self.skipped_rows:
                done = f"left out {self.skipped_rows:,} of them"
            lines.append(f"{self.short_rows:,} rows had too few candidates: {done}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen; see `mine_triples` for what the fields mean."""

    num_negatives: int
    depth: int
    seed: int
    margin: float | None = None
    near_duplicate: float | None = None
    too_few: str = "fill"
    relative_margin: float | None = None

    @property
    def judges(self) -> bool:
        """Whether the scores of a teacher refuse candidates."""
        return self.margin is not None or self.relative_margin is not None

    def most(self, positive: float) -> float:
        """The highest score of a teacher that a candidate may have beside a positive's."""
        absolute = math.inf if self.margin is None else positive + self.margin
        relative = math.inf if self.relative_margin is None else positive - abs(positive) * self.relative_margin
        return min(absolute, relative)

    def __post_init__(self) -> None:
        few, near = self.num_negatives, self.near_duplicate
        refuse(
            {
                f"num_negatives={few}: it must be 1 or more": few < 1,
                f"depth={self.depth}: too few candidates to sample num_negatives={few} from": self.depth < few,
                f"margin={self.margin}: give a finite number, or None to keep what the teacher likes": (
                    self.margin is not None and not math.isfinite(self.margin)
                ),
                f"relative_margin={self.relative_margin}: give a share of the positive's score, 0 to 1, or None": (
                    self.relative_margin is not None and not 0 <= self.relative_margin <= 1
                ),
                f"near_duplicate={near}: give a share of common word triples above 0, at most 1, or None": (
                    near is not None and not 0 < near <= 1
                ),
                f'too_few={self.too_few!r} is not known: use "fill" or "skip"': self.too_few not in ("fill", "skip"),
            }
        )


def refuse(faults: Mapping[str, bool]) -> None:
    """Raise the first message that is true."""
    for message, wrong in faults.items():
        if wrong:
            raise ValueError(message)


@dataclass
class OpenRow:
    """A row of triples that is being made; passages are rows of the corpus."""

    query_id: str
    positive: int
    positives: Sequence[int]  # all known ones of the query
    candidates: Mapping[int, float]  # to their scores, best first
    text: str | None = None  # of the positive, where it is not the passage's own
    chosen: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Judged:
    """A corpus, and which of its rows are the positives of a query."""

    corpus: Dataset
    ids: Sequence[str]
    row_of: Mapping[str, int]
    positives: Mapping[str, list[int]]  # of each query that has any
    same_ids: bool  # a passage under the id of a query is the query itself

    @classmethod
    def of(
        cls,
        corpus: Dataset,
        queries: Mapping[str, str],
        qrels: Mapping[str, Mapping[str, int]],
        *,
        may_be_none: bool = False,
    ) -> Judged:
        """Read and check both; `may_be_none`: of the positives."""
        corpus, ids = read_corpus(corpus)
        row_of = {passage_id: row for row, passage_id in enumerate(ids)}
        positives = positive_rows(queries, qrels, row_of) if qrels or not may_be_none else {}
        return cls(corpus, ids, row_of, positives, ids_are_shared(qrels))


class Miner:
    """Chooses the negatives of the rows of some queries, id to text; it holds the texts that were looked at.

    Attributes:
        counts: what was drawn and refused.
        scores: the teacher's, of query id and passage.
    """

    def __init__(
        self, judged: Judged, rules: Rules, queries: Mapping[str, str], teacher: PairScorer | None = None
    ) -> None:
        self._judged, self._rules, self._queries, self._teacher = judged, rules, queries, teacher
        self._ids = judged.ids
        for query_id, text in queries.items():
            try:
                as_id(query_id, "id"), as_text(text, "text", allow_empty=True)
            except BadRow as error:
                raise ValueError(error.at(f"query {query_id!r}")) from None
        self._text: dict[int, str] = {}
        self._title: dict[int, Any] = {}
        self._folded = cache(lambda passage: folded(self._text[passage]))
        self._shingles = cache(lambda passage: shingles(self._text[passage], _WIDTH))
        self.counts = MiningCounts()
        self.scores: dict[tuple[str, int], float] = {}

    def choose(self, rows: Sequence[OpenRow]) -> list[OpenRow]:
        """Choose the negatives of rows, and return the rows that have all of them, in their order.

        A row whose positive is its query, judged relevant to itself or to its copy, is left out.
        """
        wanted = self._rules.num_negatives
        self.read({positive for row in rows for positive in row.positives})
        rows = [row for row in rows if not self.is_query(row.query_id, row.positive)]
        self.counts.positives_found += sum(row.positive in row.candidates for row in rows)
        self.counts.queries += len({row.query_id for row in rows})
        pending = [(row, self._order(row)) for row in rows]
        while pending:
            # A few more than are missing: most rows are full after one turn, and a teacher scores a turn at once.
            drawn = [(row, list(islice(order, wanted - len(row.chosen) + 2))) for row, order in pending]
            self.read({passage for _, part in drawn for passage in part})
            if self._teacher is not None:
                self._score(drawn, self._teacher)
            for row, part in drawn:
                for passage in part:
                    self._consider(row, passage)
            pending = [
                one for one, (row, part) in zip(pending, drawn, strict=True) if part and len(row.chosen) < wanted
            ]
        return [row for row in rows if self._is_whole(row)]

    def triple(self, row: OpenRow) -> dict[str, Any]:
        """A row with the columns of :func:`column_names`."""
        negatives = dict(zip(negative_columns(self._rules.num_negatives), row.chosen, strict=True))
        return {
            "query": self._queries[row.query_id],
            "positive": self._text[row.positive] if row.text is None else row.text,
            **{name: self._text[passage] for name, passage in negatives.items()},
            "query_id": row.query_id,
            "positive_id": self._ids[row.positive],
            **{f"{name}_id": self._ids[passage] for name, passage in negatives.items()},
            "known_positive_ids": [self._ids[positive] for positive in row.positives],
        }

    def _order(self, row: OpenRow) -> Iterator[int]:
        """The candidates in random order, then random passages where a row is to be filled up."""
        # A string seed goes through SHA-512: the same numbers on every platform and in every process. Query and
        # positive are in it, so that a row does not depend on which others are asked for.
        draw = random.Random(f"{self._rules.seed}\x1f{row.query_id}\x1f{self._ids[row.positive]}")
        yield from draw.sample(list(row.candidates), len(row.candidates))
        if self._rules.too_few == "skip":
            return
        total = len(self._ids)
        if total > 10_000:  # in the end every passage, but a large corpus is put in order only where it must be
            for _ in range(100 * self._rules.num_negatives):
                yield draw.randrange(total)
        yield from draw.sample(range(total), total)

    def read(self, passages: set[int]) -> None:
        """Read the texts of passages at once, which is faster than one by one."""
        missing = sorted(passages - self._text.keys())
        if missing:
            found = self._judged.corpus[missing]
            self._text.update(zip(missing, found["text"], strict=True))
            self._title.update(zip(missing, found.get("title", ()), strict=False))

    def is_query(self, query_id: str, passage: int) -> bool:
        """Whether a passage is the query itself: by its text, with or without its title, or by its id."""
        self.read({passage})
        same_id = self._ids[passage] == query_id
        title = str(self._title.get(passage) or "")
        return (same_id and self._judged.same_ids) or is_query(
            self._text[passage], self._queries[query_id], title=title, same_id=same_id
        )

    def _consider(self, row: OpenRow, passage: int) -> None:
        if len(row.chosen) == self._rules.num_negatives or passage in row.seen:
            return
        row.seen.add(passage)
        cause = self._cause(row, passage)
        if cause is None:
            row.chosen.append(passage)
        if passage in row.candidates:
            self.counts.drawn += 1
            if cause is not None:
                setattr(self.counts, cause, getattr(self.counts, cause) + 1)

    def _cause(self, row: OpenRow, passage: int) -> str | None:
        """Why a passage is refused, by the name of its count; None where it may train."""
        if cause := self._barred(row, passage):
            return cause
        if self._folded(passage) in map(self._folded, row.chosen):
            return "repeated"
        score = self.scores.get((row.query_id, passage))
        if score is not None and score > self._rules.most(self.scores[row.query_id, row.positive]):
            return "above_margin"
        return None

    def _barred(self, row: OpenRow, passage: int) -> str | None:
        """The same by query and positives alone."""
        if passage in row.positives:
            return "known_positives"
        if self.is_query(row.query_id, passage):
            return "themselves"
        return "near_duplicates" if self._copies_a_positive(row, passage) else None

    def _copies_a_positive(self, row: OpenRow, passage: int) -> bool:
        if row.text is not None:
            return bool(folded(row.text) == self._folded(passage))
        threshold = self._rules.near_duplicate
        return any(
            self._folded(positive) == self._folded(passage)
            or (threshold is not None and share_most(self._shingles(positive), self._shingles(passage), threshold))
            for positive in row.positives
        )

    def _score(self, drawn: Sequence[tuple[OpenRow, Sequence[int]]], teacher: PairScorer) -> None:
        """Have the teacher score the positives and the candidates that the other rules leave."""
        wanted: dict[tuple[str, int], None] = {}
        for row, part in drawn:
            wanted[row.query_id, row.positive] = None
            # Random passages fill up what the margin empties, so that it must not empty it again.
            asked = (passage for passage in part if passage in row.candidates and not self._barred(row, passage))
            wanted |= {(row.query_id, passage): None for passage in asked}
        pairs = [pair for pair in wanted if pair not in self.scores]
        texts = [(self._queries[query_id], self._text[passage]) for query_id, passage in pairs]
        scores = [float(score) for score in teacher(texts)] if pairs else []
        if len(scores) != len(pairs):
            raise ValueError(f"teacher: it gave {len(scores)} scores for {len(pairs)} pairs; return one for each")
        for (query_id, passage), score in zip(pairs, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"teacher: its score of query {query_id!r} and passage {self._ids[passage]!r} is {score}; "
                    "check its weights"
                )
            self.scores[query_id, passage] = score

    def _is_whole(self, row: OpenRow) -> bool:
        short = len(row.chosen) < self._rules.num_negatives
        filled = sum(passage not in row.candidates for passage in row.chosen)
        if short and self._rules.too_few == "fill":
            raise ValueError(
                f"corpus: query {row.query_id!r} has only {len(row.chosen)} passages that may train as its negatives, "
                f"and num_negatives is {self._rules.num_negatives}; lower it, or add passages"
            )
        self.counts.short_rows += bool(short or filled)
        self.counts.skipped_rows += short
        self.counts.random_negatives += filled
        self.counts.rows += not short
        return not short


def column_names(num_negatives: int) -> list[str]:
    """The columns of `bm25_triples` with this many negatives a row, in their order."""
    names = negative_columns(num_negatives)
    ids = ["query_id", "positive_id", *(f"{name}_id" for name in names)]
    return ["query", "positive", *names, *ids, "known_positive_ids"]


def read_corpus(corpus: Dataset) -> tuple[Dataset, list[str]]:
    """A corpus in no format, with its titles if any, and its ids as text.

    ValueError where an id is repeated, or an id or a text is missing.
    """
    from datasets import Dataset  # slow to import

    if not isinstance(corpus, Dataset):
        raise ValueError(f"corpus: a {type(corpus).__name__} where a Dataset is needed; use Dataset.from_list")
    if missing := {"id", "text"}.difference(corpus.column_names):
        raise ValueError(f"corpus: column {min(missing)!r} is missing; it has {', '.join(corpus.column_names)}")
    corpus = corpus.select_columns([name for name in ("id", "text", "title") if name in corpus.column_names])
    table = corpus.with_format("arrow")[:]
    for name in ("id", "text"):
        if table[name].null_count:
            at = table[name].is_null().index(True).as_py()
            raise ValueError(f"corpus: the {name} of row {at} is missing (null); fill it in or remove the row")
    ids = table["id"].to_pylist()
    if ids and type(ids[0]) is int:
        ids = list(map(str, ids))
    check_ids(ids, len(ids), "corpus")
    return corpus.with_format(None), ids


def positive_rows(
    queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]], row_of: Mapping[str, int]
) -> dict[str, list[int]]:
    """The positives of each query that has any, as rows of the corpus, which `row_of` gives by id."""
    found: dict[str, list[int]] = {}
    for query_id, grades in qrels.items():
        wanted = [passage_id for passage_id, grade in grades.items() if grade >= 1]
        if wanted and query_id not in queries:
            raise ValueError(f"qrels: query {query_id!r} is not among the queries; load both from the same split")
        for passage_id in wanted:
            if passage_id not in row_of:
                raise ValueError(
                    f"qrels: passage {passage_id!r} (query {query_id!r}) is not in the corpus; load both together"
                )
            found.setdefault(query_id, []).append(row_of[passage_id])
    if not found:
        raise ValueError("qrels: no positive judgement, so there is no triple to make; check the split")
    return found
