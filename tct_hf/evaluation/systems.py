"""From a model and a corpus to a run, one function a kind of system, exact search throughout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import encode_texts
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

# Token vectors of this many passages are scored at a time: about 40 MB of them, whatever the corpus.
_PASSAGES_PER_CHUNK = 1024
_QUERIES_PER_BLOCK = 64


def _autocast(model: Any, bf16: bool) -> Any:
    import torch

    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)


def dense_run(
    model: SentenceTransformer,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    k: int = 100,
    bf16: bool = False,
) -> Run:
    """Search exactly with one vector a text and the model's own similarity (dot product, or cosine).

    Args:
        model: of one vector a text.
        corpus_ids: passage ids.
        corpus_texts: their texts.
        queries: query id to text.
        k: passages a query.
        bf16: encode in bfloat16.

    Returns:
        The run.

    Raises:
        ValueError: a model whose similarity is neither dot product nor cosine.
    """
    [run] = dense_runs(model, corpus_ids, corpus_texts, queries, dims=[None], k=k, bf16=bf16)
    return run


def dense_runs(
    model: SentenceTransformer,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    dims: Sequence[int | None],
    k: int = 100,
    bf16: bool = False,
) -> list[Run]:
    """As :func:`dense_run`, once with each number of first dimensions: texts are encoded once, and vectors sliced.

    Args:
        model: of one vector a text.
        corpus_ids: passage ids.
        corpus_texts: their texts.
        queries: query id to text.
        dims: how many of the first dimensions count, all where None. Dot products are of the slices as they are.
        k: passages a query.
        bf16: encode in bfloat16.

    Returns:
        A run for each of `dims`.

    Raises:
        ValueError: a model whose similarity is neither dot product nor cosine, or more dimensions than it has.
    """
    _check_similarity(model)
    check_dims(dims, model.get_embedding_dimension())
    passages = encode_texts(model, corpus_texts, task="document", bf16=bf16)
    vectors = encode_texts(model, list(queries.values()), task="query", bf16=bf16)
    return [
        DenseIndex.build(_compared(model, passages, size), list(corpus_ids)).run(
            list(queries), _compared(model, vectors, size), k
        )
        for size in dims
    ]


def dense_and_reranked_run(
    model: SentenceTransformer,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    first: Mapping[str, Mapping[str, float]],
    *,
    k: int = 100,
    bf16: bool = False,
) -> tuple[Run, Run]:
    """As :func:`dense_run`, and another system's run in the order of the model's scores; texts are encoded once.

    Args:
        model: of one vector a text.
        corpus_ids: passage ids.
        corpus_texts: their texts.
        queries: query id to text.
        first: the other system's run, all of which is scored again; a query that it lacks has no passage.
        k: passages a query of the search.
        bf16: encode in bfloat16.

    Returns:
        The run of the search, and `first` with the model's scores, best first.

    Raises:
        ValueError: a model whose similarity is neither dot product nor cosine, or a passage of `first` that is not
            in the corpus.
    """
    _check_similarity(model)
    rows = {name: row for row, name in enumerate(corpus_ids)}
    if lost := [name for hits in first.values() for name in hits if name not in rows]:
        raise ValueError(f"first: passage {lost[0]!r} is not there; pass the corpus that the run was made on")
    passages = _compared(model, encode_texts(model, corpus_texts, task="document", bf16=bf16), None)
    vectors = _compared(model, encode_texts(model, list(queries.values()), task="query", bf16=bf16), None)
    searched = DenseIndex.build(passages, list(corpus_ids)).run(list(queries), vectors, k)
    reranked: Run = {}
    for query, vector in zip(queries, vectors, strict=True):
        names = list(first.get(query, {}))
        scores = passages[[rows[name] for name in names]] @ vector
        reranked[query] = dict(rank(dict(zip(names, scores.tolist(), strict=True))))
    return searched, reranked


def _check_similarity(model: SentenceTransformer) -> None:
    if model.similarity_fn_name not in ("dot", "cosine"):
        raise ValueError(f"The model compares by {model.similarity_fn_name!r}: only dot and cosine can be searched.")


def _compared(model: SentenceTransformer, whole: Any, size: int | None) -> Any:
    """Vectors, cut to their first dimensions, whose products are the model's scores."""
    import numpy as np

    sliced = np.ascontiguousarray(whole[:, :size])
    if model.similarity_fn_name == "cosine":
        return sliced / np.linalg.norm(sliced, axis=1, keepdims=True).clip(1e-12)
    return sliced


def check_dims(dims: Sequence[int | None], dimension: int | None) -> None:
    """Refuse sizes that a student's vectors can't be cut to.

    Raises:
        ValueError: one that is not between 1 and the dimensions of the vectors.
    """
    for size in dims:
        if size is not None and dimension is not None and not 0 < size <= dimension:
            raise ValueError(f"dims: {size} is not between 1 and the {dimension} dimensions of the vectors.")


def late_interaction_run(
    model: MultiVectorEncoder,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    k: int = 100,
    bf16: bool = False,
    batch_size: int = 32,
) -> Run:
    """Score every passage by MaxSim: exhaustive, for comparison.

    Memory holds the token vectors of the queries and of a chunk of passages, and the best k of each query.

    Args:
        model: of one vector a token.
        corpus_ids: passage ids.
        corpus_texts: their texts.
        queries: query id to text.
        k: passages a query.
        bf16: encode, and multiply token vectors, in bfloat16.
        batch_size: texts a forward pass.

    Returns:
        The run.
    """
    import numpy as np
    import torch

    query_ids = list(queries)
    with _autocast(model, bf16):
        encoded = model.encode_query(list(queries.values()), batch_size=batch_size, show_progress_bar=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    query_vectors = [vectors.to(dtype) for vectors in encoded]
    # Of equal scores the first id in order comes first, and stays where the list is cut.
    places = np.empty(len(corpus_ids), np.int64)
    places[sorted(range(len(corpus_ids)), key=corpus_ids.__getitem__)] = np.arange(len(corpus_ids))
    best_scores = np.empty((len(query_ids), 0), np.float32)
    best_rows = np.empty((len(query_ids), 0), np.int64)
    for part in _by_length(corpus_texts):
        with _autocast(model, bf16):
            vectors = model.encode_document([corpus_texts[row] for row in part], batch_size=batch_size)
        passages = [v.to(dtype) for v in vectors]
        # A few queries at a time: against thousands the passages would be compared one by one, and the small results
        # between blocks of ever other sizes keep the memory of them all from going back.
        scored = [
            model.similarity(query_vectors[at : at + _QUERIES_PER_BLOCK], passages, chunk_elements=1 << 24)
            for at in range(0, len(query_vectors), _QUERIES_PER_BLOCK)
        ]
        scores = np.hstack([best_scores, torch.cat(scored).float().cpu().numpy()])
        rows = np.hstack([best_rows, np.broadcast_to(np.array(part), (len(query_ids), len(part)))])
        chosen = np.lexsort((places[rows], -scores))[:, :k]
        best_scores, best_rows = np.take_along_axis(scores, chosen, 1), np.take_along_axis(rows, chosen, 1)
    return {
        query: {corpus_ids[row]: score for row, score in zip(rows, scores, strict=True)}
        for query, rows, scores in zip(query_ids, best_rows.tolist(), best_scores.tolist(), strict=True)
    }


def _by_length(texts: Sequence[str]) -> Iterator[list[int]]:
    """Chunks of rows of like length, so that token matrices are padded little."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), _PASSAGES_PER_CHUNK):
        yield order[start : start + _PASSAGES_PER_CHUNK]
