"""How text becomes TCT input: build, save and check a student made of stock sentence-transformers modules.

The rule (Pyserini's, for the released checkpoints; `[Q]` and `[D]` are three WordPiece tokens each):

    query      [CLS] [Q] text [MASK] ... [MASK]    always 36 tokens, all attended; mean over positions 4 to 35
    passage    [CLS] [D] title text                up to document_length tokens; mean over positions from 4 on

No [SEP], no projection, no normalisation, compared by dot product. Without query augmentation a query has no [MASK]s
and is pooled like a passage. A text with no token of its own (the empty passage) is the zero vector.

Beyond the paper a student may take the start token's vector, normalise with a learned scale, keep some layers of the
encoder, or read texts as its tokenizer does by itself ("plain").
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn

from tct_hf.checkpoints import finalise_checkpoint, validate_checkpoint
from tct_hf.encoders import keep_layers, load_transformer, make_plain, make_tct, plain_prompts
from tct_hf.files import replace_dir, staging_beside
from tct_hf.scaling import length_of, scale_modules
from tct_hf.tokenization import PROMPTS

if TYPE_CHECKING:
    from tct_hf.vector_teachers import ColBERTTeacher

__all__ = [
    "build_colbert",
    "build_student",
    "finalise_checkpoint",
    "save_student",
    "student_from_teacher",
    "validate_checkpoint",
]

QUERY_LENGTH = 36
DOCUMENT_LENGTH = 154


def _prepare(
    transformer: Transformer,
    encoding: str,
    prompts: Mapping[str, str] | None,
    *,
    query_length: int,
    document_length: int,
    query_augmentation: bool,
    markers: Sequence[str] = (),
) -> dict[str, str]:
    """Give a Transformer module, in place, an encoding of texts; its prompts."""
    if encoding not in ("tct", "plain"):
        raise ValueError(
            f'encoding={encoding!r} is not known: use "tct" (the paper\'s), or "plain" for the tokenizer\'s own input.'
        )
    lengths = {"query_length": query_length, "document_length": document_length}
    if encoding == "plain":
        checked = plain_prompts(prompts)
        make_plain(transformer, **lengths, prompts=checked, markers=markers)
        return checked
    if prompts:
        raise ValueError(
            f'prompts={dict(prompts)}: the TCT encoding has its own; leave them out, or use encoding="plain".'
        )
    make_tct(transformer, **lengths, query_augmentation=query_augmentation, markers=markers)
    return dict(PROMPTS)


def _student(
    transformer: Transformer, prompts: dict[str, str], encoding: str, pooling: str, scale: float | None
) -> SentenceTransformer:
    dim = transformer.get_embedding_dimension()
    # "cls" is the vector of the start token, which belongs to the prompt; else TCT leaves the prompt out. A tokenizer
    # that joins prompt and text has no prompt to leave out.
    pool = Pooling(dim, pooling, include_prompt=pooling == "cls" or encoding == "plain")
    return SentenceTransformer(
        modules=[transformer, pool, *([] if scale is None else scale_modules(dim, scale))],
        prompts=prompts,
        default_prompt_name="document",
        similarity_fn_name="dot",
    )


def _check_pooling(pooling: str) -> None:
    if pooling not in ("mean", "cls"):
        raise ValueError(f'pooling={pooling!r} is not part of the TCT encoding: use "mean" (the paper\'s) or "cls".')


def build_student(
    model_name_or_path: str,
    *,
    pooling: str = "mean",
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    query_augmentation: bool = True,
    dtype: torch.dtype | str | None = None,
    layers: Sequence[int] | None = None,
    encoding: Literal["tct", "plain"] = "tct",
    prompts: Mapping[str, str] | None = None,
    scale: float | None = None,
) -> SentenceTransformer:
    """Build a student from any encoder, by default with the TCT encoding, which takes a BERT-like one.

    `encode_query` and `encode_document` apply the encoding, plain `encode` takes its texts for passages.

    Args:
        model_name_or_path: encoder (or SentenceTransformer checkpoint, whose pooling and later modules are left out).
        pooling: "mean" (the paper's), or "cls" for the start token's vector.
        query_length: tokens of a query, prompt and [MASK]s included.
        document_length: tokens a passage keeps, prompt included.
        query_augmentation: pad queries with attended [MASK]s. Without, servers that know nothing of query expansion
            can run the student.
        dtype: of the weights; float32 when None.
        layers: keep only these layers of the encoder, counted from 0.
        encoding: "tct"; or "plain" for an encoder whose tokenizer can't make TCT input (byte-level BPE, SentencePiece:
            RoBERTa, ModernBERT, XLM-R): its own special tokens, no [MASK]s, prompts pooled with the text.
        prompts: of the plain encoding, `{"query": "query: ", "document": "passage: "}` for instance; none when None.
        scale: normalise the vectors, and learn what cosines are multiplied by from this number on (20.0, say); it is
            kept in a stock module, see :mod:`tct_hf.scaling`. None (the paper's): vectors as pooled.

    Returns:
        A SentenceTransformer of stock modules.

    Raises:
        ValueError: a tokenizer that can't make TCT input, lengths that don't fit the encoder, layers it doesn't have,
            an unknown pooling or encoding, prompts of the TCT encoding, a scale that is none.

    Source: Pyserini's query and passage encoders for castorini/tct_colbert-msmarco.
    """
    _check_pooling(pooling)
    transformer = load_transformer(model_name_or_path, dtype)
    if layers is not None:
        keep_layers(transformer, layers)
    prompts = _prepare(
        transformer,
        encoding,
        prompts,
        query_length=query_length,
        document_length=document_length,
        query_augmentation=query_augmentation,
    )
    return _student(transformer, prompts, encoding, pooling, scale)


def build_colbert(
    model_name_or_path: str,
    *,
    dim: int = 128,
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    dtype: torch.dtype | str | None = None,
    encoding: Literal["tct", "plain"] = "tct",
    prompts: Mapping[str, str] | None = None,
) -> MultiVectorEncoder:
    """Build an untrained ColBERT that reads the same TCT input as its students, so that a batch is tokenised once.

    Args:
        model_name_or_path: encoder (or SentenceTransformer checkpoint).
        dim: dimensions of a token vector. The projection is drawn from torch's global random state.
        query_length: tokens of a query, prompt and [MASK]s included.
        document_length: tokens a passage keeps, prompt included.
        dtype: of the weights; float32 when None.
        encoding: as in :func:`build_student`.
        prompts: likewise.

    Returns:
        A MultiVectorEncoder: encoder, linear projection, scoring mask, L2 normalisation of every token vector.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.1.
    """
    transformer = load_transformer(model_name_or_path, dtype)
    prompts = _prepare(
        transformer,
        encoding,
        prompts,
        query_length=query_length,
        document_length=document_length,
        query_augmentation=True,
    )
    projection = Dense(
        in_features=transformer.get_embedding_dimension(),
        out_features=dim,
        bias=False,
        activation_function=nn.Identity(),
        module_input_name="token_embeddings",
    )
    return MultiVectorEncoder(
        modules=[transformer, projection, MultiVectorMask(), Normalize(module_input_name="token_embeddings")],
        prompts=prompts,
    )


def student_from_teacher(
    teacher: MultiVectorEncoder | ColBERTTeacher | str | Path,
    *,
    layers: Sequence[int] | None = None,
    encoding: Literal["tct", "plain"] = "tct",
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    query_augmentation: bool = True,
    pooling: str = "mean",
    prompts: Mapping[str, str] | None = None,
    scale: float | None = None,
) -> SentenceTransformer:
    """Initialise a student from a ColBERT teacher's encoder: the paper's initialisation.

    The encoder is copied without the projection. The tokenizer is made afresh, with the student's encoding and never
    the teacher's own markers ([unused0], an added "[Q] " token).

    Args:
        teacher: a multi-vector model, a ColBERTTeacher, or a path or Hub id of one.
        layers: for a smaller student, the layers of the teacher's encoder to keep, counted from 0.
        encoding: as in :func:`build_student`.
        query_length: as in :func:`build_student`.
        document_length: as in :func:`build_student`.
        query_augmentation: as in :func:`build_student`.
        pooling: as in :func:`build_student`.
        prompts: as in :func:`build_student`.
        scale: as in :func:`build_student`.

    Returns:
        A SentenceTransformer that shares no memory with the teacher.

    Raises:
        ValueError: as :func:`build_student`, or a teacher that is no multi-vector model.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1.
    """
    _check_pooling(pooling)
    model: Any = getattr(teacher, "model", teacher)
    if isinstance(teacher, (str, Path)):
        model = MultiVectorEncoder(str(teacher), device="cpu")
    if not isinstance(model, MultiVectorEncoder):
        raise ValueError(
            f"{type(model).__name__} is not a multi-vector model: give a MultiVectorEncoder, a ColBERTTeacher, or the "
            "path of one; for any other encoder use build_student."
        )
    transformer: Any = copy.deepcopy(model[0]).float().requires_grad_(True)
    if layers is not None:
        keep_layers(transformer, layers)
    prompts = _prepare(
        transformer,
        encoding,
        prompts,
        query_length=query_length,
        document_length=document_length,
        query_augmentation=query_augmentation,
        markers=[prompt for prompt in model.prompts.values() if prompt],
    )
    return _student(transformer, prompts, encoding, pooling, scale)


def has_tct_encoding(student: SentenceTransformer) -> bool:
    """Whether a model reads its texts by the rule above.

    Args:
        student: any SentenceTransformer.
    """
    first, *rest = student
    return (
        isinstance(first, Transformer)
        and [type(module) for module in rest[:1]] == [Pooling]
        and (len(rest) == 1 or (len(rest) == 3 and length_of(rest) is not None))
        and first.document_length is not None
        and {name: student.prompts.get(name) for name in PROMPTS} == PROMPTS
    )


def save_student(student: SentenceTransformer, path: str | Path) -> Path:
    """Save a student so that plain `SentenceTransformer(path)` gives the same vectors.

    It is written aside and renamed: a new folder appears whole; in one that exists each file is replaced whole and
    other files stay.

    Args:
        student: of :func:`build_student` or :func:`student_from_teacher`, trained or not, or loaded from its save.
        path: folder to write to; made when missing.

    Returns:
        The folder.

    Raises:
        ValueError: the model is something other than a student.
        OSError: the folder can't be written.
    """
    path = Path(path)
    final = Path(os.path.realpath(path))
    with staging_beside(final) as staging:
        student.save_pretrained(str(staging))
        finalise_checkpoint(staging)
        if not final.exists():
            replace_dir(staging, final)
        else:  # what else lies there (reports, a trainer's checkpoints) is not ours to take away
            for file in sorted(f for f in staging.rglob("*") if f.is_file()):
                target = final / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    return path
