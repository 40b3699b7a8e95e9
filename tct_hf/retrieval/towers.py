"""A query tower for an index that stays: only its queries' encoder learns, passages are vectors that are there."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from torch import nn

from tct_hf.data.ids import find, hash_of
from tct_hf.data.texts import checked_passages
from tct_hf.encoding.convert import load_encoder
from tct_hf.encoding.encoders import length_of
from tct_hf.encoding.routes import StoredVectors, has_routes, joined, passage_model, prompt_of, route_of
from tct_hf.retrieval.checks import check_model, described
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.engines import engine_of
from tct_hf.retrieval.engines.base import EngineIndex
from tct_hf.retrieval.vectors import LazyRows, UnitRows, load_vectors

_FITTED = 1024  # passages, and queries, that the start is fitted to
_SHRINK = 0.1  # of the fit, relative to the variance of a component


class _IndexRows(LazyRows):
    """The vectors of a Faiss index that keeps them whole."""

    def __init__(self, index: DenseIndex) -> None:
        self._index, self._engine = index, faiss.downcast_index(index._engine)  # Faiss leaves the memory to the first
        if not isinstance(self._engine, (faiss.IndexFlat, faiss.IndexHNSWFlat)):
            raise ValueError(
                f"vectors: an index {index.factory!r} keeps codes of its vectors, not the vectors; give the folder of "
                "encode_corpus that it was built from."
            )
        self.shape = (len(index), index.dimension)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self._engine.reconstruct_batch(np.arange(len(self))[rows]))


class _EngineRows(LazyRows):
    """The vectors of an engine's table, of passages in the order of `ids`."""

    def __init__(self, index: EngineIndex, ids: Sequence[str]) -> None:
        self._index, self._ids, self._process = index, ids, os.getpid()
        self.shape = (len(ids), index.dimension)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if os.getpid() != self._process:
            raise ValueError("vectors: a connection to an engine serves one process; set dataloader_num_workers=0.")
        names = [self._ids[row] for row in np.arange(len(self))[rows]]
        found = self._index.vectors(names)
        if lacking := [name for name in names if name not in found]:
            raise ValueError(f"vectors: passage {lacking[0]!r} is not in the table {self._index.name}: push it.")
        return np.stack([found[name] for name in names])


def _opened(source: Any, encoder: SentenceTransformer, ids: Sequence[str]) -> tuple[Sequence[str], LazyRows]:
    """Passage ids and their vectors; refused where `encoder` did not make them."""
    model, place = described(encoder), str(source)
    if isinstance(source, (str, Path)):
        if (Path(source) / DenseIndex.settings_file).is_file():
            source = DenseIndex.load(source, mmap=True)
        elif Path(source).is_dir():
            names, vectors, manifest = load_vectors(source, mmap=True)
            check_model(place, manifest["model"], model)
            return names, vectors
        elif "://" in place or place.startswith("unix:") or ".db" in place:
            url, _, name = place.partition("#")
            source = engine_of(url).open(url, name or "passages")
        else:
            raise FileNotFoundError(f"{place}: no folder of encoded passages or of an index, and no engine's URL.")
    if isinstance(source, DenseIndex):
        check_model("vectors: the index", source.built_by, model)
        return source.ids.to_pylist(), _IndexRows(source)
    if not isinstance(source, EngineIndex):
        known = "a folder of vectors or of an index, a DenseIndex, or a table of an engine"
        raise ValueError(f"vectors: a {type(source).__name__} does not say which model made it; give {known}.")
    check_model(f"vectors: the table {source.name}", source.about["built_by"], model)
    return ids, _EngineRows(source, ids)


