"""Sparse vectors as rows: read from scipy, torch or shards, checked, in blocks, never densified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

BLOCK = 16_384  # rows
_PAIR = [("term", "<u4"), ("weight", "<f4")]
_KINDS = "a scipy sparse matrix, a torch sparse tensor (as SparseEncoder.encode_document returns), or blocks of these"


class ShardedRows:
    """The sparse vectors of several shards as one `(passages, dim)` matrix, memory-mapped, read as float32 CSR.

    Rows are taken by slice, number or array of numbers; `tocsr` reads all of them.

    Args:
        parts: of each shard its (term, weight) pairs, row after row, and where rows begin, `(rows + 1,)` int64.
        dim: terms in all.
    """

    ndim = 2

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray]], dim: int) -> None:
        import numpy as np

        self._parts = list(parts)
        self._firsts = np.cumsum([0, *(len(begins) - 1 for _, begins in parts)])
        self.shape = (int(self._firsts[-1]), dim)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nnz(self) -> int:
        """Non-zeros in all."""
        return sum(len(pairs) for pairs, _ in self._parts)

    def __getitem__(self, rows: Any) -> csr_matrix:
        import numpy as np

        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(len(self)))
        else:
            wanted = np.atleast_1d(rows)
            wanted = np.arange(len(self))[wanted] if wanted.dtype == bool else wanted.astype(np.int64)
            wanted = np.where(wanted < 0, wanted + len(self), wanted)
            if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
                raise IndexError(f"row {rows!r} of {len(self)} vectors")
        owners = np.searchsorted(self._firsts, wanted, side="right") - 1
        # Neighbours in one shard are read as one block.
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(owners) != 0)) + 1
        pairs, lengths = [], []
        for run in np.split(wanted, breaks) if len(wanted) else []:
            owner = int(np.searchsorted(self._firsts, run[0], side="right") - 1)
            all_pairs, begins = self._parts[owner]
            first = int(run[0] - self._firsts[owner])
            pairs.append(all_pairs[begins[first] : begins[first + len(run)]])
            lengths.append(np.diff(begins[first : first + len(run) + 1]))
        return joined(pairs, lengths, self.shape[1])

    def tocsr(self) -> csr_matrix:
        """All rows, in memory."""
        return self[:]


def joined(pairs: Sequence[np.ndarray], lengths: Sequence[np.ndarray], dim: int) -> csr_matrix:
    """Rows of (term, weight) pairs as one CSR matrix in memory.

    Args:
        pairs: in parts, row after row.
        lengths: pairs a row, in parts.
        dim: terms in all.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    counts = np.concatenate([np.zeros(1, np.int64), *lengths])
    terms = np.concatenate([np.zeros(0, np.int32), *(part["term"].astype(np.int32) for part in pairs)])
    weights = np.concatenate([np.zeros(0, np.float32), *(part["weight"] for part in pairs)])
    return csr_matrix((weights, terms, np.cumsum(counts)), shape=(len(counts) - 1, dim))


