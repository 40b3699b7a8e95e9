"""Vectors on disk: half-precision vectors of texts by key, of bounded size, that several processes add to."""

from __future__ import annotations

import logging
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tct_hf.files import claim

logger = logging.getLogger(__name__)

# A text's place in a file of vectors. Written after the vectors, so that what it names is there.
_RECORD = np.dtype([("key", "<u8"), ("offset", "<u8"), ("tokens", "<u4"), ("checksum", "<u4")])


class TokenStore:
    """Vectors of texts, each `(tokens, dim)` float16, by a 64-bit key.

    Every process appends to a pair of files of its own and reads those of all. A pair that a kill has cut off is read
    up to its last whole record, and every vector is checked as it is read: one that is damaged counts as missing.

    Full, it keeps what it has and takes no more. Training goes through its texts in rounds: of a store for half of
    them, half would be found; with the oldest thrown out for the newest, none would. A full disk is a full store.

    Args:
        folder: folder of the files, made when missing.
        settings: JSON-ready, all that the vectors depend on: a folder of others is refused.
        dim: numbers a token.
        max_bytes: most bytes of all files together.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object], *, dim: int, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}.")
        self.folder = Path(folder)
        self.dim = dim
        self.max_bytes = max_bytes
        self.full = False
        claim(self.folder, {**settings, "dim": dim, "type": "float16"})
        self._places: dict[int, tuple[str, int, int, int]] = {}
        self._read: dict[str, int] = {}  # bytes of each index that are known
        self._files: dict[str, BinaryIO] = {}
        self._name = uuid.uuid4().hex
        self._own: tuple[FileIO, FileIO] | None = None
        self._warned = False
        self.refresh()

    def __getstate__(self) -> dict[str, object]:
        # In another process: files of its own.
        return {**self.__dict__, "_files": {}, "_own": None, "_name": uuid.uuid4().hex}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.*") if path.suffix in (".f16", ".index"))

    def refresh(self) -> None:
        """Learn what other processes have added."""
        for path in self.folder.glob("*.index"):
            known, size = self._read.get(path.stem, 0), path.stat().st_size
            size -= size % _RECORD.itemsize
            if size <= known:
                continue
            with path.open("rb") as file:
                file.seek(known)
                records = np.frombuffer(file.read(size - known), dtype=_RECORD)
            for key, offset, tokens, checksum in records.tolist():
                self._places.setdefault(key, (path.stem, offset, tokens, checksum))
            self._read[path.stem] = size

    def get(self, key: int) -> np.ndarray | None:
        """`(tokens, dim)` float16 of a text; None when it is not there, or damaged."""
        place = self._places.get(key)
        if place is None:
            return None
        name, offset, tokens, checksum = place
        content = b""
        try:
            if name not in self._files:
                self._files[name] = (self.folder / f"{name}.f16").open("rb")
            content = os.pread(self._files[name].fileno(), tokens * self.dim * 2, offset)
        except FileNotFoundError:  # its index was left
            pass
        if len(content) != tokens * self.dim * 2 or zlib.crc32(content) != checksum:
            del self._places[key]
            if not self._warned:
                self._warned = True
                logger.warning(f"{self.folder}/{name}.f16: damaged at byte {offset}; such vectors are computed again.")
            return None
        return np.frombuffer(content, dtype=np.float16).reshape(tokens, self.dim)

    def put(self, keys: Sequence[int], vectors: Sequence[np.ndarray]) -> None:
        """Keep the vectors `(tokens, dim)` float16 of texts that are not there yet, while there is room."""
        new = {key: text for key, text in zip(keys, vectors, strict=True) if key not in self._places}
        size = sum(text.nbytes + _RECORD.itemsize for text in new.values())
        if not new or self.full:
            return
        if self.bytes + size > self.max_bytes:
            self.full = True
            logger.warning(f"{self.folder}: full at {self.bytes / 1e9:.2f} GB; the texts that are not in it stay out.")
            return
        records = np.empty(len(new), dtype=_RECORD)
        contents = [np.ascontiguousarray(text, dtype=np.float16).tobytes() for text in new.values()]
        try:
            if self._own is None:
                self._own = (
                    (self.folder / f"{self._name}.f16").open("ab", buffering=0),
                    (self.folder / f"{self._name}.index").open("ab", buffering=0),
                )
            data, index = self._own
            offset = data.tell()
            for row, (key, text, content) in enumerate(zip(new, new.values(), contents, strict=True)):
                records[row] = (key, offset, len(text), zlib.crc32(content))
                offset += len(content)
            _write(data, b"".join(contents))
            _write(index, records.tobytes())
        except OSError as error:  # what is cached can be computed: no reason to lose a training
            self.full = True
            logger.warning(
                f"{self.folder}: no more can be written ({error}); the texts that are not in it stay out. Make room "
                "for the next run, or name another folder."
            )
            return
        self._read[self._name] = index.tell()
        for key, offset, tokens, checksum in records.tolist():
            self._places[key] = (self._name, offset, tokens, checksum)


def _write(file: FileIO, content: bytes) -> None:
    """All of it: a single call may write a part."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
