"""Train a ColBERT teacher, distil it live into a single-vector student, and measure both on held-out queries.

accelerate launch recipes/train.py recipes/quickstart.yaml [--setting value ...]

Stopped at any point, the same command goes on where it stopped. --stages runs some of teacher, student, evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf import pipeline, run_checks
from tct_hf.pipeline import (
    DataSettings,
    EncoderSettings,
    EvaluationSettings,
    StudentSettings,
    TeacherSettings,
    TriplesSettings,
)
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting
from tct_hf.teacher_settings import check_scores, check_teacher, check_teaching

if TYPE_CHECKING:
    from datasets import Dataset

    from tct_hf.data.collection import Collection


@dataclass
class Settings:
    output_dir: str = setting("outputs/train", "where everything is written")
    stages: list[Literal["teacher", "student", "evaluate"]] = setting(
        ["teacher", "student", "evaluate"], "stages to run"
    )
    seed: int = setting(13, "of negatives, new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of training; auto: bf16 where the hardware has it")
    data: DataSettings = field(default_factory=DataSettings)
    triples: TriplesSettings = field(default_factory=TriplesSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def main(settings: Settings) -> None:
    from tct_hf.evaluation.quick_report import check_evaluation
    from tct_hf.files import is_claimed
    from tct_hf.quiet import quieten
    from tct_hf.stages import precision, process_state
    from tct_hf.student_checks import check_student

    quieten()
    state = process_state()
    output = Path(settings.output_dir)
    weights = {"data": 0.5, "teacher": 6.0, "student": 6.0, "evaluate": 5.0}
    stages = Stages(
        {name: weights[name] for name in weights if name == "data" or name in settings.stages},
        enabled=state.is_main_process,
    )
    teacher = str(output / "teacher") if settings.teacher.is_trained_here else settings.teacher.model
    base: dict[str, Any] = {"seed": settings.seed, **precision(settings.precision, state.device)}

    if settings.data.questions is not None and not settings.data.unlabelled:
        raise SettingsError("data.questions: these have no labels; set data.unlabelled for the teacher to judge them")
    if settings.triples.path is not None and (settings.data.unlabelled or settings.data.labels < 1):
        raise SettingsError("triples.path: data.labels and data.unlabelled choose from a train split; leave them out")
    check_teacher(settings.teacher)
    check_teaching(settings.teacher, settings.student, triples=settings.triples.path)
    check_student(settings.encoder, settings.student, settings.teacher)
    pipeline.schedules_of(settings.student)
    run_checks.check_streaming(settings.triples, settings.teacher, settings.student, settings.stages)
    write: Callable[[str], None] = partial(print, flush=True) if state.is_main_process else lambda line: None

    @cache  # what was looked up in a table of scores is trained on
    def made_triples(*, unlabelled: bool) -> Dataset:
        return pipeline.training_triples(collection, settings.data, seed=settings.seed, unlabelled=unlabelled)

    with stages.stage("data"), state.main_process_first():
        collection = pipeline.read_collection(settings.data, train=settings.triples.path is None)
        write(f"  {collection.summary()}")
        rows = pipeline.read_triples(
            settings.triples, seed=settings.seed, write=write, scores=settings.teacher.score_columns
        )
        if rows is not None:
            rows = pipeline.refuse_reported_queries(rows, collection)
        if "student" in settings.stages and not (output / "student").is_dir():
            check_scores(settings.teacher, rows, partial(made_triples, unlabelled=settings.data.unlabelled))
        if "evaluate" in settings.stages:
            if "test" not in collection.splits:
                raise SettingsError(
                    f"data.test_split: {collection.name} has no {settings.data.test_split} split, and there are no "
                    "data.questions to hold some out: give one of them, or leave the stage evaluate out."
                )
            check_evaluation(collection, settings.evaluation.measures, settings.evaluation.depth)
            if settings.teacher.kind != "colbert" and not collection.splits["test"].qrels:
                raise SettingsError(
                    "data.test_split: without judgements the best passage of a ColBERT counts as the answer, and "
                    "there is none to search with; give judged queries, or leave the stage evaluate out."
                )
        run_checks.check_training(collection, settings.teacher, settings.student, base)
    # All that a stage's result depends on. A folder that holds the work of anything else is refused before the
    # settings are written beside it.
    of_teacher = pipeline.teacher_depends(settings.data, settings.encoder, settings.teacher, collection, base)
    if rows is not None:
        of_teacher |= {
            "triples": {
                **asdict(settings.triples),
                "fingerprint": None if settings.triples.streaming else rows._fingerprint,
            }
        }

    def triples(*, unlabelled: bool) -> Dataset:
        if rows is not None:
            return rows
        return made_triples(unlabelled=unlabelled)

    of_student = {
        **of_teacher,
        "student": asdict(settings.student),
        "questions": collection.fingerprint.get("questions"),
    }
    folders = {"training/student": of_student, "student": of_student, "runs": of_runs(settings, of_student, teacher)}
    if settings.teacher.is_trained_here:
        folders = {"training/teacher": of_teacher, "teacher": of_teacher, **folders}
    finished = {name: is_claimed(output / name, depends) for name, depends in folders.items()}
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    if "teacher" in settings.stages:
        if not settings.teacher.is_trained_here:
            names = [one.name for one in settings.teacher.parts]
            used = "is used as it is" if len(names) == 1 else "are used as they are"
            stages.skip("teacher", f"{' and '.join(names)} {used}")
        elif finished["teacher"]:
            stages.skip("teacher", "it is trained")
        else:
            with stages.stage("teacher"):
                pipeline.train_teacher(
                    collection,
                    lambda: triples(unlabelled=False),
                    settings.encoder,
                    settings.teacher,
                    output,
                    seed=settings.seed,
                    base=base,
                    settings=of_teacher,
                )
    if "student" in settings.stages:
        if finished["student"]:
            stages.skip("student", "it is trained")
        else:
            with stages.stage("student"):
                check_trained_teacher(settings, teacher)
                pipeline.train_student(
                    collection,
                    partial(triples, unlabelled=settings.data.unlabelled),
                    settings.encoder,
                    settings.student,
                    output,
                    teacher=teacher,
                    teaching=settings.teacher,
                    base=base,
                    settings=of_student,
                )
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if "evaluate" in settings.stages and state.is_main_process:
        with stages.stage("evaluate"):
            evaluate(settings, collection, output, of_runs(settings, of_student, teacher), teacher)
        print("\n" + (output / "report.md").read_text(encoding="utf-8"))
    stages.finish()


def of_runs(settings: Settings, of_student: dict[str, Any], teacher: str | None) -> dict[str, Any]:
    from tct_hf.files import file_digest

    models = {"student": Path(settings.output_dir) / "student"} | ({"teacher": Path(teacher)} if teacher else {})
    weights = {name: file_digest(path / "model.safetensors") for name, path in models.items()}
    return {**of_student, "evaluation": {"depth": settings.evaluation.depth}, "weights": weights}


def check_trained_teacher(settings: Settings, teacher: str | None) -> None:
    if settings.teacher.is_trained_here and not Path(str(teacher)).is_dir():
        raise SettingsError(
            f"stages: the student learns from {teacher}, which is not there. Add the stage teacher, or name a trained "
            "ColBERT with --teacher.model."
        )


def evaluate(
    settings: Settings, collection: Collection, output: Path, depends: dict[str, Any], teacher: str | None
) -> None:
    from tct_hf.evaluation.quick_report import quick_report

    student = output / "student"
    if not student.is_dir():
        raise SettingsError(f"stages: {student} is not there to be evaluated. Add the stage student.")
    quick_report(
        collection,
        output,
        # A ColBERT from elsewhere has a base of its own, which nobody has named.
        base_model=settings.encoder.base_model if settings.teacher.model is None else None,
        students={"student": str(student)},
        teacher=teacher if settings.teacher.kind == "colbert" else None,
        settings=depends,
        bf16=depends["bf16"],
        document_length=settings.encoder.document_length,
        prompts=settings.encoder.prompts,
        dims=settings.student.training.get("matryoshka_dims"),
        **asdict(settings.evaluation),
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
