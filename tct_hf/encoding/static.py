"""Static students: a vector for every token of the vocabulary, and no encoder between a text and its vector."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router, StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor, nn

from tct_hf.batches import parts_of_similar_length
from tct_hf.encoding.encoders import load_model
from tct_hf.encoding.kinds import kind_of

_TEXTS, _TOKENS = 256, 4096  # that are tokenised, and that are encoded, together


def build_static(
    model: Any, *, dim: int | None = None, texts: Sequence[str] = (), smoothing: float | None = None
) -> SentenceTransformer:
    """Build a static student: a text's vector is the mean of its tokens' vectors, which are looked up in a table.

    A token's vector is the model's output for the token alone, averaged with those wherever it stands in `texts`.
    Without `texts` the student ranks much worse, and training makes up for a part of it only.

    Args:
        model: embedding model, ColBERT or vector teacher, or a folder or Hub id of a model.
        dim: dimensions, principal components of the tokens' vectors; None: the model's own, in which the student's
            vectors can be compared with the model's.
        texts: passages like those to be encoded; a few thousand are enough.
        smoothing: `a` in a token's weight `a / (a + p)`, where p is its share of the tokens of `texts`, or without
            them by Zipf's law that of its place in the vocabulary; 0.005 with `texts` and 0.0001 without when None.

    Returns:
        A SentenceTransformer of StaticEmbedding and what follows the model's pooling. It reads whole texts, without
        prompts.

    Raises:
        ValueError: a model that doesn't begin with a Transformer, or a number out of range.

    Source: of the weights, Arora, Liang, Ma, ICLR 2017 (SIF); of vectors of tokens alone, model2vec.
    """
    model = getattr(model, "model", model)
    if isinstance(model, (str, Path)):
        loader = MultiVectorEncoder if kind_of(str(model)) == "colbert" else SentenceTransformer
        model = load_model(loader, str(model))
    if not isinstance(model[0], Transformer):
        raise ValueError(
            f"A static student is made of a Transformer's outputs, and {type(model[0]).__name__} is none."
        )
    smoothing = (5e-3 if len(texts) else 1e-4) if smoothing is None else smoothing
    if not smoothing > 0:
        raise ValueError(f"smoothing={smoothing}: give a number above 0, such as 0.005.")
    modules = list(model.eval())
    pool = next((place for place, module in enumerate(modules) if isinstance(module, Pooling)), len(modules))
    read = nn.Sequential(*(module for module in modules[:pool] if not isinstance(module, MultiVectorMask)))
    vectors, counts = _token_vectors(model, read, texts)
    share = counts - 1.0 if len(texts) else 1.0 / torch.arange(1, len(counts) + 1, dtype=torch.float64)
    share = share / share.sum()
    after = [copy.deepcopy(module) for module in modules[pool + 1 :]]
    if dim is not None:
        if not 0 < dim <= vectors.shape[1]:
            raise ValueError(f"dim={dim}: must be from 1 to the {vectors.shape[1]} dimensions of the token vectors.")
        vectors = vectors - share @ vectors
        _, axes = torch.linalg.eigh(vectors.T @ (share[:, None] * vectors))
        vectors, after = vectors @ axes.flip(1)[:, :dim], []
    vectors *= (smoothing / (smoothing + share))[:, None]
    if model.similarity_fn_name != "dot" or isinstance(modules[-1], Normalize):
        after = after or [Normalize()]
        vectors /= (share @ vectors.square()).mean().sqrt()  # one learning rate suits the vectors of all models
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    table = StaticEmbedding(tokenizer, embedding_weights=vectors.float())
    dot = model.similarity_fn_name == "dot"
    return SentenceTransformer(modules=[table, *after], similarity_fn_name="dot" if dot else "cosine")


def _token_vectors(model: Any, read: nn.Module, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean outputs of every token `(vocabulary, dim)`, and how many there were: once alone, and all those in texts."""
    tokenizer, prompt = model.tokenizer, model.prompts.get("document") or ""
    size, special = tokenizer.backend_tokenizer.get_vocab_size(), torch.tensor(tokenizer.all_special_ids)
    one = tokenizer("a", return_special_tokens_mask=True)
    first = one["special_tokens_mask"].index(0)
    last = len(one["input_ids"]) - one["special_tokens_mask"][::-1].index(0)
    start = first + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def passes() -> Iterator[tuple[dict[str, Any], Tensor]]:
        for ids in torch.arange(size).split(_TOKENS // 4):
            rows = torch.tensor([*one["input_ids"][:first], 0, *one["input_ids"][last:]]).repeat(len(ids), 1)
            rows[:, first] = ids
            counted = torch.zeros_like(rows, dtype=torch.bool)
            counted[:, first] = True
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}, counted
        for at in range(0, len(texts), _TEXTS):
            features = model.preprocess(list(texts[at : at + _TEXTS]), prompt=prompt or None, task="document")
            for _, part in parts_of_similar_length(features, _TOKENS):
                counted = part["attention_mask"].bool() & ~torch.isin(part["input_ids"], special)
                counted[:, :start] = False
                yield part, counted

    sums, counts = torch.zeros(0), torch.zeros(size, dtype=torch.float64)
    with torch.inference_mode():
        for features, counted in passes():
            ids = features["input_ids"][counted]
            inputs = {key: one.to(model.device) if isinstance(one, Tensor) else one for key, one in features.items()}
            vectors = read(inputs)["token_embeddings"].cpu()[counted].double()
            sums = sums if len(sums) else vectors.new_zeros(size, vectors.shape[1])
            sums.index_add_(0, ids, vectors)
            counts += torch.bincount(ids, minlength=size)
    return sums / counts[:, None], counts


def static_modules(model: Any, task: str) -> list[Any] | None:
    """The modules between a text and its vector, if that is looked up in a float32 table in this computer's memory.

    Those of a Router's route count, too.
    """
    modules = list(getattr(model, "_modules", {}).values())
    first: Any = modules[0] if modules else None
    if isinstance(first, Router) and task in first.sub_modules:
        routed: Any = first.sub_modules[task]
        modules[:1] = routed
    if not modules or not isinstance(modules[0], StaticEmbedding):
        return None
    weight = modules[0].embedding.weight
    return modules if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
