"""A collection as a run uses it: one corpus, the queries and judgements of each split, and training triples."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.beir import MissingSplitError, open_beir
from tct_hf.data.builtin import builtin_corpus, builtin_fingerprint
from tct_hf.data.ids import hash_of
from tct_hf.data.irds import is_irds, judged_sets
from tct_hf.data.near_duplicates import folded
from tct_hf.data.rows import SkippedRows, text_lines
from tct_hf.files import file_digest

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
AUTO = "auto"
_LEAST_REST = 3  # words that a passage keeps
_SENTENCE_WORDS = range(5, 31)
_TITLE_WORDS = range(3, 31)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+|\n(?=\s*[-*#])")


@dataclass(frozen=True)
class MadeQuestion:
    """A title or sentence that stands for a question, and its passage without it."""

    text: str
    passage_id: str
    rest: str


@dataclass(frozen=True)
class Split:
    """Queries of a split, query id to text, and their judgements, query id to passage id to grade."""

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def only(self, names: Container[str]) -> Split:
        return Split(
            {name: text for name, text in self.queries.items() if name in names},
            {name: grades for name, grades in self.qrels.items() if name in names},
        )


@dataclass
class Collection:
    """A corpus with its splits.

    Args:
        name: the name shown.
        corpus: columns id and text, and title where the source has titles (they begin the texts).
        splits: by the name of their use: "train", "test" and, where there is one, "dev".
        fingerprint: JSON-ready, identifies the texts and judgements that results belong to.
        questions: query id to text, of questions without judgements.
        made: those of them that were taken out of passages, by query id.
        also: splits that are reported beside "test", by their own names.
        test_split: the source's name of the split of the use "test".
        words: language and stemmer of BM25, see :meth:`read_words`.
        ignore_identical_ids: leave a passage with the query's own id out of its ranking, as BEIR does; None: where the
            reported queries are passages.
        index: BM25 over the corpus, once it has been built.
        skipped: rows of the source that were left out.
    """

    name: str
    corpus: Dataset
    splits: dict[str, Split]
    fingerprint: dict[str, Any]
    questions: dict[str, str] = field(default_factory=dict)
    made: dict[str, MadeQuestion] = field(default_factory=dict)
    also: dict[str, Split] = field(default_factory=dict)
    test_split: str = "test"
    words: dict[str, Any] = field(default_factory=dict)
    ignore_identical_ids: bool | None = None
    index: Any = None
    skipped: SkippedRows = field(default_factory=SkippedRows)

    @cached_property
    def asks_passages(self) -> bool:
        """Whether the reported queries are passages of the corpus by their ids, none of them its own answer."""
        split = self.splits.get("test") or self.splits.get("dev") or Split({}, {})
        rows = {name: row for row, name in enumerate(self.corpus["id"][:]) if name in split.queries}
        if not rows or 2 * len(rows) < len(split.queries):
            return False
        if any(split.qrels.get(name, {}).get(name, 0) > 0 for name in rows):
            return False
        if not all(name.isdecimal() for name in rows):
            return True
        # Numbers may be equal by chance: the texts decide.
        names = sorted(rows, key=hash_of)[:100]
        texts = self.corpus[[rows[name] for name in names]]["text"]
        same = [folded(split.queries[name]) in folded(text) for name, text in zip(names, texts, strict=True)]
        return 2 * sum(same) >= len(same)

    @property
    def skips_own(self) -> bool:
        return self.asks_passages if self.ignore_identical_ids is None else self.ignore_identical_ids

    def reach(self, depth: int) -> int:
        """Passages to search for where rankings hold `depth`: one of them may be left out."""
        return depth + self.skips_own

    @property
    def own_rule(self) -> dict[str, Any]:
        """What runs depend on besides corpus and depth, where a passage with the query's own id is left out."""
        return {"ignore_identical_ids": True} if self.skips_own else {}

    @property
    def own_note(self) -> list[str]:
        """What a report says of passages with the query's own id, a line where there is something to say."""
        if self.skips_own:
            rule = "A passage with the query's own id is left out of its ranking"
            return [f"{rule} (data.ignore_identical_ids), as in BEIR."]
        what = "The queries are passages, which stay in their own rankings (data.ignore_identical_ids is false)"
        return [f"{what}: BEIR's figures are without them."] if self.asks_passages else []

    def read_words(self, **words: str | None) -> None:
        """Set the `language` and `stemmer` that BM25 reads the texts with; they join the fingerprint."""
        self.words = words
        named = f"{self.fingerprint['sha256']}\0{sorted(words.items())}"
        self.fingerprint = {**self.fingerprint, "sha256": sha256(named.encode()).hexdigest(), "words": words}

    def unjudged(self, labels: float = 1.0, most: int | None = None) -> dict[str, str]:
        """Train queries whose judgements are not used, and `questions`, id to text.

        Args:
            labels: share of the train queries whose judgements are used, 0 to 1, whatever the seed.
            most: the largest number of them, drawn by a hash of the id; all when None.
        """
        train = self.splits["train"].queries if "train" in self.splits else {}
        kept = set(_share(train, labels))
        others = {name: text for name, text in train.items() if name not in kept} | self.questions
        return Split(others, {}).only(set(sorted(others, key=hash_of)[:most])).queries

    def labelled(self, labels: float = 1.0) -> dict[str, dict[str, int]]:
        train = self.splits.get("train", Split({}, {}))
        return train.only(set(_share(train.queries, labels))).qrels

    def part(self, *, passages: int | None = None, queries: int | None = None) -> Collection:
        """A smaller collection, for a quick comparison: easier to search, so its figures stand for itself alone.

        Args:
            passages: keep this many: all that are judged relevant to a query that is kept, the rest drawn by a hash
                of the id. All when None.
            queries: keep at most this many of each split, drawn in the same way. All when None.

        Raises:
            ValueError: the relevant passages alone are more.
        """
        if passages is None and queries is None:
            return self
        corpus = self.corpus
        every = [
            {name: split.only(set(sorted(split.queries, key=hash_of)[:queries])) for name, split in splits.items()}
            for splits in (self.splits, self.also)
        ]
        if passages is not None and passages < len(corpus):
            ids = corpus["id"][:]
            judged = [grades for splits in every for split in splits.values() for grades in split.qrels.values()]
            positives = {name for grades in judged for name, grade in grades.items() if grade > 0}
            if len(positives) > passages:
                fix = "raise data.max_passages (curve.passages), or lower data.max_queries (curve.queries)"
                what = f"the {len(positives)} that are relevant to the queries kept"
                raise ValueError(f"A part of {passages} passages can't hold {what}: {fix}.")
            kept = set(sorted(ids, key=lambda name: (name not in positives, hash_of(name)))[:passages])
            corpus = corpus.select([row for row, name in enumerate(ids) if name in kept])
            for split in (split for splits in every for split in splits.values()):
                for query, grades in split.qrels.items():
                    split.qrels[query] = {name: grade for name, grade in grades.items() if name in kept}
        changed: dict[str, Any] = {"corpus": corpus, "splits": every[0], "also": every[1], "made": {}, "index": None}
        name, fingerprint = f"{self.name}, a part", _fingerprint(corpus, every[0])
        part = replace(self, name=name, fingerprint=fingerprint, **changed)
        if self.words:
            part.read_words(**self.words)
        return part

    def hold_out_dev(self, share: float) -> None:
        """Take a share (0 to 1) of the train queries, drawn by a hash of the id, for a dev split that is not there."""
        if "dev" in self.splits or not share:
            return
        train = self.splits["train"]
        held_out = set(_share(train.queries, share))
        parts = {"train": train.only(train.queries.keys() - held_out), "dev": train.only(held_out)}
        # Shown in the order train, dev, test.
        self.splits = {**parts, **{use: split for use, split in self.splits.items() if use != "train"}}
        self.fingerprint = {**self.fingerprint, "dev_share": share}

    def add_questions(self, path: str | Path) -> None:
        """Read a file of questions without judgements, one a line (plain text, UTF-8); they join the fingerprint.

        Blank lines, repeated questions and the queries of the splits are left out, whatever their case and
        punctuation: those of dev and test must not be trained on, judged or not, and those of train add nothing.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of questions; give data.questions the right path")
        # Of questions that differ in case and punctuation alone, the first.
        first: dict[str, str] = {}
        for _, line in text_lines(path):
            if text := " ".join(line.split()):
                first.setdefault(folded(text), text)
        if not first:
            raise ValueError(f"{path}: no question in it; write one a line")
        there = {folded(text) for split in self.splits.values() for text in split.queries.values()}
        questions = [text for key, text in first.items() if key not in there]
        if not questions:
            raise ValueError(f"{path}: every question in it is a query of {self.name} already; add others")
        self.questions = {f"question-{number}": text for number, text in enumerate(questions, 1)}
        known = {"sha256": file_digest(path), "count": len(questions)}
        self.fingerprint = {**self.fingerprint, "questions": known}

    def make_questions(self, count: int, *, seed: int) -> None:
        """Add at most `count` questions made of the passages' own titles and sentences; they join the fingerprint."""
        splits = (*self.splits.values(), *self.also.values())
        asked = [text for split in splits for text in split.queries.values()] + list(self.questions.values())
        found = questions_from(self.corpus, count, seed=seed, without=asked)
        self.made = {f"made-{one.passage_id}": one for one in found}
        self.questions = {**self.questions, **{name: one.text for name, one in self.made.items()}}
        self.fingerprint = {**self.fingerprint, "made_questions": {"count": len(self.made), "seed": seed}}

    def hold_out_questions(self, share: float, *, most: int) -> None:
        """Take a share of the questions (0 to 1, at most `most`), drawn by a hash of the id, for test.

        For collections without any judgements; a ValueError where the share of so few questions is none.
        """
        held_out = _share(self.questions, share)[:most]
        if not held_out:
            few = f"{len(self.questions)} questions are too few to hold out {share:.0%} of them for test"
            raise ValueError(f"{self.name}: {few}: add more to data.questions, or a test split to the collection.")
        self.splits["test"] = Split({name: self.questions.pop(name) for name in held_out}, {})

    def summary(self) -> str:
        parts = [f"{len(split.queries):,} {name}" for name, split in (*self.splits.items(), *self.also.items())]
        if self.questions:
            parts.append(f"{len(self.questions):,} without judgements")
        without = "" if "dev" in self.splits else " (no dev split)"
        left_out = f"; {self.skipped.line()}" if self.skipped.total else ""
        return f"{self.name}: {len(self.corpus):,} passages; queries: {', '.join(parts) or 'none'}{without}{left_out}"


