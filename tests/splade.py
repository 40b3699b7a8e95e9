"""A small SPLADE student of stock modules."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling
from transformers import BertConfig, BertForMaskedLM

from tests.models import tiny_bert


def tiny_router(path: Path, *, seed: int = 0) -> Path:
    """Save a SPLADE student whose passages are encoded and whose queries' weights are looked up."""
    student = SparseEncoder(str(tiny_splade(path, seed=seed)), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(student.tokenizer), generator=generator)
    queries = SparseStaticEmbedding(student.tokenizer, weight=weights, frozen=True)
    router = Router.for_query_document(query_modules=[queries], document_modules=list(student))
    SparseEncoder(modules=[router], similarity_fn_name="dot").save_pretrained(str(path / "router"))
    return path / "router"


def tiny_splade(path: Path, *, seed: int = 0, name: str = "model") -> Path:
    """Save a SPLADE student whose vectors have about a third of their terms."""
    base = tiny_bert(path / "base", seed=seed)
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig.from_pretrained(base))
    with torch.no_grad():
        model.cls.predictions.bias.normal_(-2.5, 1.0)
    model.save_pretrained(base)
    transformer = Transformer(str(base), transformer_task="fill-mask", max_seq_length=48)
    student = SparseEncoder(modules=[transformer, SpladePooling("max")], similarity_fn_name="dot")
    student.save_pretrained(str(path / name))
    return path / name
