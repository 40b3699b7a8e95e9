"""What is refused in settings before anything is read: teachers that lack something, and contradictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from tct_hf.data.rows import is_hub_id
from tct_hf.files import command
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import EncoderSettings, OneTeacher, StudentSettings, TeacherSettings, TrainSettings
from tct_hf.settings import SettingsError


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Turn what a constructor refuses into an error of its section, `prefix`, or of the setting it begins with."""
    try:
        yield
    except SettingsError:
        raise
    except (ValueError, TypeError) as error:
        said = str(error)
        name = said.replace("=", ":").partition(":")[0]
        if name in {one.name for one in fields(EncoderSettings)}:
            prefix = "encoder"
        elif said.startswith("training."):
            prefix, name = prefix.removesuffix(".training"), "training"
        raise SettingsError(
            (f"{prefix}.{said}" if name.isidentifier() else f"{prefix}: {said}").lstrip(".: ")
        ) from error


def check_part(one: OneTeacher, prefix: str, *, model: str = "model", trains: bool = False) -> None:
    """Refuse a teacher that lacks what its kind needs; `prefix` and `model` name its settings in messages."""
    if one.kind in ("stored", "bm25") and one.model is not None:
        raise SettingsError(f"{prefix}{model}: {one.kind} needs no model; leave it out, or choose another kind")
    if one.kind != "stored" and one.scores is not None:
        raise SettingsError(f'{prefix}scores: a {one.kind} scores live; leave it out, or set {prefix}kind to "stored"')
    if one.candidates == "in-batch" and one.kind != "cross-encoder":
        raise SettingsError(f"{prefix}candidates: only a cross-encoder has a choice; leave it out")
    if one.kind == "bm25":
        return
    if one.kind == "stored":
        if one.scores is None:
            raise SettingsError(
                f"{prefix}scores: name the stored scores, columns of the triples (scores, teacher_score) or a file"
            )
        if one.column is None and not Path(one.scores).is_file() and not is_hub_id(one.scores):
            raise SettingsError(f"{prefix}scores: {one.scores}: no such file of scores; give the right path")
        return
    what = {"colbert": "a ColBERT", "cross-encoder": "a cross-encoder"}.get(one.kind, "an embedding model")
    name = one.model
    if name is None:
        if not trains:
            raise SettingsError(f"{prefix}{model}: name the folder or Hub id of {what}")
    elif not Path(resolve_model(name)).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        train = f"Train one with {command('train paper')}, or name" if one.kind == "colbert" else "Name"
        raise SettingsError(
            f"{prefix}{model}: {name} is not there, and no Hub id (owner/name) either. {train} the folder of {what}."
        )


def check_teacher(teacher: TeacherSettings) -> None:
    """Refuse a settled teacher, or one that it is mixed with, that lacks what its kind needs."""
    if teacher.mixture_weights is not None and (not teacher.is_mixture or len(teacher.mixture_weights) != 3):
        raise SettingsError(
            "teacher.mixture_weights: give three numbers, of a mixture's pooled vectors, BM25 and own MaxSim"
        )
    if teacher.is_mixture:
        default = TeacherSettings()
        for name in ("scores", "weight", "normalize", "dim", "training"):
            if getattr(teacher, name) != getattr(default, name):
                raise SettingsError(f"teacher.{name} has no effect on a mixture: leave it out, or set teacher.kind")
    else:
        check_part(teacher, "teacher.", trains=teacher.kind == "colbert")
        if not teacher.mixed_with and teacher.weight != 1.0:
            raise SettingsError("teacher.weight: there is no other teacher; leave it out, or add teacher.mixed_with")
    for place, one in enumerate(teacher.mixed_with):
        check_part(one, f"teacher.mixed_with[{place}].")
    if len({one.column for one in teacher.parts if one.column is not None}) > 1:
        raise SettingsError("teacher: stored scores from two sets of columns; keep one, and give the other as a file")


def check_colbert(teacher: TeacherSettings) -> None:
    """Refuse what is no single ColBERT, where a recipe trains and mines with one."""
    teacher.kind = teacher.kind or "colbert"
    if teacher.kind != "colbert" or teacher.mixed_with:
        raise SettingsError(
            f"teacher.kind, teacher.mixed_with: only a ColBERT works here; use {command('train')} for others"
        )


