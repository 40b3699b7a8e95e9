"""The models of a run, made of its settings: teachers, and a student before its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformer

from tct_hf.encoding.build import build_colbert, build_student, student_from_teacher
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import EncoderSettings, OneTeacher, StudentSettings, TeacherSettings
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.teachers.base import Teacher
from tct_hf.teachers.bm25 import BM25Teacher
from tct_hf.teachers.cached import CachedTeacher
from tct_hf.teachers.colbert import ColBERTTeacher, DenseTeacher, VectorTeacher
from tct_hf.teachers.cross_encoder import CrossEncoderTeacher
from tct_hf.teachers.ensemble import TeacherEnsemble
from tct_hf.teachers.mixture import by_cosine
from tct_hf.teachers.stored import StoredScores


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
    if one.kind == "cross-encoder":
        return CrossEncoderTeacher(one.model, candidates=one.candidates, dtype=dtype)
    model = resolve_model(one.model)
    if one.kind == "own":
        return ColBERTTeacher(build_colbert(model, **(reads or {})), dtype=dtype)
    if one.kind == "dense":
        return DenseTeacher(build_student(model, **(reads or {})), dtype=dtype)
    return ColBERTTeacher(model, dtype=dtype)


def make_teacher(
    teacher: TeacherSettings,
    *,
    index: Callable[[], BM25Index],
    reads: Mapping[str, Any],
    cache: str | None,
    cache_gigabytes: float,
) -> Teacher:
    """The teacher of a run: one, or several mixed.

    Args:
        index: gives the collection's BM25 index, for a part of the kind bm25.
        reads: lengths and prompts of the base of a mixture.
        cache: folder for vectors of ColBERTs and embedding models; None: encode every time.
        cache_gigabytes: maximum size of each one's vectors.
    """
    made: list[tuple[Teacher, float]] = []
    for one in teacher.parts:
        base = teacher.is_mixture and one.model == teacher.model
        live = make_part(one, dtype=teacher.dtype, index=index, reads=reads if base else None)
        if base and isinstance(live, DenseTeacher):
            by_cosine(live.model)
        if cache is not None and isinstance(live, VectorTeacher):
            live = CachedTeacher(live, cache, max_gigabytes=cache_gigabytes)
        made.append((live, one.weight))
    if teacher.is_mixture:
        return TeacherEnsemble(made, normalize="none")
    return TeacherEnsemble(made, normalize=teacher.normalize) if len(made) > 1 else made[0][0]


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


def new_student(encoder: EncoderSettings, student: StudentSettings, teacher: str | None) -> SentenceTransformer:
    """An untrained dense student: the encoder of `teacher` (folder or Hub id) or the base, read as `encoder` says."""
    from_teacher = encoder.starts_from(student.initialise_from) == "teacher"
    make: Any = student_from_teacher if from_teacher else build_student
    return make(
        teacher if from_teacher else resolve_model(encoder.base_model),
        layers=student.layers,
        query_augmentation=student.query_augmentation,
        pooling=student.pooling,
        scale=student.scale,
        encoding=encoder.encoding,
        prompts=encoder.prompts,
        **encoder.lengths,
    )
