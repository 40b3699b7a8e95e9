"""What is refused in settings before anything is read: teachers that lack something, and contradictions."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from tct_hf.files import command
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import (
    OF_PAIRS,
    EncoderSettings,
    OneTeacher,
    StudentSettings,
    TeacherSettings,
    TrainSettings,
)
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
        raise SettingsError(f"{prefix}{'.' if name.isidentifier() else ': '}{said}".lstrip(".: ")) from error


@contextmanager
def of_section(prefix: str) -> Iterator[None]:
    """Put a prefix before the message of a setting that is refused."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{prefix}{error}") from error


# What a teacher's model is named by, for messages.
_WHAT = {
    "colbert": "the folder or Hub id of a ColBERT",
    "cross-encoder": "the folder or Hub id of a cross-encoder",
    "causal": "the folder or Hub id of a causal language model",
    "url": "the URL of a server that reranks",
}

# Whose arguments their options are; imported with torch, which --help does without.
_TEACHERS = {
    "cross-encoder": "tct_hf.teachers.cross_encoder:CrossEncoderTeacher",
    "causal": "tct_hf.teachers.causal:CausalRerankerTeacher",
    "url": "tct_hf.teachers.remote:URLTeacher",
}


def check_part(one: OneTeacher, prefix: str, *, model: str = "model", trains: bool = False) -> None:
    """Refuse a teacher that lacks what its kind needs; `prefix` and `model` name its settings in messages."""
    if one.kind != "stored" and one.scores is not None:
        raise SettingsError(f'{prefix}scores: a {one.kind} scores live; leave it out, or set {prefix}kind to "stored"')
    if one.kind == "stored" and one.scores is None:
        raise SettingsError(f"{prefix}scores: name the stored scores, columns of the triples or a file")
    if one.kind != "url" and one.key_env is not None:
        raise SettingsError(f'{prefix}key_env is of a server: leave it out, or set {prefix}kind to "url"')
    if one.kind not in OF_PAIRS and one.options:
        raise SettingsError(f"{prefix}options: a {one.kind} teacher takes none; leave them out")
    if one.kind in ("stored", "bm25"):
        return
    if one.options:
        taken = {"candidates", "dtype", *(("url", "key_env") if one.kind == "url" else ("model",))}
        known = sorted({*inspect.signature(pkgutil.resolve_name(_TEACHERS[one.kind])).parameters} - taken)
        if wrong := sorted({*one.options}.difference(known)):
            raise SettingsError(f"{prefix}options.{wrong[0]}: not known here; known are {', '.join(known)}")
    what = _WHAT.get(one.kind, "the folder or Hub id of an embedding model")
    if (name := one.model) is None:
        if not trains:
            raise SettingsError(f"{prefix}{model}: name {what}")
    elif one.kind == "url":
        try:
            pkgutil.resolve_name(_TEACHERS["url"])(name, key_env=one.key_env, candidates=one.candidates, **one.options)
        except (ValueError, TypeError) as error:
            said = str(error).replace("url:", f"{model}:", 1)
            section = "" if said.startswith((model, "key_env")) else "options: "
            raise SettingsError(f"{prefix}{section}{said}") from error
    elif not Path(resolve_model(name)).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        train = f" Train one with {command('train paper')}." if one.kind == "colbert" else ""
        raise SettingsError(f"{prefix}{model}: {name} is not there; name {what} (owner/name).{train}")