def check_together(settings: TrainSettings) -> None:
    """Refuse settings that contradict one another; the teacher is settled."""
    data, triples, encoder = settings.data, settings.triples, settings.encoder
    teacher, student = settings.teacher, settings.student
    asks = data.unlabelled or "unlabelled" in settings.stages
    if data.questions is not None and not data.unlabelled:
        raise SettingsError("data.questions: these have no labels; set data.unlabelled for the teacher to judge them")
    for name in ("made_questions", "max_questions"):
        if getattr(data, name) and not asks:
            raise SettingsError(f"data.{name}: questions without labels; set data.unlabelled to learn from them")
    if triples.path is not None and (asks or data.labels < 1):
        raise SettingsError(
            "triples.path: data.labels, data.unlabelled and the stage unlabelled choose from a train split; leave "
            "them or triples.path out"
        )
    if data.negatives == "teacher" and not teacher.is_mixture:
        raise SettingsError("data.negatives: only a mixture searches the corpus; leave it out, or set teacher.kind")
    check_teacher(teacher)
    if teacher.is_mixture and (asks or data.negatives == "teacher") and any(p.kind == "stored" for p in teacher.parts):
        raise SettingsError(
            f"{'data.unlabelled' if asks else 'data.negatives'}: the stored scores of teacher.mixed_with do not cover "
            "the passages that the mixture finds; leave one of the two out"
        )
    if teacher.is_mixture and student.training.get("preset") is not None:
        raise SettingsError(
            "student.training.preset: its temperature belongs to the paper's teacher; leave it out, or set "
            "teacher.kind to colbert"
        )
    own = student.training.get("candidates", "in-batch") == "own"
    if not own and all(one.covers == "own" for one in teacher.parts):
        raise SettingsError(
            f"teacher.kind: a {teacher.kind} teacher scores a query's own candidates only; set "
            "student.training.candidates to own, or mix it with a ColBERT (teacher.mixed_with). A cross-encoder can "
            'score the whole batch, slowly, with teacher.candidates: "in-batch"'
        )
    if own and any(one.candidates == "in-batch" for one in teacher.parts):
        raise SettingsError(
            "teacher.candidates: the cross-encoder would score every query with every passage, and the student "
            "compares a query's own; leave it out, or set student.training.candidates to in-batch"
        )
    starts_from = encoder.starts_from(student.initialise_from)
    if starts_from == "teacher" and (teacher.kind != "colbert" or student.kind == "splade"):
        what = "for a sparse student" if student.kind == "splade" else f"from a {teacher.kind} teacher"
        raise SettingsError(f"student.initialise_from: there is no encoder to take {what}; set it to base")
    if student.kind == "splade":
        dense = StudentSettings()
        for name in ("layers", "pooling", "scale", "query_augmentation"):
            if getattr(student, name) != getattr(dense, name):
                raise SettingsError(f"student.{name} is of dense students: leave it out, or set student.kind to dense")
        if encoder.prompts and not teacher.is_trained_here:
            raise SettingsError("encoder.prompts: a sparse student reads texts without any; leave them out")
    if student.teacher_cache is not None and all(one.kind not in ("colbert", "dense", "own") for one in teacher.parts):
        raise SettingsError("student.teacher_cache: there is no ColBERT or embedding model to keep vectors of")
    if not 0 < student.teacher_cache_gigabytes < float("inf"):
        raise SettingsError(
            f"student.teacher_cache_gigabytes={student.teacher_cache_gigabytes}: give a finite number greater than 0"
        )
    if triples.path is None and teacher.score_columns is not None:
        raise SettingsError(
            f"teacher.scores: {teacher.score_columns} are columns of triples, or a file that is not there; name the "
            f"triples with triples.path ({command('score')} writes them), or give the right path of a file"
        )
    if triples.streaming:
        if triples.path is None:
            raise SettingsError("triples.streaming: there is nothing to stream; name the triples with triples.path")
        if triples.shuffle_buffer < 1:
            raise SettingsError(f"triples.shuffle_buffer: {triples.shuffle_buffer} is below 1")
        trained = {"student": student.training, **({"teacher": teacher.training} if teacher.is_trained_here else {})}
        for name, arguments in trained.items():
            if name in settings.stages and not arguments.get("max_steps", -1) > 0:
                raise SettingsError(
                    f"{name}.training.max_steps: streamed triples have no length, so num_train_epochs can't say when "
                    "training ends. Set it (for e passes over n rows: e * n / (per_device_train_batch_size * "
                    "processes * gradient_accumulation_steps))."
                )
