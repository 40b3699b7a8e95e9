"""The teacher of a recipe, made of its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import OneTeacher, TeacherSettings
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
    model: str | None,
    *,
    dtype: Any,
    index: Callable[[], BM25Index] | None = None,
    reads: Mapping[str, Any] | None = None,
) -> Teacher:
    """Load one teacher.

    Args:
        one: its settings.
        model: folder or Hub id; None where the kind has none.
        dtype: what it computes in.
        index: gives the collection's BM25 index, for the kind bm25.
        reads: lengths and prompts of an embedding model, arguments of `build_student`; its own when None.
    """
    if one.kind == "stored":
        # Triples that are loaded with scores have them in a column of that name.
        return StoredScores(column="scores") if one.column is not None else StoredScores(one.scores)
    if one.kind == "bm25":
        assert index is not None
        return BM25Teacher(index())
    assert model is not None
    if one.kind == "cross-encoder":
        return CrossEncoderTeacher(model, candidates=one.candidates, dtype=dtype)
    if one.kind == "own":
        return ColBERTTeacher(build_colbert(resolve_model(model), **(reads or {})), dtype=dtype)
    if one.kind == "dense":
        return DenseTeacher(build_student(resolve_model(model), **(reads or {})), dtype=dtype)
    return ColBERTTeacher(resolve_model(model), dtype=dtype)


def make_teacher(
    teacher: TeacherSettings,
    model: str | None,
    *,
    index: Callable[[], BM25Index] | None = None,
    reads: Mapping[str, Any] | None = None,
    cache: str | None = None,
    cache_gigabytes: float = 20.0,
) -> Teacher:
    """The teacher of a run: one, or several mixed.

    Args:
        teacher: the settings.
        model: folder or Hub id of the first one, None where it has no model.
        index: gives the collection's BM25 index, for a part of the kind bm25.
        reads: lengths and prompts of the base of a mixture, as in :func:`make_part`.
        cache: folder for vectors of ColBERTs and embedding models; None: encode every time.
        cache_gigabytes: maximum size of each one's vectors.
    """
    made: list[tuple[Teacher, float]] = []
    for one in teacher.parts:
        base = teacher.is_mixture and one.model == teacher.model
        live = make_part(
            one,
            model if one is teacher else one.model,
            dtype=teacher.dtype,
            index=index,
            reads=reads if base else None,
        )
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
        teacher: the settings.
        rows: the user's own triples; streamed ones are looked up as they come.
        make_rows: gives those of the collection, where there are no others.

    Raises:
        ValueError, FileNotFoundError: as `StoredScores`; a row's score is missing.
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
