"""First-stage retrieval: indexes and the runs they give."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.retrieval.dense import DenseIndex as DenseIndex
    from tct_hf.retrieval.encode import encode_corpus as encode_corpus
    from tct_hf.retrieval.encode import encode_texts as encode_texts
    from tct_hf.retrieval.expanded import expanded_bm25 as expanded_bm25
    from tct_hf.retrieval.hybrid import check_tuning_queries as check_tuning_queries
    from tct_hf.retrieval.hybrid import fuse as fuse
    from tct_hf.retrieval.hybrid import reciprocal_rank_fusion as reciprocal_rank_fusion
    from tct_hf.retrieval.hybrid import tune_alpha as tune_alpha
    from tct_hf.retrieval.learned_sparse import SparseIndex as SparseIndex
    from tct_hf.retrieval.runs import read_run as read_run
    from tct_hf.retrieval.runs import write_run as write_run
    from tct_hf.retrieval.sparse import BM25Index as BM25Index
    from tct_hf.retrieval.vectors import load_vectors as load_vectors

_PUBLIC = {
    "BM25Index": "sparse",
    "DenseIndex": "dense",
    "SparseIndex": "learned_sparse",
    "encode_corpus": "encode",
    "encode_texts": "encode",
    "load_vectors": "vectors",
    "check_tuning_queries": "hybrid",
    "expanded_bm25": "expanded",
    "fuse": "hybrid",
    "read_run": "runs",
    "reciprocal_rank_fusion": "hybrid",
    "tune_alpha": "hybrid",
    "write_run": "runs",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.retrieval' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.retrieval.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
