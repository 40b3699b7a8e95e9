"""The rules of the encodings, written out here once more with plain transformers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer

LENGTH = 40  # of a passage
TEXTS = [
    "what is the teacher",
    "",
    "   ",
    *(" ".join(["the"] * words) for words in (31, 32, 33)),  # a query's 36 tokens hold 32 of the text
    *(" ".join(["query"] * words) for words in (35, 36, 37)),  # a passage's 40 tokens hold 36 of the text
    "retrieval of passage representations " * 100,
    "[SEP] opens, [SEP] and [CLS] and [PAD] and a literal [MASK] follow [SEP]",
    "<mask> </s> <s> <pad>",
    "[Q] is the prompt as a text [D]",
    "Café naïve résumé 检索 passage 中文搜索 ☃",
]
PROMPTS = {"query": "query: ", "document": "passage: "}
QUERY_ALONE, NONE = {"query": "query: "}, {"query": "", "document": ""}
OWN: dict[str, Any] = {"encoding": "own"}


class Rule:
    """One text at a time, without padding, by the tokenizer of the base model.

    Args:
        prompts: of an own-encoding student; None: the TCT encoding.
        norm: length of every vector but zero; None: as pooled.
    """

    def __init__(
        self,
        model: Any,
        base: Path,
        *,
        query_length: int = 36,
        document_length: int = LENGTH,
        augmented: bool = True,
        pooling: str = "mean",
        norm: float | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), AutoTokenizer.from_pretrained(base)
        self.lengths = {"query": query_length, "document": document_length}
        self.augmented, self.pooling, self.norm, self.prompts = augmented, pooling, norm, prompts

    def ids(self, text: str, side: str) -> list[int]:
        length = self.lengths[side]
        if self.prompts is not None:
            return self.tokenizer(self.prompts[side] + text, truncation=True, max_length=length)["input_ids"]
        opening = f"{self.tokenizer.cls_token} {'[Q]' if side == 'query' else '[D]'} {text}"
        ending = self.tokenizer.mask_token * length if side == "query" and self.augmented else ""
        return self.tokenizer(opening + ending, add_special_tokens=False)["input_ids"][:length]

    def vectors(self, texts: list[str], side: str) -> np.ndarray:
        skipped, made = 4 if self.prompts is None else 0, []
        for text in texts:
            ids = self.ids(text, side)
            with torch.no_grad():
                hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()
            if self.pooling == "cls":
                vector = hidden[0]
            else:
                vector = hidden[skipped:].mean(0) if len(ids) > skipped else np.zeros_like(hidden[0])
            made.append(vector if self.norm is None else self.norm * vector / max(np.linalg.norm(vector), 1e-12))
        return np.stack(made)

    @cached_property
    def wanted(self) -> dict[str, np.ndarray]:
        found = {side: self.vectors(TEXTS, side) for side in PROMPTS}
        return {**found, "plain": found["document"]}


def load(path: Path, **kwargs: Any) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", **kwargs)


def close(found: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, dtype=np.float32) - wanted).max() <= tolerance


def embedding_model(path: Path, base: Path, *, pooling: str = "mean", prompts: dict[str, str] | None = None) -> Path:
    """What stock sentence-transformers saves of an encoder, with normalised vectors."""
    transformer = Transformer(str(base))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(path))
    return path
