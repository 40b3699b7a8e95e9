"""Models that read queries and passages by different modules: a Router, and stored vectors in place of one route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Router
from torch import nn

# A tower and the model of its passages read different lengths, each its own.
logging.getLogger(Router.__module__).addFilter(lambda record: "Different max_seq_lengths" not in record.getMessage())

# Vectors `(texts, dim)` float32 of passages, and what is to be said of those that have none.
LookUp = Callable[[Sequence[str]], tuple[np.ndarray, list[str]]]


def route_of(model: Any, task: str) -> list[Any]:
    """The modules that a query or a passage ("document") goes through."""
    modules = list(model)
    return [*modules[0].sub_modules[task], *modules[1:]] if has_routes(modules) else modules


def prompt_of(model: Any, task: str) -> str | None:
    """The prompt that `encode_query` and `encode_document` would take."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in model.prompts), model.default_prompt_name)
    return model.prompts[name] if name else None


def has_routes(model: Any) -> bool:
    """Whether queries and passages go through modules of their own."""
    first = next(iter(model), None)
    return isinstance(first, Router) and {"query", "document"} <= first.sub_modules.keys()


def joined(queries: Sequence[Module], passages: Sequence[Module], like: Any, query_prompt: str) -> SentenceTransformer:
    """A model of two routes whose passages are read as those of the model `like`; plain `encode` reads passages."""
    return SentenceTransformer(
        modules=[Router.for_query_document(list(queries), list(passages))],
        prompts={**like.prompts, "query": query_prompt},
        default_prompt_name=like.default_prompt_name,
        similarity_fn_name=like.similarity_fn_name,
        truncate_dim=like.truncate_dim,
        device=str(like.device),
    )


def passage_model(model: Any) -> Any:
    """The model of the passages: of a dense one with two routes that of the document route alone."""
    stored = _stored(model)
    return _alone(model, "document") if stored is None else stored.encoder


def query_model(model: Any) -> Any:
    """The model of the queries: of a dense one with two routes that of the query route alone."""
    return _alone(model, "query")


def _alone(model: Any, task: str) -> Any:
    if not (isinstance(model, SentenceTransformer) and has_routes(model)):
        return model
    prompts: Any = dict(model.prompts)
    return SentenceTransformer(
        modules=route_of(model, task),
        prompts=prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
        device=str(model.device),
    )


class StoredVectors(Module):
    """The document route of a query tower while it is trained: vectors that are there, found by the passage's text.

    It has no parameters, and a passage without a vector is refused when its vector is needed. The tower is saved with
    the encoder in its place, see :func:`whole`.

    Args:
        look_up: finds vectors.
        encoder: the model that made them.
    """

    def __init__(self, look_up: LookUp, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.look_up = look_up
        self._aside = (encoder.eval(),)  # in a tuple it is no child: it is not trained, moved or counted

    @property
    def encoder(self) -> SentenceTransformer:
        """The model that made the vectors."""
        return self._aside[0]

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        vectors, missing = self.look_up(inputs)
        return {"sentence_embedding": torch.from_numpy(vectors), "missing": missing}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if features["missing"]:
            raise ValueError(features["missing"][0])
        return features

    def get_embedding_dimension(self) -> int | None:
        return self.encoder.truncate_dim or self.encoder.get_embedding_dimension()

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise ValueError("A query tower is saved with the encoder of its passages: use save_student.")


def _stored(model: Any) -> StoredVectors | None:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, SentenceTransformer) or not has_routes(model):  # an expander is no list of modules
        return None
    last: Any = route_of(model, "document")[0]
    return last if isinstance(last, StoredVectors) else None


def has_stored_vectors(model: Any) -> bool:
    """Whether a model is a query tower in training."""
    return _stored(model) is not None


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Give a query tower the encoder of its passages in place of their stored vectors, for a while: to be saved."""
    stored = _stored(model)
    if stored is None:
        yield
        return
    routes = getattr(model, "_orig_mod", model)[0].sub_modules
    place, encoder = stored.encoder.device, stored.encoder.to(model.device)
    routes["document"] = nn.Sequential(*encoder)
    try:
        yield
    finally:
        routes["document"] = nn.Sequential(stored)
        encoder.to(place)
