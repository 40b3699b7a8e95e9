"""Vectors as rows, dense or sparse, that may be larger than memory: checked, read in blocks, kept in folders.

A folder of encoded passages is one of `tct_hf.data.shards`: columns id and vector, or id, terms and weights if sparse.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_matrix, csr_matrix, issparse, vstack

from tct_hf.data import shards

BLOCK = 65_536  # rows of dense vectors
SPARSE_BLOCK = 16_384
_KINDS = "a scipy sparse matrix, or a torch sparse tensor as SparseEncoder.encode_document returns"


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


class ShardedVectors(LazyRows):
    """The vectors of several shards, each `(passages, dim)`, as one array, memory-mapped, read as float32."""

    def __init__(self, parts: Sequence[Any], dim: int) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self._starts[-1]), dim)

    def __getitem__(self, rows: Any) -> np.ndarray:
        wanted = self._numbers(rows)
        found = np.concatenate([np.empty((0, self.shape[1]), np.float32), *self._pieces(np.atleast_1d(wanted))])
        return found if wanted.ndim else found[0]

    def _numbers(self, rows: Any) -> np.ndarray:
        return np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.arange(len(self))[rows]

    def _pieces(self, wanted: np.ndarray) -> Iterator[Any]:
        """The rows of these numbers, shard by shard; neighbours are read as one block."""
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        for places in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(owners)) + 1) if len(wanted) else []:
            owner = owners[places[0]]
            local = wanted[places] - self._starts[owner]
            neighbours = bool((np.diff(local) == 1).all())
            yield self._parts[owner][slice(local[0], local[-1] + 1) if neighbours else local]


class ShardedRows(ShardedVectors):
    """The same of sparse vectors, each shard a CSR matrix: rows are CSR."""

    def __getitem__(self, rows: Any) -> csr_matrix:
        none = csr_matrix((0, self.shape[1]), dtype=np.float32)
        return vstack([none, *self._pieces(np.atleast_1d(self._numbers(rows)))], format="csr")


def as_rows(vectors: npt.ArrayLike, what: str) -> Any:
    """Vectors as they are where they are an array, in memory, mapped, or of another kind that gives rows by slice.

    Tensors of torch, one or a list of them, become float32 arrays; whole numbers and sparse vectors are refused.
    """
    matrix: Any = vectors
    rows = vectors if isinstance(vectors, (list, tuple)) else ()
    if issparse(vectors) or "sparse" in str(getattr(vectors, "layout", "")):
        raise ValueError(f"{what}: sparse vectors where dense ones are needed; use a SparseIndex")
    try:
        if any(hasattr(one, "detach") for one in rows):
            matrix = np.stack([as_array(one) for one in rows])
        elif hasattr(vectors, "detach"):
            matrix = as_array(vectors)
        elif not isinstance(getattr(matrix, "dtype", None), np.dtype) or not hasattr(matrix, "shape"):
            matrix = np.asanyarray(vectors)
    except (TypeError, ValueError, NotImplementedError) as error:  # quantised and meta tensors raise these, too
        raise ValueError(f"{what}: not numbers in rows of one length ({error}); stack vectors as rows") from error
    if any(isinstance(one, np.ma.MaskedArray) for one in (matrix, *rows)):
        raise ValueError(f"{what}: masked arrays can't be indexed; fill them first")
    for kind in (matrix.dtype, *(row.dtype for row in rows if isinstance(row, np.ndarray))):
        if kind.kind != "f" and (kind.kind != "V" or kind.type is np.void):  # V: bfloat16 of numpy's extensions
            raise ValueError(f"{what}: {kind} where floating-point vectors are needed; pass those of the model")
    if matrix.shape == (0,):  # what encoding no text gives
        return np.empty((0, 0), np.float32)
    if len(matrix.shape) != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{what}: shape {matrix.shape} where (rows, dimension) is needed; stack vectors as rows")
    return matrix


def as_array(tensor: Any) -> np.ndarray:
    """A tensor of torch of any type and on any device as an array, one of half precision in float32."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def as_matrix(vectors: npt.ArrayLike, what: str, start: int = 0) -> np.ndarray:
    """Vectors as one contiguous float32 array, all components finite; `start` numbers the rows for the message."""
    with np.errstate(over="ignore"):  # refused below
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


