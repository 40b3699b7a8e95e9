"""Load published checkpoints as what they are, and write them as folders that stock sentence-transformers loads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import AutoModel
from transformers.utils import logging

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.encoding.build import build_student
from tct_hf.encoding.checkpoint import finalise_checkpoint
from tct_hf.encoding.encoders import QUERY_LENGTH, load_model, told_of_files
from tct_hf.encoding.kinds import (
    ORIGIN_FILE,
    STARTING,
    TRAINING_FILE,
    Recognised,
    published_name,
    read_json,
    recognise,
)
from tct_hf.files import file_digest, replace_dir, staging_beside, write_json_atomic
from tct_hf.hub_client import fetch_model

PUBLISHED_DOCUMENT_LENGTH = 512
_CONVERTER = 1  # raised when a conversion changes, so that no earlier cached one is used


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` made."""

    path: Path
    kind: Literal["student", "teacher", "starting student"]
    why: str


def load_student(
    name_or_path: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | None = None,
    encoding: Literal["tct"] | None = None,
    document_length: int | None = None,
) -> SentenceTransformer:
    """Load a TCT student in whatever shape it was published, with the right vectors.

    A student of this package is loaded as it is. A bare encoder that is known to have been trained with the TCT
    encoding (castorini's tct_colbert checkpoints), for which plain `SentenceTransformer(...)` gives wrong vectors, is
    converted first; the conversion is kept in the cache.

    Args:
        name_or_path: folder or Hub id.
        revision: branch, tag or commit of a repository.
        token: token for the Hub; the logged-in one when None.
        device: device to load to; sentence-transformers' choice when None.
        encoding: "tct" declares that a bare encoder that is not known (one that you trained with Pyserini's or the
            authors' code, for example) was trained with the TCT encoding.
        document_length: tokens a passage keeps; 512 for a bare encoder, a student's own otherwise.

    Returns:
        The student: `encode_query`, `encode_document`, dot product.

    Raises:
        ValueError: it is something else, which is named with the way to load it; or its weights don't fit.
        FileNotFoundError: there is no such folder.
        HubError: the repository can't be downloaded.

    Source: Pyserini's TctColBertQueryEncoder and TctColBertDocumentEncoder.
    """
    source = fetch_model(name_or_path, revision=revision, token=token)
    found = recognise(name_or_path, source)
    if found.kind == "student":
        # A save by other means may name a tokenizer class that puts [SEP] back on load.
        named = (read_json(source / "tokenizer_config.json") or {}).get("tokenizer_class")
        folder = source if named == "TokenizersBackend" else _cached(source, 0, _finalised_copy)
    elif found.kind == "tct" or (found.kind == "bare" and encoding == "tct"):
        length = document_length or PUBLISHED_DOCUMENT_LENGTH
        folder = _cached(source, length, partial(_write_student, document_length=length))
    else:
        raise ValueError(f"{name_or_path} is no TCT student: {found.why}. {_instead(name_or_path, found)}")
    student: SentenceTransformer = load_model(SentenceTransformer, str(folder), device=device)
    if document_length is not None:
        student.max_seq_length = student[0].document_length = document_length  # type: ignore[assignment]
    # So that vectors and indexes say which model made them, not which folder of a cache.
    transformer: Any = student[0]
    transformer.model.config._name_or_path = str(name_or_path)
    return student


def load_encoder(
    name_or_path: str, *, revision: str | None = None, token: str | None = None, device: Any = None
) -> Any:
    """The model that built an index: a student, or another SentenceTransformer or SparseEncoder, loaded as it is.

    Arguments and errors are those of :func:`load_student`.
    """
    folder = fetch_model(name_or_path, revision=revision, token=token)
    kind = recognise(name_or_path, folder).kind
    if kind in ("dual-encoder", "router", "sparse"):
        return load_model(SparseEncoder if kind == "sparse" else SentenceTransformer, str(folder), device=device)
    return load_student(name_or_path, revision=revision, token=token, device=device)


def _instead(name: str, found: Recognised) -> str:
    ways = {
        "colbert": 'It is a teacher: ColBERTTeacher("{0}"); student_from_teacher("{0}") starts from its encoder.',
        "dual-encoder": 'Load it with SentenceTransformer("{0}"), or train it further with build_student("{0}").',
        "sparse": 'Load it with sentence_transformers.SparseEncoder("{0}").',
        "bare": "No file says how its texts are encoded, and guessing would silently give wrong vectors. If it "
        'was trained with the TCT encoding pass encoding="tct"; to begin a student from it use build_student("{0}").',
    }
    return ways.get(found.kind, 'Load it with SentenceTransformer("{0}").').format(name)


def _cached(source: Path, document_length: int, write: Callable[[Path, Path], None]) -> Path:
    """The cached conversion of a checkpoint, made when it is missing."""
    commit = source.name if _is_snapshot(source) else ""
    key = hashlib.sha256(json.dumps([_CONVERTER, document_length, commit]).encode())
    if not commit:  # a commit names its files; those of a folder must be read
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            key.update(f"{file.relative_to(source)} {file_digest(file)}\n".encode())
    return build_once(default_cache_dir() / f"student-{key.hexdigest()[:16]}", lambda folder: write(source, folder))


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and len(folder.name) == 40


def _finalised_copy(source: Path, out: Path) -> None:
    if not any(source.glob("*.safetensors")):
        raise ValueError(f"{source}: the weights, model.safetensors, are missing; download or save the student again.")
    shutil.copytree(source, out, dirs_exist_ok=True)  # follows the links of the client's cache
    finalise_checkpoint(out)


