"""Build a sparse student, SPLADE, of stock sentence-transformers modules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoConfig, AutoModelForMaskedLM

from tct_hf.hub_client import told_when_missing

DOCUMENT_LENGTH = 256


def build_splade(
    model_name_or_path: str,
    *,
    query_length: int | None = None,
    document_length: int = DOCUMENT_LENGTH,
    pooling: Literal["max", "sum"] = "max",
    activation: Literal["relu", "log1p_relu"] = "relu",
    dtype: torch.dtype | str | None = None,
) -> SparseEncoder:
    """Build a SPLADE student from an encoder with a masked-language-model head.

    Every dimension of its vectors is a word of the vocabulary, weighted `log(1 + relu(logit))`, the most over the
    text's tokens. `SparseEncoder(path)` loads what it saves.

    Args:
        model_name_or_path: encoder with its head, such as `Luyu/co-condenser-marco` or `distilbert-base-uncased`; a
            trained SPLADE may go on from there.
        query_length: tokens a query keeps, special tokens included; `document_length` when None.
        document_length: tokens a passage keeps, special tokens included.
        pooling: "max" (SPLADE v2 and later), or "sum" (the first).
        activation: "relu", or "log1p_relu", whose weights grow slower still.
        dtype: of the weights; float32 when None.

    Returns:
        A SparseEncoder of stock modules.

    Raises:
        ValueError: an encoder without the head, whose weights would be random; lengths that don't fit; an unknown
            pooling or activation.

    Source: Formal et al., arXiv 2107.05720, section 3, and arXiv 2109.10086 (max pooling).
    """
    check_head(model_name_or_path)
    # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
    transformer = Transformer(
        model_name_or_path, transformer_task="fill-mask", model_kwargs={"dtype": dtype or torch.float32}
    )
    positions = transformer.max_seq_length
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        if length is None:
            continue
        if length < 3:
            raise ValueError(f"{name}={length} leaves no token for the text between the special tokens.")
        if positions is not None and length > positions:
            raise ValueError(f"{name}={length}, but the encoder takes {positions} tokens: choose at most that.")
    transformer.max_seq_length = document_length  # plain encode() knows no other
    transformer.document_length = document_length
    transformer.query_length = document_length if query_length is None else query_length
    head: Any = transformer.model.get_output_embeddings()
    pool = SpladePooling(pooling, activation_function=activation, embedding_dimension=head.out_features)
    return SparseEncoder(modules=[transformer, pool], similarity_fn_name="dot")


def check_head(model_name_or_path: str) -> None:
    """Refuse an encoder whose checkpoint lacks weights of the head: transformers would draw them at random.

    Args:
        model_name_or_path: folder or Hub id.

    Raises:
        ValueError: what is missing, and the mend.
    """
    mend = (
        "A SPLADE student needs a checkpoint with its masked-language-model head (an architecture *ForMaskedLM, such "
        "as Luyu/co-condenser-marco, bert-base-uncased or distilbert-base-uncased), or a trained SPLADE."
    )
    with told_when_missing(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path)
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, which has no such head. {mend}")
    if any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        return
    _, loading = AutoModelForMaskedLM.from_pretrained(model_name_or_path, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{model_name_or_path} lacks {', '.join(missing[:3])}. {mend}")