def open_pairs(file: Path, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Map the (term, weight) pairs of a shard.

    Args:
        file: that holds what :func:`as_pairs` made.
        lengths: pairs a row.

    Returns:
        The pairs, and where rows begin, `(rows + 1,)` int64.

    Raises:
        OSError, ValueError: it is damaged, or holds another number of pairs.
    """
    import numpy as np

    pairs = np.load(file, mmap_mode="r", allow_pickle=False)
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if pairs.dtype != np.dtype(_PAIR) or pairs.shape != (begins[-1],):
        raise ValueError(f"{pairs.dtype} of shape {pairs.shape} where {begins[-1]} pairs are announced")
    return pairs, begins


def as_pairs(rows: csr_matrix) -> np.ndarray:
    """The non-zeros of CSR rows as one array of (term uint32, weight float32)."""
    import numpy as np

    pairs = np.empty(rows.nnz, dtype=_PAIR)
    pairs["term"], pairs["weight"] = rows.indices, rows.data
    return pairs


def is_sparse(vectors: Any) -> bool:
    """Whether a single object is a matrix of sparse rows, of scipy, torch or shards."""
    from scipy.sparse import issparse

    if isinstance(vectors, ShardedRows) or issparse(vectors):
        return True
    # A torch tensor, without importing torch for those who have none.
    return str(getattr(vectors, "layout", "")) in ("torch.sparse_coo", "torch.sparse_csr")


def as_csr(vectors: Any, what: str, first_row: int = 0) -> csr_matrix:
    """Sparse vectors as float32 CSR rows, terms rising and each once, weights finite and above 0.

    Args:
        vectors: a matrix of scipy, a tensor of torch, `(rows, dim)` or one vector `(dim,)`, or the rows of shards.
        what: they are, for the message.
        first_row: number of the first row, for the message.

    Raises:
        ValueError: of another kind, a term beyond the dimensions, or a weight that is NaN, infinite or negative; names
            the row.
    """
    import numpy as np
    from scipy.sparse import csr_matrix, issparse

    if not is_sparse(vectors):
        raise ValueError(f"{what}: {type(vectors).__name__} where sparse vectors are needed: {_KINDS}")
    if isinstance(vectors, ShardedRows):
        rows = vectors.tocsr()
    elif issparse(vectors):
        rows = csr_matrix(vectors, dtype=np.float32)
    else:
        rows = of_torch(vectors)
    if rows.nnz and not 0 <= rows.indices.min() <= rows.indices.max() < rows.shape[1]:  # compiled search trusts these
        raise ValueError(
            f"{what}: terms from {rows.indices.min()} to {rows.indices.max()} in vectors of {rows.shape[1]} "
            "dimensions: the matrix is damaged; encode again"
        )
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    if not (np.isfinite(rows.data) & (rows.data >= 0)).all():
        at = int(np.flatnonzero(~(np.isfinite(rows.data) & (rows.data >= 0)))[0])
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
    import numpy as np
    import torch
    from scipy.sparse import coo_matrix, csr_matrix

    tensor = tensor.detach().cpu()
    if tensor.layout == torch.sparse_csr:
        parts = (tensor.values().float().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
        return csr_matrix(parts, shape=tuple(tensor.shape))
    tensor = (tensor if tensor.ndim == 2 else tensor.unsqueeze(0)).coalesce()
    rows, terms = tensor.indices().numpy()
    return coo_matrix((tensor.values().float().numpy(), (rows, terms)), tuple(tensor.shape), np.float32).tocsr()


def row_blocks(vectors: Any, what: str) -> Iterable[csr_matrix]:
    """Sparse vectors in blocks of rows, each as :func:`as_csr` returns it; can be gone through again.

    Args:
        vectors: one matrix, or any iterable of matrices of one width (an iterator's blocks are kept).
        what: they are, for the message.

    Raises:
        ValueError: as :func:`as_csr`, when a block is reached; or at once where it is no such thing.
    """
    if is_sparse(vectors):
        if len(vectors.shape) != 2:
            raise ValueError(f"{what}: shape {tuple(vectors.shape)} where (rows, dimension) is needed")
        whole = vectors if isinstance(vectors, ShardedRows) else as_csr(vectors, what)
        return _Sliced(whole, what)
    if not isinstance(vectors, Iterable) or hasattr(vectors, "dtype") or isinstance(vectors, (str, bytes)):
        raise ValueError(f"{what}: {type(vectors).__name__} where sparse vectors are needed: {_KINDS}")
    blocks: list[csr_matrix] = []
    for block in vectors:
        blocks.append(as_csr(block, what, sum(part.shape[0] for part in blocks)))
    return blocks


class _Sliced:
    def __init__(self, rows: Any, what: str) -> None:
        self._rows, self._what = rows, what

    def __iter__(self) -> Iterator[csr_matrix]:
        for first in range(0, self._rows.shape[0], BLOCK):
            yield as_csr(self._rows[first : first + BLOCK], self._what, first)
