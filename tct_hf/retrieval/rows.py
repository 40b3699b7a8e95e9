"""Vectors as rows, dense or sparse, that may be larger than memory: checked, and read in blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix, csr_matrix, issparse

BLOCK = 65_536  # rows of dense vectors
SPARSE_BLOCK = 16_384
_KINDS = "a scipy sparse matrix, a torch sparse tensor (as SparseEncoder.encode_document returns), or blocks of these"


class LazyRows(ABC):
    """A `(rows, dimension)` float32 array whose rows are read when they are taken: by slice, number or numbers."""

    ndim = 2
    dtype = np.dtype(np.float32)
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: Any) -> np.ndarray: ...

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{type(self).__name__} are read as they are needed: an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)


class ShardedVectors(LazyRows):
    """The vectors of several shards as one `(passages, dim)` array, memory-mapped, read as float32.

    Args:
        parts: one array a shard, `(passages, dim)`.
        dim: of a vector.
    """

    def __init__(self, parts: Sequence[np.ndarray], dim: int) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), dim)

    def __getitem__(self, rows: Any) -> np.ndarray:
        wanted = _numbers(rows, len(self))
        if wanted.ndim == 0:
            return self[wanted[None]][0]
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            local = wanted[places] - self._starts[owner]
            # Neighbours are read as one block, not row by row.
            one_run = len(local) == local[-1] - local[0] + 1 and bool((np.diff(local) == 1).all())
            part = self._parts[owner]
            found[places] = part[local[0] : local[-1] + 1] if one_run else part[local]
        return found


class UnitRows(LazyRows):
    """The rows of `(rows, dimension)` vectors divided by their lengths."""

    def __init__(self, vectors: Any) -> None:
        self._vectors, self.shape = vectors, vectors.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        block = np.asarray(self._vectors[rows], dtype=np.float32)
        return block / np.linalg.norm(block, axis=-1, keepdims=True).clip(1e-12)


class FirstColumns(LazyRows):
    """The first `size` components of the rows of `(rows, dimension)` vectors."""

    def __init__(self, vectors: Any, size: int) -> None:
        self._vectors, self.shape = vectors, (vectors.shape[0], size)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self._vectors[rows], dtype=np.float32)[..., : self.shape[1]]


class ShardedRows:
    """The sparse vectors of several shards as one `(passages, dim)` matrix, memory-mapped, read as float32 CSR.

    Args:
        parts: of each shard where rows begin, `(rows + 1,)` int64, and the terms and weights of the rows.
        dim: terms in all.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, parts: Sequence[Sequence[np.ndarray]], dim: int) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(begins) - 1 for begins, _, _ in parts)])
        self.shape = (int(self._starts[-1]), dim)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nnz(self) -> int:
        """Non-zeros in all."""
        return sum(len(terms) for _, terms, _ in self._parts)

    def __getitem__(self, rows: Any) -> csr_matrix:
        wanted = np.atleast_1d(_numbers(rows, len(self)))
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        # Neighbours in one shard are read as one block.
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(owners) != 0)) + 1
        counts, terms, weights = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for run in np.split(wanted, breaks) if len(wanted) else []:
            owner = int(np.searchsorted(self._starts, run[0], side="right") - 1)
            all_begins, all_terms, all_weights = self._parts[owner]
            first = int(run[0] - self._starts[owner])
            begins = all_begins[first : first + len(run) + 1]
            counts.append(np.diff(begins))
            terms.append(all_terms[begins[0] : begins[-1]].astype(np.int32))
            weights.append(all_weights[begins[0] : begins[-1]])
        parts = (np.concatenate(weights), np.concatenate(terms), np.cumsum(np.concatenate(counts)))
        return csr_matrix(parts, shape=(len(wanted), self.shape[1]))

    def tocsr(self) -> csr_matrix:
        """All rows, in memory."""
        return self[:]


