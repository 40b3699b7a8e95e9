"""Late interaction: token vectors of passages, scored by MaxSim, in search and in reranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tct_hf.data.rows import checked_texts
from tct_hf.encoding.weights import unpack_half
from tct_hf.files import write_aside
from tct_hf.retrieval.encode import say_cut_queries
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

_PASSAGES_PER_SHARD = 1024
_TEXTS_PER_PASS = 32
# Passages encoded and scored at a time where nothing is kept: about 40 MB of token vectors, whatever the corpus.
_PASSAGES_PER_CHUNK = 1024
# Passages multiplied at a time: a product of 128 x 150 x 36 numbers stays in the caches of a processor, with one query
# at a time; accelerators take more.
_PASSAGES_PER_BLOCK, _QUERIES_PER_PRODUCT = 128, 32
# Scores of so many queries and of all passages are held at a time.
_QUERIES_TOGETHER = 256


def maxsim(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Scores `(queries, passages)` of `(queries, query tokens, dim)` and `(passages, tokens, dim)`, in float32.

    Short queries are padded with zero vectors, short passages by repeating a vector: neither changes a score.
    """
    (count, width, dim), (passages, tokens, _) = queries.shape, block.shape
    products = block.reshape(passages * tokens, dim) @ queries.reshape(count * width, dim).T
    return products.view(passages, tokens, count, width).amax(1).float().sum(-1).T


def encode_query_tokens(model: MultiVectorEncoder, texts: Sequence[str], *, bf16: bool = False) -> list[torch.Tensor]:
    """Token vectors `(tokens, dim)` float32 of queries; divided by their number where scores are means."""
    vectors = _encoded(model, "query", texts, bf16)
    say_cut_queries(model, texts, len(texts))
    mean = model.similarity_fn_name == "meanmaxsim"
    return [one / len(one) for one in vectors] if mean else vectors