class PassageVectors:
    """The stored vectors of a corpus's passages, by text, read when they are asked for; 16 bytes a passage in memory.

    Args:
        source: see :func:`query_tower`.
        corpus: the passages, "id" and "text".
        encoder: the model that made the vectors.

    Attributes:
        sample: texts of some passages, spread over the corpus.

    Raises:
        ValueError: vectors of another model, or a passage without one.
    """

    def __init__(self, source: Any, corpus: Any, encoder: SentenceTransformer) -> None:
        ids: list[str] = []
        hashes, self.sample = np.empty(len(corpus), np.uint64), []
        every = max(1, len(corpus) // _FITTED)
        for at, (name, text) in enumerate(checked_passages(corpus, allow_empty=True)):
            ids.append(name)
            hashes[at] = hash_of(text)
            if at % every == 0:
                self.sample.append(text)
        names, self.vectors = _opened(source, encoder, ids)
        order = hashes.argsort()
        rows = {name: row for row, name in enumerate(names)}
        if lacking := [one for one in ids if one not in rows]:
            raise ValueError(
                f"vectors: passage {lacking[0]!r} has none ({len(lacking):,} of {len(ids):,} have none): encode them "
                "with the model of the others, or leave them out of the corpus."
            )
        self._keys, self._rows = hashes[order], np.fromiter(map(rows.__getitem__, ids), np.int64)[order]

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """The vectors `(texts, dim)` of passages, zeros where there is none, and what is to be said of those."""
        at, there = find(self._keys, map(hash_of, texts))
        rows, back = np.unique(self._rows[at[there]], return_inverse=True)  # neighbours are read together
        found = np.zeros((len(texts), self.vectors.shape[1]), np.float32)
        if len(rows):
            found[there] = self.vectors[rows][back]
        missing = [text[:80] for text, known in zip(texts, there, strict=True) if not known]
        fix = "it is not in the corpus, letter for letter. Add it there, or leave the row out."
        return found, [f"The passage {text!r} has no stored vector: {fix}" for text in missing]


def query_tower(
    tower: SentenceTransformer,
    of: SentenceTransformer | str | Path,
    vectors: Any,
    corpus: Any,
    *,
    queries: Sequence[str] = (),
    fit: bool | None = None,
) -> SentenceTransformer:
    """Make a model a student that learns to encode queries for passage vectors that stay.

    `TCTTrainer` trains it like any other student, without encoding a passage; `save_student` saves it with the model
    `of` as the encoder of passages, so that plain `encode_query` and `encode_document` are right. Its vectors are
    compared and normalised as those of `of`.

    Args:
        tower: the model of the queries, of `build_student`: with fewer layers, from another base, in another language.
            Its modules are taken over.
        of: the model that encoded the passages, or its folder or Hub id.
        vectors: where the vectors of the passages are: a folder of `encode_corpus`, a `DenseIndex` of whole vectors
            ("Flat" or HNSW) or its folder, a table of an engine, or its `URL#name`.
        corpus: the passages, a data set or list of "id" and "text", all of which have a vector; texts of the training
            rows are looked up by them.
        queries: some questions, such as those of the training rows, to fit the start to.
        fit: end the tower in a linear layer that is fitted, by least squares, to stored vectors of passages and to the
            vectors that `of` has for `queries`: a far better start, whatever the dimensions. None: unless `tower` is
            such a tower already. A static tower has the layer in its table.

    Returns:
        The student.

    Raises:
        ValueError: vectors of another model, an index that keeps codes, a passage without a vector.
        FileNotFoundError: there are no vectors.
    """
    model = load_encoder(str(of), device="cpu") if isinstance(of, (str, Path)) else of
    encoder = passage_model(model)
    stored = PassageVectors(vectors, corpus, encoder)
    body, _ = _parted(route_of(tower, "query"))
    _, ending = _parted(list(encoder))
    prompts: Any = dict(tower.prompts)
    alone = SentenceTransformer(modules=body, prompts=prompts, device=str(encoder.device))
    other = alone.get_embedding_dimension() != stored.vectors.shape[1]
    if fit or (fit is None and (other or not has_routes(tower))):
        asked = list(queries)[:_FITTED]
        found = alone.encode_query([*stored.sample, *asked], show_progress_bar=False)
        wanted = [stored(stored.sample)[0], *([model.encode_query(asked, show_progress_bar=False)] if asked else [])]
        if model.similarity_fn_name == "cosine":
            wanted = [UnitRows(part)[:] for part in wanted]
        body.append(_fitted(found, np.concatenate(wanted)))
    if isinstance(body[0], StaticEmbedding):
        body = _folded(body, rescale=bool(ending))
    made = [*body, *copy.deepcopy(ending)]
    return joined(made, [StoredVectors(stored, encoder)], encoder, prompt_of(tower, "query") or "")


def _parted(modules: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The modules before the normalisation of a model's vectors, and those from there on."""
    ending = 2 if length_of(modules) is not None else int(isinstance(modules[-1], Normalize))
    return list(modules[: len(modules) - ending]), list(modules[len(modules) - ending :])


def _fitted(found: np.ndarray, wanted: np.ndarray) -> Dense:
    """The linear module that brings vectors `(texts, dim)` nearest to others, its weights held back a little."""
    mean, goal = found.mean(0), wanted.mean(0)
    held_back = np.sqrt(_SHRINK * (found - mean).var() * len(found)) * np.eye(found.shape[1], dtype=np.float32)
    rows = np.concatenate([found - mean, held_back])
    targets = np.concatenate([wanted - goal, np.zeros((found.shape[1], wanted.shape[1]), np.float32)])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0].T.astype(np.float32)  # (stored dim, dim)
    return Dense(
        found.shape[1],
        wanted.shape[1],
        activation_function=nn.Identity(),
        init_weight=torch.from_numpy(weight),
        init_bias=torch.from_numpy((goal - weight @ mean).astype(np.float32)),
    )


def _folded(body: Sequence[Any], *, rescale: bool) -> list[Any]:
    """A static body whose linear module, where it ends in one, is in its table: the mean of tokens commutes with it.

    `rescale`: keep the median length of the table's rows, where vectors are normalised, for one learning rate.
    """
    if len(body) != 2 or not isinstance(body[1], Dense) or not isinstance(body[1].activation_function, nn.Identity):
        return list(body)
    before, linear = body[0].embedding.weight, body[1].linear
    with torch.no_grad():
        rows = linear(before)
        if rescale:
            rows *= before.norm(dim=1).median() / rows.norm(dim=1).median()
    return [StaticEmbedding(body[0].tokenizer, embedding_weights=rows.detach())]