def as_csr(vectors: Any, what: str, first_row: int = 0) -> csr_matrix:
    """Sparse vectors as float32 CSR rows, terms rising and each once, weights finite and above 0.

    A matrix of scipy, or a tensor of torch, `(rows, dim)` or one vector `(dim,)`; `what` and `first_row` are for the
    ValueError about a wrong kind, term or weight.
    """
    # A torch tensor, without importing torch for those who have none.
    of_torch_kind = str(getattr(vectors, "layout", "")) in ("torch.sparse_coo", "torch.sparse_csr")
    if isinstance(vectors, (list, tuple)) and not vectors:
        return csr_matrix((0, 0), dtype=np.float32)
    if not issparse(vectors) and not of_torch_kind:
        raise ValueError(f"{what}: {type(vectors).__name__} where sparse vectors are needed: {_KINDS}")
    if not re.fullmatch(r"(torch\.)?b?float\d+", str(vectors.dtype)) or vectors.ndim not in (2, 2 - of_torch_kind):
        raise ValueError(
            f"{what}: {vectors.dtype} in the shape {tuple(vectors.shape)} where floating-point weights, (rows, "
            "dimension), are needed; stack vectors as rows"
        )
    try:  # compiled search, and scipy's conversions, trust the numbers of terms
        if hasattr(vectors, "check_format"):
            vectors.check_format(full_check=True)
        with np.errstate(over="ignore"):  # refused below
            rows = csr_matrix(vectors, dtype=np.float32) if issparse(vectors) else of_torch(vectors)
        if not issparse(vectors):
            rows.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"{what}: the matrix is damaged ({error}); encode again") from error
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


def csr_blocks(rows: Any) -> Iterator[csr_matrix]:
    """All rows of a CSR matrix or of sparse shards in their order, in blocks as :func:`as_csr` returns them."""
    for first in range(0, rows.shape[0], SPARSE_BLOCK):
        yield as_csr(rows[first : first + SPARSE_BLOCK], "vectors", first)


def load_vectors(
    directory: str | Path, *, mmap: bool = False, verify: bool = True
) -> tuple[list[str], Any, dict[str, Any]]:
    """Read what `encode_corpus` wrote.

    Args:
        directory: its folder.
        mmap: leave vectors on disk until they are used.
        verify: read every file and compare its checksum, and refuse an id that comes twice.

    Returns:
        Passage ids in the corpus's order; their vectors, `(passages, dim)` float32, an array, or `ShardedVectors` with
        `mmap`; of a sparse encoder a scipy CSR matrix, or `ShardedRows`, which gives rows as CSR; the manifest:
        "model" ("id", "weights_sha256"), "encoding", "precision", "dtype", "count", "dim", "shards", and of a sparse
        encoder "layout" ("sparse") and "nonzeros".

    Raises:
        FileNotFoundError: there is no finished folder, or a shard is missing.
        ValueError: a file is damaged or altered, naming it, an id comes twice, or the folder is of another version.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    numbers = range(len(manifest["shards"]))
    tables = shards.checked_shards(folder, manifest) if verify else [shards.read_shard(folder, at) for at in numbers]
    ids: list[str] = []
    parts: list[Any] = []
    for number, table in enumerate(tables):
        try:
            parts.append(_part(table, manifest["dim"], verify))
            ids += table["id"].to_pylist()
        except (ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
            raise ValueError(
                f"{shards.shard_file(folder, number)}: its vectors are damaged ({error}); encode again"
            ) from error
    if verify and len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{folder}: two passages have the id {twice!r}: give each its own id, and encode again")
    vectors = (ShardedRows if manifest.get("layout") == "sparse" else ShardedVectors)(parts, manifest["dim"])
    return ids, vectors if mmap else vectors[:], manifest


def _part(table: Any, dim: int, verify: bool) -> Any:
    """The vectors of a shard, whoever wrote it; ValueError where they are none."""
    table.validate(full=verify)
    columns = [column.chunk(0) for column in table.columns[1:]]
    values = [column.flatten().to_numpy() for column in columns]
    if dim < 1 or any(value.dtype.kind != kind for value, kind in zip(values[::-1], "fi", strict=False)):
        raise ValueError(f"{[str(value.dtype) for value in values]} in {dim} dimensions")
    if len(columns) == 1:
        return values[0].reshape(len(table), dim)
    terms, weights = values
    rows = csr_matrix((weights, terms, columns[0].offsets.to_numpy()), (len(table), dim))
    rows.check_format(full_check=verify)
    return rows


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished folder, see `load_vectors`; FileNotFoundError where the encoding is not finished."""
    manifest = shards.read_manifest(Path(directory), "vectors")
    if type(manifest.get("dim")) is not int or not isinstance(manifest.get("shards"), list):
        raise ValueError(f"{directory}: holds no vectors; give a folder that encode_corpus wrote")
    return manifest


def vector_table(ids: Sequence[str], vectors: Any) -> Any:
    """Ids and vectors `(passages, dim)`, an array or CSR rows, as an Arrow table that says the dimension."""
    if isinstance(vectors, np.ndarray):
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        columns = {"vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    else:
        begins = pa.array(vectors.indptr.astype(np.int64))
        values = {"terms": vectors.indices.astype(np.int32), "weights": vectors.data}
        columns = {name: pa.LargeListArray.from_arrays(begins, pa.array(one)) for name, one in values.items()}
    return pa.table({"id": pa.array(ids, pa.string()), **columns}, metadata={"dim": str(vectors.shape[1])})


def vector_facts(tables: Sequence[Any]) -> dict[str, int]:
    """What the manifest says of the vectors in all shards."""
    facts = {"dim": int(tables[0].schema.metadata[b"dim"])}
    if "terms" in tables[0].column_names:
        facts["nonzeros"] = sum(len(table["terms"].chunk(0).values) for table in tables)
    return facts
