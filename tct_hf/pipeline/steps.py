"""What the recipes that train share: the steps from a source to a trained teacher and student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.files import CLAIM_FILE, is_claimed, replace_dir, staging_beside, write_json_atomic
from tct_hf.pipeline.settings import DataSettings, EncoderSettings, StudentSettings, TriplesSettings
from tct_hf.pipeline.settings import EvaluationSettings as EvaluationSettings
from tct_hf.pipeline.teacher import TeacherSettings, make_teacher, weights_of
from tct_hf.retrieval.negatives import collection_bm25, collection_triples
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.settings import SettingsError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from tct_hf.data.collection import Collection
    from tct_hf.training.schedules import Schedule

# Where nothing else is said. Checkpoints are small and frequent: a run is made to be interrupted.
TRAINING = {"logging_steps": 10, "save_steps": 25, "save_total_limit": 1, "report_to": "none"}

# Of a file of questions, where there are no judgements to measure with.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 500


def read_collection(
    data: DataSettings, *, train: bool = True, test: bool = True, also: Sequence[str] = ()
) -> Collection:
    """Load what `data` names: the splits, a part of them, questions without judgements.

    Args:
        data: the settings.
        train: the train split must be there where `labels` asks for it.
        test: likewise the split to report.
        also: more splits to report, by name.

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
        data.source,
        packages=data.packages,
        test_split=data.test_split,
        dev_split=data.dev_split,
        required=required,
        also=also,
    )
    if data.dev_share and "train" in collection.splits:
        collection.hold_out_dev(data.dev_share)
    collection = collection.part(passages=data.max_passages, queries=data.max_queries)
    if data.questions is not None:
        collection.add_questions(data.questions)
        if "test" not in collection.splits:
            collection.hold_out_questions(_HELD_OUT_SHARE, most=_MOST_HELD_OUT)
    if data.made_questions:
        collection.make_questions(data.made_questions, seed=0)
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
    from tct_hf.data.rows import SkippedRows
    from tct_hf.retrieval.triples import load_triples

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


def training_triples(
    collection: Collection,
    data: DataSettings,
    *,
    seed: int,
    unlabelled: bool,
    candidates: Mapping[str, Mapping[str, float]] | None = None,
) -> Dataset:
    """Triples of a collection as `data` asks for them.

    Args:
        collection: of the source.
        data: the settings.
        seed: of the negatives.
        unlabelled: also give the rows that only a teacher judges.
        candidates: what a mixture has found for some of the queries.
    """
    return collection_triples(
        collection,
        num_negatives=data.num_negatives,
        depth=data.negative_depth,
        seed=seed,
        labels=data.labels,
        unlabelled=unlabelled,
        max_questions=data.max_questions,
        candidates=candidates,
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

    from tct_hf.encoding.build import build_colbert
    from tct_hf.hub_client import resolve_model
    from tct_hf.teachers.base import read_training_scale
    from tct_hf.training import run as training

    def new_colbert() -> Any:
        set_seed(seed)
        if start is not None:
            return MultiVectorEncoder(start)
        return build_colbert(
            resolve_model(encoder.base_model),
            dim=teacher.dim,
            encoding=encoder.encoding,
            prompts=encoder.prompts,
            **encoder.lengths,
        )

    return training.train_colbert(
        new_colbert,
        make_triples,
        output / "teacher",
        work=output / "training" / "teacher",
        arguments={**TRAINING, **base, **teacher.training},
        settings=settings,
        scale=None if start is None else read_training_scale(start),
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
    name: str = "student",
) -> Path:
    """Distil a student, into a folder of `output`.

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
        name: of its folder.

    Returns:
        Its folder.
    """
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from tct_hf.encoding.splade import build_splade
    from tct_hf.hub_client import resolve_model
    from tct_hf.training import run as training

    sparse = student.kind == "splade"

    def new() -> SentenceTransformer | SparseEncoder:
        if start is not None:
            return SparseEncoder(start) if sparse else SentenceTransformer(start)
        if sparse:
            return build_splade(resolve_model(encoder.base_model), **encoder.lengths)
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
            index=partial(collection_bm25, collection),
            reads=encoder.reads,
            cache=vectors_folder(teaching, student, output),
            cache_gigabytes=student.teacher_cache_gigabytes,
        ),
        make_triples,
        output / name,
        work=output / "training" / name,
        arguments={**TRAINING, **base, **student.training},
        settings=settings,
        evaluator=training.dev_evaluator(
            collection, {**base, **student.training}, kind="sparse" if sparse else "dense"
        ),
        schedules=schedules_of(student),
    )


