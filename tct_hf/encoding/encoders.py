"""An encoder made ready for a student or a ColBERT: the layers it keeps, its tokenizer, its lengths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import nn

from tct_hf.encoding.checkpoint import query_expansion
from tct_hf.encoding.tokenization import own_tokenizer, start_token, tct_tokenizer
from tct_hf.hub_client import told_when_missing


def load_transformer(model_name_or_path: str, dtype: torch.dtype | str | None) -> Transformer:
    """The encoder of a folder or Hub id."""
    # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
    with told_when_missing(model_name_or_path):
        return Transformer(model_name_or_path, model_kwargs={"dtype": dtype or torch.float32})


def _positions(config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return positions - config.pad_token_id - 1  # these count positions from the padding index on
    return positions


def make_tct(
    transformer: Transformer,
    *,
    query_length: int,
    document_length: int,
    query_augmentation: bool,
    markers: Sequence[str] = (),
) -> Transformer:
    """Give a Transformer module, in place, the TCT tokenizer, lengths and query expansion."""
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        _check_length(transformer, name, length, 5, "the start token and the prompt take 4")
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
    _set(transformer, tokenizer, query_length, document_length, augmented=query_augmentation)
    return transformer


def make_own(transformer: Transformer, *, markers: Sequence[str] = ()) -> None:
    """Give the Transformer module of a ColBERT, in place, what an embedding model has: no query expansion, one length.

    Args:
        transformer: of any encoder.
        markers: added tokens that the tokenizer must not have, such as a ColBERT's [unused0].
    """
    length: Any = transformer.document_length or transformer.max_seq_length
    tokenizer = own_tokenizer(transformer.tokenizer, document_length=length, markers=markers)
    _set(transformer, tokenizer, transformer.query_length, None, augmented=False)


def set_lengths(
    transformer: Any, prompts: Mapping[str, str | None], *, query_length: int | None, document_length: int | None
) -> None:
    """Set what a query and a passage keep, in place, where they are given.

    A passage's length is the tokenizer's, so that plain `encode` and servers cut alike. A query's is a setting that
    sentence-transformers 6 knows alone.

    Args:
        transformer: the first module of an embedding model.
        prompts: of the model.
        query_length: tokens of a query, prompt and special tokens included; None: as it is.
        document_length: of any other text; None: as it is.

    Raises:
        ValueError: no room for a text, or more than the encoder has positions.
    """
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        if length is not None:
            taken = len(transformer.tokenizer(prompts.get(name.split("_")[0]) or "")["input_ids"])
            _check_length(transformer, name, length, taken + 1, f"special tokens and the prompt take {taken}")
    if document_length is not None:
        transformer.max_seq_length = document_length
        if transformer.document_length is not None:
            transformer.document_length = document_length
    if query_length is not None:
        transformer.query_length = None if query_length == transformer.max_seq_length else query_length


def _check_length(transformer: Transformer, name: str, length: int, least: int, why: str) -> None:
    if length < least:
        raise ValueError(f"{name}={length} leaves no token for the text: {why}.")
    positions = _positions(transformer.config)
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}, but the encoder has {positions} positions: choose at most that.")


def _set(
    transformer: Transformer,
    tokenizer: Any,
    query_length: int | None,
    document_length: int | None,
    *,
    augmented: bool,
) -> None:
    transformer.processor = tokenizer
    transformer.processing_kwargs = {}
    transformer._prompt_length_mapping = {}
    transformer.query_expansion = None  # before the lengths: the setter compares them
    transformer.document_length = document_length
    transformer.query_length = None if augmented else query_length
    transformer.query_expansion = query_expansion(query_length) if augmented and query_length else None


def keep_layers(transformer: Transformer, layers: Sequence[int]) -> None:
    """Leave an encoder, in place, with some of its layers, counted from 0.

    Raises:
        ValueError: as :func:`check_layers`.
    """
    config = transformer.model.config
    path, kept = check_layers(transformer.model, layers)
    stack: Any = transformer.model.get_submodule(path)
    transformer.model.set_submodule(path, nn.ModuleList([stack[layer] for layer in layers]))
    for key, value in vars(kept).items():
        if vars(config).get(key) != value:
            setattr(config, key, value)


def check_layers(model: Any, layers: Sequence[int]) -> tuple[str, Any]:
    """Refuse layers that would not come back from a checkpoint as they were.

    Args:
        model: the encoder; its weights are not looked at, and may lie on the device "meta".
        layers: to keep, counted from 0.

    Returns:
        Where the stack of layers is in it, and the configuration of an encoder of these layers.

    Raises:
        ValueError: layers that it doesn't have, an encoder whose layers are not one stack, or a layer with weights
            that its new place has not, or without some that it has.
    """
    config = model.config
    count = config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"layers={list(layers)}: name distinct layers of the encoder, 0 to {count - 1}.")
    stacks = [
        path for path, stack in model.named_modules() if isinstance(stack, nn.ModuleList) and len(stack) == count
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers, so that which layers to keep is "
            "unclear: use an encoder with one stack (BERT, MiniLM, MPNet), or layers=None."
        )
    [path] = stacks
    kept = copy.deepcopy(config)
    kept.num_hidden_layers = len(layers)
    for key, value in vars(kept).items():  # per-layer settings, such as ModernBERT's layer_types
        if key.startswith("layer") and isinstance(value, list) and len(value) == count:
            setattr(kept, key, [value[layer] for layer in layers])
    before, after = (_weights_of_layers(type(model), made, path) for made in (config, kept))
    for layer, loaded in zip(layers, after, strict=True):
        if before[layer] != loaded:
            differs = min(name for name, _ in before[layer].items() ^ loaded.items())
            raise ValueError(
                f"layers={list(layers)}: the layers of {type(model).__name__} are not alike, and of layer {layer} at "
                f"its new place {differs} would be lost, or random, in a saved student: keep it at its place "
                "(the first one first, of ModernBERT and T5), or layers=None."
            )
    return path, kept


def _weights_of_layers(encoder: type, config: Any, path: str) -> list[dict[str, torch.Size]]:
    """Names and shapes of each layer's weights in an encoder made of a configuration."""
    with torch.device("meta"):  # no memory
        stack = encoder(config).get_submodule(path)
    return [{name: weight.shape for name, weight in layer.named_parameters()} for layer in stack]
