"""A late-interaction model put over another system's run: the top k scored again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

# Token vectors of this many passages are held at a time: about 40 MB of them, however many are reranked.
_PASSAGES_PER_CHUNK = 256


def rerank_run(
    model: MultiVectorEncoder,
    run: Mapping[str, Mapping[str, float]],
    corpus: Mapping[str, str] | Dataset,
    queries: Mapping[str, str],
    k: int = 100,
    *,
    bf16: bool = False,
    batch_size: int = 32,
) -> Run:
    """Order the top k of a run by MaxSim; what lies below keeps its order.

    Each passage is encoded once, however many queries have it. The reranked passages have their MaxSim as score; those
    below k get scores that only keep them in order: 1, 2, 3... less than the lowest of the reranked.

    Args:
        model: of one vector a token.
        run: query id to passage id to score.
        corpus: passage id to text, or a data set with columns `id` and `text`; it need hold no more than the top k.
        queries: query id to text, of every query of the run.
        k: passages a query to rerank.
        bf16: encode in bfloat16; token vectors are compared in float32.
        batch_size: texts a forward pass.

    Returns:
        The run over `queries`, in their order, best first; empty for a query that the run lacks.

    Raises:
        ValueError: k is below 1, a query of the run has no text, or a passage of its top k is not in the corpus.
    """
    import torch

    if k < 1:
        raise ValueError(f"k: {k} is below 1; rerank at least one passage")
    for query in run:
        if query not in queries:
            raise ValueError(f"queries: the run's query {query!r} has no text; pass the queries of the run's split")
    ranked = {query: rank(run.get(query, {})) for query in queries}
    askers: dict[str, list[str]] = {}
    for query, hits in ranked.items():
        for passage, _ in hits[:k]:
            askers.setdefault(passage, []).append(query)
    texts = _texts(corpus, askers)
    asked = [query for query, hits in ranked.items() if hits]
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)
    scores: dict[str, dict[str, float]] = {query: {} for query in queries}
    if asked:
        with autocast:
            encoded: Any = model.encode_query(
                [queries[query] for query in asked], batch_size=batch_size, show_progress_bar=False
            )
        query_vectors = {query: vectors.float() for query, vectors in zip(asked, encoded, strict=True)}
    # Passages of like length together, so that token matrices are padded little.
    names = sorted(texts, key=lambda name: (len(texts[name]), name))
    for start in range(0, len(names), _PASSAGES_PER_CHUNK):
        part = names[start : start + _PASSAGES_PER_CHUNK]
        with autocast:
            encoded = model.encode_document(
                [texts[name] for name in part], batch_size=batch_size, show_progress_bar=False
            )
        pairs = [
            (query, name, vectors.float())
            for name, vectors in zip(part, encoded, strict=True)
            for query in askers[name]
        ]
        found = model.similarity_pairwise(
            [query_vectors[query] for query, _, _ in pairs], [vectors for *_, vectors in pairs], chunk_elements=1 << 24
        )
        for (query, name, _), score in zip(pairs, found.tolist(), strict=True):
            scores[query][name] = score
    reranked: Run = {}
    for query, hits in ranked.items():
        reranked[query] = above(dict(rank(scores[query])), [passage for passage, _ in hits[k:]])
    return reranked


def above(best: dict[str, float], rest: Iterable[str]) -> dict[str, float]:
    """Reranked passages, and below them those that were not, in their order: 1, 2, 3... less than the lowest."""
    lowest = min(best.values(), default=0.0)
    return best | {passage: lowest - place for place, passage in enumerate(rest, 1)}


def _texts(corpus: Mapping[str, str] | Dataset, wanted: Mapping[str, Any]) -> dict[str, str]:
    if isinstance(corpus, Mapping):
        texts = {name: corpus[name] for name in wanted if name in corpus}
    else:
        rows = {name: row for row, name in enumerate(corpus["id"]) if name in wanted}
        texts = dict(zip(rows, corpus[list(rows.values())]["text"], strict=True)) if rows else {}
    for name, queries in wanted.items():
        if name not in texts:
            raise ValueError(
                f"corpus: passage {name!r}, which the run has for query {queries[0]!r}, is not there; "
                "pass the corpus that the run was made on"
            )
    return texts