def _numbers(rows: Any, count: int) -> np.ndarray:
    """Row numbers of what rows are taken by; without dimensions of a single number."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count))
    wanted = np.asarray(rows)
    if wanted.dtype == bool:
        return np.flatnonzero(wanted)
    wanted = np.where(wanted < 0, wanted + count, wanted).astype(np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < count:
        raise IndexError(f"row {rows!r} of {count} vectors")
    return wanted


def as_rows(vectors: npt.ArrayLike, what: str) -> Any:
    """Vectors as they are where they are an array, in memory, mapped, or of another kind that gives rows by slice."""
    matrix: Any = vectors
    # Not a tensor, whose dtype is torch's.
    if not isinstance(getattr(matrix, "dtype", None), np.dtype) or not hasattr(matrix, "shape"):
        matrix = np.asanyarray(vectors, dtype=np.float32)
    if len(matrix.shape) != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{what}: shape {matrix.shape} where (rows, dimension) is needed; stack vectors as rows")
    return matrix


def as_matrix(vectors: npt.ArrayLike, what: str, start: int = 0) -> np.ndarray:
    """Vectors as one contiguous float32 array, all components finite; `start` numbers the rows for the message."""
    block = np.ascontiguousarray(as_rows(vectors, what)[:], dtype=np.float32)
    if not np.isfinite(block).all():
        row = start + int(finite_rows(block).argmin())
        raise ValueError(f"{what}: row {row} has a NaN or infinite component; check the model and its dtype")
    return block


def blocks(matrix: Any) -> Iterator[np.ndarray]:
    """All rows in their order, as contiguous float32 blocks, checked."""
    for start in range(0, len(matrix), BLOCK):
        yield as_matrix(matrix[start : start + BLOCK], "vectors", start)


def finite_rows(vectors: Any) -> np.ndarray:
    """Whether all of a row is finite, `(rows,)` bool, of an array or CSR rows."""
    if isinstance(vectors, np.ndarray):
        return np.asarray(np.isfinite(vectors).all(axis=1))
    finite = np.ones(vectors.shape[0], bool)
    finite[np.repeat(np.arange(len(finite)), np.diff(vectors.indptr))[~np.isfinite(vectors.data)]] = False
    return finite


def is_sparse(vectors: Any) -> bool:
    """Whether a single object is a matrix of sparse rows, of scipy, torch or shards."""
    # A torch tensor, without importing torch for those who have none.
    of_torch = str(getattr(vectors, "layout", "")) in ("torch.sparse_coo", "torch.sparse_csr")
    return isinstance(vectors, ShardedRows) or issparse(vectors) or of_torch


def as_csr(vectors: Any, what: str, first_row: int = 0) -> csr_matrix:
    """Sparse vectors as float32 CSR rows, terms rising and each once, weights finite and above 0.

    A matrix of scipy, a tensor of torch, `(rows, dim)` or one vector `(dim,)`, or the rows of shards; `what` and
    `first_row` are for the ValueError about a wrong kind, term or weight.
    """
    if not is_sparse(vectors):
        raise ValueError(f"{what}: {type(vectors).__name__} where sparse vectors are needed: {_KINDS}")
    if isinstance(vectors, ShardedRows):
        rows = vectors.tocsr()
    else:
        rows = csr_matrix(vectors, dtype=np.float32) if issparse(vectors) else of_torch(vectors)
    if rows.nnz and not 0 <= rows.indices.min() <= rows.indices.max() < rows.shape[1]:  # compiled search trusts these
        raise ValueError(
            f"{what}: terms from {rows.indices.min()} to {rows.indices.max()} in vectors of {rows.shape[1]} "
            "dimensions: the matrix is damaged; encode again"
        )
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    wrong = ~(np.isfinite(rows.data) & (rows.data >= 0))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        row = int(np.searchsorted(rows.indptr, at, side="right") - 1)
        raise ValueError(
            f"{what}: row {first_row + row} has the weight {rows.data[at]} for term {rows.indices[at]}: weights must "
            "be finite and not negative, as those of SPLADE are; check the model and its dtype"
        )
    if not rows.data.all():
        rows = rows.copy()
        rows.eliminate_zeros()
    return rows


def of_torch(tensor: Any) -> csr_matrix:
    """A sparse tensor of torch, `(rows, dim)` or one vector `(dim,)`, as float32 CSR; nothing is checked."""
    tensor = tensor.detach().cpu()
    if str(tensor.layout) == "torch.sparse_csr":
        parts = (tensor.values().float().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
        return csr_matrix(parts, shape=tuple(tensor.shape))
    tensor = (tensor if tensor.ndim == 2 else tensor.unsqueeze(0)).coalesce()
    rows, terms = tensor.indices().numpy()
    return coo_matrix((tensor.values().float().numpy(), (rows, terms)), tuple(tensor.shape), np.float32).tocsr()


def sparse_blocks(vectors: Any, what: str) -> Iterable[csr_matrix]:
    """One sparse matrix, or an iterable of some, in blocks as :func:`as_csr` returns them; can be iterated again."""
    if is_sparse(vectors):
        if len(vectors.shape) != 2:
            raise ValueError(f"{what}: shape {tuple(vectors.shape)} where (rows, dimension) is needed")
        return _Sliced(vectors if isinstance(vectors, ShardedRows) else as_csr(vectors, what), what)
    if not isinstance(vectors, Iterable) or hasattr(vectors, "dtype") or isinstance(vectors, (str, bytes)):
        raise ValueError(f"{what}: {type(vectors).__name__} where sparse vectors are needed: {_KINDS}")
    kept: list[csr_matrix] = []
    for block in vectors:
        kept.append(as_csr(block, what, sum(part.shape[0] for part in kept)))
    return kept


class _Sliced:
    def __init__(self, rows: Any, what: str) -> None:
        self._rows, self._what = rows, what

    def __iter__(self) -> Iterator[csr_matrix]:
        for first in range(0, self._rows.shape[0], SPARSE_BLOCK):
            yield as_csr(self._rows[first : first + SPARSE_BLOCK], self._what, first)
