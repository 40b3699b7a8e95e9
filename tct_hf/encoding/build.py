"""Build and save students, dense and sparse, and ColBERTs made of stock sentence-transformers modules.

The rule of "tct" (Pyserini's, for the released checkpoints; `[Q]` and `[D]` are three WordPiece tokens each):

    query      [CLS] [Q] text [MASK] ... [MASK]    always 36 tokens, all attended; mean over positions 4 to 35
    passage    [CLS] [D] title text                up to document_length tokens; mean over positions from 4 on

No [SEP], no projection, no normalisation, compared by dot product. Without query augmentation a query has no [MASK]s
and is pooled like a passage. A text with no token of its own (the empty passage) is the zero vector.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from tct_hf.encoding.checkpoint import finalise_checkpoint
from tct_hf.encoding.encoders import (
    check_length,
    keep_layers,
    length_of,
    load_model,
    load_transformer,
    make_own,
    make_tct,
    scale_modules,
    set_lengths,
    told_of_files,
)
from tct_hf.encoding.kinds import PROMPTS, kind_of, read_json_of
from tct_hf.encoding.routes import whole
from tct_hf.encoding.weights import refuse_not_finite
from tct_hf.files import replace_dir, staging_beside

Encoding = Literal["own", "tct"]


def _check(
    encoding: str,
    prompts: Mapping[str, str] | None,
    *,
    pooling: str | None = None,
    query_augmentation: bool = True,
    scale: float | None = None,
) -> None:
    """Refuse unknown settings and those of the other encoding."""
    if encoding not in ("own", "tct"):
        raise ValueError(f'encoding={encoding!r} is not known: use "own" (the model\'s), or "tct" (the paper\'s).')
    if pooling not in (None, "mean", "cls"):
        raise ValueError(f'pooling={pooling!r} is not known: use "mean" or "cls".')
    if encoding == "tct" and prompts:
        raise ValueError(f'prompts={dict(prompts)}: the TCT encoding has its own; omit them, or use encoding="own".')
    if encoding == "own" and (scale is not None or not query_augmentation):
        raise ValueError('scale and query_augmentation are settings of encoding="tct": use student_scale, or neither.')


def _tct_student(
    transformer: Transformer, pooling: str | None, scale: float | None, layers: Sequence[int] | None, **reads: Any
) -> SentenceTransformer:
    keep_layers(transformer.model, layers)
    make_tct(transformer, **reads)
    dim = transformer.get_embedding_dimension()
    # "cls" is the vector of the start token, which belongs to the prompt; else the prompt is left out.
    pool = Pooling(dim, pooling or "mean", include_prompt=pooling == "cls")
    return SentenceTransformer(
        modules=[transformer, pool, *([] if scale is None else scale_modules(dim, scale))],
        prompts=dict(PROMPTS),
        default_prompt_name="document",
        similarity_fn_name="dot",
    )


def _load_own(model_name_or_path: str, prompts: Mapping[str, str] | None, **lengths: Any) -> SentenceTransformer:
    """An embedding model as it is, but for prompts and lengths; a bare encoder with mean pooling and dot product."""
    if read_json_of(model_name_or_path, "modules.json") is None:
        transformer = load_transformer(model_name_or_path)
        pool = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pool], similarity_fn_name="dot")
    else:
        # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
        model = load_model(SentenceTransformer, model_name_or_path, model_kwargs={"dtype": torch.float32})
    return _with_own(model, prompts, **lengths)


def _with_own(model: SentenceTransformer, prompts: Mapping[str, str] | None, **lengths: Any) -> SentenceTransformer:
    if prompts:
        model.prompts = {"query": "", "document": "", **prompts}
        # Plain encode() takes its texts for passages.
        model.default_prompt_name = "document" if prompts.get("document") else None
    _check_taken(model, **lengths)
    set_lengths(model[0], model.prompts, **lengths)
    return model


def _check_taken(model: SentenceTransformer, **settings: Any) -> None:
    given = [f"{name}={value}" for name, value in settings.items() if value is not None]
    if given and not isinstance(model[0], Transformer):
        kind = type(model[0]).__name__
        raise ValueError(f"{given[0]}: a model that begins with a {kind} takes none; leave it out.")


def build_student(
    model_name_or_path: str,
    *,
    encoding: Encoding = "own",
    pooling: str | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
    query_augmentation: bool = True,
    layers: Sequence[int] | None = None,
    prompts: Mapping[str, str] | None = None,
    scale: float | None = None,
) -> SentenceTransformer:
    """Build a student from any embedding model or encoder.

    Args:
        model_name_or_path: embedding model, or an encoder of transformers.
        encoding: "own", the model as it is, and an encoder with mean pooling, compared by dot product; or "tct", the
            paper's, for a BERT-like encoder (pooling and later modules of an embedding model are left out).
        pooling: "mean", or "cls" for the start token's vector; the model's own when None ("mean" with "tct").
        query_length: tokens a query keeps; the passage's number when None. With "tct" the tokens of every query,
            prompt and [MASK]s included; 36 when None. An own one that differs needs sentence-transformers 6.
        document_length: tokens a passage keeps, prompt included; the model's own number when None (154 with "tct").
        query_augmentation: with "tct", pad queries with attended [MASK]s. Without, servers that know nothing of query
            expansion can run a student with pooling="cls"; with mean pooling they would pool the prompt, too.
        layers: the layers of the encoder to keep, counted from 0; None: all.
        prompts: prompts such as `{"query": "query: ", "document": "passage: "}`, instead of the model's own. With a
            prompt of documents plain `encode` takes its texts for passages.
        scale: with "tct", normalise the vectors and learn the factor of their cosines, from this number on (20.0, for
            example), in a stock module. None (the paper's): vectors as pooled.

    Returns:
        A SentenceTransformer of stock modules, in float32.

    Raises:
        ValueError: an unknown encoding or pooling, lengths that don't fit the encoder, layers it doesn't have,
            settings of the other encoding, or a tokenizer that can't make TCT input.

    Source: of "tct", Pyserini's query and passage encoders for castorini/tct_colbert-msmarco.
    """
    _check(encoding, prompts, pooling=pooling, query_augmentation=query_augmentation, scale=scale)
    lengths: dict[str, Any] = {"query_length": query_length, "document_length": document_length}
    if encoding == "tct":
        transformer = load_transformer(model_name_or_path)
        return _tct_student(transformer, pooling, scale, layers, query_augmentation=query_augmentation, **lengths)
    student = _load_own(model_name_or_path, prompts, **lengths)
    _check_taken(student, layers=layers)
    if layers is not None:
        keep_layers(student[0].model, layers)
    if pooling is not None:
        place = next((place for place, module in enumerate(student) if isinstance(module, Pooling)), None)
        if place is None:
            raise ValueError(f"pooling={pooling!r}: {model_name_or_path} has no Pooling module; leave it out.")
        pool: Any = student[place]
        student[place] = Pooling(pool.embedding_dimension, pooling, include_prompt=pool.include_prompt)
    return student


def build_colbert(
    model_name_or_path: str,
    *,
    encoding: Encoding = "own",
    dim: int | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> MultiVectorEncoder:
    """Build an untrained ColBERT: with "own" one that ranks well as it is, with "tct" one to be trained.

    Args:
        model_name_or_path: embedding model, or an encoder of transformers.
        encoding: "own", the model's own token vectors and prompts, scored by the mean over the query's tokens; or
            "tct", the students' TCT input and a projection, scored by the sum.
        dim: with "tct", dimensions of a token vector, 128 when None. The projection is drawn from torch's global
            random state.
        query_length: as in :func:`build_student`.
        document_length: as in :func:`build_student`.
        prompts: as in :func:`build_student`.

    Returns:
        A MultiVectorEncoder: encoder, linear projection ("tct"), scoring mask, L2 normalisation of every token vector.

    Raises:
        ValueError: as :func:`build_student`, or a model that doesn't begin with a Transformer.

    Source: of "tct", Lin, Yang, Lin, arXiv 2010.11386, section 3.1.
    """
    _check(encoding, prompts)
    lengths: dict[str, Any] = {"query_length": query_length, "document_length": document_length}
    scoring = [MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    if encoding == "tct":
        transformer = load_transformer(model_name_or_path)
        make_tct(transformer, query_augmentation=True, **lengths)
        projection = Dense(
            in_features=transformer.get_embedding_dimension(),
            out_features=dim or 128,
            bias=False,
            activation_function=nn.Identity(),
            module_input_name="token_embeddings",
        )
        return MultiVectorEncoder(modules=[transformer, projection, *scoring], prompts=dict(PROMPTS))
    if dim is not None:
        raise ValueError(f'dim={dim}: a ColBERT of encoding="own" has the encoder\'s dimensions; leave it out.')
    model = _load_own(model_name_or_path, prompts, **lengths)
    if not isinstance(model[0], Transformer):
        raise ValueError(
            f"{model_name_or_path} begins with a {type(model[0]).__name__}: a ColBERT needs a Transformer."
        )
    return MultiVectorEncoder(
        modules=[model[0], *scoring],
        prompts={side: prompt or "" for side, prompt in model.prompts.items()},
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name="meanmaxsim",
    )


def student_from_teacher(
    teacher: Any,
    *,
    encoding: Encoding = "tct",
    layers: Sequence[int] | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
    query_augmentation: bool = True,
    pooling: str | None = None,
    prompts: Mapping[str, str] | None = None,
    scale: float | None = None,
) -> SentenceTransformer:
    """Initialise a student from a ColBERT teacher's encoder: the paper's initialisation.

    The encoder is copied without the projection, the tokenizer without the teacher's markers ([unused0], "[Q] ").

    Args:
        teacher: a multi-vector model, a ColBERTTeacher, or a path or Hub id of one.
        encoding: "tct", or "own" for the teacher's tokenizer, lengths and prompts, compared by dot product.
        layers: as in :func:`build_student`.
        query_length: as in :func:`build_student`.
        document_length: as in :func:`build_student`.
        query_augmentation: as in :func:`build_student`.
        prompts: as in :func:`build_student`.
        scale: as in :func:`build_student`.
        pooling: "mean" or "cls"; "mean" when None.

    Returns:
        A SentenceTransformer that shares no memory with the teacher.

    Raises:
        ValueError: as :func:`build_student`, a teacher that is no multi-vector model, or encoding="own" of one that
            reads TCT input.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1.
    """
    _check(encoding, prompts, pooling=pooling, query_augmentation=query_augmentation, scale=scale)
    model: Any = getattr(teacher, "model", teacher)
    if isinstance(teacher, (str, Path)):
        if (kind := kind_of(str(teacher))) not in ("colbert", "other", None):
            raise ValueError(f"{teacher} is no ColBERT ({kind}): use build_student.")
        model = load_model(MultiVectorEncoder, str(teacher), device="cpu")
    if not isinstance(model, MultiVectorEncoder):
        raise ValueError(f"{type(model).__name__} is not a multi-vector model: give one, or use build_student.")
    transformer: Any = copy.deepcopy(model[0]).float().requires_grad_(True)
    lengths: dict[str, Any] = {"query_length": query_length, "document_length": document_length}
    own = {side: prompt or "" for side, prompt in model.prompts.items()}
    if encoding == "tct":
        reads = {"query_augmentation": query_augmentation, "markers": list(own.values()), **lengths}
        return _tct_student(transformer, pooling, scale, layers, **reads)
    keep_layers(transformer.model, layers)
    added = {token.strip() for token in transformer.tokenizer.get_added_vocab()}
    markers = [prompt for prompt in own.values() if prompt and prompt.strip() in added]
    make_own(transformer, markers=markers)
    student = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling or "mean")],
        similarity_fn_name="dot",
    )
    own = {side: "" if prompt in markers else prompt for side, prompt in own.items()}
    return _with_own(student, prompts or own, **lengths)


def build_splade(
    model_name_or_path: str,
    *,
    query_length: int | None = None,
    document_length: int = 256,
) -> SparseEncoder:
    """Build a SPLADE student from an encoder with a masked-language-model head.

    Every dimension of its vectors is a token of the vocabulary, weighted `log(1 + relu(logit))`, the largest over
    the text's tokens. `SparseEncoder(path)` loads what it saves.

    Args:
        model_name_or_path: encoder with its head, such as `Luyu/co-condenser-marco` or `distilbert-base-uncased`, or
            a trained SPLADE to continue from.
        query_length: tokens a query keeps, special tokens included; `document_length` when None.
        document_length: tokens a passage keeps, special tokens included.

    Returns:
        A SparseEncoder of stock modules.

    Raises:
        ValueError: an encoder without the head, whose weights would be random; lengths that don't fit.

    Source: Formal et al., arXiv 2109.10086.
    """
    _check_head(model_name_or_path)
    transformer = load_transformer(model_name_or_path, transformer_task="fill-mask")
    query_length = document_length if query_length is None else query_length
    for name, length in (("document_length", document_length), ("query_length", query_length)):
        check_length(transformer.config, name, length, taken=2)
        setattr(transformer, name, length)
    transformer.max_seq_length = document_length  # plain encode() knows no other
    head: Any = transformer.model.get_output_embeddings()
    pool = SpladePooling("max", embedding_dimension=head.out_features)
    return SparseEncoder(modules=[transformer, pool], similarity_fn_name="dot")


def _check_head(model_name_or_path: str) -> None:
    """Refuse a checkpoint without all weights of the masked-language-model head: they would be random."""
    needed = "A SPLADE student needs one with its masked-language-model head, such as distilbert-base-uncased."
    with told_of_files(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path)
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, which has no such head. {needed}")
    if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        with told_of_files(model_name_or_path):
            _, loading = AutoModelForMaskedLM.from_pretrained(model_name_or_path, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"{model_name_or_path} lacks {', '.join(missing[:3])}. {needed}")


def has_tct_encoding(student: SentenceTransformer) -> bool:
    """Whether a model reads its texts by the rule of "tct"."""
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

    It is written aside and renamed: the student appears whole, and so does one that replaces another; other files of
    the folder stay.

    A query tower is saved with the encoder of its passages.

    Args:
        student: any SentenceTransformer, trained or not.
        path: folder to write to; made when missing.

    Returns:
        The folder.

    Raises:
        ValueError: the model is something other than a student, one of the TCT encoding that has been altered, or has
            weights that are not finite.
        OSError: the folder can't be written.
    """
    path = Path(path)
    if not isinstance(getattr(student, "_orig_mod", student), SentenceTransformer):  # or a compiled one
        raise ValueError(f"A {type(student).__name__} is no student of one vector a text: use its save_pretrained.")
    refuse_not_finite(student.named_parameters(), "The student")
    final = Path(os.path.realpath(path))
    with staging_beside(final) as staging:
        with whole(student):
            student.save_pretrained(str(staging))
        finalise_checkpoint(staging)
        if final.is_dir():  # what else lies there (reports, a trainer's checkpoints) stays
            _add_missing(final, staging)
        replace_dir(staging, final)
    return path


def _add_missing(source: Path, target: Path) -> None:
    """Give a folder, as second names, the files of another that it lacks."""
    for file in (path for path in source.rglob("*") if path.is_symlink() or not path.is_dir()):
        own = target / file.relative_to(source)
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, own, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(file, own, follow_symlinks=False)
