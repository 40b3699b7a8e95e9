"""PyTerrier transformers: a student that encodes and scores, and an index that retrieves."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import encode_texts, is_sparse_encoder
from tct_hf.retrieval.runs import Run, rank
from tct_hf.retrieval.sparse import SparseIndex

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def pyterrier_student(student: SentenceTransformer | SparseEncoder) -> Any:
    """A transformer that scores results again by a student, or encodes queries or passages with a dense one.

    It does what pyterrier_dr's bi-encoders do, but with the student's own encoding of queries and of passages, where
    `SBertBiEncoder` calls `encode` for both. What it does is decided by the columns of the frame: `query` and `text`
    give `score` and `rank`; `query` alone gives `query_vec`, and `text` alone `doc_vec`, as its indexes take them.

    Raises:
        ImportError: PyTerrier is not installed.
    """
    pt, sparse = _pyterrier(), is_sparse_encoder(student)

    def encoded(texts: Any, task: str) -> Any:
        vectors = encode_texts(student, list(texts), task=task)
        if student.similarity_fn_name == "cosine" and not sparse:  # indexes compare by dot product
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        return vectors

    def transform(frame: Any) -> Any:
        with pt.validate.any(frame) as valid:
            valid.columns(includes=["qid", "query", "text"], mode="score")
            if not sparse:
                valid.columns(includes=["query"], excludes=["text"], mode="query")
                valid.columns(includes=["text"], excludes=["query"], mode="document")
        if valid.mode in ("query", "document"):
            column, made = ("query", "query_vec") if valid.mode == "query" else ("text", "doc_vec")
            return frame.assign(**{made: list(encoded(frame[column], valid.mode)) if len(frame) else []})
        scores: Any = []
        if len(frame):
            (asked, queries), (read, texts) = frame["query"].factorize(), frame["text"].factorize()
            one, other = encoded(queries, "query")[asked], encoded(texts, "document")[read]
            scores = one.multiply(other).sum(axis=1).A1 if sparse else student.similarity_pairwise(one, other).numpy()
        return pt.model.add_ranks(frame.assign(score=scores))

    return pt.apply.generic(transform, label="student")


def pyterrier_index(
    index: BM25Index | DenseIndex | SparseIndex,
    student: SentenceTransformer | SparseEncoder | None = None,
    *,
    k: int = 1000,
) -> Any:
    """A transformer that finds the passages of queries: columns `qid`, `query` to `docno`, `score` and `rank` as well.

    Args:
        index: index of words or of vectors.
        student: the model that built an index of vectors.
        k: passages a query, at most.

    Raises:
        ImportError: PyTerrier is not installed.
        ValueError: an index of vectors without its student, or one of words with a student.
    """
    pt = _pyterrier()
    if (student is None) != isinstance(index, BM25Index):
        raise ValueError("student: give the model that built an index of vectors, and none for BM25")

    def find(texts: dict[str, str]) -> Run:
        if isinstance(index, BM25Index):
            return index.run(texts, k)
        encoder: Any = student
        return index.run(list(texts), encode_texts(encoder, list(texts.values()), task="query"), k)

    def search(frame: Any) -> Any:
        import pandas as pd

        pt.validate.query_frame(frame, extra_columns=["query"])
        texts = dict(zip(frame["qid"], frame["query"], strict=True))
        run = find(texts) if texts else {}
        rows = [(query, *hit, place) for query, hits in run.items() for place, hit in enumerate(rank(hits))]
        found = pd.DataFrame(rows, columns=["qid", "docno", "score", "rank"])
        return frame[pt.model.query_columns(frame)].merge(found, on="qid")

    return pt.apply.generic(search, label=type(index).__name__)


def _pyterrier() -> ModuleType:
    try:
        import pyterrier
    except ImportError as error:
        raise ImportError(f"This needs PyTerrier ({error}): pip install 'tct_hf[pyterrier]'.") from error
    return pyterrier
