"""The training of rounds of hard negatives: what each round's models depend on, and one round after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.files import claim, is_claimed
from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.rounds import MiningSettings, check_judged, check_mining
from tct_hf.pipeline.run_checks import check_training
from tct_hf.pipeline.steps import DataSettings, EncoderSettings, StudentSettings, TeacherSettings
from tct_hf.pipeline.student_checks import check_student
from tct_hf.pipeline.teacher import check_colbert, check_teacher
from tct_hf.settings import SettingsError, setting

if TYPE_CHECKING:
    from accelerate import PartialState

    from tct_hf.data.collection import Collection
    from tct_hf.evaluation.round_report import RoundResult
    from tct_hf.progress import Stages
    from tct_hf.retrieval.mining import MiningCounts


@dataclass
class LaterSettings:
    """What differs in the training on mined negatives."""

    student: dict[str, Any] = setting(
        {}, "arguments of the student's training on mined negatives that differ", keys_of="tct_hf:TCTTrainingArguments"
    )
    teacher: dict[str, Any] = setting(
        {}, "likewise of the teacher's", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
    )


@dataclass
class RoundsSettings:
    """All that the models of the rounds depend on."""

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


def check_rounds(settings: RoundsSettings, rounds: int) -> None:
    """Find out before any training what would stop a round.

    Args:
        settings: of all rounds.
        rounds: after the base.

    Raises:
        SettingsError: with the mend.
    """
    if rounds < 0:
        raise SettingsError(f"rounds: {rounds} is below 0")
    if settings.data.unlabelled or settings.data.questions is not None:
        raise SettingsError(
            "data.unlabelled, data.questions: negatives are mined for judged queries; leave them out, or train with "
            "recipes/train.py"
        )
    if settings.student.kind != "dense":
        raise SettingsError(
            "student.kind: negatives are mined with a dense student; train a sparse one on its triples"
        )
    check_teacher(settings.teacher)
    check_colbert(settings.teacher)
    check_student(settings.encoder, settings.student, settings.teacher)
    pipeline.schedules_of(settings.student)
    check_mining(settings.mining, "mining.")


def check_rounds_training(settings: RoundsSettings, collection: Collection, base: Mapping[str, Any]) -> None:
    """Likewise, once the data are there: what is wrong with the training arguments, and the queries to mine for.

    Args:
        settings: of all rounds.
        collection: to be trained on.
        base: training arguments that every stage shares.

    Raises:
        SettingsError: with the mend.
    """
    check_judged(collection, settings.data.labels)
    check_training(collection, settings.teacher, settings.student, base)
    teacher, student = _later(settings, settings.later)
    if settings.variant == "HN+":
        teacher = replace(teacher, model=None)  # trained further, even where the base takes it as it is
    try:
        check_training(collection, teacher, student, base)
    except SettingsError as error:
        raise SettingsError(f"later: {error}") from error


def _later(settings: RoundsSettings, later: LaterSettings) -> tuple[TeacherSettings, StudentSettings]:
    """Teacher and student with what differs in a round."""
    return (
        replace(settings.teacher, training={**settings.teacher.training, **later.teacher}),
        replace(settings.student, training={**settings.student.training, **later.student}),
    )


def round_stages(rounds: int, variant: str) -> dict[str, float]:
    """The stages that :func:`train_round` goes through in all rounds, in order.

    Args:
        rounds: after the base.
        variant: "HN" or "HN+".

    Returns:
        Name to expected share of the time.
    """
    from tct_hf.evaluation.round_report import round_name

    found: dict[str, float] = {}
    for number in range(rounds + 1):
        name = round_name(number)
        found |= {f"{name}: mine": 3.0} if number else {}
        found |= {f"{name}: teacher": 6.0} if number == 0 or variant == "HN+" else {}
        found |= {f"{name}: student": 6.0}
    return found


def depends_of_round(
    settings: RoundsSettings, collection: Collection, base: Mapping[str, Any], number: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a round's teacher and its student depend on, JSON-ready.

    Args:
        settings: of all rounds.
        collection: they are trained on.
        base: training arguments that every stage shares.
        number: of the round, 0 for the base.
    """
    of_teacher = pipeline.teacher_depends(settings.data, settings.encoder, settings.teacher, collection, base)
    student = {"student": asdict(settings.student)}
    if number:
        rules = {"variant": settings.variant, "start_from": settings.start_from, "mining": asdict(settings.mining)}
        of_teacher |= {**student, **rules, "later": asdict(settings.later), "round": number}
    return of_teacher, {**of_teacher, **student}


