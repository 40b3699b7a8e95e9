"""The models of a run, made of its settings: teachers, what they find before training, and untrained students."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformer

from tct_hf.cache import prepared
from tct_hf.encoding.build import build_colbert, build_splade, build_student, student_from_teacher
from tct_hf.encoding.convert import load_encoder
from tct_hf.encoding.routes import passage_model
from tct_hf.encoding.static import build_static
from tct_hf.files import (
    CLAIM_FILE,
    is_claimed,
    json_digest,
    read_json,
    replace_dir,
    staging_beside,
    weights_file_digest,
    write_json_atomic,
)
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import OF_PAIRS, TRAINING, EncoderSettings, OneTeacher, StudentSettings, TeacherSettings
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.encode import encode_texts
from tct_hf.retrieval.encode_corpus import describe_model, encode_corpus
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.retrieval.towers import query_tower
from tct_hf.teachers.base import NoTeacher, Teacher
from tct_hf.teachers.bm25 import BM25Teacher
from tct_hf.teachers.cached import CachedTeacher
from tct_hf.teachers.causal import CausalRerankerTeacher
from tct_hf.teachers.colbert import ColBERTTeacher, DenseTeacher, VectorTeacher
from tct_hf.teachers.cross_encoder import CrossEncoderTeacher
from tct_hf.teachers.ensemble import TeacherEnsemble
from tct_hf.teachers.mixture import DEFAULT_WEIGHTS, by_cosine, calibrate, members_of, search_mixture, weights_of
from tct_hf.teachers.queries import QueryVectors
from tct_hf.teachers.remote import URLTeacher
from tct_hf.teachers.stored import StoredScores
from tct_hf.training.from_vectors import DROPOUT, parts_of_passages, train_from_vectors, vector_arguments
from tct_hf.training.run import ARGUMENTS
from tct_hf.training.stages import Stage

if TYPE_CHECKING:
    from tct_hf.pipeline.train import Training


_READ_BY_STATIC = 2500  # passages that a static student's first vectors are taken from, at most


def make_part(
    one: OneTeacher,
    *,
    dtype: Any,
    index: Callable[[], BM25Index] | None = None,
    reads: Mapping[str, Any] | None = None,
) -> Teacher:
    """Load one teacher.

    Args:
        index: gives the collection's BM25 index, for the kind bm25.
        reads: lengths and prompts of an embedding model, arguments of `build_student`; its own when None.
    """
    if one.kind == "stored":
        # Triples that are loaded with scores have them in a column of that name.
        return StoredScores(column="scores") if one.column is not None else StoredScores(one.scores)
    if one.kind == "bm25":
        assert index is not None
        return BM25Teacher(index())
    assert one.model is not None
    if one.kind == "url":
        return URLTeacher(one.model, key_env=one.key_env, candidates=one.candidates, **one.options)
    if one.kind in OF_PAIRS:
        kind = CausalRerankerTeacher if one.kind == "causal" else CrossEncoderTeacher
        return kind(one.model, candidates=one.candidates, dtype=dtype, **one.options)
    model = resolve_model(one.model)
    if one.kind == "own":
        return ColBERTTeacher(build_colbert(model, **(reads or {})), dtype=dtype)
    if one.kind == "dense":
        return DenseTeacher(build_student(model, **(reads or {})), dtype=dtype)
    return ColBERTTeacher(model, dtype=dtype)


def make_teacher(run: Training, teaching: TeacherSettings, student: StudentSettings) -> Teacher:
    """The teacher of a run's student: none, one, or several mixed."""
    said = student.training
    others = ("margin_mse_weight", "self_coupled", "distillation_weight", "embedding_weight")
    also = run.schedules or any(said.get(name) for name in others)
    if said.get("hard_label_weight") == 1.0 and not also:
        return NoTeacher()  # hard labels are all that the student learns from
    teaching, cache = replace(teaching, model=run.teacher_model), run.vectors_folder
    made: list[tuple[Teacher, float]] = []
    for one in teaching.parts:
        reads = run.settings.encoder.reads if teaching.is_mixture and one.model == teaching.model else None
        live = make_part(one, dtype=teaching.dtype, index=partial(collection_bm25, run.collection), reads=reads)
        if reads is not None and isinstance(live, DenseTeacher):
            by_cosine(live.model)
        if cache is not None and isinstance(live, VectorTeacher):
            live = CachedTeacher(live, cache, max_gigabytes=student.teacher_cache_gigabytes)
        made.append((live, one.weight))
    single = len(made) == 1 and not teaching.is_mixture
    of_queries: list[tuple[Teacher, float]] = []
    if student.tower_of is not None and said.get("embedding_weight"):
        of: Any = DenseTeacher(load_encoder(student.tower_of), dtype=teaching.dtype)
        if cache is not None:
            of = CachedTeacher(of, cache, max_gigabytes=student.teacher_cache_gigabytes)
        of_queries = [(QueryVectors(of), 0.0)]
    elif single:
        return made[0][0]
    raw = teaching.is_mixture or single
    teacher = TeacherEnsemble([*of_queries, *made], normalize="none" if raw else teaching.normalize)
    teacher.training_scale = made[0][0].training_scale if single else teacher.training_scale
    return teacher