def _share(names: Iterable[str], share: float) -> list[str]:
    """The first `share` (0 to 1) of the ids in the order of their hashes."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share of {share} of the queries: give a number from 0 to 1.")
    ordered = sorted(names, key=hash_of)
    return ordered[: round(share * len(ordered))]


def questions_from(corpus: Dataset, count: int, *, seed: int, without: Iterable[str] = ()) -> Iterator[MadeQuestion]:
    """Questions out of passages drawn at random, one a passage: titles of 3 to 30 words, else a sentence of 5 to 30.

    A question is removed from its passage, as BM25 would answer it word for word, and is none of the texts `without`.
    Source: the inverse cloze task (Lee, Chang and Toutanova, ACL 2019); half of DRAGON's queries are such sentences
    (Lin et al., arXiv 2302.07452).
    """
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    made, taken = 0, {folded(text) for text in without}
    for row in order:
        if made == count:
            return
        passage = corpus[row]
        passage_id, text, title = passage["id"], passage["text"], passage.get("title") or ""
        body = text.removeprefix(title)

        def fits(one: str, words: range) -> bool:
            return len(one.split()) in words and _is_prose(one) and folded(one) not in taken

        if fits(title, _TITLE_WORDS):
            chosen, rest = title, body
        else:
            sentences = [part.strip() for part in _SENTENCE_END.split(body)]
            fit = [one for one in sentences if fits(one, _SENTENCE_WORDS)]
            if not fit:
                continue
            chosen = random.Random(f"{seed}\x1f{passage_id}").choice(fit)
            rest = text.replace(chosen, " ")
        rest = " ".join(rest.split())
        if len(rest.split()) < _LEAST_REST:
            continue
        taken.add(folded(chosen))
        made += 1
        yield MadeQuestion(chosen, passage_id, rest)


def _is_prose(text: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)


def load_collection(
    source: str,
    *,
    packages: Sequence[str] = (),
    test_split: str = "test",
    dev_split: str | None = AUTO,
    required: Sequence[str] = ("train", "dev", "test"),
    also: Sequence[str] = (),
    skip_bad_rows: bool = False,
    ignore_identical_ids: bool | None = None,
) -> Collection:
    """Load the built-in corpus, or a BEIR folder or Hub data set, with the splits of a training run.

    Args:
        source: "builtin", a BEIR folder or one of Markdown and text files, a Hub id, or "irds:ID" of ir_datasets.
        packages: of the built-in corpus.
        test_split: the split to report.
        dev_split: the split to compare models on, or None; "auto": "dev" where the source has it.
        required: of "train", "dev" and "test", the uses without whose split there is no run. Another is left out
            where the source has no judgements of it, unless it was named: then it was mistyped.
        also: more splits to report. A dev split that is reported is none to compare models on where that is "auto".
        skip_bad_rows: as of `load_beir`; what was left out stands in the collection's `skipped` and summary.
        ignore_identical_ids: see :class:`Collection`.

    Raises:
        ValueError, FileNotFoundError: as `builtin_corpus` and `load_beir`; or a split has two uses.
    """
    defaults = {"train": True, "dev": dev_split == AUTO, "test": test_split == "test"}
    if dev_split == AUTO:
        there = source == BUILTIN or any((Path(source) / "qrels").glob("dev.tsv*"))
        there = there or (is_irds(source) and "dev" in judged_sets(source))
        dev_split = "dev" if there and "dev" not in (test_split, *also) else None
    names = {"train": "train", "dev": dev_split, "test": test_split}
    if dev_split == test_split:
        why = "models must not be chosen on the queries that are reported"
        raise ValueError(f"dev_split and test_split are both {test_split!r}: {why}. Name another dev_split, or none.")
    for name in also:
        # Their names are those of files, too, beside those of the uses.
        if name in ("train", "test", test_split, dev_split) or (name == "dev" and dev_split is not None):
            uses = f"data.test_split is {test_split!r}, data.dev_split {dev_split!r} (none lets dev be reported)"
            raise ValueError(f"also_report: {name!r} is reported already, trained on, or the name of a use: {uses}.")

    folder = None if source == BUILTIN else open_beir(source, skip_bad_rows=skip_bad_rows)

    def load(split: str) -> tuple[Dataset, dict[str, str], dict[str, dict[str, int]]]:
        return builtin_corpus(split, packages=packages) if folder is None else folder.load(split)

    corpus = None
    splits = {}
    for use, split in names.items():
        if split is None:
            continue
        try:
            corpus, queries, qrels = load(split)
        except MissingSplitError:
            if use in required or not defaults[use]:
                raise
        else:
            splits[use] = Split(queries, qrels)
    reported = {name: Split(*load(name)[1:]) for name in also}
    if folder is None:
        name, fingerprint = "built-in API docs", builtin_fingerprint(packages=packages)
    else:
        corpus = folder.corpus() if corpus is None else corpus
        name, fingerprint = source, _fingerprint(corpus, splits)
    skipped = SkippedRows() if folder is None else folder.skipped
    if skipped.total:
        logger.warning("%s: %s", name, skipped.summary())
    more: dict[str, Any] = {"test_split": test_split, "ignore_identical_ids": ignore_identical_ids, "skipped": skipped}
    return Collection(name, corpus, splits, fingerprint, also=reported, **more)


def read_corpus(
    source: str, packages: Sequence[str], *, allow_empty: bool = False, skip_bad_rows: bool = False
) -> Dataset:
    """The passages of a source alone, as in :func:`load_collection`; with allow_empty, without text too."""
    if source == BUILTIN:
        return builtin_corpus("test", packages=packages)[0]
    folder = open_beir(source, skip_bad_rows=skip_bad_rows)
    corpus = folder.corpus(allow_empty=allow_empty)
    if folder.skipped.total:
        logger.warning("%s: %s", source, folder.skipped.summary())
    return corpus


def _fingerprint(corpus: Dataset, splits: dict[str, Split]) -> dict[str, Any]:
    digest = sha256()
    for batch in corpus.iter(1000):
        for passage_id, text in zip(batch["id"], batch["text"], strict=True):
            digest.update(f"{passage_id}\0{text}\0".encode())
    for use, split in splits.items():
        digest.update(f"{use}\0{sorted(split.queries.items())}\0{sorted(split.qrels.items())}".encode())
    counts = {use: len(split.queries) for use, split in splits.items()}
    return {"sha256": digest.hexdigest(), "passages": len(corpus), "queries": counts}
