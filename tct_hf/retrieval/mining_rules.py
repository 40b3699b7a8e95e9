"""The rules of mining: which of a query's candidates may train as negatives, and which of these a row takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeAlias

from tct_hf.data.near_duplicates import folded, share_most, shingles
from tct_hf.retrieval.negatives import random_rows, row_generator

if TYPE_CHECKING:
    from datasets import Dataset

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
# (query text, passage text) pairs to a score each; the `predict` of a CrossEncoder is one.
PairScorer: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float]]

# Words a shingle, as in the built-in corpus.
_WIDTH = 3


@dataclass
class MiningCounts:
    """What mining did.

    A row draws from its candidates in random order until it has its negatives: a candidate that is not drawn is not
    looked at. `drawn` counts these looks, and the causes of refusal are shares of it.

    Args:
        queries: with positives.
        rows: made.
        positives_found: rows whose positive is among the candidates of its query.
        drawn: candidates looked at.
        known_positives: of these, refused as a known positive of the query.
        near_duplicates: refused as nearly the same text as a positive of the query.
        repeated: refused as the same text as another negative of the row.
        above_margin: refused as the teacher's score is above the positive's by more than the margin.
        short_rows: rows with too few candidates left.
        random_negatives: random passages that filled such rows up.
        skipped_rows: such rows that were left out.
    """

    queries: int = 0
    rows: int = 0
    positives_found: int = 0
    drawn: int = 0
    known_positives: int = 0
    near_duplicates: int = 0
    repeated: int = 0
    above_margin: int = 0
    short_rows: int = 0
    random_negatives: int = 0
    skipped_rows: int = 0

    def add(self, other: MiningCounts) -> None:
        """Add the figures of another part."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def replace(self, other: MiningCounts) -> None:
        """Take over the figures of another."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

    def summary(self) -> str:
        """For people: rows, what was refused, and which rows had too few candidates."""

        def share(count: int) -> str:
            return f"{count:,} ({count / self.drawn:.1%})" if self.drawn else str(count)

        lines = [
            f"{self.rows:,} triples of {self.queries:,} queries; {self.positives_found:,} rows have their positive "
            "among the candidates",
            f"{self.drawn:,} candidates drawn; refused as known positive {share(self.known_positives)}, "
            f"near-duplicate of one {share(self.near_duplicates)}, repeated {share(self.repeated)}, above the margin "
            f"{share(self.above_margin)}",
        ]
        if self.short_rows:
            mend = (
                f"left out {self.skipped_rows:,} of them"
                if self.skipped_rows
                else f"filled up with {self.random_negatives:,} random passages"
            )
            lines.append(f"{self.short_rows:,} rows had too few candidates: {mend}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen; see `mine_triples` for what the fields mean."""

    num_negatives: int
    depth: int
    seed: int
    margin: float | None
    near_duplicate: float | None
    too_few: str

    def __post_init__(self) -> None:
        for name in ("num_negatives", "depth", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: give a whole number")
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives={self.num_negatives}: it must be 1 or more")
        if self.depth < self.num_negatives:
            raise ValueError(
                f"depth={self.depth}: too few candidates to sample num_negatives={self.num_negatives} from; raise it"
            )
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin={self.margin}: give a finite number, or None to keep what the teacher likes")
        if self.near_duplicate is not None and not 0 < self.near_duplicate <= 1:
            raise ValueError(
                f"near_duplicate={self.near_duplicate}: give a share of common word triples above 0, at most 1, or "
                "None to refuse equal texts alone"
            )
        if self.too_few not in ("fill", "skip"):
            raise ValueError(f'too_few={self.too_few!r} is not known: use "fill" or "skip"')


@dataclass
class Candidate:
    """A passage that may become a negative: its row in the corpus, and its scores where there are any."""

    row: int
    score: float | None
    teacher_score: float | None = None


@dataclass
class OpenRow:
    """A row that is being made: a query with one of its positives, and the negatives chosen so far."""

    query_id: str
    positive: int
    positives: Sequence[int]
    order: Iterator[Candidate]
    chosen: list[Candidate] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    positive_teacher_score: float | None = None
    random_negatives: int = 0


class BlockMiner:
    """Makes the rows of some queries; it holds the texts that these rows have looked at.

    Args:
        corpus: column text.
        ids: of its passages.
        rules: of choosing.
        queries: query id to text.
        teacher: scores pairs of texts, or holds scores by ids; None where nobody judges.
    """

    def __init__(
        self,
        corpus: Dataset,
        ids: Sequence[str],
        rules: Rules,
        queries: Mapping[str, str],
        teacher: PairScorer | Scores | None,
    ) -> None:
        self._texts = corpus.select_columns("text")
        self._ids, self._rules, self._queries, self._teacher = ids, rules, queries, teacher
        self.text: dict[int, str] = {}
        self._shingles: dict[int, frozenset[int]] = {}
        self._folded: dict[int, str] = {}
        self._scores: dict[tuple[str, int], float] = {}
        self.counts = MiningCounts()

    def rows(
        self, positives: Mapping[str, Sequence[int]], candidates: Mapping[str, Mapping[int, float]]
    ) -> list[OpenRow]:
        """Choose the negatives of every (query, positive).

        Args:
            positives: query id to rows of the corpus.
            candidates: query id to row of the corpus to score, best first, at most `depth`.

        Returns:
            The rows that have all their negatives, in the order of `positives`.

        Raises:
            ValueError: the corpus is too small to fill a row up, or the teacher lacks a score.
        """
        rows = []
        for query_id, own in positives.items():
            found = candidates.get(query_id, {})
            for positive in own:
                self.counts.positives_found += positive in found
                rows.append(OpenRow(query_id, positive, own, self._order(query_id, positive, found)))
        self.counts.queries += len(positives)
        self._read({row.positive for row in rows})
        pending = rows
        while pending:
            # A few more than are missing: most rows are full after one turn, and a teacher scores a turn at once.
            drawn = [
                (row, list(itertools.islice(row.order, self._rules.num_negatives - len(row.chosen) + 2)))
                for row in pending
            ]
            self._read({c.row for row, part in drawn for c in part if c.row not in row.positives})
            self._score(drawn)
            for row, part in drawn:
                for candidate in part:
                    self._consider(row, candidate)
            pending = [row for row, part in drawn if part and len(row.chosen) < self._rules.num_negatives]
        return [row for row in rows if self._is_whole(row)]

    def _order(self, query_id: str, positive: int, found: Mapping[int, float]) -> Iterator[Candidate]:
        """The candidates in random order, then random passages where a row is to be filled up."""
        draw = row_generator(self._rules.seed, query_id, self._ids[positive])
        for row in draw.sample(list(found), len(found)):
            yield Candidate(row, found[row])
        if self._rules.too_few == "fill":
            for row in random_rows(draw, len(self._ids), 100 * self._rules.num_negatives):
                yield Candidate(row, None)

    def _read(self, rows: set[int]) -> None:
        missing = sorted(rows - self.text.keys())
        if missing:
            self.text.update(zip(missing, self._texts[missing]["text"], strict=True))

    def _shingled(self, row: int) -> frozenset[int]:
        if row not in self._shingles:
            self._shingles[row] = shingles(self.text[row], _WIDTH)
        return self._shingles[row]

    def _plain(self, row: int) -> str:
        if row not in self._folded:
            self._folded[row] = folded(self.text[row])
        return self._folded[row]

    def _copies_a_positive(self, row: OpenRow, candidate: int) -> bool:
        threshold = self._rules.near_duplicate
        text = self._plain(candidate)
        return any(
            self._plain(positive) == text
            or (threshold is not None and share_most(self._shingled(positive), self._shingled(candidate), threshold))
            for positive in row.positives
        )

    def _consider(self, row: OpenRow, candidate: Candidate) -> None:
        if len(row.chosen) == self._rules.num_negatives or candidate.row in row.seen:
            return
        row.seen.add(candidate.row)
        cause = self._cause(row, candidate)
        if candidate.score is not None:
            self.counts.drawn += 1
            if cause is not None:
                setattr(self.counts, cause, getattr(self.counts, cause) + 1)
        if cause is None:
            row.chosen.append(candidate)
            row.texts.add(self._plain(candidate.row))
            row.random_negatives += candidate.score is None

    def _cause(self, row: OpenRow, candidate: Candidate) -> str | None:
        """Why a candidate is refused, by the name of its count; None where it may train."""
        if candidate.row in row.positives:
            return "known_positives"
        if self._copies_a_positive(row, candidate.row):
            return "near_duplicates"
        if self._plain(candidate.row) in row.texts:
            return "repeated"
        if candidate.score is not None:
            candidate.teacher_score = self._scores.get((row.query_id, candidate.row))
        margin, positive = self._rules.margin, row.positive_teacher_score
        if margin is None or positive is None or candidate.teacher_score is None:
            return None
        return "above_margin" if candidate.teacher_score > positive + margin else None

    def _score(self, drawn: Sequence[tuple[OpenRow, Sequence[Candidate]]]) -> None:
        """Have the teacher score the positives and the candidates that the other rules leave."""
        if self._teacher is None:
            return
        wanted: dict[tuple[str, int], None] = {}
        for row, part in drawn:
            wanted[row.query_id, row.positive] = None
            for candidate in part:
                # Random passages fill up what the margin empties, so that it must not empty it again.
                if (
                    candidate.score is not None
                    and candidate.row not in row.positives
                    and not self._copies_a_positive(row, candidate.row)
                ):
                    wanted[row.query_id, candidate.row] = None
        pairs = [pair for pair in wanted if pair not in self._scores]
        if callable(self._teacher):
            found = (
                self._teacher([(self._queries[query_id], self.text[row]) for query_id, row in pairs]) if pairs else []
            )
            scores = [float(score) for score in found]
            if len(scores) != len(pairs):
                raise ValueError(f"teacher: it gave {len(scores)} scores for {len(pairs)} pairs; return one for each")
        else:
            scores = [self._known(self._teacher, query_id, row) for query_id, row in pairs]
        for (query_id, passage), score in zip(pairs, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"teacher: its score of query {query_id!r} and passage {self._ids[passage]!r} is {score}; "
                    "check its weights"
                )
            self._scores[query_id, passage] = score
        for row, _ in drawn:
            row.positive_teacher_score = self._scores[row.query_id, row.positive]

    def _known(self, scores: Scores, query_id: str, row: int) -> float:
        try:
            return float(scores[query_id][self._ids[row]])
        except KeyError:
            raise ValueError(
                f"teacher: it has no score of query {query_id!r} and passage {self._ids[row]!r}; score all positives "
                f"and the best {self._rules.depth} candidates, or give a function that scores pairs of texts"
            ) from None

    def _is_whole(self, row: OpenRow) -> bool:
        short = len(row.chosen) < self._rules.num_negatives
        if short and self._rules.too_few == "fill":
            raise ValueError(
                f"corpus: query {row.query_id!r} has only {len(row.chosen)} passages that may train as its negatives, "
                f"and num_negatives is {self._rules.num_negatives}; lower it, add passages, or leave such rows out "
                'with too_few="skip"'
            )
        self.counts.short_rows += bool(short or row.random_negatives)
        self.counts.skipped_rows += short
        self.counts.random_negatives += row.random_negatives
        self.counts.rows += not short
        return not short
