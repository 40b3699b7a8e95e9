"""From a sparse student and a corpus to a run: exact search by a product of sparse matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

# Scores of this many queries are held at a time: 4 bytes a passage each.
_QUERIES_PER_BLOCK = 64


def sparse_run(
    model: SparseEncoder,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    k: int = 100,
    bf16: bool = False,
) -> Run:
    """Search exactly with weights of words, by dot product.

    Args:
        model: a sparse student.
        corpus_ids: passage ids.
        corpus_texts: their texts.
        queries: query id to text.
        k: passages a query; those that share no word with it are left out.
        bf16: encode in bfloat16.

    Returns:
        The run; of equal scores the first id in order comes first.
    """
    import numpy as np
    import torch

    def encode(encoder: Any, texts: Sequence[str]) -> Any:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            vectors = encoder(list(texts), save_to_cpu=True, show_progress_bar=False)
        return _csr(vectors.float())

    passages = encode(model.encode_document, corpus_texts).T.tocsr()
    vectors = encode(model.encode_query, list(queries.values()))
    ids = np.array(corpus_ids, dtype=object)
    places = np.empty(len(ids), np.int64)
    places[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    run: Run = {}
    names = list(queries)
    for start in range(0, len(names), _QUERIES_PER_BLOCK):
        scores = (vectors[start : start + _QUERIES_PER_BLOCK] @ passages).tocsr()
        for row, name in enumerate(names[start : start + _QUERIES_PER_BLOCK]):
            columns, values = scores[row].indices, scores[row].data
            best = np.lexsort((places[columns], -values))[:k]
            run[name] = {str(ids[columns[i]]): float(values[i]) for i in best}
    return run


def _csr(vectors: Any) -> Any:
    """A torch sparse tensor as a scipy matrix of the same weights."""
    from scipy.sparse import csr_matrix

    vectors = vectors.coalesce()
    rows, columns = vectors.indices().numpy()
    return csr_matrix((vectors.values().numpy(), (rows, columns)), shape=tuple(vectors.shape))