def check_scores(
    teacher: TeacherSettings, rows: Dataset | IterableDataset | None, make_rows: Callable[[], Dataset]
) -> None:
    """Look every row up in the files of stored scores, before a teacher is trained for hours.

    Args:
        rows: the user's own triples; streamed ones are looked up as they come.
        make_rows: gives those of the collection, where there are no others.
    """
    for one in teacher.parts:
        if one.kind != "stored" or one.column is not None:
            continue
        stored = StoredScores(one.scores)
        if rows is None:
            stored.check_rows(
                make_rows(),
                fix="score the pair, or name triples that are scored with triples.path (of a collection's own, seed, "
                "data.num_negatives and data.negative_depth choose the negatives)",
            )
        elif rows.column_names:
            stored.check(rows.column_names, candidates="own")
            if isinstance(rows, Dataset):
                stored.check_rows(rows)


def new_student(
    encoder: EncoderSettings, student: StudentSettings, teacher: str | None, corpus: Dataset | None = None
) -> Any:
    """An untrained student: the encoder of `teacher` (folder or Hub id) or the base, read as `encoder` says.

    A static one learns its first vectors from some of the passages of `corpus`.
    """
    if student.kind == "splade":
        return build_splade(resolve_model(encoder.base_model), **encoder.lengths)
    from_teacher = student.stays is None and encoder.starts_from(student.initialise_from) == "teacher"
    source = teacher if from_teacher else resolve_model(student.stays or encoder.base_model)
    if student.kind == "static":
        rows = [] if corpus is None else corpus[:: math.ceil(len(corpus) / _READ_BY_STATIC)]["text"]
        return build_static(source, dim=student.dim, texts=rows)
    make: Any = student_from_teacher if from_teacher else build_student
    return make(
        source,
        layers=student.layers,
        query_augmentation=student.query_augmentation,
        pooling=student.pooling,
        scale=student.scale,
        encoding=encoder.encoding,
        prompts=encoder.prompts,
        **encoder.lengths,
    )


def _make_tower(run: Training, student: StudentSettings, tower: Any) -> Any:
    """A query tower of a model, which is taken over, for the passage vectors that the settings name."""
    assert student.tower_of is not None
    encoder, vectors = load_encoder(student.tower_of, device=str(run.job.state.device)), student.passages
    if vectors is None:
        digest = describe_model(passage_model(encoder))["model"]["weights_sha256"]
        folder = run.shared / "passages" / digest[:8]
        how: dict[str, Any] = {"precision": "auto" if run.base["bf16"] else "fp32", "model_id": student.tower_of}
        encode_corpus(encoder, run.collection.corpus, folder, state=run.job.state, write=run.job.write, **how)
        vectors = str(folder)
    queries = [*run.collection.unjudged(0.0, None).values()]
    made = query_tower(tower, encoder, vectors, run.collection.corpus, queries=queries)
    encoder.cpu()  # until the tower is saved
    return made


def tower_stage(run: Training, student: StudentSettings) -> Stage:
    """The stage in which a query tower learns from vectors alone, the same for all that begin so."""
    other = ("training", "schedules", "teacher_cache", "teacher_cache_gigabytes")
    own = {name: value for name, value in student.depends().items() if name not in other}
    learning = vector_arguments(student.from_vectors.training, static=student.kind == "static")
    depends = {**run.depends("student"), "student": own, "learning": {**learning, "dropout": DROPOUT}}
    folder = run.shared / "towers" / json_digest(depends)[:8]
    how = {**TRAINING, "logging_steps": 100, "save_steps": 200, **run.base, **learning}
    work = folder.parent / "training" / folder.name
    return Stage(folder, work, settings=depends, arguments=how, write=run.job.write)


def _begin_tower(run: Training, student: StudentSettings, new: Callable[[], Any]) -> Path:
    """The folder of a query tower that has learned from vectors alone; `new` makes its encoder of queries."""
    of, precise = str(student.tower_of), run.base["bf16"]

    def make() -> Any:
        tower = _make_tower(run, student, new())
        questions = [*dict.fromkeys(run.collection.unjudged(0.0, None).values())]
        others = parts_of_passages(run.collection.corpus["text"], student.from_vectors.texts)
        texts = [*questions, *others]

        def encode(out: Path) -> None:
            run.job.write(f"  {len(texts):,} texts: vectors of {of}")
            encoder = load_encoder(of, device=str(run.job.state.device))
            np.save(out / "vectors.npy", encode_texts(encoder, texts, task="query", bf16=precise))

        key = [weights_file_digest(of) or of, json_digest(texts), precise]
        kept = prepared("vectors", key, encode, run.shared / "texts")
        return tower, questions, others, np.load(kept / "vectors.npy")

    return train_from_vectors(tower_stage(run, student), make)


