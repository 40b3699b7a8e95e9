"""A lexical teacher: BM25 scores of every query with every passage of a batch, by the statistics of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tct_hf.batches import gather_rows, sizes_of_all
from tct_hf.data.rows import checked_texts
from tct_hf.teachers.base import Columns, Rows, Teacher, Texts
from tct_hf.teachers.colbert import pad_arrays

if TYPE_CHECKING:
    from tct_hf.retrieval.bm25 import BM25Index

# Texts whose analysis is remembered, about 1 kB each: a passage comes back in many batches.
_REMEMBERED = 1 << 16


class BM25Teacher(Teacher):
    """BM25 as a teacher: what an index gives for a query and a passage, whether the passage is in the index or not.

    Words are matched on the device; texts become words and weights in the data loader's workers.

    Args:
        index: index of the corpus whose document frequencies and average length count, with its parameters and
            analysis.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009; Kamphuis et al., ECIR 2020.
    """

    score_kind = "BM25"

    def __init__(self, index: BM25Index) -> None:
        self.index = index
        self._words = lru_cache(_REMEMBERED)(lambda text: np.array(index.known_words(text), np.int32))
        self._weights = lru_cache(_REMEMBERED)(index.weigh)

    def __reduce__(self) -> tuple[type[BM25Teacher], tuple[BM25Index]]:
        return type(self), (self.index,)  # a process that is spawned remembers texts of its own

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        words, weights = self._passages([text for row in zip(*columns, strict=True) for text in row])
        shape = (len(queries), len(columns), -1)
        return {
            "query_words": self._queries(queries),
            "passage_words": words.view(shape),
            "passage_weights": weights.view(shape),
        }

    def _queries(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(pad_arrays([self._words(text) for text in checked_texts(texts, "query texts")], -1))

    def _passages(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        words, weights = zip(*map(self._weights, checked_texts(texts, "document texts")), strict=True)
        return torch.from_numpy(pad_arrays(words, -1)), torch.from_numpy(pad_arrays(weights))

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        words, weights = inputs["passage_words"], inputs["passage_weights"]
        if gather:
            rows, width = (sizes_of_all(size, words.device) for size in (len(words), words.shape[2]))
            missing = (0, max(width) - words.shape[2])
            words = gather_rows(torch.nn.functional.pad(words, missing, value=-1), rows)
            weights = gather_rows(torch.nn.functional.pad(weights, missing), rows)
        # All positives in rank order, then all first negatives, and so on.
        return _compare(inputs["query_words"], *(part.transpose(0, 1).flatten(0, 1) for part in (words, weights)))

    def scores(self, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
        """The scores of texts, `(queries, passages)` float32 on the CPU."""
        return _compare(self._queries(queries), *self._passages(passages))


def _compare(queries: Tensor, words: Tensor, weights: Tensor) -> Tensor:
    """Scores of query words `(queries, words)` and of words and weights `(passages, words)`, padded with -1."""
    # Weights of the batch's query words alone, in float64: a trainer's autocast or TF32 would round the product.
    asked = queries.unique()
    asked = torch.cat([asked.new_tensor([-1]), asked[asked >= 0]])
    place = torch.searchsorted(asked, words).clamp(max=len(asked) - 1)
    weights = weights.double().masked_fill((asked[place] != words) | (words < 0), 0.0)
    table = weights.new_zeros(len(words), len(asked)).scatter_add_(1, place, weights)
    counts = table.new_zeros(len(queries), len(asked))
    counts.scatter_add_(1, torch.searchsorted(asked, queries), (queries >= 0).double())
    return (counts @ table.T).float()
