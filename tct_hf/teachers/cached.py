"""A teacher whose vectors are computed once: later epochs, and later runs, read them from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from tct_hf.batches import stack_columns, take
from tct_hf.encoding.digests import weights_digest
from tct_hf.teachers.base import Columns, Features, Rows, Teacher, Texts
from tct_hf.teachers.colbert import (
    TEXTS_AT_ONCE,
    ColBERTTeacher,
    DenseTeacher,
    Side,
    VectorTeacher,
    describe_teacher,
    halves,
    padded,
)
from tct_hf.teachers.token_store import TokenStore


def _key(side: str, text: str) -> int:
    named = f"{side}\x1f{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big")


def _described_tokenizer(tokenizer: Any) -> str:
    """All that turns a text into tokens: two of one vocabulary may fold case or cut words differently."""
    words = repr(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return words
    rules = json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # of the last batch
        rules.pop(name, None)
    rules["model"].pop("vocab", None)  # in `words`, whatever its order
    return words + json.dumps(rules, sort_keys=True)


class CachedTeacher(Teacher):
    """Wraps a :class:`ColBERTTeacher` or :class:`DenseTeacher` and keeps its vectors on disk, in half precision.

    A text is encoded when it is met for the first time; scores are computed live all the same, of the vectors read. A
    vector is known by its teacher (a hash of weights, tokens and encoding: another teacher has another folder) and by
    its text, not its id: the same id may stand for another text elsewhere, the same text never has other vectors.

    Vectors just computed are rounded like those on disk, so that a batch has the same scores the first time and later
    (to the last bits, in which padding plays a part).

    Args:
        teacher: the teacher to wrap.
        cache_dir: a folder for the vectors of any number of teachers.
        max_gigabytes: size of this teacher's files; when they are full, further texts are encoded in every epoch. A
            passage of 60 tokens of 128 dimensions takes 15 kB.

    Raises:
        ValueError: a teacher that has no vectors, or no room.
    """

    def __init__(self, teacher: VectorTeacher, cache_dir: str | Path, *, max_gigabytes: float = 20.0) -> None:
        if not isinstance(teacher, VectorTeacher):
            raise ValueError(
                f"A CachedTeacher keeps vectors, and a {type(teacher).__name__} has none: give a ColBERTTeacher or a "
                "DenseTeacher."
            )
        if not 0 < max_gigabytes < float("inf"):
            raise ValueError(f"max_gigabytes must be a finite number greater than 0, got {max_gigabytes}.")
        self.teacher = teacher
        self.training_scale = teacher.training_scale
        self.score_kind = teacher.score_kind
        self.cache_dir = Path(cache_dir).expanduser()
        self.max_gigabytes = max_gigabytes
        self.hits = self.misses = 0
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """Where the vectors are; opened when it is first needed, or by :meth:`to`."""
        if self._store is None:
            model = self.teacher.model
            dim = model.get_embedding_dimension()
            described = {
                **describe_teacher(model),
                "words": hashlib.sha256(_described_tokenizer(model.tokenizer).encode()).hexdigest(),
                "computed_in": str(self.teacher.compute_dtype),
                "dim": dim,
            }
            name = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()[:16]
            self._store = TokenStore(
                self.cache_dir / name, described, dim=dim, max_bytes=int(self.max_gigabytes * 1e9)
            )
        return self._store

    def attach(self, student: SentenceTransformer) -> None:
        self.teacher.attach(student)

    def to(self, device: torch.device) -> CachedTeacher:
        """Move the model to the device that scores, and open the store of what it computes there."""
        self.teacher.to(device)
        self._store = None
        assert self.store is not None  # before the data loader's workers start: they can't read a model on a GPU
        return self

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        """Read the batch's vectors; where one is missing, prepare what the wrapped teacher needs to encode it.

        Returns:
            "keys" `(1 + columns, queries)` of the texts, and either "vectors" and "mask", of the queries and of all
            candidates, or what the wrapped teacher returns.
        """
        sides = ["query", *["document"] * len(columns)]
        keys = np.array(
            [[_key(side, text) for text in texts] for side, texts in zip(sides, [queries, *columns], strict=True)],
            dtype=np.uint64,
        )
        signed = torch.from_numpy(keys.view(np.int64))  # torch's unsigned types can do little
        self.store.refresh()
        found = self._read(keys.reshape(-1).tolist())
        if any(vectors is None for vectors in found.values()):
            return {"keys": signed, **(self.teacher.collate(queries, columns, rows) or {})}
        vectors, mask = zip(
            *(padded([found[key] for key in side.reshape(-1).tolist()]) for side in (keys[:1], keys[1:])),  # type: ignore[misc]
            strict=True,
        )
        return {"keys": signed, "vectors": list(vectors), "mask": list(mask)}

    def _read(self, keys: Sequence[int]) -> dict[int, np.ndarray | None]:
        return {key: self.store.get(key) for key in dict.fromkeys(keys)}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """The similarity of every query with every candidate, as the wrapped teacher compares them."""
        self.teacher.model.eval()
        with torch.inference_mode():
            if "vectors" in inputs:
                self.hits += sum(len(side.unique()) for side in (inputs["keys"][:1], inputs["keys"][1:]))
                (queries, passages), (query_mask, passage_mask) = inputs["vectors"], inputs["mask"]
            else:
                keys = inputs["keys"].cpu().numpy().view(np.uint64)
                self.store.refresh()
                queries, query_mask = self._vectors([inputs["query"]], keys[0].tolist(), "query")
                passages, passage_mask = self._vectors(inputs["columns"], keys[1:].reshape(-1).tolist(), "document")
            scores = self.teacher.compare(
                queries, query_mask, passages, passage_mask, len(inputs["keys"]) - 1, gather=gather
            )
        return scores.clone()

    def _vectors(self, columns: Sequence[Features], keys: list[int], side: Side) -> tuple[Tensor, Tensor]:
        found = self._read(keys)
        missing = [key for key, vectors in found.items() if vectors is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            first = {key: row for row, key in reversed(list(enumerate(keys)))}
            made = self._encode(columns, [first[key] for key in missing], side)
            self.store.put(missing, made)
            found |= zip(missing, made, strict=True)
        vectors, mask = send_to_device(padded([found[key] for key in keys]), self.teacher.model.device)  # type: ignore[misc]
        return vectors, mask

    def _encode(self, columns: Sequence[Features], rows: list[int], side: Side) -> list[np.ndarray]:
        """The vectors of some rows of the columns; the rest is not encoded where the columns can be cut."""
        merged = stack_columns(columns)
        if merged is not None:
            index = torch.tensor(rows, device=merged["attention_mask"].device)
            columns = [{key: take(value, index, merged["attention_mask"].shape[1]) for key, value in merged.items()}]
            rows = list(range(len(rows)))
        made = halves(*self.teacher.encode(columns, side))
        return [made[row] for row in rows]

    def vectors(self, texts: Sequence[str], side: Side) -> list[np.ndarray]:
        """As :meth:`VectorTeacher.vectors`; missing ones are encoded, and kept while there is room."""
        keyed = {_key(side, text): text for text in texts}
        self.store.refresh()
        found = self._read(list(keyed))
        missing = sorted((key for key in keyed if found[key] is None), key=lambda key: len(keyed[key]))
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            keys = missing[start : start + TEXTS_AT_ONCE]
            made = self.teacher.vectors([keyed[key] for key in keys], side)
            self.store.put(keys, made)
            found |= zip(keys, made, strict=True)
        return [found[_key(side, text)] for text in texts]  # type: ignore[misc]

    def scores(self, queries: Sequence[np.ndarray], passages: Sequence[np.ndarray]) -> Tensor:
        """Compare vectors of :meth:`vectors`, see :meth:`VectorTeacher.scores`."""
        return self.teacher.scores(queries, passages)


class _PooledAndTokens(ColBERTTeacher):
    """The pooled vector of a text, then its token vectors, of one forward pass."""

    def __init__(self, pooled: DenseTeacher, tokens: ColBERTTeacher) -> None:
        super().__init__(tokens.model, dtype=tokens.dtype, tokens_per_pass=pooled.tokens_per_pass)
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
        or not one.reads_like(other.model, other.preprocess)
    ):
        return
    both, keyed = _PooledAndTokens(one, other), {_key("document", text): text for text in texts}
    for store in (pooled.store, tokens.store):
        store.refresh()
    missing = [key for key in keyed if pooled.store.get(key) is None and tokens.store.get(key) is None]
    missing.sort(key=lambda key: len(keyed[key]))
    for start in range(0, len(missing), TEXTS_AT_ONCE):
        if pooled.store.full or tokens.store.full:
            return
        keys = missing[start : start + TEXTS_AT_ONCE]
        made = both.vectors([keyed[key] for key in keys], "document")
        pooled.store.put(keys, [vectors[:1] for vectors in made])
        tokens.store.put(keys, [vectors[1:] for vectors in made])
