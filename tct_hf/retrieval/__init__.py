"""First-stage retrieval: indexes and the runs they give."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.retrieval.dense import DenseIndex as DenseIndex
    from tct_hf.retrieval.runs import read_run as read_run
    from tct_hf.retrieval.runs import write_run as write_run
    from tct_hf.retrieval.sparse import BM25Index as BM25Index

_PUBLIC = {"BM25Index": "sparse", "DenseIndex": "dense", "read_run": "runs", "write_run": "runs"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.retrieval' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.retrieval.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