def check_together(settings: TrainSettings) -> None:
    """Refuse settings that lack something, contradict one another or would be ignored; the teacher is settled."""
    data, triples, teacher, student = settings.data, settings.triples, settings.teacher, settings.student
    if settings.verify:
        settings.expected.check()
    asks = data.unlabelled or "unlabelled" in settings.stages
    if data.questions is not None and not data.unlabelled:
        raise SettingsError("data.questions: these have no labels; set data.unlabelled for the teacher to judge them")
    if data.made_questions and not asks:
        raise SettingsError("data.made_questions: questions without labels; set data.unlabelled to learn from them")
    if triples.path is not None and (asks or data.labels < 1):
        raise SettingsError("triples.path: data.labels, data.unlabelled and the stage unlabelled need a train split")
    if triples.path is None and triples.streaming:
        raise SettingsError("triples.streaming: there is nothing to stream; name the triples with triples.path")
    if data.negatives == "teacher" and not teacher.is_mixture:
        raise SettingsError("data.negatives: only a mixture searches the corpus; leave it out, or set teacher.kind")

    weights = teacher.mixture_weights
    if weights is not None and (not teacher.is_mixture or len(weights) != 3):
        raise SettingsError("teacher.mixture_weights: give three numbers, of pooled vectors, BM25 and own MaxSim")
    default = TeacherSettings()
    if teacher.is_mixture:
        for name in ("scores", "weight", "normalize", "dim", "training", "key_env", "options"):
            if getattr(teacher, name) != getattr(default, name):
                raise SettingsError(f"teacher.{name} has no effect on a mixture: leave it out, or set teacher.kind")
    else:
        check_part(teacher, "teacher.", trains=teacher.kind == "colbert")
    for place, one in enumerate(teacher.mixed_with):
        check_part(one, f"teacher.mixed_with[{place}].")
    if len({one.column for one in teacher.parts if one.column is not None}) > 1:
        raise SettingsError("teacher: stored scores from two sets of columns; keep one, and give the other as a file")
    stored = any(one.kind == "stored" for one in teacher.parts)
    if teacher.is_mixture and stored and (asks or data.negatives == "teacher"):
        name = "data.unlabelled" if asks else "data.negatives"
        raise SettingsError(f"{name}: the stored scores of teacher.mixed_with do not cover what the mixture finds")
    if triples.path is None and teacher.score_columns is not None:
        raise SettingsError(
            f"teacher.scores: {teacher.score_columns} are columns of triples, or a file that is not there; name the "
            f"triples with triples.path ({command('score')} writes them), or give the right path of a file"
        )

    whole = [p for p in teacher.parts if p.kind != "stored" and not (p.kind in OF_PAIRS and p.candidates == "own")]
    if not whole and student.training.get("candidates", "in-batch") != "own":
        raise SettingsError(
            f"student.training.candidates: a {teacher.kind} teacher scores a query's own candidates only; set it to "
            "own, mix in a ColBERT (teacher.mixed_with), or set teacher.candidates to in-batch if it takes it"
        )
    has_vectors = student.tower_of is not None or any(one.kind == "dense" for one in teacher.parts)
    if student.training.get("embedding_weight") and not has_vectors:
        raise SettingsError(
            f"student.training.embedding_weight: a {teacher.kind} teacher has no vector of a text; set teacher.kind "
            "to dense or mixture, or mix one in (teacher.mixed_with: [{kind: dense, model: owner/name, weight: 0}])"
        )
    if not 0 < (size := student.teacher_cache_gigabytes) < float("inf"):
        raise SettingsError(f"student.teacher_cache_gigabytes={size}: give a finite number greater than 0")
    if teacher.is_mixture and student.training.get("preset") is not None:
        raise SettingsError("student.training.preset: its temperature belongs to the paper's teacher; leave it out")
    sparse, static = student.kind == "splade", student.kind == "static"
    if student.tower_of is None and student.passages is not None:
        raise SettingsError("student.passages: vectors of which model? Name it with student.tower_of")
    if (first := student.from_vectors).texts < 0 or (first.training and not first.texts):
        raise SettingsError(f"student.from_vectors.texts={first.texts}: give the number of texts, such as 20000")
    if student.tower_of is None and first.texts:
        raise SettingsError("student.from_vectors: vectors of which model? Name it with student.tower_of")
    if student.training.get("max_steps") == 0 and (student.is_coupled or "stock" in settings.stages):
        raise SettingsError(
            "student.training.max_steps: 0 is for a query tower that learns from vectors alone: set "
            "student.from_vectors.texts, and leave the stage stock out; -1 trains for num_train_epochs"
        )
    if student.tower_of is not None and (sparse or student.scale is not None or teacher.kind == "self"):
        name = "teacher.kind" if teacher.kind == "self" else "student.kind" if sparse else "student.scale"
        raise SettingsError(
            f"{name}: a query tower (student.tower_of) is dense, scaled as that model is, and reads no passages that "
            "could teach it; leave it out"
        )
    begins = "base" if student.stays else settings.encoder.starts_from(student.initialise_from)
    if begins == "teacher" and (teacher.kind != "colbert" or sparse):
        what = "for a sparse student" if sparse else f"from a {teacher.kind} teacher"
        raise SettingsError(f"student.initialise_from: there is no encoder to take {what}; set it to base")
    for name in ("layers", "pooling", "scale", "query_augmentation"):
        if (sparse or static) and getattr(student, name) != getattr(StudentSettings(), name):
            raise SettingsError(f"student.{name} is of dense students: leave it out, or set student.kind to dense")
    if student.dim is not None and not static:
        raise SettingsError("student.dim is of static students: leave it out, or set student.kind to static")
    if static and teacher.kind == "self":
        raise SettingsError("teacher.kind: a static student has no token vectors to teach itself; set it to mixture")
    if sparse and settings.encoder.prompts and not teacher.is_trained_here:
        raise SettingsError("encoder.prompts: a sparse student reads texts without any; leave them out")
    trained = {"student": student.training, **({"teacher": teacher.training} if teacher.is_trained_here else {})}
    for name, arguments in trained.items():
        if triples.streaming and name in settings.stages and not arguments.get("max_steps", -1) > 0:
            raise SettingsError(
                f"{name}.training.max_steps: streamed triples have no length, so num_train_epochs can't say when "
                "training ends; set it (for e passes over n rows: e * n / the rows of one optimizer step)"
            )