def begin(run: Training, student: StudentSettings, new: Callable[[], Any]) -> Any:
    """What teachers of scores train: `new()`, or a query tower of it, which may have learned from vectors."""
    if student.tower_of is None:
        return new()
    begun = SentenceTransformer(str(_begin_tower(run, student, new))) if student.from_vectors.texts else new()
    return _make_tower(run, student, begun)


def finish_tower(run: Training, name: str, student: StudentSettings, new: Callable[[], Any]) -> None:
    """Train a query tower from vectors alone, as the model of a stage."""
    made, final = _begin_tower(run, student, new), run.folder_of(name)
    with run.job.state.main_process_first(), staging_beside(final) as staging:
        if not run.is_trained(name):
            shutil.copytree(made, staging)
            write_json_atomic(staging / CLAIM_FILE, run.depends(name))
            replace_dir(staging, final)


def prepare(run: Training, name: str) -> tuple[StudentSettings, TeacherSettings, Run]:
    """The settings of student and teacher with what is found once before the stage `name`, and the best passages.

    A mixture is calibrated where labels are used, dev is judged and no weights are given; any other teacher where
    `student.training.temperature` is "auto". A mixture searches for questions without judgements, and where its ranks
    are those that negatives are sampled from.
    """
    student, teaching, data, collection = run.settings.student, run.settings.teacher, run.data_of(name), run.collection
    temperature = student.training.get("temperature")
    calibrates = (
        (teaching.is_mixture if temperature is None else temperature == "auto")
        and teaching.mixture_weights is None
        and data.labels > 0
        and "dev" in collection.splits
        and bool(collection.splits["dev"].qrels)
        # Stored scores are known of their own pairs alone, not of what a search finds.
        and not any(one.kind == "stored" for one in teaching.parts)
    )
    queries: dict[str, str] = {}
    if teaching.is_mixture and run.rows is None:
        queries = collection.unjudged(data.labels, data.max_questions) if data.unlabelled else {}
        if data.negatives == "teacher" and "train" in collection.splits:
            queries |= collection.splits["train"].queries
    if teaching.is_mixture and not calibrates:
        shown = ", ".join(f"{weight:g}" for weight in teaching.mixture_weights or DEFAULT_WEIGHTS)
        run.job.write(f"  not calibrated: pooled vectors, BM25 and own MaxSim weigh {shown}")

    candidates: Run = {}
    if calibrates or queries:
        folder = (run.mixtures or run.folder) / f"mixture-{name}"
        depends = {**run.depends(name), "queries": len(queries), "calibrated": calibrates}
        for other in ("seed", "student"):
            del depends[other]
        if not is_claimed(folder, depends):
            with staging_beside(folder) as staging:
                staging.mkdir(parents=True)
                mixture = replace(teaching, kind="mixture") if teaching.is_mixture else teaching
                teacher = make_teacher(run, mixture, replace(student, training={}))
                if calibrates:
                    _calibrate(run, teacher, staging)
                if queries:
                    corpus = f"{len(collection.corpus):,} passages"
                    run.job.write(f"  {len(queries):,} questions: the mixture searches {corpus}")
                write_run(search_mixture(teacher, collection, queries), staging / "candidates.trec", "mixture")
                write_json_atomic(staging / "weights.json", weights_of(teacher))
                write_json_atomic(staging / CLAIM_FILE, depends)
                replace_dir(staging, folder)
        weights = read_json(folder / "weights.json", "delete the folder, and run again.", kind=list)
        if not teaching.is_mixture:
            temperature = ARGUMENTS[run.kind].softening / weights[0]
            return replace(student, training={**student.training, "temperature": temperature}), teaching, {}
        others = [replace(one, weight=own) for one, own in zip(teaching.mixed_with, weights[3:], strict=True)]
        teaching = replace(teaching, mixture_weights=weights[:3], mixed_with=others)
        candidates = read_run(folder / "candidates.trec") if queries else {}
    if teaching.kind == "self":
        pooled, _, tokens = teaching.mixture_weights or DEFAULT_WEIGHTS
        student = replace(student, training={**student.training, "self_coupled": [pooled, tokens]})
    return student, teaching, candidates


def _calibrate(run: Training, teacher: Teacher, folder: Path) -> None:
    """Set the weights of a teacher's members by the judgements of dev."""
    is_mixture, encoder = run.settings.teacher.is_mixture, run.settings.encoder
    if is_mixture:  # its first member is the base, which the student starts from
        student = next(iter(members_of(teacher).values()))
    else:
        student = DenseTeacher(build_student(resolve_model(encoder.base_model), **encoder.reads))
    try:
        found = calibrate(teacher, run.collection, student=student)
    except ValueError as error:
        if not is_mixture:
            raise
        run.job.write(f"  not calibrated, the default weights stay: {error}")
    else:
        run.job.write("  " + found.summary().replace("\n", "\n  "))
        found.save(folder)
