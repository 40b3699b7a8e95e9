"""What is found before training, once: weights of teachers, calibrated on dev, and a mixture's best passages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.encoding.build import build_student
from tct_hf.files import CLAIM_FILE, is_claimed, read_json, replace_dir, staging_beside, write_json_atomic
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import StudentSettings, TeacherSettings
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.teachers.base import Teacher
from tct_hf.teachers.calibration import calibrate
from tct_hf.teachers.colbert import DenseTeacher
from tct_hf.teachers.mixture import DEFAULT_WEIGHTS, members_of, search_mixture, weights_of
from tct_hf.training.run import ARGUMENTS

if TYPE_CHECKING:
    from tct_hf.pipeline.train import Training


def prepare(run: Training, name: str) -> tuple[StudentSettings, TeacherSettings, Run]:
    """The settings of student and teacher with what is found before the stage `name`, and the best passages.

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
                teacher = run.make_teacher(mixture, replace(student, training={}))
                if calibrates:
                    _calibrate(run, teacher, staging)
                if queries:
                    run.job.write(
                        f"  {len(queries):,} questions: the mixture searches {len(collection.corpus):,} passages"
                    )
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
