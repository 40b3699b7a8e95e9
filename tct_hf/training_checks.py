"""What a student could not be trained with, found before its teacher is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tct_hf.settings import SettingsError

if TYPE_CHECKING:
    from tct_hf.pipeline import EncoderSettings, StudentSettings


def check_training(encoder: EncoderSettings, student: StudentSettings, base: Mapping[str, Any]) -> None:
    """Find out before a teacher is trained what would stop the student's training after it.

    Args:
        encoder: what a sparse student starts from.
        student: the settings.
        base: training arguments that every stage shares.

    Raises:
        SettingsError: a training argument out of its range or of the other kind of student, or a base without what a
            sparse student needs.
    """
    from tct_hf import SparseTCTTrainingArguments, TCTTrainingArguments
    from tct_hf.bundled import resolve_model
    from tct_hf.pipeline import TRAINING
    from tct_hf.splade import check_head
    from tct_hf.training import check_arguments

    sparse = student.kind == "splade"
    make: Any = SparseTCTTrainingArguments if sparse else TCTTrainingArguments
    for name in student.training:
        if name not in {field.name for field in fields(make)}:
            raise SettingsError(
                f"student.training.{name} is of sparse students: leave it out, or set student.kind to splade"
            )
    try:
        check_arguments(student.training)
        make(output_dir="unused", **{**TRAINING, **base, **student.training})
    except ValueError as error:
        raise SettingsError(f"student.{'' if str(error).startswith('training.') else 'training: '}{error}") from error
    if not sparse:
        return
    if student.initialise_from != "base":
        raise SettingsError(
            "student.initialise_from: a ColBERT has no masked-language-model head, and a sparse student starts with "
            "one; set it to base"
        )
    if student.layers is not None:
        raise SettingsError(
            "student.layers: a sparse student keeps all layers of its base, whose head was trained on the last; leave "
            "it out"
        )
    try:
        check_head(resolve_model(encoder.base_model))
    except ValueError as error:
        raise SettingsError(f"encoder.base_model: {error}") from error
