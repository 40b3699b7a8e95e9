"""An encoder made ready for a student or a ColBERT: the layers it keeps, its tokenizer, its lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import nn

from tct_hf.encoding.checkpoint import query_expansion
from tct_hf.encoding.tokenization import own_tokenizer, tct_tokenizer
from tct_hf.hub_client import told_when_missing

QUERY_LENGTH = 36
DOCUMENT_LENGTH = 154


def load_transformer(model_name_or_path: str, dtype: torch.dtype | str | None, **options: Any) -> Transformer:
    """The encoder of a folder or Hub id."""
    # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
    with told_when_missing(model_name_or_path):
        return Transformer(model_name_or_path, model_kwargs={"dtype": dtype or torch.float32}, **options)


def make_tct(
    transformer: Transformer,
    *,
    query_length: int | None,
    document_length: int | None,
    query_augmentation: bool,
    markers: Sequence[str] = (),
) -> None:
    """Give a Transformer module, in place, the TCT tokenizer, lengths and query expansion."""
    query_length, document_length = query_length or QUERY_LENGTH, document_length or DOCUMENT_LENGTH
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        check_length(transformer.config, name, length, taken=4)
    tokenizer = tct_tokenizer(transformer.tokenizer, document_length=document_length, markers=markers)
    tokens = [str(tokenizer.cls_token or tokenizer.bos_token)]
    if query_augmentation:
        if tokenizer.mask_token is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no mask token for query augmentation: use another "
                "encoder, or query_augmentation=False."
            )
        tokens.append(str(tokenizer.mask_token))
    encoder: Any = transformer.model
    rows = encoder.get_input_embeddings().num_embeddings
    for token in tokens:
        if tokenizer.backend_tokenizer.token_to_id(token) >= rows:
            raise ValueError(
                f"The token {token!r} of {tokenizer.name_or_path!r} has no embedding: the encoder has {rows}. Use the "
                "tokenizer that the encoder was trained with, or resize its embeddings and train them."
            )
    _set(transformer, tokenizer, query_length, document_length, augmented=query_augmentation)


def make_own(transformer: Transformer, *, markers: Sequence[str] = ()) -> None:
    """Give a ColBERT's Transformer module, in place, what an embedding model has: no query expansion, one length."""
    length: Any = transformer.document_length or transformer.max_seq_length
    tokenizer = own_tokenizer(transformer.tokenizer, document_length=length, markers=markers)
    _set(transformer, tokenizer, transformer.query_length, None, augmented=False)


def _set(
    transformer: Transformer, tokenizer: Any, query_length: int | None, document_length: int | None, *, augmented: bool
) -> None:
    transformer.processor = tokenizer
    transformer.processing_kwargs = {}
    transformer._prompt_length_mapping = {}
    transformer.query_expansion = None  # before the lengths: the setter compares them
    transformer.document_length = document_length
    transformer.query_length = None if augmented else query_length
    transformer.query_expansion = query_expansion(query_length) if augmented and query_length else None


def set_lengths(
    transformer: Any, prompts: Mapping[str, str | None], *, query_length: int | None, document_length: int | None
) -> None:
    """Set the tokens that a query and a passage keep, in place, where they are given.

    A passage's length is the tokenizer's, so that plain `encode` and servers truncate in the same way. A query's is a
    setting that only sentence-transformers 6 knows.
    """
    for side, length in (("query", query_length), ("document", document_length)):
        if length is not None:
            taken = len(transformer.tokenizer(prompts.get(side) or "")["input_ids"])
            check_length(transformer.config, f"{side}_length", length, taken=taken)
    if document_length is not None:
        transformer.max_seq_length = document_length
        if transformer.document_length is not None:
            transformer.document_length = document_length
    if query_length is not None:
        transformer.query_length = None if query_length == transformer.max_seq_length else query_length


def check_length(config: Any, name: str, length: int, *, taken: int) -> None:
    """Refuse a length that leaves no room beside the `taken` tokens, or exceeds the encoder's positions."""
    if length <= taken:
        raise ValueError(f"{name}={length} leaves no token for the text: special tokens and the prompt take {taken}.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # these count positions from the padding index on
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}, but the encoder has {positions} positions: choose at most that.")


def keep_layers(model: Any, layers: Sequence[int] | None) -> None:
    """Leave an encoder, in place, with these layers, counted from 0; None: all."""
    if layers is None:
        return
    config = model.config
    count = config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"layers={list(layers)}: name distinct layers of the encoder, 0 to {count - 1}.")
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    stacks = {name: stack for name, stack in stacks.items() if len(stack) == count}
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers, so that it is unclear which layers "
            "to keep: use an encoder with one stack (BERT, MiniLM, MPNet), or layers=None."
        )
    [(name, stack)] = stacks.items()
    model.set_submodule(name, nn.ModuleList([stack[layer] for layer in layers]))
    config.num_hidden_layers = len(layers)
    for key, value in list(vars(config).items()):  # per-layer settings, such as ModernBERT's layer_types
        if key.startswith("layer") and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in layers])
    with torch.device("meta"):  # no memory
        loaded = type(model)(config)
    found, wanted = ({(key, one.shape) for key, one in made.named_parameters()} for made in (model, loaded))
    if found != wanted:
        raise ValueError(
            f"layers={list(layers)}: the layers of {type(model).__name__} differ, and at its new place "
            f"{min(found ^ wanted)[0]} would be lost, or random, in a saved student: keep that layer at its place "
            "(the first one first, of ModernBERT and T5), or layers=None."
        )
