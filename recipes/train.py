"""Train a single-vector student from a live teacher, with labels or without, and measure it on held-out queries.

accelerate launch recipes/train.py recipes/quickstart.yaml [--setting value ...]

Stopped at any point, the same command goes on where it stopped. --stages runs some of the stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.pipeline import run_checks
from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.steps import (
    DataSettings,
    EncoderSettings,
    EvaluationSettings,
    StudentSettings,
    TeacherSettings,
    TriplesSettings,
)
from tct_hf.pipeline.teacher import check_scores, check_teacher, check_teaching
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from datasets import Dataset

    from tct_hf.data.collection import Collection


@dataclass
class Settings:
    output_dir: str = setting("outputs/train", "where everything is written")
    stages: list[Literal["teacher", "unlabelled", "stock", "student", "evaluate"]] = setting(
        ["teacher", "student", "evaluate"],
        "stages to run; to compare with: unlabelled, a student without labels, and stock, sentence-transformers alone",
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
    from tct_hf.pipeline.student_checks import check_student
    from tct_hf.progress import quieten
    from tct_hf.training.stages import precision, process_state

    quieten()
    state = process_state()
    output = Path(settings.output_dir)
    settings.teacher.settle(settings.encoder)
    weights = {"data": 0.5, "teacher": 6.0, "unlabelled": 6.0, "stock": 6.0, "student": 6.0, "evaluate": 5.0}
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
    asked = settings.data.unlabelled or "unlabelled" in settings.stages
    for name in ("made_questions", "max_questions"):
        if getattr(settings.data, name) and not asked:
            raise SettingsError(f"data.{name}: questions without labels; set data.unlabelled to learn from them")
    if settings.data.negatives == "teacher" and not settings.teacher.is_mixture:
        raise SettingsError("data.negatives: only a mixture searches the corpus; leave it out, or set teacher.kind")
    if settings.triples.path is not None and "unlabelled" in settings.stages:
        raise SettingsError("stages: unlabelled learns from the collection's questions; leave it or triples.path out")
    check_teacher(settings.teacher)
    check_teaching(settings.teacher, settings.student, settings.encoder, triples=settings.triples.path)
    check_student(settings.encoder, settings.student, settings.teacher)
    pipeline.schedules_of(settings.student)
    run_checks.check_streaming(settings.triples, settings.teacher, settings.student, settings.stages)
    write: Callable[[str], None] = partial(print, flush=True) if state.is_main_process else lambda line: None

    @cache  # what was looked up in a table of scores is trained on
    def made_triples(*, unlabelled: bool) -> Dataset:
        return pipeline.training_triples(collection, settings.data, seed=settings.seed, unlabelled=unlabelled)

    without_labels = replace(settings.data, labels=0.0, unlabelled=True, dev_split=None)

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
        "made_questions": collection.fingerprint.get("made_questions"),
    }
    of_unlabelled = {**of_student, "data": asdict(without_labels)}
    folders: dict[str, dict[str, Any]] = {"runs": of_runs(settings, of_student, teacher)}
    for name, depends in (("student", of_student), ("stock", of_student), ("unlabelled", of_unlabelled)):
        folders |= {f"training/{name}": depends, name: depends}
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

    def distil(name: str, data: DataSettings, depends: dict[str, Any]) -> None:
        student, teaching = settings.student, settings.teacher
        rows_of = partial(triples, unlabelled=data.unlabelled)
        with state.main_process_first():
            student, teaching, candidates = pipeline.prepare_teaching(
                *(collection, data, settings.encoder, student, teaching, output),
                model=teacher,
                name=f"mixture-{name}",
                has_rows=rows is not None,
                settings={**of_teacher, "data": asdict(data), "questions": of_student["questions"]},
                write=write,
            )
        if candidates:
            made = partial(pipeline.training_triples, collection, data, seed=settings.seed)
            rows_of = partial(made, unlabelled=data.unlabelled, candidates=candidates)
        pipeline.train_student(
            *(collection, rows_of, settings.encoder, student, output),
            teacher=teacher,
            teaching=teaching,
            base=base,
            settings=depends,
            name=name,
        )

    for name, data, depends in (
        ("unlabelled", without_labels, of_unlabelled),
        ("stock", settings.data, of_student),
        ("student", settings.data, of_student),
    ):
        if name not in settings.stages:
            continue
        if finished[name]:
            stages.skip(name, "it is trained")
            continue
        with stages.stage(name):
            if name == "stock":
                pipeline.train_stock(
                    *(collection, partial(triples, unlabelled=False), settings.encoder, settings.student, output),
                    base=base,
                    settings=depends,
                )
                continue
            check_trained_teacher(settings, teacher)
            distil(name, data, depends)
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if "evaluate" in settings.stages and state.is_main_process:
        with stages.stage("evaluate"):
            evaluate(settings, collection, output, of_runs(settings, of_student, teacher), teacher)
        print("\n" + (output / "report.md").read_text(encoding="utf-8"))
    stages.finish()


def of_runs(settings: Settings, of_student: dict[str, Any], teacher: str | None) -> dict[str, Any]:
    from tct_hf.files import file_digest

    models = students_of(settings) | ({"teacher": Path(teacher)} if teacher else {})
    weights = {name: file_digest(path / "model.safetensors") for name, path in models.items()}
    return {**of_student, "evaluation": {"depth": settings.evaluation.depth}, "weights": weights}


def students_of(settings: Settings) -> dict[str, Path]:
    """The folders of the models that this run trains, by name, in the order of the table."""
    names = [name for name in ("stock", "unlabelled") if name in settings.stages]
    return {name: Path(settings.output_dir) / name for name in [*names, "student"]}


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

    models = {name: str(folder) for name, folder in students_of(settings).items()}
    for name, folder in models.items():
        if not Path(folder).is_dir():
            raise SettingsError(f"stages: {folder} is not there to be evaluated. Add the stage {name}.")
    stock = models.pop("stock", None)
    if "unlabelled" in models:
        models = {"unlabelled": models["unlabelled"], "labelled": models["student"]}
    # A ColBERT from elsewhere has a base of its own, which nobody has named.
    colbert = settings.teacher.kind == "colbert"
    quick_report(
        collection,
        output,
        base_model=None if colbert and settings.teacher.model else settings.encoder.base_model,
        students=models,
        stock=stock,
        teacher=teacher if colbert else None,
        settings=depends,
        bf16=depends["bf16"],
        lengths=settings.encoder.lengths,
        vectors=pipeline.vectors_folder(settings.teacher, settings.student, output),
        prompts=settings.encoder.prompts,
        dims=settings.student.training.get("matryoshka_dims"),
        labels=settings.data.labels > 0,
        **asdict(settings.evaluation),
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