def refuse_other_rounds(
    settings: RoundsSettings, collection: Collection, base: Mapping[str, Any], output: Path, rounds: int
) -> None:
    """Refuse a folder with rounds of other settings, before anything is written there.

    Args:
        settings: of all rounds.
        collection: they are trained on.
        base: training arguments that every stage shares.
        output: folder of the run.
        rounds: after the base.

    Raises:
        ValueError: names the first setting that differs, and the mend.
    """
    for number in range(rounds + 1):
        of_teacher, of_student = depends_of_round(settings, collection, base, number)
        for name in ("", "training/teacher", "teacher", "training/student", "student"):
            is_claimed(output / f"round-{number}" / name, of_teacher if "teacher" in name else of_student)


def train_round(
    settings: RoundsSettings,
    collection: Collection,
    earlier: Sequence[RoundResult],
    output: Path,
    stages: Stages,
    *,
    base: Mapping[str, Any],
    state: PartialState,
    write: Callable[[str], None] = print,
) -> RoundResult:
    """Mine with the last student where there is one, train the teacher where that is asked for, train the student.

    Stopped and called again, it goes on where it stopped; what is finished is left as it is.

    Args:
        settings: of all rounds.
        collection: with a train split.
        earlier: the rounds before, the base first; none for the base itself.
        output: folder of the run; the round has one of its own there, `round-0` and so on.
        stages: with those of :func:`round_stages`.
        base: training arguments that every stage shares.
        state: the processes that share the work.
        write: takes lines of progress.

    Returns:
        What it came to, for :func:`tct_hf.evaluation.round_report.report_rounds`.

    Raises:
        ValueError: the folder holds a round of other settings, or as training and mining.
    """
    from tct_hf.evaluation.round_report import RoundResult, round_name
    from tct_hf.retrieval.mining import TRIPLES_FILE
    from tct_hf.retrieval.triples import load_triples

    number = len(earlier)
    name, folder = round_name(number), output / f"round-{number}"
    of_teacher, of_student = depends_of_round(settings, collection, base, number)
    if state.is_main_process:
        claim(folder, of_student)
    trained = [str(result.teacher) for result in earlier if result.teacher is not None]
    teacher = trained[-1] if trained else settings.teacher.model
    of_round, student = _later(settings, settings.later if number else LaterSettings())
    if number == 0:
        mined = None
        make_triples: Callable[[], Any] = partial(
            pipeline.training_triples, collection, settings.data, seed=settings.seed, unlabelled=False
        )
    else:
        mined = _mined(
            settings, collection, earlier, folder, stages, teacher=teacher, bf16=base["bf16"], state=state, write=write
        )
        make_triples = partial(load_triples, folder / "mined" / TRIPLES_FILE)
    own = folder / "teacher" if (settings.variant == "HN+" if number else teacher is None) else None
    if own is not None:
        _unless_there(
            stages,
            f"{name}: teacher",
            own,
            lambda: pipeline.train_teacher(
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
        )
        teacher = str(own)
    elif number == 0:
        stages.skip(f"{name}: teacher", f"{teacher} is used as it is")
    assert teacher is not None
    further = number > 0 and settings.start_from == "previous"
    _unless_there(
        stages,
        f"{name}: student",
        folder / "student",
        lambda: pipeline.train_student(
            collection,
            make_triples,
            settings.encoder,
            student,
            folder,
            teacher=teacher,
            teaching=settings.teacher,
            base=base,
            settings=of_student,
            start=str(earlier[-1].student) if further else None,
        ),
    )
    return RoundResult(folder, folder / "student", own, mined)


def _unless_there(stages: Stages, name: str, model: Path, train: Callable[[], object]) -> None:
    if model.is_dir():
        stages.skip(name, "it is trained")
        return
    with stages.stage(name):
        train()


def _mined(
    settings: RoundsSettings,
    collection: Collection,
    earlier: Sequence[RoundResult],
    folder: Path,
    stages: Stages,
    *,
    teacher: str | None,
    bf16: bool,
    state: PartialState,
    write: Callable[[str], None],
) -> MiningCounts:
    """Mine `folder/mined` with the student of the last round, or find it mined."""
    from tct_hf.evaluation.round_report import open_stores, round_name
    from tct_hf.pipeline.rounds import mine, student_source
    from tct_hf.retrieval.mining import SUMMARY_FILE, read_counts

    number, last = len(earlier), earlier[-1]
    name, mined = f"{round_name(number)}: mine", folder / "mined"
    if (mined / SUMMARY_FILE).is_file():
        stages.skip(name, "they are mined")
    else:
        with stages.stage(name):
            stores = open_stores(
                collection,
                str(last.student),
                last.folder,
                precision=settings.precision,
                device=str(state.device),
                write=write,
            )
            mine(
                collection,
                student_source(stores, f"student {round_name(number - 1)}", depth=settings.mining.depth, state=state),
                settings.mining,
                mined,
                seed=settings.seed + number,
                labels=settings.data.labels,
                teacher=teacher,
                bf16=bf16,
                state=state,
                write=write,
            )
    counts = read_counts(mined)
    write("  " + counts.summary().replace("\n", "\n  "))
    return counts
