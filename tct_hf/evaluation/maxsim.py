"""Late interaction: token vectors of passages, scored by MaxSim, in search and in reranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch.nn.utils.rnn import pad_sequence

from tct_hf.data.rows import checked_texts
from tct_hf.data.shards import digest_of, read_shard, run_shards
from tct_hf.encoding.weights import unpack_half
from tct_hf.retrieval.cut_queries import say_cut_queries
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
    def block_bytes(self) -> int:
        """Bytes that exhaustive search holds in memory."""
        padded = sum(len(rows) * int(self.lengths[rows].max()) for rows in self._rows_by_length)
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

    @cached_property
    def _rows_by_length(self) -> list[np.ndarray]:
        order = np.argsort(self.lengths, kind="stable")
        return [order[at : at + _PASSAGES_PER_BLOCK] for at in range(0, len(order), _PASSAGES_PER_BLOCK)]

    @cached_property
    def _blocks(self) -> list[tuple[np.ndarray, torch.Tensor]]:
        return [(rows, self._padded(rows)) for rows in self._rows_by_length]


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
    folder: Path,
    depends: Mapping[str, Any],
    *,
    names: Mapping[str, str | None] | None = None,
    bf16: bool = False,
    write: Callable[[str], None] = print,
) -> TokenVectors:
    """Encode a corpus into shards of a folder, in float16, or read what is there; see `run_shards`."""

    def make(passages: Sequence[tuple[str, str]]) -> dict[str, Any]:
        vectors = _encoded(model, "document", [text for _, text in passages], bf16)
        for (name, _), one in zip(passages, vectors, strict=True):
            if not len(one) or not bool(one.isfinite().all()):
                raise ValueError(
                    f"teacher: passage {name!r} has {'a NaN or infinite' if len(one) else 'no'} token vector; "
                    "check the teacher's weights, or set precision to fp32"
                )
        tokens = torch.cat(vectors).half().cpu().numpy()
        write(f"    token vectors of {len(passages):,} passages more")
        rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), tokens.shape[1])
        return {"tokens": pa.ListArray.from_arrays(np.cumsum([0, *map(len, vectors)], dtype=np.int32), rows)}

    batches: Any = corpus.iter(_PASSAGES_PER_SHARD)
    passages = (list(zip(batch["id"], batch["text"], strict=True)) for batch in batches)
    parts = ((digest_of(chain.from_iterable(part)), part) for part in passages)
    manifest = run_shards(folder, depends, parts, make, names=names)
    shards = [read_shard(folder, at)["tokens"].combine_chunks() for at in range(len(manifest["shards"]))]
    lengths = np.concatenate([np.diff(shard.offsets) for shard in shards])
    dim = shards[0].type.value_type.list_size
    tokens = np.concatenate([shard.values.values.to_numpy().reshape(-1, dim) for shard in shards])
    return TokenVectors(corpus["id"], torch.from_numpy(tokens), lengths, model.device)
