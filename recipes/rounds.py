"""Train a student in rounds of hard negatives: base, mine with the student, train, mine, train; one table of them all.

accelerate launch recipes/rounds.py recipes/rounds.yaml [--rounds N] [--variant HN+] [--setting value ...]

HN trains the student alone on what is mined, HN+ first its teacher. Stopped at any point, the same command goes on
where it stopped; with more --rounds it goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf import pipeline
from tct_hf.pipeline import DataSettings, EncoderSettings, EvaluationSettings, StudentSettings, TeacherSettings
from tct_hf.progress import Stages
from tct_hf.rounds import MiningSettings
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.evaluation.round_report import RoundResult


@dataclass
class LaterSettings:
    student: dict[str, Any] = setting(
        {}, "arguments of the student's training on mined negatives that differ", keys_of="tct_hf:TCTTrainingArguments"
    )
    teacher: dict[str, Any] = setting(
        {}, "likewise of the teacher's", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
    )


@dataclass
class Settings:
    output_dir: str = setting("outputs/rounds", "where everything is written")
    rounds: int = setting(1, "of mining and training after the base")
    variant: Literal["HN", "HN+"] = setting("HN", "HN+: the teacher is trained on the mined negatives too")
    start_from: Literal["previous", "new"] = setting(
        "previous", "a round's student: the last round's trained further, or made anew"
    )
    seed: int = setting(13, "of negatives (plus the round's number), new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of training; auto: bf16 where the hardware has it")
    data: DataSettings = field(default_factory=DataSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    mining: MiningSettings = field(default_factory=MiningSettings)
    later: LaterSettings = field(default_factory=LaterSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def main(settings: Settings) -> None:
    from tct_hf.evaluation.quick_report import check_evaluation
    from tct_hf.evaluation.round_report import round_name
    from tct_hf.files import is_claimed
    from tct_hf.quiet import quieten
    from tct_hf.training import precision, process_state

    check(settings)
    quieten()
    state = process_state()
    output = Path(settings.output_dir)
    base: dict[str, Any] = {"seed": settings.seed, **precision(settings.precision, state.device)}
    write: Callable[[str], None] = partial(print, flush=True) if state.is_main_process else lambda line: None
    stages = Stages(weights(settings), enabled=state.is_main_process)

    with stages.stage("data"), state.main_process_first():
        collection = pipeline.read_collection(settings.data)
        write(f"  {collection.summary()}")
        check_evaluation(collection, settings.evaluation.measures, settings.evaluation.depth)
    depends = [depends_of(settings, collection, base, number) for number in range(settings.rounds + 1)]
    # A folder of other settings is refused before these are written beside it.
    for number, (of_teacher, of_student) in enumerate(depends):
        for name in ("", "training/teacher", "teacher", "training/student", "student"):
            is_claimed(output / f"round-{number}" / name, of_teacher if "teacher" in name else of_student)
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    results: list[RoundResult] = []
    for number, (of_teacher, of_student) in enumerate(depends):
        results.append(
            run_round(
                settings,
                collection,
                results,
                partial(run_stage, stages, round_name(number)),
                base=base,
                of_teacher=of_teacher,
                of_student=of_student,
                state=state,
                write=write,
            )
        )
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if state.is_main_process:
        with stages.stage("evaluate"):
            report = evaluate(settings, collection, results, output, base, depends[-1][1])
        print("\n" + report.read_text(encoding="utf-8"))
    stages.finish()


def check(settings: Settings) -> None:
    if settings.rounds < 0:
        raise SettingsError(f"rounds: {settings.rounds} is below 0")
    if settings.data.unlabelled or settings.data.questions is not None:
        raise SettingsError(
            "data.unlabelled, data.questions: negatives are mined for judged queries; leave them out, or train with "
            "recipes/train.py"
        )
    if settings.student.kind != "dense":
        raise SettingsError(
            "student.kind: negatives are mined with a dense student; train a sparse one on its triples"
        )
    pipeline.check_teacher(settings.teacher)


def weights(settings: Settings) -> dict[str, float]:
    """The stages, in order, with their expected shares of the time."""
    from tct_hf.evaluation.round_report import round_name

    found = {"data": 0.5}
    for number in range(settings.rounds + 1):
        name = round_name(number)
        found |= {f"{name}: mine": 3.0} if number else {}
        found |= {f"{name}: teacher": 6.0} if number == 0 or settings.variant == "HN+" else {}
        found |= {f"{name}: student": 6.0}
    return {**found, "evaluate": 2.0 + settings.rounds}


def depends_of(
    settings: Settings, collection: Collection, base: dict[str, Any], number: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a round's teacher and its student depend on."""
    of_teacher = pipeline.teacher_depends(settings.data, settings.encoder, settings.teacher, collection, base)
    student = {"student": asdict(settings.student)}
    if number:
        rules = {"variant": settings.variant, "start_from": settings.start_from, "mining": asdict(settings.mining)}
        of_teacher |= {**student, **rules, "later": asdict(settings.later), "round": number}
    return of_teacher, {**of_teacher, **student}