def train_stock(
    collection: Collection,
    make_triples: Callable[[], Dataset],
    encoder: EncoderSettings,
    student: StudentSettings,
    output: Path,
    *,
    base: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    """Train the base by sentence-transformers alone, on the student's rows and steps, into `output/stock`."""
    from tct_hf.training import run as training

    return training.train_stock(
        partial(new_student, replace(encoder, encoding="own"), None, initialise_from="base", layers=student.layers),
        make_triples,
        output / "stock",
        work=output / "training" / "stock",
        arguments={**TRAINING, **base, **student.training},
        settings=settings,
        evaluator=training.dev_evaluator(collection, {**base, **student.training}, kind="dense"),
    )


def vectors_folder(teaching: TeacherSettings, student: StudentSettings, output: Path) -> str | None:
    """Where a teacher's vectors are kept; those of a mixture, which are read at every step, always somewhere."""
    return student.teacher_cache or (str(output / "vectors") if teaching.is_mixture else None)


@dataclass(frozen=True)
class PreparedMixture:
    """What a mixture has found before training: its members' weights, and the best passages of questions."""

    weights: list[float]
    candidates: Run


def prepare_mixture(
    collection: Collection,
    queries: Mapping[str, str],
    encoder: EncoderSettings,
    student: StudentSettings,
    teaching: TeacherSettings,
    output: Path,
    *,
    model: str | None,
    name: str,
    calibrated: bool,
    settings: Mapping[str, Any],
    write: Callable[[str], None] = print,
) -> PreparedMixture:
    """Calibrate a teacher and search the corpus with it, into a folder of `output`, or read what is there.

    Args:
        collection: to search; its dev split is judged where `calibrated` is asked for.
        queries: to search for, query id to text.
        encoder: lengths.
        student: where vectors are kept.
        teaching: the mixture, or another teacher.
        output: folder of the run.
        model: folder or Hub id of a teacher that is no mixture.
        name: of the folder.
        calibrated: find the weights on dev; else they stay.
        settings: JSON-ready, all that the result depends on; a folder of others is refused.
        write: takes lines of progress.
    """
    from tct_hf.encoding.build import build_student
    from tct_hf.hub_client import resolve_model
    from tct_hf.teachers.calibration import calibrate
    from tct_hf.teachers.colbert import DenseTeacher
    from tct_hf.teachers.mixture import members_of, search_mixture
    from tct_hf.teachers.mixture import weights_of as weights_of_members

    folder = output / name
    if not is_claimed(folder, settings):
        mixture = replace(teaching, kind="mixture") if teaching.is_mixture else teaching
        cache = vectors_folder(mixture, student, output)
        teacher = make_teacher(
            mixture, model, index=partial(collection_bm25, collection), reads=encoder.reads, cache=cache
        )
        with staging_beside(folder) as staging:
            staging.mkdir(parents=True)
            if calibrated:
                if teaching.is_mixture:  # its first member is the base, which the student starts from
                    about_to_learn = next(iter(members_of(teacher).values()))
                else:
                    about_to_learn = DenseTeacher(build_student(resolve_model(encoder.base_model), **encoder.reads))
                found = calibrate(teacher, collection, student=about_to_learn)
                write("  " + found.summary().replace("\n", "\n  "))
                found.save(staging)
            if queries:
                write(f"  {len(queries):,} questions: the mixture searches {len(collection.corpus):,} passages")
            write_run(search_mixture(teacher, collection, queries), staging / "candidates.trec", "mixture")
            write_json_atomic(staging / "weights.json", weights_of_members(teacher))
            write_json_atomic(staging / CLAIM_FILE, settings)
            replace_dir(staging, folder)
    weights = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
    return PreparedMixture(weights, read_run(folder / "candidates.trec") if queries else {})


def prepare_teaching(
    collection: Collection,
    data: DataSettings,
    encoder: EncoderSettings,
    student: StudentSettings,
    teaching: TeacherSettings,
    output: Path,
    *,
    model: str | None,
    name: str,
    has_rows: bool,
    settings: Mapping[str, Any],
    write: Callable[[str], None] = print,
) -> tuple[StudentSettings, TeacherSettings, Run]:
    """Calibrate a teacher where that is asked for, and let a mixture search for what nobody has judged.

    A mixture is calibrated where labels are used, dev is judged and nobody gave weights; any other teacher where
    `student.training.temperature` is "auto".

    Args:
        collection: of the run.
        data: which questions there are.
        encoder: lengths.
        student: its settings.
        teaching: the teacher's.
        output: folder of the run.
        model: folder or Hub id of a teacher that is no mixture.
        name: of the folder for what is found.
        has_rows: the user's own triples are trained on: nothing is searched for.
        settings: JSON-ready, all that the result depends on.
        write: takes lines of progress.

    Returns:
        The settings of student and teacher with what was found, and the best passages of questions.
    """
    from tct_hf.teachers.mixture import DEFAULT_WEIGHTS
    from tct_hf.training.arguments import SparseTCTTrainingArguments, TCTTrainingArguments

    temperature = student.training.get("temperature")
    calibrates = teaching.is_mixture if temperature is None else temperature == "auto"
    calibrates = calibrates and teaching.mixture_weights is None and data.labels > 0
    calibrates = calibrates and "dev" in collection.splits and bool(collection.splits["dev"].qrels)
    queries: dict[str, str] = {}
    if teaching.is_mixture and not has_rows:
        queries = collection.unjudged(data.labels, data.max_questions) if data.unlabelled else {}
        if data.negatives == "teacher" and "train" in collection.splits:
            queries |= collection.splits["train"].queries
    if teaching.is_mixture and not calibrates:
        shown = ", ".join(f"{weight:g}" for weight in teaching.mixture_weights or DEFAULT_WEIGHTS)
        write(f"  not calibrated: pooled vectors, BM25 and own MaxSim weigh {shown}")
    found: Run = {}
    if calibrates or queries:
        prepared = prepare_mixture(
            *(collection, queries, encoder, student, teaching, output),
            model=model,
            name=name,
            calibrated=calibrates,
            settings=settings,
            write=write,
        )
        weights, found = prepared.weights, prepared.candidates
        if not teaching.is_mixture:
            softening = (SparseTCTTrainingArguments if student.kind == "splade" else TCTTrainingArguments).softening
            training = {**student.training, "temperature": softening / weights[0]}
            return replace(student, training=training), teaching, {}
        others = [replace(one, weight=weight) for one, weight in zip(teaching.mixed_with, weights[3:], strict=True)]
        teaching = replace(teaching, mixture_weights=weights[:3], mixed_with=others)
    if teaching.kind == "self":
        pooled, _, tokens = teaching.mixture_weights or DEFAULT_WEIGHTS
        student = replace(student, training={**student.training, "self_coupled": [pooled, tokens]})
    return student, teaching, found


def schedules_of(student: StudentSettings) -> dict[str, Schedule]:
    """The schedules of `student.schedules`.

    Raises:
        SettingsError: a setting without a schedule, or a schedule that is none.
    """
    from tct_hf.training.schedules import LossSchedule, Schedule

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
    initialise_from: str | None,
    layers: list[int] | None,
    query_augmentation: bool = True,
    pooling: str | None = None,
    scale: float | None = None,
) -> SentenceTransformer:
    """An untrained student: the teacher's encoder or the base, reading texts as `encoder` says.

    Args:
        encoder: encoding, lengths, and the base.
        teacher: folder or Hub id; needed to initialise from.
        initialise_from: "teacher" or "base"; None: the teacher with "tct", else the base.
        layers: of that encoder to keep; all when None.
        query_augmentation: as in `build_student`.
        pooling: likewise.
        scale: likewise.
    """
    from tct_hf.encoding.build import build_student, student_from_teacher
    from tct_hf.hub_client import resolve_model

    from_teacher = encoder.starts_from(initialise_from) == "teacher"
    make: Any = student_from_teacher if from_teacher else build_student
    return make(
        teacher if from_teacher else resolve_model(encoder.base_model),
        layers=layers,
        query_augmentation=query_augmentation,
        pooling=pooling,
        scale=scale,
        encoding=encoder.encoding,
        prompts=encoder.prompts,
        **encoder.lengths,
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