def convert_checkpoint(
    source: str | Path,
    out_dir: str | Path,
    *,
    kind: Literal["auto", "tct", "colbert", "dual-encoder"] = "auto",
    pooling: Literal["mean", "cls"] | None = None,
    revision: str | None = None,
    token: str | None = None,
    query_length: int = QUERY_LENGTH,
    document_length: int | None = None,
) -> Conversion:
    """Write a published checkpoint as a folder that stock sentence-transformers loads right, in safetensors.

    - A bare TCT checkpoint becomes a student with the same vectors (without its pretraining heads).
    - A ColBERT of the Stanford code or PyLate becomes a MultiVectorEncoder with the same token vectors: a teacher.
    - A mean- or CLS-pooled dual encoder becomes a student to start from: its encoder with the TCT encoding.

    Args:
        source: folder or Hub id.
        out_dir: folder to write; an earlier conversion there is replaced, any other content is refused.
        kind: what the source is; "auto" recognises it by its files and refuses what it does not know.
        pooling: pooling of a bare dual encoder, which no file says.
        revision: branch, tag or commit of a repository.
        token: token for the Hub; the logged-in one when None.
        query_length: tokens of a query, prompt and [MASK]s included.
        document_length: tokens a passage keeps; None: 512 for a TCT checkpoint, 154 for a dual encoder, its own for a
            ColBERT.

    Returns:
        What was made.

    Raises:
        ValueError: a source that is not recognised or can't be converted (a ColBERT without its projection, for
            example), weights that are missing or hold more than tensors.
        FileExistsError: the folder holds something else.
        FileNotFoundError: there is no such source.
        HubError: the repository can't be downloaded.
    """
    name, out = str(source), Path(out_dir).expanduser()
    if out.exists() and any(out.iterdir()) and not (out / ORIGIN_FILE).is_file():
        raise FileExistsError(f"{out}: holds something other than a conversion; name another folder, or empty it.")
    folder = fetch_model(name, revision=revision, token=token)
    found = recognise(name, folder)
    asked = found.kind if kind == "auto" else kind
    if kind != "auto" and found.kind not in (kind, "bare"):
        raise ValueError(f'{name} is {found.why}, not "{kind}"; leave kind at "auto".')
    if asked not in ("tct", "colbert", "dual-encoder"):
        hint = {
            "bare": 'pass kind="tct" if it was trained with the TCT encoding, or kind="dual-encoder" to start from it',
            "student": "there is nothing to convert",
        }.get(asked, "only TCT checkpoints, ColBERTs and dual encoders can be converted")
        raise ValueError(f"{name}: {found.why}; {hint}.")
    pooled = pooling or found.pooling if asked == "dual-encoder" else "mean"
    if pooled not in ("mean", "cls"):
        raise ValueError(
            f'{name}: pooling {pooled!r} is unknown; pass pooling="mean" or "cls", whichever it was trained with.'
        )
    kinds: dict[str, Any] = {"colbert": "teacher", "tct": "student", "dual-encoder": STARTING}
    with staging_beside(out) as staging:
        if asked == "colbert":
            _write_teacher(folder, staging, document_length)
        else:
            length = document_length or (PUBLISHED_DOCUMENT_LENGTH if asked == "tct" else None)
            _write_student(folder, staging, length, query_length, pooled)
        origin = {
            "source": published_name(name, folder) or name,
            "revision": folder.name if _is_snapshot(folder) else revision,
            "recognised_by": found.why,
            "made": kinds[asked],
        }
        write_json_atomic(staging / ORIGIN_FILE, origin)
        replace_dir(staging, out)
    return Conversion(out, kinds[asked], found.why)


def _write_student(
    source: Path, out: Path, document_length: int | None, query_length: int = QUERY_LENGTH, pooling: str = "mean"
) -> None:
    unused = _check_weights(source)
    lengths: dict[str, Any] = {"query_length": query_length, "document_length": document_length}
    # Pretraining heads are left out on purpose; transformers reports any other unused weights.
    with _without_report() if all(name.startswith("cls.") for name in unused) else nullcontext():
        build_student(str(source), encoding="tct", pooling=pooling, **lengths).save_pretrained(str(out))
    finalise_checkpoint(out)


def _write_teacher(source: Path, out: Path, document_length: int | None) -> None:
    modules = read_json(source / "modules.json")
    architectures = (read_json(source / "config.json") or {}).get("architectures") or []
    native = any(str(name).endswith("ForRetrieval") for name in architectures)
    if modules is None and not native and "HF_ColBERT" not in architectures:
        raise ValueError(
            f"{source}: a bare encoder without a projection: name a trained ColBERT, or train one with build_colbert."
        )
    model = load_model(MultiVectorEncoder, str(source), device="cpu")
    if not native:
        transformer: Any = model[0]
        _check_weights(source / (modules[0]["path"] if modules else ""), type(transformer.model))
    if document_length is not None:
        model.max_seq_length = model[0].document_length = document_length
    model.save_pretrained(str(out), safe_serialization=True)
    if (source / TRAINING_FILE).is_file():
        shutil.copyfile(source / TRAINING_FILE, out / TRAINING_FILE)


@contextmanager
def _without_report() -> Iterator[None]:
    before = logging.get_verbosity()  # transformers reports on a model's weights
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_weights(source: Path, encoder: Any = AutoModel) -> list[str]:
    """Refuse weights that leave a part of the encoder untrained, about which transformers only warns.

    Returns the names of those that the encoder does not take.
    """
    with told_of_files(str(source)), _without_report():
        _, info = encoder.from_pretrained(str(source), output_loading_info=True)
    wrong = sorted(key for key in info["missing_keys"] if "pooler" not in key and "position_ids" not in key)
    wrong += [str(key) for key in info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{source}: the model would be partly random, {len(wrong)} weights are missing or of another shape "
            f"({wrong[0]}, ...): download or save it again."
        )
    return [str(key) for key in info["unexpected_keys"]]
