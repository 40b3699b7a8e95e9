"""Passage ids by row, compact: their letters in one block, on disk and in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np

_TEXT_FILE = "ids.bin"
_LENGTHS_FILE = "ids.npy"


class IdTable(Sequence[str]):
    """An unchangeable list of ids that costs their UTF-8 bytes and a few more each, not a Python object each."""

    def __init__(self, text: Any, ends: np.ndarray) -> None:
        self._text = text
        self._ends = ends

    @classmethod
    def of(cls, ids: Iterable[str]) -> IdTable:
        """Make a table of ids in their order."""
        import numpy as np

        # surrogatepass: an id read from a broken file name comes back as it was.
        encoded = [name.encode("utf-8", "surrogatepass") for name in ids]
        lengths = np.fromiter((len(name) for name in encoded), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), _ends(lengths))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        at = int(row)
        if at < 0:
            at += len(self)
        if not 0 <= at < len(self):
            raise IndexError(f"row {row} of {len(self)} ids")
        begin = int(self._ends[at - 1]) if at else 0
        return self._text[begin : int(self._ends[at])].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, or mapped."""
        return int(self._text.nbytes + self._ends.nbytes)

    def save(self, directory: Path) -> None:
        """Write the table into a folder: ids.bin, and the length of each id in ids.npy."""
        import numpy as np

        lengths = np.diff(self._ends.astype(np.int64), prepend=0)
        (directory / _TEXT_FILE).write_bytes(self._text.tobytes())
        np.save(directory / _LENGTHS_FILE, lengths.astype(np.min_scalar_type(int(lengths.max(initial=0)))))

    @classmethod
    def load(cls, directory: Path, *, mmap: bool = False) -> IdTable:
        """Read what `save` wrote.

        Args:
            directory: the folder.
            mmap: leave the text on disk and map it.

        Raises:
            ValueError: the two files don't fit.
        """
        import numpy as np

        lengths = np.load(directory / _LENGTHS_FILE, allow_pickle=False)
        path = directory / _TEXT_FILE
        text: np.ndarray
        if mmap and path.stat().st_size:  # an empty file can't be mapped
            text = np.memmap(path, dtype=np.uint8, mode="r")
        else:
            text = np.fromfile(path, dtype=np.uint8)
        ends = _ends(lengths)
        if int(ends[-1] if len(ends) else 0) != len(text):
            raise ValueError(f"{path}: {len(text)} bytes of ids where {_LENGTHS_FILE} announces another length")
        return cls(text, ends)


class SeenIds:
    """Finds an id that comes twice in a stream, in 16 bytes an id."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # digests, each array at least twice as long as the next

    def add(self, ids: Sequence[str]) -> int | None:
        """Take the next ids.

        Args:
            ids: any number of them.

        Returns:
            The place among them of the first that came before, here or in an earlier call; None where there is none.
        """
        import hashlib

        import numpy as np

        digests = np.array(
            [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in ids], "S16"
        )
        fresh, first = np.unique(digests, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        for known in self._sorted:
            at = np.searchsorted(known, digests)
            again |= known[np.minimum(at, len(known) - 1)] == digests
        if again.any():
            return int(np.flatnonzero(again)[0])
        if len(ids):
            self._sorted.append(fresh)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            self._sorted.append(np.sort(np.concatenate([self._sorted.pop(), self._sorted.pop()]), kind="stable"))
        return None


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ends(lengths: np.ndarray) -> np.ndarray:
    import numpy as np

    ends = np.cumsum(lengths, dtype=np.int64)
    return ends.astype(np.uint32) if not len(ends) or ends[-1] < 2**32 else ends
