"""An encoder made ready for a student or a ColBERT: the layers it keeps, its tokenizer, its lengths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import nn

from tct_hf.bundled import told_when_missing
from tct_hf.checkpoints import query_expansion
from tct_hf.tokenization import PROMPTS, plain_tokenizer, start_token, tct_tokenizer

NO_PROMPTS = {"query": "", "document": ""}


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


def make_plain(
    transformer: Transformer,
    *,
    query_length: int,
    document_length: int,
    prompts: Mapping[str, str],
    markers: Sequence[str] = (),
) -> Transformer:
    """Give a Transformer module, in place, lengths and a fresh tokenizer with its own special tokens.

    Args:
        transformer: of any encoder.
        query_length: tokens of a query, prompt and special tokens included.
        document_length: of a passage, likewise.
        prompts: of :func:`plain_prompts`.
        markers: added tokens to leave out, such as those of a ColBERT.
    """
    tokenizer = plain_tokenizer(transformer.tokenizer, document_length=document_length, markers=markers)
    for name, length, side in (
        ("query_length", query_length, "query"),
        ("document_length", document_length, "document"),
    ):
        taken = len(tokenizer(prompts[side])["input_ids"])
        _check_length(transformer, name, length, taken + 1, f"special tokens and the prompt take {taken}")
    _set(transformer, tokenizer, query_length, document_length, augmented=False)
    return transformer


def plain_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    """The prompts of the plain encoding, checked; none where None.

    Raises:
        ValueError: other sides than query and document, or the TCT encoding's prompts, by which it is recognised.
    """
    made = {**NO_PROMPTS, **(prompts or {})}
    if made.keys() != NO_PROMPTS.keys():
        raise ValueError(f'prompts has {sorted(made)}: give those of "query" and "document", or one of them, or none.')
    if taken := [prompt for prompt in made.values() if prompt in PROMPTS.values()]:
        raise ValueError(
            f"prompts: {taken[0]!r} marks the TCT encoding, which pools and cuts otherwise: give another prompt."
        )
    return made


def _check_length(transformer: Transformer, name: str, length: int, least: int, why: str) -> None:
    if length < least:
        raise ValueError(f"{name}={length} leaves no token for the text: {why}.")
    positions = _positions(transformer.config)
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}, but the encoder has {positions} positions: choose at most that.")


def _set(
    transformer: Transformer, tokenizer: Any, query_length: int, document_length: int, *, augmented: bool
) -> None:
    transformer.processor = tokenizer
    transformer.processing_kwargs = {}
    transformer._prompt_length_mapping = {}
    transformer.query_expansion = None  # before the lengths: the setter compares them
    transformer.document_length = document_length
    transformer.query_length = None if augmented else query_length
    transformer.query_expansion = query_expansion(query_length) if augmented else None


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
