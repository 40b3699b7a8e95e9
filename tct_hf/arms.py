"""One arm of a comparison: a way to train a student, everything else held equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf import pipeline
from tct_hf.pipeline import TRAINING, DataSettings, EncoderSettings
from tct_hf.settings import setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

HARD, OWN, IN_BATCH = "hard labels", "own candidates", "in-batch"
# What a student learns from. The paper's ablation: no distillation, triplet distillation, in-batch distillation.
SIGNALS: dict[str, dict[str, Any]] = {
    HARD: {"hard_label_weight": 1.0},
    OWN: {"candidates": "own"},
    IN_BATCH: {"candidates": "in-batch"},
}

# Systems that no arm trains, by their keys: an arm can be tested against them too.
REFERENCES = ("bm25", "base-native", "teacher")


@dataclass
class Arm:
    """One kind of student in a comparison: what it learns from, what it starts from, its own settings."""

    signal: Literal["hard labels", "own candidates", "in-batch"] = setting("in-batch", "what the student learns from")
    initialise_from: Literal["teacher", "base"] = setting("teacher", "whose encoder it starts from")
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when none")
    unlabelled: bool = setting(False, "also learn from train queries without labels, and questions")
    against: list[str] = setting([], "what it is tested against: arms, bm25, base-native, teacher")
    seeds: list[int] | None = setting(None, "its own seeds; those of the comparison when none")
    training: dict[str, Any] = setting({}, "its own training arguments", keys_of="tct_hf:TCTTrainingArguments")

    def __post_init__(self) -> None:
        if self.unlabelled and self.signal == HARD:
            raise ValueError(
                "unlabelled is set, but hard labels is all that signal gives: rows without one teach nothing"
            )
        fixed = {"seed": "seeds", "candidates": "signal"}
        if self.signal == HARD:
            fixed["hard_label_weight"] = "signal"
        for name, by in fixed.items():
            if name in self.training:
                raise ValueError(f"training: {name} is what {by} says; leave it out")

    def arguments(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Its training arguments: those that all arms share, what its signal means, its own."""
        return {**TRAINING, **shared, **SIGNALS[self.signal], **self.training}

    def depends(self, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All that its student of a seed depends on, JSON-ready; `settings` are what every arm's depend on."""
        own = {name: value for name, value in asdict(self).items() if name not in ("against", "seeds")}
        return {**settings, "arm": own, "seed": seed}


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
    from tct_hf import TCTTrainingArguments
    from tct_hf.training import dev_evaluator

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
    from tct_hf import CachedTeacher, ColBERTTeacher, NoTeacher, Teacher
    from tct_hf import training as stages

    def make_teacher() -> Teacher:
        if arm.signal == HARD:
            return NoTeacher()
        live = ColBERTTeacher(teacher, dtype=dtype)  # type: ignore[arg-type]
        return live if cache is None else CachedTeacher(live, cache)

    arguments = {**arm.arguments(training), "seed": seed}
    return stages.train_student(
        lambda: pipeline.new_student(encoder, teacher, initialise_from=arm.initialise_from, layers=arm.layers),
        make_teacher,
        lambda: pipeline.training_triples(collection, data, seed=seed, unlabelled=arm.unlabelled),
        folder / "student",
        work=folder / "training",
        arguments=arguments,
        settings=arm.depends(seed, settings),
        evaluator=stages.dev_evaluator(collection, arguments, kind="dense", **curve),
    )
