"""Checkpoints as others published them, small, and vectors by their own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

from tct_hf.evaluation.report import Report, SystemResult
from tct_hf.hub.cards import CardFacts
from tests.models import SIZES, tiny_bert, wordpiece_vocabulary

FACTS = CardFacts(license="mit", base_model="google-bert/bert-base-uncased", training_data="words")
TEXTS = ["what is a dense teacher", "", "the student of a query: tokens!", "retrieval " * 60, "passage " * 700]


def published_tct(path: Path, *, weights: str = "safetensors") -> Path:
    """A stand-in for castorini/tct_colbert-msmarco: BERT with pretraining heads, vocab.txt, no tokenizer.json."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = wordpiece_vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    torch.manual_seed(11)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=512, initializer_range=0.2, **SIZES)
    model = BertForPreTraining(config)
    model.save_pretrained(path)
    if weights == "bin":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


def pyserini_vectors(path: Path, texts: list[str], side: str, *, document_length: int = 512) -> np.ndarray:
    """Queries padded with [MASK] to 36, passages cut; mean over the positions from 4 on, one text at a time."""
    tokenizer = BertTokenizer(vocab=str(path / "vocab.txt"), do_lower_case=True)
    model = BertModel.from_pretrained(path).eval()
    vectors = []
    for text in texts:
        query = side == "query"
        whole = f"[CLS] [Q] {text}{'[MASK]' * 36}" if query else f"[CLS] [D] {text}"
        length = 36 if query else document_length
        ids = tokenizer(whole, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        vectors.append(hidden[4:].mean(0) if len(ids) > 4 else torch.zeros(32))
    return torch.stack(vectors).numpy()


def dual_encoder(path: Path, pooling: str = "mean") -> Path:
    """A SentenceTransformer with its own pooling and no TCT encoding."""
    transformer = Transformer(str(tiny_bert(path / "base", seed=3)))
    pool = Pooling(transformer.get_embedding_dimension(), pooling)
    SentenceTransformer(modules=[transformer, pool]).save_pretrained(str(path / "model"))
    return path / "model"


def system(key: str, title: str, mean: float, *, baseline: bool = False) -> SystemResult:
    p = {"mean": mean, "difference": 0.1, "better": 3, "worse": 1, "standard_error": 0.01}
    p |= {f"p_{test}{holm}": 0.01 for test in ("randomisation", "t_test") for holm in ("", "_holm")}
    means = {"RR@10": {"mean": mean, "standard_error": 0.01}, "R@100": {"mean": 0.9, "standard_error": 0.0}}
    latency = {"p50": 12.5, "p95": 14.0, "p99": 20.0, "mean": 13.0, "queries": 100}
    cost = {"latency": {"total": latency}, "queries_per_second": 90.0, "disk_bytes_per_passage": 1536.0}
    cost |= {"build_seconds": None, "memory_bytes_per_passage": None}
    tests = None if baseline else {"RR@10": p, "R@100": p}
    return SystemResult(key, title, "dense", effectiveness=means, significance=tests, cost=cost, run={})


def small_report(weights: str) -> Report:
    """Of BM25 and the student with these weights."""
    empty: dict[str, Any] = {"environment": {}, "settings": {}, "notes": []}
    return Report(
        collection={"name": "Sci Fact", "passages": 5183, "split": "test", "queries": 300, "fingerprint": {}},
        models={"student": {"name": "x", "weights_sha256": weights}, "teacher": None},
        measures=["RR@10", "R@100"], relevance=1, depth=100, baseline="bm25",
        tuning={"hybrid": {"alpha": 0.8951, "queries": 500, "split": "dev"}},
        systems=[system("bm25", "BM25", 0.62, baseline=True), system("dense-exact", "student", 0.64321)],
        machine={"processor": "a processor", "cpu_count": 2, "device": "cpu"}, threads={"torch": 1}, **empty,
    )  # fmt: skip