def run_stage(stages: Stages, name: str, part: str, work: Callable[[], Any], skip: str | None = None) -> Any:
    if skip is not None:
        stages.skip(f"{name}: {part}", skip)
        return None
    with stages.stage(f"{name}: {part}"):
        return work()


def run_round(
    settings: Settings,
    collection: Collection,
    earlier: list[RoundResult],
    stage: Callable[..., Any],
    *,
    base: dict[str, Any],
    of_teacher: dict[str, Any],
    of_student: dict[str, Any],
    state: Any,
    write: Callable[[str], None],
) -> RoundResult:
    """Mine where there is a student to mine with, train the teacher where that is asked for, train the student."""
    from tct_hf import load_triples
    from tct_hf.data.mining import SUMMARY_FILE, read_counts
    from tct_hf.evaluation.round_report import RoundResult, open_stores, round_name
    from tct_hf.files import claim
    from tct_hf.rounds import mine, student_source

    number = len(earlier)
    folder = Path(settings.output_dir) / f"round-{number}"
    if state.is_main_process:
        claim(folder, of_student)
    trained = [str(result.teacher) for result in earlier if result.teacher is not None]
    teacher = trained[-1] if trained else settings.teacher.model
    of_round = replace(settings.teacher, training={**settings.teacher.training, **settings.later.teacher})
    student = replace(settings.student, training={**settings.student.training, **settings.later.student})
    counts = None
    if number == 0:
        of_round, student = settings.teacher, settings.student
        make_triples: Callable[[], Any] = partial(
            pipeline.training_triples, collection, settings.data, seed=settings.seed, unlabelled=False
        )
    else:
        last = earlier[-1]

        def mine_with_last() -> None:
            stores = open_stores(
                collection,
                str(last.student),
                last.folder,
                precision=settings.precision,
                device=str(state.device),
                write=write,
            )
            origin = f"student {round_name(number - 1)}"
            mine(
                collection,
                student_source(stores, origin, depth=settings.mining.depth, state=state),
                settings.mining,
                folder / "mined",
                seed=settings.seed + number,
                labels=settings.data.labels,
                teacher=teacher,
                bf16=base["bf16"],
                state=state,
                write=write,
            )

        there = (folder / "mined" / SUMMARY_FILE).is_file()
        stage("mine", mine_with_last, skip="they are mined" if there else None)
        counts = read_counts(folder / "mined")
        write("  " + counts.summary().replace("\n", "\n  "))
        make_triples = partial(load_triples, folder / "mined" / "triples.parquet")
    own = None
    if (number == 0 and settings.teacher.model is None) or (number and settings.variant == "HN+"):
        own = folder / "teacher"
        stage(
            "teacher",
            partial(
                pipeline.train_teacher,
                collection,
                make_triples,
                settings.encoder,
                of_round,
                folder,
                seed=settings.seed,
                base=base,
                settings=of_teacher,
                start=teacher if number else None,
            ),
            skip="it is trained" if own.is_dir() else None,
        )
        teacher = str(own)
    elif number == 0:
        stage("teacher", None, skip=f"{teacher} is used as it is")
    assert teacher is not None
    stage(
        "student",
        partial(
            pipeline.train_student,
            collection,
            make_triples,
            settings.encoder,
            student,
            folder,
            teacher=teacher,
            dtype=settings.teacher.dtype,
            base=base,
            settings=of_student,
            start=str(earlier[-1].student) if number and settings.start_from == "previous" else None,
        ),
        skip="it is trained" if (folder / "student").is_dir() else None,
    )
    return RoundResult(folder, folder / "student", own, counts)


def evaluate(
    settings: Settings,
    collection: Collection,
    results: list[RoundResult],
    output: Path,
    base: dict[str, Any],
    depends: dict[str, Any],
) -> Path:
    from tct_hf.evaluation.round_report import report_rounds

    return report_rounds(
        results,
        collection,
        output,
        base_model=settings.encoder.base_model if settings.teacher.model is None else None,
        teacher=settings.teacher.model or str(output / "round-0" / "teacher"),
        query_length=settings.encoder.query_length,
        document_length=settings.encoder.document_length,
        measures=settings.evaluation.measures,
        depth=settings.evaluation.depth,
        precision=settings.precision,
        bf16=base["bf16"],
        settings=depends,
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
