"""Training triples with mined negatives: what a retriever puts near the top and nobody has judged relevant."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from tct_hf.data.near_duplicates import folded, share_most, shingles
from tct_hf.files import claim, write_aside, write_json_atomic
from tct_hf.retrieval.runs import rank

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
# Queries, id to text, to a run of them: the `run` of an index.
Search: TypeAlias = Callable[[Mapping[str, str]], Scores]
# (query text, passage text) pairs to a score each; the `predict` of a CrossEncoder is one.
PairScorer: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float]]

TRIPLES_FILE = "triples.parquet"
SUMMARY_FILE = "summary.json"
_PARTS = "parts"
_COUNTS = b"tct_mining_counts"
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
            f"near-duplicate of one {share(self.near_duplicates)}, repeated {share(self.repeated)}, above the margin "
            f"{share(self.above_margin)}",
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
    """A row of triples that is being made."""

    query_id: str
    positive: int  # a row of the corpus
    positives: Sequence[int]  # all known ones of the query
    candidates: Mapping[int, float]  # row of the corpus to score, best first
    text: str | None = None  # of the positive, where it is not the passage's own
    chosen: list[Candidate] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    positive_teacher_score: float | None = None
    random_negatives: int = 0


class Miner:
    """Chooses the negatives of the rows of some queries, id to text; it holds the texts that were looked at.

    `plain` gives what is left of a text when two are compared for being equal.
    """

    def __init__(
        self,
        corpus: Dataset,
        ids: Sequence[str],
        rules: Rules,
        queries: Mapping[str, str],
        teacher: PairScorer | Scores | None = None,
        plain: Callable[[str], str] = folded,
    ) -> None:
        self._corpus = corpus.select_columns("text")
        self._ids, self._rules, self._queries, self._teacher, self._plain_of = ids, rules, queries, teacher, plain
        self._text: dict[int, str] = {}
        self._shingles: dict[int, frozenset[int]] = {}
        self._plain: dict[int, str] = {}
        self._scores: dict[tuple[str, int], float] = {}
        self.counts = MiningCounts()

    def choose(self, rows: Sequence[OpenRow]) -> list[OpenRow]:
        """Choose the negatives of rows, and return the rows that have all of them, in their order."""
        wanted = self._rules.num_negatives
        self.counts.positives_found += sum(row.positive in row.candidates for row in rows)
        self.counts.queries += len({row.query_id for row in rows})
        pending = [(row, self._order(row)) for row in rows]
        self._read({positive for row in rows for positive in row.positives})
        while pending:
            # A few more than are missing: most rows are full after one turn, and a teacher scores a turn at once.
            drawn = [(row, list(itertools.islice(order, wanted - len(row.chosen) + 2))) for row, order in pending]
            self._read({candidate.row for _, part in drawn for candidate in part})
            if self._teacher is not None:
                self._score(drawn)
            for row, part in drawn:
                for candidate in part:
                    self._consider(row, candidate)
            pending = [
                one for one, (row, part) in zip(pending, drawn, strict=True) if part and len(row.chosen) < wanted
            ]
        return [row for row in rows if self._is_whole(row)]

    def triple(self, row: OpenRow) -> dict[str, Any]:
        """A row with the columns of :func:`column_names`."""
        names = negative_names(self._rules.num_negatives)
        chosen = [candidate.row for candidate in row.chosen]
        return {
            "query": self._queries[row.query_id],
            "positive": self._text[row.positive] if row.text is None else row.text,
            **{name: self._text[at] for name, at in zip(names, chosen, strict=True)},
            "query_id": row.query_id,
            "positive_id": self._ids[row.positive],
            **{f"{name}_id": self._ids[at] for name, at in zip(names, chosen, strict=True)},
            "known_positive_ids": [self._ids[positive] for positive in row.positives],
        }

    def _order(self, row: OpenRow) -> Iterator[Candidate]:
        """The candidates in random order, then random passages where a row is to be filled up."""
        # A string seed goes through SHA-512: the same numbers on every platform and in every process. Query and
        # positive are in it, so that a row does not depend on which others are asked for.
        draw = random.Random(f"{self._rules.seed}\x1f{row.query_id}\x1f{self._ids[row.positive]}")
        for at in draw.sample(list(row.candidates), len(row.candidates)):
            yield Candidate(at, row.candidates[at])
        if self._rules.too_few == "skip":
            return
        total = len(self._ids)
        if total > 10_000:  # in the end every passage, but a large corpus is put in order only where it must be
            for _ in range(100 * self._rules.num_negatives):
                yield Candidate(draw.randrange(total), None)
        for at in draw.sample(range(total), total):
            yield Candidate(at, None)

    def _read(self, rows: set[int]) -> None:
        missing = sorted(rows - self._text.keys())
        if missing:
            self._text.update(zip(missing, self._corpus[missing]["text"], strict=True))

    def _shingled(self, row: int) -> frozenset[int]:
        if row not in self._shingles:
            self._shingles[row] = shingles(self._text[row], _WIDTH)
        return self._shingles[row]

    def _plainly(self, row: int) -> str:
        if row not in self._plain:
            self._plain[row] = self._plain_of(self._text[row])
        return self._plain[row]

    def _copies_a_positive(self, row: OpenRow, candidate: int) -> bool:
        threshold = self._rules.near_duplicate
        text = self._plainly(candidate)
        if row.text is not None:
            return self._plain_of(row.text) == text
        return any(
            self._plainly(positive) == text
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
            row.texts.add(self._plainly(candidate.row))
            row.random_negatives += candidate.score is None

    def _cause(self, row: OpenRow, candidate: Candidate) -> str | None:
        """Why a candidate is refused, by the name of its count; None where it may train."""
        if candidate.row in row.positives:
            return "known_positives"
        if self._copies_a_positive(row, candidate.row):
            return "near_duplicates"
        if self._plainly(candidate.row) in row.texts:
            return "repeated"
        if candidate.score is not None:
            candidate.teacher_score = self._scores.get((row.query_id, candidate.row))
        margin, positive = self._rules.margin, row.positive_teacher_score
        if margin is None or positive is None or candidate.teacher_score is None:
            return None
        return "above_margin" if candidate.teacher_score > positive + margin else None

    def _score(self, drawn: Sequence[tuple[OpenRow, Sequence[Candidate]]]) -> None:
        """Have the teacher score the positives and the candidates that the other rules leave."""
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
            texts = [(self._queries[query_id], self._text[row]) for query_id, row in pairs]
            scores = [float(score) for score in self._teacher(texts)] if pairs else []
            if len(scores) != len(pairs):
                raise ValueError(f"teacher: it gave {len(scores)} scores for {len(pairs)} pairs; return one for each")
        else:
            scores = [self._known(query_id, row) for query_id, row in pairs]
        for (query_id, passage), score in zip(pairs, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"teacher: its score of query {query_id!r} and passage {self._ids[passage]!r} is {score}; "
                    "check its weights"
                )
            self._scores[query_id, passage] = score
        for row, _ in drawn:
            row.positive_teacher_score = self._scores[row.query_id, row.positive]

    def _known(self, query_id: str, row: int) -> float:
        stored: Any = self._teacher
        try:
            return float(stored[query_id][self._ids[row]])
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
                f"and num_negatives is {self._rules.num_negatives}; lower it, or add passages (mine_triples leaves "
                'such rows out with too_few="skip")'
            )
        self.counts.short_rows += bool(short or row.random_negatives)
        self.counts.skipped_rows += short
        self.counts.random_negatives += row.random_negatives
        self.counts.rows += not short
        return not short


def mine_triples(
    run: Scores | Search,
    corpus: Dataset,
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    origin: str,
    seed: int,
    num_negatives: int = 1,
    depth: int = 200,
    teacher: Scores | PairScorer | None = None,
    margin: float | None = None,
    near_duplicate: float | None = 0.6,
    too_few: Literal["fill", "skip"] = "fill",
    counts: MiningCounts | None = None,
    output_dir: str | Path | None = None,
    depends: Mapping[str, Any] | None = None,
    queries_a_part: int = 2048,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
) -> Dataset:
    """Pair every query and positive with negatives sampled from the best passages of any run.

    A negative is never a known positive of its query, nor nearly the same text as one, and no two negatives of a row
    have the same text. Each row draws from its own generator, made of seed, query id and positive id, so that a row
    does not depend on which others are asked for.

    Args:
        run: query id to passage id to score, of any system (`read_run`); or a function from queries, id to text, to
            such a run, called for some queries at a time (`BM25Index.run`).
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        origin: name of the source of the negatives, for instance "student round 1"; it is written into every row.
        seed: the seed.
        num_negatives: negatives a row.
        depth: how many of the best passages of a query to sample from, known positives among them.
        teacher: judge of candidates: a function from (query, passage) texts to a score each, asked for as few pairs
            as possible (`CrossEncoder.predict`), or a run with a score of every positive and candidate.
        margin: refuse a candidate whose teacher score is above that of the row's positive by more than this: it
            probably answers the query. None: the teacher's scores are recorded and refuse nothing.
        near_duplicate: refuse candidates that share at least this much of their word triples with a positive (Jaccard
            index, above 0, at most 1). Texts that differ in case and punctuation alone are always refused; None
            refuses nothing else.
        too_few: what becomes of a row with too few candidates left: "fill" takes random passages, which no teacher
            judges, under the other rules; "skip" leaves it out.
        counts: set to what was refused, filled up and left out.
        output_dir: folder for `triples.parquet` and `summary.json`. A call that was stopped goes on after the last
            whole part, one that has finished is read, and a folder of other arguments is refused.
        depends: JSON-ready, all that `run` and `teacher` depend on where they are functions; needed with output_dir.
        queries_a_part: queries that are searched and written at a time; what a kill loses at most.
        state: the processes of a distributed run, which share the parts; one process when None. Needs output_dir.
        write: takes a line of progress a part.

    Returns:
        One row a (query, positive): the columns of `bm25_triples`; then positive_score and negative_score (or
        negative_1_score ...), the run's, null for a positive outside it and for a random passage; the same with
        _teacher_score for _score where there is a teacher; origin. `load_triples` opens the file.

    Raises:
        ValueError: an argument out of range, a query or passage that the data lack, a run without any of the queries,
            a score that is missing or not finite, a corpus too small to fill a row up, no row at all, or an output_dir
            of other arguments.
        OSError: output_dir can't be written.

    Source: Lin, Yang, Lin, RepL4NLP 2021 (sampled from the student's top 200, judged positives not excluded); the
        margin as in de Souza Moreira et al., "NV-Retriever", arXiv 2407.15831.
    """
    from datasets import Dataset  # slow to import

    rules = Rules(num_negatives, depth, seed, margin, near_duplicate, too_few)
    if not isinstance(origin, str) or not origin.strip():
        raise ValueError(f'origin={origin!r}: name where the negatives come from, for instance "bm25"')
    if margin is not None and teacher is None:
        raise ValueError(f"margin={margin}: there is no teacher to judge by it; give one, or leave margin out")
    if queries_a_part < 1:
        raise ValueError(f"queries_a_part={queries_a_part}: it must be 1 or more")
    if output_dir is None and state is not None:
        raise ValueError("state: processes share the work through files; give an output_dir")
    if output_dir is not None and depends is None and (callable(run) or callable(teacher)):
        raise ValueError(
            "depends: run or teacher is a function, and output_dir must tell whether its content is of the same; give "
            "what they depend on, for instance the checksum of a model"
        )
    ids = passage_ids(corpus)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    positives = positive_rows(queries, qrels, row_of)
    if not callable(run) and not any(run.get(query_id) for query_id in positives):
        raise ValueError("run: it has none of the queries with judgements; give the run of the same split as qrels")
    negatives = ["positive", *negative_names(num_negatives)]
    types = {name: pa.string() for name in column_names(num_negatives)} | {"known_positive_ids": pa.list_(pa.string())}
    types |= {f"{name}_score": pa.float64() for name in negatives}
    types |= {f"{name}_teacher_score": pa.float64() for name in negatives} if teacher is not None else {}
    schema = pa.schema({**types, "origin": pa.string()})

    def mine(part: Sequence[str]) -> tuple[Any, MiningCounts]:
        texts = {query_id: queries[query_id] for query_id in part}
        found = run(texts) if callable(run) else run
        opened = []
        for query_id in part:
            candidates = _candidates(found.get(query_id, {}), query_id, depth, row_of)
            own = positives[query_id]
            opened += [OpenRow(query_id, positive, own, candidates) for positive in own]
        miner = Miner(corpus, ids, rules, texts, teacher)
        made = []
        for row in miner.choose(opened):
            score = found.get(row.query_id, {}).get(ids[row.positive])
            scores = [None if score is None else float(score), *(negative.score for negative in row.chosen)]
            judged = [row.positive_teacher_score, *(negative.teacher_score for negative in row.chosen)]
            made.append(
                {
                    **miner.triple(row),
                    **{f"{name}_score": value for name, value in zip(negatives, scores, strict=True)},
                    **{f"{name}_teacher_score": value for name, value in zip(negatives, judged, strict=True)},
                    "origin": origin,
                }
            )
        return pa.Table.from_pylist(made, schema=schema), miner.counts

    asked = list(positives)
    parts = [asked[start : start + queries_a_part] for start in range(0, len(asked), queries_a_part)]
    if output_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            table, done = _mined(Path(scratch), parts, mine, None, write, {})
    else:
        settings = {
            **asdict(rules),
            "origin": origin,
            "queries_a_part": queries_a_part,
            "run": dict(depends or {}) if callable(run) else _digest(run),
            "teacher": None if teacher is None else "a function" if callable(teacher) else _digest(teacher),
            **({"depends": dict(depends)} if depends and not callable(run) else {}),
            "data": _data_digest(corpus, queries, positives, ids),
        }
        table, done = _mined(Path(output_dir), parts, mine, state, write, settings)
    if counts is not None:
        vars(counts).update(vars(done))
    dataset = Dataset(table)
    dataset.info.description = done.summary()
    return dataset


def _mined(
    folder: Path,
    parts: Sequence[Sequence[str]],
    mine: Callable[[Sequence[str]], tuple[Any, MiningCounts]],
    state: PartialState | None,
    write: Callable[[str], None] | None,
    settings: Mapping[str, Any],
) -> tuple[Any, MiningCounts]:
    """Mine what a folder lacks, part by part, join the parts, and read the result."""
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)
    team: Any = state if state is not None else alone
    if team.is_main_process:
        claim(folder, settings)
    team.wait_for_everyone()
    if not ((folder / SUMMARY_FILE).is_file() and (folder / TRIPLES_FILE).is_file()):
        files = [folder / _PARTS / f"{number:05d}.parquet" for number in range(len(parts))]
        rows = 0
        for number in range(team.process_index, len(parts), team.num_processes):
            if not files[number].is_file():
                table, counts = mine(parts[number])
                table = table.replace_schema_metadata({_COUNTS: json.dumps(asdict(counts))})
                with write_aside(files[number]) as aside:
                    pq.write_table(table, aside, compression="zstd")
                rows += counts.rows
                if write is not None and len(parts) > 1 and team.is_main_process:
                    write(f"  part {number + 1} of {len(parts)}: {rows:,} triples")
        team.wait_for_everyone()
        if team.is_main_process:
            _join(files, folder, settings)
        team.wait_for_everyone()
    if team.is_main_process:
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return pq.read_table(folder / TRIPLES_FILE), read_counts(folder)


def _join(files: Sequence[Path], folder: Path, settings: Mapping[str, Any]) -> None:
    """One file of all parts, in their order, with what they counted beside it."""
    done = MiningCounts()
    with write_aside(folder / TRIPLES_FILE) as aside:
        writer = None
        for file in files:
            try:
                table = pq.read_table(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file}: damaged ({error}); delete it and start again") from error
            done.add(MiningCounts(**json.loads(table.schema.metadata[_COUNTS])))
            table = table.replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()
        if not done.drawn:
            raise ValueError(
                "run: it has no passage for any of the queries with judgements; give the run of these queries"
            )
        if not done.rows:
            raise ValueError(
                f"mining: none of {done.skipped_rows:,} rows has enough candidates; raise depth or margin, or fill "
                'rows up with too_few="fill"'
            )
    write_json_atomic(folder / SUMMARY_FILE, {"counts": asdict(done), "settings": dict(settings)})


def read_counts(folder: str | Path) -> MiningCounts:
    """What mining into a folder did, once it has finished."""
    return MiningCounts(**json.loads((Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8"))["counts"])


def negative_names(num_negatives: int) -> list[str]:
    """The columns of this many negatives a row."""
    return ["negative"] if num_negatives == 1 else [f"negative_{place + 1}" for place in range(num_negatives)]


def column_names(num_negatives: int) -> list[str]:
    """The columns of `bm25_triples` with this many negatives a row, in their order."""
    names = negative_names(num_negatives)
    ids = ["query_id", "positive_id", *(f"{name}_id" for name in names)]
    return ["query", "positive", *names, *ids, "known_positive_ids"]


def passage_ids(corpus: Dataset) -> list[str]:
    """The ids of a corpus; ValueError where it lacks a column, id or text."""
    missing = [name for name in ("id", "text") if name not in corpus.column_names]
    if missing:
        raise ValueError(f"corpus: column {missing[0]!r} is missing; it has {', '.join(corpus.column_names)}")
    ids: list[str] = corpus["id"][:]
    return ids


def positive_rows(
    queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]], row_of: Mapping[str, int]
) -> dict[str, list[int]]:
    """The positives of each query that has any, as rows of the corpus, which `row_of` gives by id.

    Raises:
        ValueError: a query or passage that judgements name and the data lack, or no positive at all.
    """
    found: dict[str, list[int]] = {}
    for query_id, grades in qrels.items():
        wanted = [passage_id for passage_id, grade in grades.items() if grade >= 1]
        if not wanted:
            continue
        if query_id not in queries:
            raise ValueError(f"qrels: query {query_id!r} is not among the queries; load both from the same split")
        for passage_id in wanted:
            if passage_id not in row_of:
                raise ValueError(
                    f"qrels: passage {passage_id!r} (query {query_id!r}) is not in the corpus; load both together"
                )
        found[query_id] = [row_of[passage_id] for passage_id in wanted]
    if not found:
        raise ValueError("qrels: no positive judgement, so there is no triple to make; check the split")
    return found


def _candidates(scores: Mapping[str, float], query_id: str, depth: int, row_of: Mapping[str, int]) -> dict[int, float]:
    """The best passages of a query as rows of the corpus, best first."""
    for passage_id, score in scores.items():  # all of them: one that is nan leaves the others in no order
        if not math.isfinite(score):
            raise ValueError(
                f"run: the score of query {query_id!r} and passage {passage_id!r} is {score}; leave the passage out, "
                "or score it again"
            )
    best = rank(scores)[:depth]
    try:
        return {row_of[passage_id]: float(score) for passage_id, score in best}
    except KeyError as error:
        raise ValueError(
            f"run: passage {error.args[0]!r} (query {query_id!r}) is not in the corpus; give the corpus that the run "
            "was made on"
        ) from None


def _digest(scores: Scores) -> str:
    digest = sha256()
    for query_id in sorted(scores):
        digest.update(json.dumps([query_id, sorted(scores[query_id].items())]).encode())
    return digest.hexdigest()


def _data_digest(
    corpus: Dataset, queries: Mapping[str, str], positives: Mapping[str, Sequence[int]], ids: Sequence[str]
) -> str:
    digest = sha256()
    for batch in corpus.select_columns(["id", "text"]).iter(1000):
        digest.update(json.dumps([batch["id"], batch["text"]]).encode())
    for query_id, rows in positives.items():
        digest.update(json.dumps([query_id, queries[query_id], [ids[row] for row in rows]]).encode())
    return digest.hexdigest()
