"""How text becomes TCT input: build, save and check a student made of stock sentence-transformers modules.

The rule (Pyserini's, for the released checkpoints; `[Q]` and `[D]` are three WordPiece tokens each):

    query      [CLS] [Q] text [MASK] ... [MASK]    always 36 tokens, all attended; mean over positions 4 to 35
    passage    [CLS] [D] title text                up to document_length tokens; mean over positions from 4 on

No [SEP], no projection, no normalisation, compared by dot product. Without query augmentation a query has no [MASK]s
and is pooled like a passage. A text with no token of its own (the empty passage) is the zero vector.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn

from tct_hf.checkpoints import finalise_checkpoint, query_expansion, validate_checkpoint
from tct_hf.files import replace_dir, staging_beside
from tct_hf.tokenization import PROMPTS, start_token, tct_tokenizer

if TYPE_CHECKING:
    from tct_hf.teachers import ColBERTTeacher

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


def _load_transformer(model_name_or_path: str, dtype: torch.dtype | str | None) -> Transformer:
    # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
    return Transformer(model_name_or_path, model_kwargs={"dtype": dtype or torch.float32})


def _positions(config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return positions - config.pad_token_id - 1  # these count positions from the padding index on
    return positions


def _make_tct(
    transformer: Transformer,
    *,
    query_length: int,
    document_length: int,
    query_augmentation: bool,
    markers: Sequence[str] = (),
) -> Transformer:
    """Give a Transformer module, in place, the TCT tokenizer, lengths and query expansion."""
    positions = _positions(transformer.config)
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        if length < 5:
            raise ValueError(f"{name}={length} leaves no token for the text: the start token and the prompt take 4.")
        if positions is not None and length > positions:
            raise ValueError(f"{name}={length}, but the encoder has {positions} positions: choose at most that.")
    tokenizer = tct_tokenizer(transformer.tokenizer, document_length=document_length, markers=markers)
    if query_augmentation and tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no mask token for query augmentation: use another "
            "encoder, or query_augmentation=False."
        )
    encoder: Any = transformer.model
    rows = encoder.get_input_embeddings().num_embeddings
    for token in (start_token(tokenizer), *((str(tokenizer.mask_token),) if query_augmentation else ())):
        if tokenizer.backend_tokenizer.token_to_id(token) >= rows:
            raise ValueError(
                f"The token {token!r} of {tokenizer.name_or_path!r} has no embedding: the encoder has {rows}. Use the "
                "tokenizer that the encoder was trained with, or resize its embeddings and train them."
            )
    transformer.processor = tokenizer
    transformer.processing_kwargs = {}
    transformer._prompt_length_mapping = {}
    transformer.query_expansion = None  # before the lengths: the setter compares them
    transformer.document_length = document_length
    transformer.query_length = None if query_augmentation else query_length
    transformer.query_expansion = query_expansion(query_length) if query_augmentation else None
    return transformer


def _student(transformer: Transformer, pooling: str) -> SentenceTransformer:
    # "cls" is the vector of the start token, which belongs to the prompt; all else leaves the prompt out.
    pool = Pooling(transformer.get_embedding_dimension(), pooling, include_prompt=pooling == "cls")
    return SentenceTransformer(
        modules=[transformer, pool],
        prompts=dict(PROMPTS),
        default_prompt_name="document",
        similarity_fn_name="dot",
    )


def build_student(
    model_name_or_path: str,
    *,
    pooling: str = "mean",
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    query_augmentation: bool = True,
    dtype: torch.dtype | str | None = None,
    layers: Sequence[int] | None = None,
) -> SentenceTransformer:
    """Build a student with the TCT encoding from any BERT-like encoder.

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

    Returns:
        A SentenceTransformer of stock modules.

    Raises:
        ValueError: a tokenizer that can't make TCT input, lengths that don't fit the encoder, layers it doesn't have,
            an unknown pooling.

    Source: Pyserini's query and passage encoders for castorini/tct_colbert-msmarco.
    """
    if pooling not in ("mean", "cls"):
        raise ValueError(f'pooling={pooling!r} is not part of the TCT encoding: use "mean" (the paper\'s) or "cls".')
    transformer = _load_transformer(model_name_or_path, dtype)
    if layers is not None:
        _keep_layers(transformer, layers)
    _make_tct(
        transformer,
        query_length=query_length,
        document_length=document_length,
        query_augmentation=query_augmentation,
    )
    return _student(transformer, pooling)


def build_colbert(
    model_name_or_path: str,
    *,
    dim: int = 128,
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    dtype: torch.dtype | str | None = None,
) -> MultiVectorEncoder:
    """Build an untrained ColBERT that reads the same TCT input as its students, so that a batch is tokenised once.

    Args:
        model_name_or_path: encoder (or SentenceTransformer checkpoint).
        dim: dimensions of a token vector. The projection is drawn from torch's global random state.
        query_length: tokens of a query, prompt and [MASK]s included.
        document_length: tokens a passage keeps, prompt included.
        dtype: of the weights; float32 when None.

    Returns:
        A MultiVectorEncoder: encoder, linear projection, scoring mask, L2 normalisation of every token vector.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.1.
    """
    transformer = _make_tct(
        _load_transformer(model_name_or_path, dtype),
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
        prompts=dict(PROMPTS),
    )


def _keep_layers(transformer: Transformer, layers: Sequence[int]) -> None:
    config = transformer.model.config
    count = config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"layers={list(layers)}: name distinct layers of the encoder, 0 to {count - 1}.")
    stacks = [
        (parent, name, child)
        for parent in transformer.model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(transformer.model).__name__} has {len(stacks)} stacks of {count} layers, so that which layers to "
            "keep is unclear: use an encoder with one stack (BERT, MiniLM, MPNet), or layers=None."
        )
    parent, name, stack = stacks[0]
    setattr(parent, name, nn.ModuleList([stack[layer] for layer in layers]))
    config.num_hidden_layers = len(layers)
    for key, value in vars(config).items():  # per-layer settings, such as ModernBERT's layer_types
        if key.startswith("layer") and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in layers])


def student_from_teacher(
    teacher: MultiVectorEncoder | ColBERTTeacher | str | Path,
    *,
    layers: Sequence[int] | None = None,
    encoding: Literal["tct"] = "tct",
    query_length: int = QUERY_LENGTH,
    document_length: int = DOCUMENT_LENGTH,
    query_augmentation: bool = True,
) -> SentenceTransformer:
    """Initialise a student from a ColBERT teacher's encoder: the paper's initialisation.

    The encoder is copied without the projection. The tokenizer is made afresh, with the TCT encoding and never the
    teacher's own markers ([unused0], an added "[Q] " token).

    Args:
        teacher: a multi-vector model, a ColBERTTeacher, or a path or Hub id of one.
        layers: for a smaller student, the layers of the teacher's encoder to keep, counted from 0.
        encoding: "tct".
        query_length: as in :func:`build_student`.
        document_length: as in :func:`build_student`.
        query_augmentation: as in :func:`build_student`.

    Returns:
        A SentenceTransformer that shares no memory with the teacher.

    Raises:
        ValueError: as :func:`build_student`, an unknown encoding, or a teacher that is no multi-vector model.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1.
    """
    if encoding != "tct":
        raise ValueError(f'encoding={encoding!r} is not known: use "tct".')
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
        _keep_layers(transformer, layers)
    _make_tct(
        transformer,
        query_length=query_length,
        document_length=document_length,
        query_augmentation=query_augmentation,
        markers=[prompt for prompt in model.prompts.values() if prompt],
    )
    return _student(transformer, "mean")


def has_tct_encoding(student: SentenceTransformer) -> bool:
    """Whether a model reads its texts by the rule above.

    Args:
        student: any SentenceTransformer.
    """
    first, *rest = student
    return (
        isinstance(first, Transformer)
        and [type(module) for module in rest] == [Pooling]
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
        ValueError: the model is something other than a student with the TCT encoding.
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
