"""One arm of a comparison: a way to train a student, everything else held equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.settings import StudentSettings
from tct_hf.pipeline.steps import TRAINING, DataSettings, EncoderSettings
from tct_hf.pipeline.student_checks import check_student
from tct_hf.settings import SettingsError, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.pipeline.teacher import TeacherSettings

HARD, OWN, IN_BATCH, STOCK = "hard labels", "own candidates", "in-batch", "stock"
# What a student learns from. The paper's ablation: no distillation, triplet distillation, in-batch distillation.
SIGNALS: dict[str, dict[str, Any]] = {
    HARD: {"hard_label_weight": 1.0},
    OWN: {"candidates": "own"},
    IN_BATCH: {"candidates": "in-batch"},
    STOCK: {},  # sentence-transformers' own trainer and loss, on the base as it is
}

# Systems that no arm trains, by their keys: an arm can be tested against them too.
REFERENCES = ("bm25", "base-native", "base-maxsim", "teacher")

# Later than students that are there already, which were made with what these are when nothing is said.
_LATER = ("query_augmentation", "pooling", "scale", "encoder")


@dataclass
class Arm:
    """One kind of student in a comparison: what it learns from, starts from, how it reads texts, its own settings."""

    signal: Literal["hard labels", "own candidates", "in-batch", "stock"] = setting(
        "in-batch", "what the student learns from"
    )
    initialise_from: Literal["teacher", "base"] | None = setting(
        None, "whose encoder it starts from; none: the teacher's with tct, else the base's"
    )
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when none")
    query_augmentation: bool = setting(True, "with tct: pad its queries with attended [MASK]s")
    pooling: Literal["mean", "cls"] | None = setting(
        None, "of its token vectors; cls: the start token's; none: the base's own, mean with tct"
    )
    scale: float | None = setting(
        None, "with tct: normalise its vectors and learn the factor of cosines from here on; not when none"
    )
    encoder: dict[str, Any] = setting(
        {}, "its own lengths, encoding or base", keys_of="tct_hf.pipeline.settings:EncoderSettings"
    )
    unlabelled: bool = setting(False, "also learn from train queries without labels, and questions")
    against: list[str] = setting([], "what it is tested against: arms, bm25, base-native, base-maxsim, teacher")
    seeds: list[int] | None = setting(None, "its own seeds; those of the comparison when none")
    training: dict[str, Any] = setting({}, "its own training arguments", keys_of="tct_hf:TCTTrainingArguments")

    def __post_init__(self) -> None:
        if self.signal == STOCK:
            self.initialise_from = "base"
        if self.unlabelled and self.signal in (HARD, STOCK):
            raise ValueError("unlabelled is set, but labels are all that signal gives: rows without one teach nothing")
        fixed = {"seed": "seeds", "candidates": "signal"}
        if self.signal == HARD:
            fixed["hard_label_weight"] = "signal"
        for name, by in fixed.items():
            if name in self.training:
                raise ValueError(f"training: {name} is what {by} says; leave it out")
        if "base_model" in self.encoder and self.initialise_from == "teacher":
            raise ValueError("encoder: base_model is not what it starts from; set initialise_from to base")

    def arguments(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Its training arguments: those that all arms share, what its signal means, its own."""
        return {**TRAINING, **shared, **SIGNALS[self.signal], **self.training}

    def depends(self, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All that its student of a seed depends on, JSON-ready; `settings` are what every arm's depend on."""
        silent = {name: value for name, value in asdict(Arm()).items() if name in _LATER}
        own = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("against", "seeds") and not (name in silent and value == silent[name])
        }
        return {**settings, "arm": own, "seed": seed}

    def encoder_settings(self, shared: EncoderSettings) -> EncoderSettings:
        """How it reads texts: as all arms do, but for what it says itself."""
        return replace(shared, **self.encoder)

    def reads(self) -> str:
        """How it reads texts otherwise than most students do, in a few words; empty where it does not."""
        words = [
            *([] if self.query_augmentation else ["no [MASK]s"]),
            *([] if self.pooling != "cls" else ["start token's vector"]),
            *([] if self.scale is None else ["normalised"]),
            *(f"{name} {value}" for name, value in self.encoder.items()),
        ]
        return ", ".join(words)


@dataclass
class ArmTable:
    """Some arms of a comparison, in a table of their own; an arm may stand in several, and is trained once."""

    arms: list[str] = setting([], "its lines")
    against: list[str] = setting([], "what each is tested against, in place of what the arms say themselves")

    def pairs(self, results: Mapping[str, Arm], there: Iterable[str]) -> list[tuple[str, str]]:
        """Who is tested against whom.

        Args:
            results: the arms there are, by name.
            there: names of all that can be tested against: arms, and keys of REFERENCES.
        """
        known = set(there)
        return [
            (name, other)
            for name in self.arms
            if name in results
            for other in (self.against or results[name].against)
            if other in known and other != name
        ]