def _encoded(model: MultiVectorEncoder, side: str, texts: Sequence[str], bf16: bool) -> list[torch.Tensor]:
    texts = checked_texts(texts, f"{side} texts")
    encode: Any = model.encode_query if side == "query" else model.encode_document
    unpack_half(model)
    with torch.inference_mode(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        found = encode(texts, batch_size=_TEXTS_PER_PASS, show_progress_bar=False)
    return [vectors.float() for vectors in found]


class TokenVectors:
    """The token vectors of passages, searched exhaustively, or by row to rerank; multiplied in float32.

    `tokens` are `(tokens, dim)`, passage after passage; `lengths` `(passages,)`, 1 or more.
    """

    def __init__(self, ids: Sequence[str], tokens: torch.Tensor, lengths: np.ndarray, device: Any = "cpu") -> None:
        self.ids, self.tokens, self.lengths = list(ids), tokens, lengths.astype(np.int64)
        self.rows = {name: row for row, name in enumerate(self.ids)}
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._device = torch.device(device)
        # The place of each id in the order of ids, by which equal scores are ordered.
        self._places = np.empty(len(self.ids), np.int64)
        self._places[sorted(range(len(self.ids)), key=self.ids.__getitem__)] = np.arange(len(self.ids))

    @classmethod
    def encoded(cls, model: MultiVectorEncoder, texts: Mapping[str, str], *, bf16: bool) -> TokenVectors:
        """The token vectors of some passages, id to text, in memory."""
        vectors = _encoded(model, "document", list(texts.values()), bf16)
        return cls(list(texts), torch.cat(vectors), np.array([len(one) for one in vectors]), model.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors."""
        return self.tokens.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes that exhaustive search holds in memory."""
        padded = sum(len(rows) * int(self.lengths[rows].max()) for rows in self._rows_by_length())
        return 4 * padded * self.tokens.shape[1]

    def scores(self, queries: Sequence[torch.Tensor]) -> np.ndarray:
        """MaxSim `(queries, passages)` float32 of every passage, for queries `(tokens, dim)` each."""
        together = 1 if self._device.type == "cpu" else _QUERIES_PER_PRODUCT
        moved = [one.to(self._device, torch.float32) for one in queries]
        groups = [pad_sequence(moved[at : at + together], batch_first=True) for at in range(0, len(moved), together)]
        found = np.empty((len(queries), len(self.ids)), np.float32)
        with torch.inference_mode():
            for rows, block in self._blocks:
                found[:, rows] = torch.cat([maxsim(group, block) for group in groups]).cpu().numpy()
        return found

    def search(self, queries: Sequence[torch.Tensor], k: int) -> list[dict[str, float]]:
        """Passage id to MaxSim of each query's best k passages, best first, equal scores by id."""
        rows, best = np.arange(len(self.ids)), []
        for start in range(0, len(queries), _QUERIES_TOGETHER):
            best += [self._best(rows, one, k) for one in self.scores(queries[start : start + _QUERIES_TOGETHER])]
        return best

    def rerank(self, query: torch.Tensor, names: Iterable[str]) -> dict[str, float]:
        """Passage id to MaxSim of some passages, best first, equal scores by id."""
        rows = np.array([self.rows[name] for name in names], np.int64)
        if not len(rows):
            return {}
        with torch.inference_mode():
            scores = maxsim(query.to(self._device, torch.float32)[None], self._padded(rows))[0].cpu().numpy()
        return self._best(rows, scores, len(rows))

    def _best(self, rows: np.ndarray, scores: np.ndarray, k: int) -> dict[str, float]:
        if k < len(scores):
            # All that equal the last one kept come along, for the ids to decide among.
            kept = scores >= np.partition(scores, -k)[-k]
            rows, scores = rows[kept], scores[kept]
        order = np.lexsort((self._places[rows], -scores))[:k]
        return {self.ids[row]: score for row, score in zip(rows[order].tolist(), scores[order].tolist(), strict=True)}

    def _padded(self, rows: np.ndarray) -> torch.Tensor:
        """`(rows, tokens, dim)` float32, short passages filled up with their last vector."""
        width = np.arange(int(self.lengths[rows].max()))
        at = self._starts[rows, None] + np.minimum(width, self.lengths[rows, None] - 1)
        return self.tokens[torch.from_numpy(at).to(self.tokens.device)].to(self._device, torch.float32)

    def _rows_by_length(self) -> list[np.ndarray]:
        order = np.argsort(self.lengths, kind="stable")
        return [order[at : at + _PASSAGES_PER_BLOCK] for at in range(0, len(order), _PASSAGES_PER_BLOCK)]

    @cached_property
    def _blocks(self) -> list[tuple[np.ndarray, torch.Tensor]]:
        return [(rows, self._padded(rows)) for rows in self._rows_by_length()]


def late_interaction_run(
    model: MultiVectorEncoder,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    k: int = 100,
    bf16: bool = False,
) -> Run:
    """Score every passage by MaxSim and keep none of its vectors: exhaustive, whatever the size of the corpus."""
    passages = dict(zip(corpus_ids, checked_texts(corpus_texts, "document texts"), strict=True))
    vectors = encode_query_tokens(model, list(queries.values()), bf16=bf16)
    best: Run = {query: {} for query in queries}
    # Passages of similar length together, so that token matrices are padded little.
    for part in _chunks(sorted(passages, key=lambda name: len(passages[name]))):
        chunk = TokenVectors.encoded(model, {name: passages[name] for name in part}, bf16=bf16)
        for query, found in zip(queries, chunk.search(vectors, k), strict=True):
            best[query] = dict(rank(best[query] | found)[:k])
    return best


def rerank_run(
    model: MultiVectorEncoder,
    run: Mapping[str, Mapping[str, float]],
    texts: Mapping[str, str],
    queries: Mapping[str, str],
    k: int = 100,
    *,
    bf16: bool = False,
) -> Run:
    """Order the top k passages of all `queries` in a run by MaxSim; what lies below keeps its order.

    Each passage is encoded once, however many queries have it. The reranked passages have their MaxSim as score; those
    below k get scores that only keep them in order: 1, 2, 3... less than the lowest of the reranked.
    """
    ranked = {query: [name for name, _ in rank(run.get(query, {}))] for query in queries}
    asked = [query for query, names in ranked.items() if names]
    vectors = encode_query_tokens(model, [queries[query] for query in asked], bf16=bf16) if asked else []
    scores: dict[str, dict[str, float]] = {query: {} for query in queries}
    askers: dict[str, list[int]] = {}
    for at, query in enumerate(asked):
        for name in ranked[query][:k]:
            askers.setdefault(name, []).append(at)
    passages = dict(zip(askers, checked_texts(map(texts.__getitem__, askers), "document texts"), strict=True))
    for part in _chunks(sorted(askers, key=lambda name: (len(passages[name]), name))):
        chunk = TokenVectors.encoded(model, {name: passages[name] for name in part}, bf16=bf16)
        pools: dict[int, list[str]] = {}
        for name in part:
            for at in askers[name]:
                pools.setdefault(at, []).append(name)
        for at, pool in pools.items():
            scores[asked[at]] |= chunk.rerank(vectors[at], pool)
    return {query: above(dict(rank(scores[query])), names[k:]) for query, names in ranked.items()}


def above(best: dict[str, float], rest: Iterable[str]) -> dict[str, float]:
    """Reranked passages, and below them those that were not, in their order: 1, 2, 3... less than the lowest."""
    lowest = min(best.values(), default=0.0)
    return best | {passage: lowest - place for place, passage in enumerate(rest, 1)}


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _PASSAGES_PER_CHUNK):
        yield items[start : start + _PASSAGES_PER_CHUNK]


def encode_tokens(
    model: MultiVectorEncoder,
    corpus: Dataset,
    folder: str | Path,
    *,
    bf16: bool = False,
    write: Callable[[str], None] = print,
) -> TokenVectors:
    """Encode a corpus into a folder, or read what is there; a call that was stopped goes on after its last shard.

    A shard is a file of a thousand passages: `tokens` (tokens, dim) float16 and `lengths` (passages,). The folder does
    not record the model: claim it (`tct_hf.files.claim`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    parts, lengths = [], []
    batches: Any = corpus.iter(_PASSAGES_PER_SHARD)
    for number, batch in enumerate(batches):
        ids += batch["id"]
        file = folder / f"{number:05d}.npz"
        if not file.is_file():
            vectors = _encoded(model, "document", batch["text"], bf16)
            for name, one in zip(batch["id"], vectors, strict=True):
                if not len(one) or not bool(one.isfinite().all()):
                    raise ValueError(
                        f"teacher: passage {name!r} has {'a NaN or infinite' if len(one) else 'no'} token vector; "
                        "check the teacher's weights, or set precision to fp32"
                    )
            counts = np.array([len(one) for one in vectors], np.uint32)
            with write_aside(file) as aside, aside.open("wb") as opened:
                np.savez(opened, tokens=torch.cat(vectors).half().cpu().numpy(), lengths=counts)
            write(f"    token vectors of {len(ids):,} of {len(corpus):,} passages")
        try:
            with np.load(file, allow_pickle=False) as shard:
                tokens, counts = shard["tokens"], shard["lengths"]
                if len(counts) != len(batch["id"]) or counts.sum() != len(tokens):
                    raise ValueError(f"{len(tokens)} vectors of {len(counts)} passages")
        except Exception as error:
            raise ValueError(f"{file}: damaged ({error}); delete it, and it is made again") from error
        parts.append(tokens)
        lengths.append(counts)
    return TokenVectors(ids, torch.from_numpy(np.concatenate(parts)), np.concatenate(lengths), model.device)
