"""A teacher whose vectors are computed once: later epochs, and later runs, read them from disk."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import send_to_device
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from tct_hf.data.rows import checked_texts
from tct_hf.encoding.weights import tokenizer_digest, weights_digest
from tct_hf.files import claim, staging_beside
from tct_hf.teachers.base import Columns, Features, Rows, Teacher, Texts
from tct_hf.teachers.colbert import (
    TEXTS_AT_ONCE,
    ColBERTTeacher,
    DenseTeacher,
    Side,
    VectorTeacher,
    describe_teacher,
    padded,
    read_alike,
)

logger = logging.getLogger(__name__)

# Rows that one statement may ask for; SQLite's own limit is 32,766.
_KEYS_AT_ONCE = 10_000
_COLUMNS = "key, checksum, vectors"
_TABLE = (
    "CREATE TABLE IF NOT EXISTS vectors (key INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, vectors BLOB NOT NULL)"
)
# Errors of a file that is whole, by their words: Python 3.10 gives no codes.
_NO_DAMAGE = ("locked", "full", "readonly", "unable to open", "disk I/O")


class TokenStore:
    """Vectors of texts, each `(tokens, dim)` float16, by a 64-bit key: an SQLite file that several processes share.

    Full, it takes no more: training goes through its texts in rounds, and with the oldest thrown out none
    would be found. A full disk is a full store, a damaged text counts as missing, a damaged file is begun again.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object], *, dim: int, max_bytes: int) -> None:
        claim(folder, {**settings, "dim": dim, "type": "float16"})
        self.file = Path(folder) / "vectors.sqlite"
        self.dim = dim
        self.max_bytes = max_bytes
        self.full = False
        self._found_damage = False
        self._run(_TABLE)
        self._run(f"SELECT {_COLUMNS} FROM vectors LIMIT 1")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Anew each time: a connection must not live through the fork of a data loader's worker.
        with closing(sqlite3.connect(self.file, timeout=600)) as database, database:
            database.text_factory = bytes  # a damaged row may say that it is text
            database.execute("PRAGMA page_size = 16384")  # a text in few pages
            yield database

    def _run(self, statement: str, values: Sequence[Any] = (), *, many: bool = False) -> list[tuple[Any, ...]]:
        """The rows that a statement gives; none of a damaged file, which is begun again."""
        try:
            with self._open() as database:
                run: Any = database.executemany if many else database.execute
                return run(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            if any(words in str(error) for words in _NO_DAMAGE):
                raise
            with staging_beside(self.file) as aside:  # one process at a time
                try:
                    with self._open() as database:
                        database.execute(f"SELECT {_COLUMNS} FROM vectors").fetchall()
                except sqlite3.DatabaseError:  # no other process has begun it again
                    logger.warning(f"{self.file}: damaged ({error}): it is begun again, its texts are encoded again.")
                    with closing(sqlite3.connect(aside)) as database:
                        database.execute("PRAGMA page_size = 16384")
                        database.execute(_TABLE)
                    self.file.with_name(f"{self.file.name}-journal").unlink(missing_ok=True)
                    os.replace(aside, self.file)
        return []

    def keys(self) -> set[int]:
        """Keys of all texts that are there."""
        return {key for (key,) in self._run("SELECT key FROM vectors")}

    def get(self, keys: Iterable[int]) -> dict[int, np.ndarray]:
        """`(tokens, dim)` float16 of those texts that are there."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), _KEYS_AT_ONCE):
            part = wanted[start : start + _KEYS_AT_ONCE]
            places = ", ".join("?" * len(part))
            for key, checksum, content in self._run(f"SELECT {_COLUMNS} FROM vectors WHERE key IN ({places})", part):
                if isinstance(content, bytes) and checksum == _checksum(key, content):
                    found[key] = np.frombuffer(content, dtype=np.float16).reshape(-1, self.dim)
                    continue
                self._run("DELETE FROM vectors WHERE key = ?", [key])
                if not self._found_damage:
                    self._found_damage = True
                    logger.warning(f"{self.file}: a text in it is damaged (checksum); it is encoded again.")
        return found

    def put(self, keys: Iterable[int], vectors: Iterable[np.ndarray]) -> None:
        """Keep the vectors `(tokens, dim)` float16 of texts that are not there yet, while there is room."""
        rows = []
        for key, text in zip(keys, vectors, strict=True):
            content = np.ascontiguousarray(text).tobytes()
            rows.append((key, _checksum(key, content), content))
        if self.full:
            return
        if self.file.stat().st_size + sum(len(content) for *_, content in rows) > self.max_bytes:
            self.full = True
            logger.warning(f"{self.file}: full; the texts that are not in it stay out.")
            return
        try:
            self._run(f"INSERT OR IGNORE INTO vectors ({_COLUMNS}) VALUES (?, ?, ?)", rows, many=True)
        except sqlite3.OperationalError as error:  # what is cached can be computed: no reason to lose a training
            self.full = True
            logger.warning(
                f"{self.file}: no more can be written ({error}); the texts that are not in it stay out. Make room for "
                "the next run, or name another folder."
            )


def _checksum(key: int, content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content, key % 2**64) - 2**63  # signed, as SQLite's integers are


def _keys(side: str, texts: Iterable[str]) -> list[int]:
    named = (f"{side}\x1f{text}".encode() for text in checked_texts(texts, f"{side} texts"))
    return [int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "big", signed=True) for one in named]


class CachedTeacher(Teacher):
    """Wraps a :class:`ColBERTTeacher` or :class:`DenseTeacher` and keeps its vectors on disk, in half precision.

    A text is encoded when it is met for the first time; scores are computed live, of vectors rounded as they are on
    disk, so that a batch has the same scores the first time and later. A vector is known by its teacher (a hash of
    weights, tokens and encoding: another teacher has another folder) and by its text.

    Args:
        teacher: the teacher to wrap.
        cache_dir: a folder for the vectors of any number of teachers, on a file system that can lock files.
        max_gigabytes: size of this teacher's file; when it is full, further texts are encoded in every epoch. A
            passage of 60 tokens of 128 dimensions takes 15 kB.

    Raises:
        ValueError: a teacher that has no vectors, or no room.
    """

    def __init__(self, teacher: VectorTeacher, cache_dir: str | Path, *, max_gigabytes: float = 20.0) -> None:
        if not isinstance(teacher, VectorTeacher):
            what = f"A CachedTeacher keeps vectors, and a {type(teacher).__name__} has none"
            raise ValueError(f"{what}: give a ColBERTTeacher or a DenseTeacher.")
        if not 0 < max_gigabytes < float("inf"):
            raise ValueError(f"max_gigabytes must be a finite number greater than 0, got {max_gigabytes}.")
        self.teacher, self.members = teacher, [teacher]
        self.training_scale = teacher.training_scale
        self.score_kind = teacher.score_kind
        self.cache_dir = Path(cache_dir).expanduser()
        self.max_gigabytes = max_gigabytes
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """Where the vectors are; opened when it is first needed, or by :meth:`to`."""
        if self._store is None:
            model = self.teacher.model
            dim = model.get_embedding_dimension()
            described = {
                **describe_teacher(model),
                "words": tokenizer_digest(model.tokenizer),
                "computed_in": str(self.teacher.compute_dtype),
                "dim": dim,
            }
            name = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()[:16]
            self._store = TokenStore(
                self.cache_dir / name, described, dim=dim, max_bytes=int(self.max_gigabytes * 1e9)
            )
        return self._store

    def to(self, device: torch.device) -> Teacher:
        super().to(device)
        self._store = None
        assert self.store is not None  # before the data loader's workers start: they can't read a model on a GPU
        return self

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        """The padded vectors and masks of queries and candidates; where one is missing, the texts of both."""
        sides: dict[Side, list[str]] = {"query": list(queries), "document": [t for column in columns for t in column]}
        keys = [_keys(side, texts) for side, texts in sides.items()]
        known = self.store.get(key for each in keys for key in each)
        if any(key not in known for each in keys for key in each):
            return {"texts": list(sides.values())}
        return {"vectors": [part for each in keys for part in padded([known[key] for key in each])]}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        return self.score_and_embed(inputs, gather=gather)[0]

    def score_and_embed(self, inputs: Mapping[str, Any], *, gather: bool) -> tuple[Tensor, list[Tensor] | None]:
        parts = inputs.get("vectors")
        if parts is None:
            queries, passages = inputs["texts"]
            parts = (*padded(self.vectors(queries, "query")), *padded(self.vectors(passages, "document")))
            parts = send_to_device(parts, self.device)
        return self.teacher.compare_and_embed(*parts, gather=gather)

    def vectors(self, texts: Sequence[str], side: Side) -> list[np.ndarray]:
        """As :meth:`VectorTeacher.vectors`; missing ones are encoded, and kept while there is room."""
        wanted = _keys(side, texts)
        keyed = dict(zip(wanted, texts, strict=True))
        found = self.store.get(keyed)
        missing = sorted((key for key in keyed if key not in found), key=lambda key: len(keyed[key]))
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            keys = missing[start : start + TEXTS_AT_ONCE]
            made = self.teacher.vectors([keyed[key] for key in keys], side)
            self.store.put(keys, made)
            found |= zip(keys, made, strict=True)
        return [found[key] for key in wanted]

    def scores(self, queries: Sequence[np.ndarray], passages: Sequence[np.ndarray]) -> Tensor:
        return self.teacher.scores(queries, passages)


class _PooledAndTokens(ColBERTTeacher):
    """The pooled vector of a text, then its token vectors, of one forward pass."""

    def __init__(self, pooled: DenseTeacher, tokens: ColBERTTeacher) -> None:
        super().__init__(tokens.model, dtype=tokens.dtype)
        self.pooled = pooled

    def forward(self, features: Features, side: Side) -> tuple[Tensor, Tensor]:
        vector, one = self.pooled.forward(features, side)  # leaves what is pooled in the features
        out: Any = features
        for module in list(self.model)[1:]:
            out = module(out, **({"task": side} if isinstance(module, MultiVectorMask) else {}))
        return torch.cat([vector, out["token_embeddings"]], 1), torch.cat([one, out["attention_mask"].bool()], 1)


def encode_together(pooled: CachedTeacher, tokens: CachedTeacher, texts: Sequence[str]) -> None:
    """Keep the pooled and the token vectors of passages, of one forward pass; nothing where two encoders make them."""
    one, other = pooled.teacher, tokens.teacher
    assert isinstance(one, DenseTeacher) and isinstance(other, ColBERTTeacher)
    if (
        not isinstance(one.model[1], Pooling)
        or not isinstance(other.model[1], MultiVectorMask)  # no projection
        or one.model.get_embedding_dimension() != other.model.get_embedding_dimension()
        or one.compute_dtype != other.compute_dtype
        or weights_digest(one.model[0]) != weights_digest(other.model[0])
        or not read_alike(one.model, other.model)
    ):
        return
    both, keyed = _PooledAndTokens(one, other), dict(zip(_keys("document", texts), texts, strict=True))
    missing = list(keyed.keys() - pooled.store.keys() - tokens.store.keys())
    missing.sort(key=lambda key: (len(keyed[key]), key))
    for start in range(0, len(missing), TEXTS_AT_ONCE):
        if pooled.store.full or tokens.store.full:
            return
        keys = missing[start : start + TEXTS_AT_ONCE]
        made = both.vectors([keyed[key] for key in keys], "document")
        pooled.store.put(keys, [vectors[:1] for vectors in made])
        tokens.store.put(keys, [vectors[1:] for vectors in made])