def slug_of(name: str) -> str:
    """An arm's or a table's name in the name of a folder or a file."""
    return name.replace(" ", "-").replace(",", "").replace("/", "-")


def check_students(arms: Mapping[str, Arm], encoder: EncoderSettings, teacher: TeacherSettings) -> None:
    """Find out before any training which arm's student could not be built.

    Args:
        arms: by name.
        encoder: the settings that they share.
        teacher: whose encoder they may start from.

    Raises:
        SettingsError: as :func:`~tct_hf.pipeline.student_checks.check_student`, of an arm.
    """
    same = {field.name for field in fields(StudentSettings)} & {field.name for field in fields(Arm)}
    for name, arm in arms.items():
        student = StudentSettings(**{setting: getattr(arm, setting) for setting in same})
        try:
            check_student(arm.encoder_settings(encoder), student, teacher)
        except SettingsError as error:
            message = str(error)
            raise SettingsError(f"arms.{name}.{message.removeprefix('student.')}") from error


def check_arms(
    arms: Mapping[str, Arm], collection: Collection, training: Mapping[str, Any], curve: Mapping[str, int]
) -> None:
    """Find out before any training what would stop an arm after the teacher's.

    Args:
        arms: by name.
        collection: of the comparison.
        training: arguments that all arms share.
        curve: as for :func:`train_arm`.

    Raises:
        ValueError: an arm's training arguments are wrong, or dev figures are asked for where there are none.
    """
    from tct_hf.training.arguments import TCTTrainingArguments
    from tct_hf.training.run import dev_evaluator

    if training.get("eval_strategy", "no") != "no" and "dev" not in collection.splits:
        raise ValueError(
            f"curve.steps asks for dev figures, but {collection.name} has no dev split: set data.dev_share, or "
            "curve.steps to 0."
        )
    for name, arm in arms.items():
        arguments = arm.arguments(training)
        try:
            TCTTrainingArguments(output_dir="unused", **arguments)
            dev_evaluator(collection, arguments, kind="dense", **curve)
        except (ValueError, TypeError) as error:
            raise ValueError(f"arms.{name}: {error}") from error


def train_arm(
    arm: Arm,
    seed: int,
    folder: Path,
    *,
    collection: Collection,
    data: DataSettings,
    encoder: EncoderSettings,
    teacher: str,
    dtype: str,
    cache: str | None = None,
    training: Mapping[str, Any],
    curve: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Path:
    """Train one student of an arm, or find it trained.

    Args:
        arm: how.
        seed: of negatives, batches and dropout.
        folder: of this student; a run that was stopped goes on there.
        collection: with a train split.
        data: its settings.
        encoder: lengths, and the base.
        teacher: folder or Hub id.
        dtype: the teacher computes in.
        cache: folder for its token vectors; none: encode every time.
        training: arguments that all arms share; the arm's own win.
        curve: how many dev `queries` are searched among how many `passages` during training.
        settings: JSON-ready, all that the students of all arms depend on.

    Returns:
        The student's folder.

    Raises:
        ValueError: the folder holds another arm's work.
    """
    from tct_hf.encoding.build import build_student
    from tct_hf.hub_client import resolve_model
    from tct_hf.teachers.base import NoTeacher, Teacher
    from tct_hf.teachers.cached import CachedTeacher
    from tct_hf.teachers.colbert import ColBERTTeacher
    from tct_hf.training import run as stages

    def make_teacher() -> Teacher:
        if arm.signal == HARD:
            return NoTeacher()
        live = ColBERTTeacher(teacher, dtype=dtype)  # type: ignore[arg-type]
        return live if cache is None else CachedTeacher(live, cache)

    arguments = {**arm.arguments(training), "seed": seed}
    evaluator = stages.dev_evaluator(collection, arguments, kind="dense", **curve)
    if arm.signal == STOCK:
        own = arm.encoder_settings(encoder)
        return stages.train_stock(
            lambda: build_student(
                resolve_model(own.base_model),
                encoding="own",
                layers=arm.layers,
                query_length=own.query_length,
                document_length=own.document_length,
                prompts=own.prompts,
            ),
            lambda: pipeline.training_triples(collection, data, seed=seed, unlabelled=False),
            folder / "student",
            work=folder / "training",
            arguments=arguments,
            settings=arm.depends(seed, settings),
            evaluator=evaluator,
        )
    return stages.train_student(
        lambda: pipeline.new_student(
            arm.encoder_settings(encoder),
            teacher,
            initialise_from=arm.initialise_from,
            layers=arm.layers,
            query_augmentation=arm.query_augmentation,
            pooling=arm.pooling,
            scale=arm.scale,
        ),
        make_teacher,
        lambda: pipeline.training_triples(collection, data, seed=seed, unlabelled=arm.unlabelled),
        folder / "student",
        work=folder / "training",
        arguments=arguments,
        settings=arm.depends(seed, settings),
        evaluator=evaluator,
    )
