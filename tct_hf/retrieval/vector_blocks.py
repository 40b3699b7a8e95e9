"""Vectors that may be larger than memory: read, checked and drawn from by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLOCK = 65_536  # rows


def as_rows(vectors: npt.ArrayLike, what: str) -> Any:
    """Vectors as they are where they are an array, in memory, mapped, or of another kind that gives rows by slice."""
    import numpy as np

    matrix: Any = vectors
    # Not a tensor, whose dtype is torch's.
    if not isinstance(getattr(matrix, "dtype", None), np.dtype) or not hasattr(matrix, "shape"):
        matrix = np.asanyarray(vectors, dtype=np.float32)
    if len(matrix.shape) != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{what}: shape {matrix.shape} where (rows, dimension) is needed; stack vectors as rows")
    return matrix


def finite(block: npt.ArrayLike, what: str, start: int = 0) -> np.ndarray:
    """Rows as contiguous float32, all of their components finite."""
    import numpy as np

    block = np.ascontiguousarray(block, dtype=np.float32)
    if not np.isfinite(block).all():
        row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
        raise ValueError(f"{what}: row {row} has a NaN or infinite component; check the model and its dtype")
    return block


class ShardedVectors:
    """The vectors of several shards as one `(passages, dim)` array, memory-mapped, read as float32.

    Rows are taken by slice, number or array of numbers; `numpy.asarray` reads all of them.

    Args:
        parts: one array a shard, `(passages, dim)`.
        dim: of a vector.
    """

    ndim = 2

    def __init__(self, parts: Sequence[np.ndarray], dim: int) -> None:
        import numpy as np

        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self._starts[-1]), dim)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        import numpy as np

        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(len(self)))
        else:
            wanted = np.asarray(rows)
            if wanted.dtype == bool:
                wanted = np.arange(len(self))[wanted]
            wanted = np.where(wanted < 0, wanted + len(self), wanted).astype(np.int64)
            if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
                raise IndexError(f"row {rows!r} of {len(self)} vectors")
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

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("ShardedVectors are read from several files: an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)


class UnitRows:
    """The rows of an array divided by their lengths, as they are read.

    Args:
        vectors: (rows, dimension), of any kind that gives rows by slice or number.
    """

    ndim = 2

    def __init__(self, vectors: Any) -> None:
        import numpy as np

        self._vectors = vectors
        self.shape: tuple[int, int] = vectors.shape
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        import numpy as np

        block = np.asarray(self._vectors[rows], dtype=np.float32)
        return block / np.linalg.norm(block, axis=-1, keepdims=True).clip(1e-12)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class FirstColumns:
    """The first components of the rows of an array, as they are read.

    Args:
        vectors: (rows, dimension), of any kind that gives rows by slice or number.
        size: components to keep.
    """

    ndim = 2

    def __init__(self, vectors: Any, size: int) -> None:
        import numpy as np

        self._vectors, self._size = vectors, size
        self.shape: tuple[int, int] = (vectors.shape[0], size)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        import numpy as np

        return np.asarray(self._vectors[rows], dtype=np.float32)[..., : self._size]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def as_matrix(vectors: npt.ArrayLike, what: str) -> np.ndarray:
    """Vectors as one contiguous float32 array, checked."""
    matrix = as_rows(vectors, what)
    return finite(matrix[:], what)


def blocks(matrix: Any) -> Iterator[np.ndarray]:
    """All rows in their order, as contiguous float32 blocks, checked."""
    for start in range(0, len(matrix), BLOCK):
        yield finite(matrix[start : start + BLOCK], "vectors", start)


def ranges(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each component."""
    import numpy as np

    extremes = [(block.min(axis=0), block.max(axis=0)) for block in blocks(matrix)]
    return np.min([low for low, _ in extremes], axis=0), np.max([high for _, high in extremes], axis=0)


def choose_rows(count: int, wanted: int, seed: int) -> np.ndarray:
    """Draw row numbers, rising."""
    import numpy as np

    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def draw(count: int, held_out: int, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to tune on and rows to train on, apart where there are enough, in the order of a file that is mapped."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(count)
    rest = order[held_out:] if count - held_out >= wanted else order
    return np.sort(order[:held_out]), np.sort(rest[:wanted])
