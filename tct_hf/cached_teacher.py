"""A teacher whose token vectors are computed once: later epochs, and later runs, read them from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf.batching import stack_columns, take
from tct_hf.teachers import ColBERTTeacher, Features, Teacher, describe_teacher
from tct_hf.token_store import TokenStore


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
    """Wraps a :class:`ColBERTTeacher` and keeps its token vectors on disk, in half precision.

    A text is encoded when it is met for the first time; scores are computed live all the same, of the vectors read. A
    vector is known by its teacher (a hash of weights, tokens and encoding: another teacher has another folder) and by
    its text, not its id: the same id may stand for another text elsewhere, the same text never has other vectors.

    Vectors just computed are rounded like those on disk, so that a batch has the same scores the first time and later
    (to the last bits, in which padding plays a part).

    Args:
        teacher: to be wrapped.
        cache_dir: a folder for the vectors of any number of teachers.
        max_gigabytes: of this teacher's files; when they are full, further texts are encoded in every epoch. A passage
            of 60 tokens of 128 dimensions takes 15 kB.

    Raises:
        ValueError: a teacher that has no token vectors, or no room.
    """

    score_kind = "MaxSim"

    def __init__(self, teacher: ColBERTTeacher, cache_dir: str | Path, *, max_gigabytes: float = 20.0) -> None:
        if not isinstance(teacher, ColBERTTeacher):
            raise ValueError(
                f"A CachedTeacher keeps token vectors, and a {type(teacher).__name__} has none: give a ColBERTTeacher."
            )
        if not 0 < max_gigabytes < float("inf"):
            raise ValueError(f"max_gigabytes must be a finite number greater than 0, got {max_gigabytes}.")
        self.teacher = teacher
        self.training_scale = teacher.training_scale
        self.cache_dir = Path(cache_dir).expanduser()
        self.max_gigabytes = max_gigabytes
        self.hits = self.misses = 0
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """Where the vectors are; opened when it is first needed, when the teacher's type of numbers is settled."""
        if self._store is None:
            model = self.teacher.model
            words = hashlib.sha256(_described_tokenizer(model.tokenizer).encode()).hexdigest()
            described = {**describe_teacher(model), "words": words, "computed_in": str(self.teacher._compute_dtype)}
            name = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()[:16]
            dim = model.get_embedding_dimension()
            assert dim is not None
            self._store = TokenStore(
                self.cache_dir / name, described, dim=dim, max_bytes=int(self.max_gigabytes * 1e9)
            )
        return self._store

    def attach(self, student: SentenceTransformer) -> None:
        self.teacher.attach(student)

    def to(self, device: torch.device) -> CachedTeacher:
        self.teacher.to(device)
        return self

    def collate(
        self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The texts' keys, and what the wrapped teacher needs to encode those that are new."""
        keys = [[_key("query", text) for text in queries]]
        keys += [[_key("document", text) for text in column] for column in columns]
        signed = np.array(keys, dtype=np.uint64).view(np.int64)  # torch's unsigned types can do little
        return {"keys": torch.from_numpy(signed), **(self.teacher.collate(queries, columns, rows) or {})}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """MaxSim of every query with every candidate, as the wrapped teacher compares them."""
        self.teacher.model.eval()
        keys = inputs["keys"].cpu().numpy().view(np.uint64)
        self.store.refresh()
        with torch.inference_mode():
            queries = self._vectors([inputs["query"]], keys[0].tolist(), "query")
            passages = self._vectors(inputs["columns"], keys[1:].reshape(-1).tolist(), "document")
            scores = self.teacher._compare(*queries, *passages, len(keys) - 1, gather=gather)
        return scores.clone()

    def _vectors(self, columns: Sequence[Features], keys: list[int], side: str) -> tuple[Tensor, Tensor]:
        found = {key: self.store.get(key) for key in dict.fromkeys(keys)}
        missing = [key for key, vectors in found.items() if vectors is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            made = self._encode(columns, keys, missing, side)
            self.store.put(missing, made)
            found |= zip(missing, made, strict=True)
        texts = [found[key] for key in keys]
        width = max(len(text) for text in texts if text is not None)
        vectors = np.zeros((len(texts), width, self.store.dim), dtype=np.float16)
        mask = np.zeros((len(texts), width), dtype=bool)
        for row, text in enumerate(texts):
            assert text is not None
            vectors[row, : len(text)] = text
            mask[row, : len(text)] = True
        device = self.teacher.model.device
        return torch.from_numpy(vectors).to(device), torch.from_numpy(mask).to(device)

    def _encode(self, columns: Sequence[Features], keys: list[int], missing: list[int], side: str) -> list[np.ndarray]:
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = [first[key] for key in missing]
        merged = stack_columns(columns)
        if merged is not None:
            index = torch.tensor(rows, device=merged["attention_mask"].device)
            columns = [{key: take(value, index, merged["attention_mask"].shape[1]) for key, value in merged.items()}]
            rows = list(range(len(missing)))
        vectors, mask = self.teacher._encode(columns, side)
        halves, scored = vectors.to(torch.float16).cpu().numpy(), mask.cpu().numpy()
        return [halves[row][scored[row]] for row in rows]
