"""What no student could be built or trained with, found before its teacher is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tct_hf.settings import SettingsError

if TYPE_CHECKING:
    from tct_hf.pipeline.steps import EncoderSettings, StudentSettings, TeacherSettings


def check_student(encoder: EncoderSettings, student: StudentSettings, teacher: TeacherSettings) -> None:
    """Find out before a teacher is trained what no student could be built with.

    Args:
        encoder: the settings; its base is looked at.
        student: its settings.
        teacher: whose encoder the student may start from.

    Raises:
        SettingsError: no room for a teacher's vectors, settings of the other encoding, a scale that is none, layers or
            Matryoshka sizes that the encoder does not have, settings of dense students for a sparse one, or a base
            that it can't start from.
    """
    from tct_hf.encoding.encoders import keep_layers
    from tct_hf.encoding.scale import scale_modules

    if student.kind == "splade":
        dense = {
            "pooling": student.pooling is not None,
            "scale": student.scale is not None,
            "query_augmentation": not student.query_augmentation,
        }
        for name, given in dense.items():
            if given:
                raise SettingsError(f"student.{name} is of dense students: leave it out, or set student.kind to dense")
        if encoder.prompts and not teacher.is_trained_here:
            raise SettingsError(
                "encoder.prompts: a sparse student reads texts without any; leave them out, or make it a dense one"
            )
        _check_splade(encoder, student)
    if not 0 < student.teacher_cache_gigabytes < float("inf"):
        raise SettingsError(
            f"student.teacher_cache_gigabytes={student.teacher_cache_gigabytes}: give a finite number greater than 0"
        )
    if student.teacher_cache is None and student.teacher_cache_gigabytes != type(student).teacher_cache_gigabytes:
        raise SettingsError(
            "student.teacher_cache_gigabytes is of student.teacher_cache, which is not set: name a folder there, or "
            "leave it out"
        )
    if encoder.encoding == "tct":
        if encoder.prompts:
            raise SettingsError(
                "encoder.prompts: the TCT encoding has its own; leave them out, or set encoder.encoding to own"
            )
        try:
            if student.scale is not None:
                scale_modules(1, student.scale)
        except ValueError as error:
            raise SettingsError(f"student.{error}") from error
    else:
        if teacher.dim is not None and teacher.is_trained_here:
            raise SettingsError("teacher.dim is of the TCT encoding: leave it out, or set encoder.encoding to tct")
        if student.scale is not None or not student.query_augmentation:
            raise SettingsError(
                "student.scale and student.query_augmentation are of the TCT encoding: leave them out (the factor of "
                "the cosines is student.training.student_scale), or set encoder.encoding to tct"
            )
    start = encoder.starts_from(student.initialise_from)
    config = _config_of(encoder.base_model if start == "base" else teacher.model or encoder.base_model)
    layers, dim = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if student.layers is not None and (not student.layers or len(set(student.layers)) != len(student.layers)):
        raise SettingsError(f"student.layers: {student.layers}: name distinct layers of the encoder, or leave it out")
    for layer in student.layers or []:
        if layers is not None and not 0 <= layer < layers:
            raise SettingsError(
                f"student.layers: there is no layer {layer} in an encoder with the layers 0 to {layers - 1}"
            )
    if student.layers is not None and config is not None and not config.is_encoder_decoder:
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(config)
        try:
            keep_layers(model, student.layers)
        except ValueError as error:
            raise SettingsError(f"student.{error}") from error
    for size in student.training.get("matryoshka_dims") or []:
        if dim is not None and isinstance(size, int) and not 0 < size <= dim:
            raise SettingsError(
                f"student.training.matryoshka_dims: {size} is not between 1 and the {dim} dimensions of the encoder"
            )


def _config_of(model: str) -> Any:
    """The configuration of an encoder; None where it can't be read: loading the model will say why."""
    from transformers import AutoConfig

    from tct_hf.hub_client import resolve_model

    try:
        return AutoConfig.from_pretrained(resolve_model(model))
    except (OSError, ValueError):
        return None


def _check_splade(encoder: EncoderSettings, student: StudentSettings) -> None:
    """Refuse a base without what a sparse student needs, or a part of its layers."""
    from tct_hf.encoding.splade import check_head
    from tct_hf.hub_client import resolve_model

    if encoder.starts_from(student.initialise_from) != "base":
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
