"""Build a sparse student, SPLADE, of stock sentence-transformers modules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoConfig, AutoModelForMaskedLM

from tct_hf.encoding.encoders import check_length, load_transformer
from tct_hf.hub_client import told_when_missing


def build_splade(
    model_name_or_path: str,
    *,
    query_length: int | None = None,
    document_length: int = 256,
    pooling: Literal["max", "sum"] = "max",
    activation: Literal["relu", "log1p_relu"] = "relu",
    dtype: torch.dtype | str | None = None,
) -> SparseEncoder:
    """Build a SPLADE student from an encoder with a masked-language-model head.

    Every dimension of its vectors is a token of the vocabulary, weighted `log(1 + relu(logit))`, pooled over the
    text's tokens. `SparseEncoder(path)` loads what it saves.

    Args:
        model_name_or_path: encoder with its head, such as `Luyu/co-condenser-marco` or `distilbert-base-uncased`, or
            a trained SPLADE to continue from.
        query_length: tokens a query keeps, special tokens included; `document_length` when None.
        document_length: tokens a passage keeps, special tokens included.
        pooling: "max" (SPLADE v2 and later), or "sum" (the first).
        activation: "relu", or "log1p_relu", whose weights grow more slowly.
        dtype: dtype of the weights; float32 when None.

    Returns:
        A SparseEncoder of stock modules.

    Raises:
        ValueError: an encoder without the head, whose weights would be random; lengths that don't fit; an unknown
            pooling or activation.

    Source: Formal et al., arXiv 2107.05720, section 3, and arXiv 2109.10086 (max pooling).
    """
    check_head(model_name_or_path)
    transformer = load_transformer(model_name_or_path, dtype, transformer_task="fill-mask")
    check_length(transformer.config, "document_length", document_length, taken=2)
    if query_length is not None:
        check_length(transformer.config, "query_length", query_length, taken=2)
    transformer.max_seq_length = document_length  # plain encode() knows no other
    transformer.document_length = document_length
    transformer.query_length = query_length or document_length
    head: Any = transformer.model.get_output_embeddings()
    pool = SpladePooling(pooling, activation_function=activation, embedding_dimension=head.out_features)
    return SparseEncoder(modules=[transformer, pool], similarity_fn_name="dot")


def check_head(model_name_or_path: str) -> None:
    """Refuse a checkpoint without all weights of the masked-language-model head: they would be random."""
    needed = (
        "A SPLADE student needs a checkpoint with its masked-language-model head (an architecture *ForMaskedLM, such "
        "as Luyu/co-condenser-marco, bert-base-uncased or distilbert-base-uncased), or a trained SPLADE."
    )
    with told_when_missing(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path)
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, which has no such head. {needed}")
    if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        _, loading = AutoModelForMaskedLM.from_pretrained(model_name_or_path, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"{model_name_or_path} lacks {', '.join(missing[:3])}. {needed}")
