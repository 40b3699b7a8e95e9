"""Data in: collections with judgements, the built-in corpus, training triples."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.data.beir import load_beir as load_beir
    from tct_hf.data.builtin import builtin_corpus as builtin_corpus
    from tct_hf.data.builtin import builtin_fingerprint as builtin_fingerprint
    from tct_hf.data.expansion import expanded_texts as expanded_texts
    from tct_hf.data.expansion import load_expansions as load_expansions
    from tct_hf.data.expansion import write_expansions as write_expansions
    from tct_hf.data.expansion_corpus import expand_corpus as expand_corpus
    from tct_hf.data.expansion_corpus import load_expander as load_expander
    from tct_hf.data.expansion_scores import score_expansions as score_expansions
    from tct_hf.data.mining import MiningCounts as MiningCounts
    from tct_hf.data.mining import mine_triples as mine_triples
    from tct_hf.data.negatives import bm25_triples as bm25_triples
    from tct_hf.data.row_parsing import SkippedRows as SkippedRows
    from tct_hf.data.triples import load_triples as load_triples

_PUBLIC = {
    "builtin_corpus": "builtin",
    "builtin_fingerprint": "builtin",
    "load_beir": "beir",
    "bm25_triples": "negatives",
    "expand_corpus": "expansion_corpus",
    "load_expander": "expansion_corpus",
    "score_expansions": "expansion_scores",
    "expanded_texts": "expansion",
    "load_expansions": "expansion",
    "write_expansions": "expansion",
    "mine_triples": "mining",
    "MiningCounts": "mining",
    "load_triples": "triples",
    "SkippedRows": "row_parsing",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.data.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
