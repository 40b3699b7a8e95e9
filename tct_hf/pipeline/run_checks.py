"""What would stop a run after its teacher has been trained for hours, found before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tct_hf.pipeline.steps import TRAINING, StudentSettings, TeacherSettings, TriplesSettings
from tct_hf.settings import SettingsError

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


def check_streaming(
    triples: TriplesSettings, teacher: TeacherSettings, student: StudentSettings, stages: Sequence[str]
) -> None:
    """Refuse streamed triples that are not there, or whose training would have no end.

    Args:
        triples: the settings.
        teacher: likewise; one that is used as it is needs no end.
        student: likewise.
        stages: that are to run.

    Raises:
        SettingsError: with the mend.
    """
    if not triples.streaming:
        return
    if triples.path is None:
        raise SettingsError("triples.streaming: there is nothing to stream; name a file or data set with triples.path")
    if triples.shuffle_buffer < 1:
        raise SettingsError(f"triples.shuffle_buffer: {triples.shuffle_buffer} is below 1")
    training = (
        {"student": student.training}
        if not teacher.is_trained_here
        else {"teacher": teacher.training, "student": student.training}
    )
    for name, arguments in training.items():
        if name in stages and not arguments.get("max_steps", -1) > 0:
            raise SettingsError(
                f"{name}.training.max_steps: it is not set, and triples.streaming is: streamed triples have no "
                "length, so that num_train_epochs can't say when training ends. Set it (for e passes over n rows: "
                "e * n / (per_device_train_batch_size * processes * gradient_accumulation_steps))."
            )


def check_training(
    collection: Collection, teacher: TeacherSettings, student: StudentSettings, base: Mapping[str, Any]
) -> None:
    """Find out before any training what is wrong with the training arguments of teacher and student.

    Args:
        collection: with a dev split, where they ask for evaluation.
        teacher: the settings; one that is used as it is has no training.
        student: likewise.
        base: training arguments that every stage shares.

    Raises:
        SettingsError: with the mend.
    """
    from tct_hf.training.arguments import TCTTrainingArguments
    from tct_hf.training.run import check_arguments

    if student.kind == "dense":
        known = {field.name for field in fields(TCTTrainingArguments)}
        for name in student.training:
            if name not in known:
                raise SettingsError(
                    f"student.training.{name} is of sparse students: leave it out, or set student.kind to splade"
                )
    stages: dict[str, tuple[Any, Any]] = {"student": (student.kind, student.training)}
    if teacher.is_trained_here:
        stages["teacher"] = ("colbert", teacher.training)
    for name, (kind, training) in stages.items():
        try:
            check_arguments({**TRAINING, **base, **training}, collection, of=kind)
        except (ValueError, TypeError) as error:
            said = str(error)
            where = "." if said.startswith("training.") else ".training: "
            raise SettingsError(f"{name}{where}{said}") from error
