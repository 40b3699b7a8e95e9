"""All token vectors of a corpus, as late interaction has to keep them: written once, then scored by MaxSim.

00000.npy           token vectors of a thousand passages, (tokens, dim) float16, passage after passage
00000.lengths.npy   tokens of each passage; written after the vectors, so that it announces them
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

_PASSAGES_PER_SHARD = 1024
# Passages multiplied at a time: a product of 128 x 150 x 36 numbers stays in the caches of a processor.
_PASSAGES_PER_BLOCK = 128
# Scores of so many queries and of all passages are held at a time.
_QUERIES_TOGETHER = 256


class TokenVectors:
    """The token vectors of a corpus, searched exhaustively, or by row to rerank.

    Vectors are kept in float16 and multiplied in float32. Blocks of passages of like length, padded by repeating a
    passage's last vector, which changes no maximum, are made of them for exhaustive search when it is first asked for.

    Args:
        ids: passage ids.
        tokens: `(tokens, dim)` float16, passage after passage.
        lengths: `(passages,)` tokens of each passage, 1 or more.
        device: that multiplies.
    """

    def __init__(self, ids: Sequence[str], tokens: np.ndarray, lengths: np.ndarray, device: Any = "cpu") -> None:
        import numpy as np

        self.ids = list(ids)
        self.tokens = tokens
        self.lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._device = device
        self._blocks: list[tuple[np.ndarray, torch.Tensor]] | None = None
        places = np.empty(len(self.ids), np.int64)
        places[sorted(range(len(self.ids)), key=self.ids.__getitem__)] = np.arange(len(self.ids))
        self._places = places  # of each passage in the order of ids, for ties

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors: tokens x dim x 2."""
        return int(self.tokens.nbytes)

    @property
    def block_bytes(self) -> int:
        """Bytes that exhaustive search holds in memory."""
        return sum(block.element_size() * block.nelement() for _, block in self._in_blocks())

    def search(self, queries: Sequence[torch.Tensor], k: int) -> list[dict[str, float]]:
        """Score every passage.

        Args:
            queries: `(tokens, dim)` each.
            k: passages a query.

        Returns:
            Passage id to MaxSim of each query, best first, equal scores by id.
        """
        import numpy as np
        import torch

        best: list[dict[str, float]] = []
        rows_of_all = np.arange(len(self.ids))
        for start in range(0, len(queries), _QUERIES_TOGETHER):
            part = queries[start : start + _QUERIES_TOGETHER]
            found = np.empty((len(part), len(self.ids)), np.float32)
            with torch.inference_mode():
                moved = [query.to(self._device, torch.float32) for query in part]
                for rows, block in self._in_blocks():
                    for number, query in enumerate(moved):
                        found[number, rows] = _maxsim(query, block).cpu().numpy()
            best += [self._best(rows_of_all, scores, k) for scores in found]
        return best

    def rerank(self, query: torch.Tensor, rows: np.ndarray) -> dict[str, float]:
        """Score some passages.

        Args:
            query: `(tokens, dim)`.
            rows: their row numbers.

        Returns:
            Passage id to MaxSim, best first, equal scores by id.
        """
        import torch

        if not len(rows):
            return {}
        with torch.inference_mode():
            block = self._padded(rows)
            scores = _maxsim(query.to(self._device, torch.float32), block).cpu().numpy()
        return self._best(rows, scores, len(rows))

    def _best(self, rows: np.ndarray, scores: np.ndarray, k: int) -> dict[str, float]:
        import numpy as np

        if k < len(scores):
            # All that equal the last one kept come along, for the ids to decide among.
            kept = scores >= np.partition(scores, -k)[-k]
            rows, scores = rows[kept], scores[kept]
        order = np.lexsort((self._places[rows], -scores))[:k]
        return {self.ids[row]: score for row, score in zip(rows[order].tolist(), scores[order].tolist(), strict=True)}

    def _padded(self, rows: np.ndarray) -> torch.Tensor:
        """`(rows, tokens, dim)` float32, short passages filled up with their last vector."""
        import numpy as np
        import torch

        width = np.arange(int(self.lengths[rows].max()))
        at = self._starts[rows, None] + np.minimum(width, self.lengths[rows, None] - 1)
        return torch.from_numpy(self.tokens[at]).to(self._device, torch.float32)

    def _in_blocks(self) -> list[tuple[np.ndarray, torch.Tensor]]:
        import numpy as np

        if self._blocks is None:
            order = np.argsort(self.lengths, kind="stable")
            parts = [order[at : at + _PASSAGES_PER_BLOCK] for at in range(0, len(order), _PASSAGES_PER_BLOCK)]
            self._blocks = [(part, self._padded(part)) for part in parts]
        return self._blocks


def _maxsim(query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """`(passages,)` of a query `(tokens, dim)` and passages `(passages, tokens, dim)`."""
    passages, tokens, dim = block.shape
    products = block.reshape(passages * tokens, dim) @ query.T
    return products.view(passages, tokens, len(query)).amax(1).sum(1)


def encode_tokens(
    model: MultiVectorEncoder,
    corpus: Dataset,
    folder: str | Path,
    *,
    bf16: bool = False,
    batch_size: int = 32,
    write: Callable[[str], None] = print,
) -> TokenVectors:
    """Encode a corpus into a folder, or read what is there; a call that was stopped goes on after its last shard.

    The folder says nothing of the model: claim it (`tct_hf.files.claim`).

    Args:
        model: of one vector a token.
        corpus: columns id and text.
        folder: of the shards.
        bf16: compute in bfloat16.
        batch_size: texts a forward pass.
        write: takes lines of progress.

    Returns:
        The vectors, on the model's device when they are scored.

    Raises:
        ValueError: a passage has a NaN vector, or a shard is damaged.
        OSError: the folder can't be written.
    """
    import numpy as np
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    parts, lengths = [], []
    for number, batch in enumerate(_batches(corpus)):
        ids += batch["id"]
        tokens_file, lengths_file = folder / f"{number:05d}.npy", folder / f"{number:05d}.lengths.npy"
        if not (tokens_file.is_file() and lengths_file.is_file()):
            autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)
            with torch.inference_mode(), autocast:
                encoded: Any = model.encode_document(batch["text"], batch_size=batch_size, show_progress_bar=False)
            vectors = [one.float().cpu().numpy() for one in encoded]
            for name, one in zip(batch["id"], vectors, strict=True):
                if not np.isfinite(one).all() or not len(one):
                    raise ValueError(
                        f"teacher: passage {name!r} has {'a NaN or infinite' if len(one) else 'no'} token vector; "
                        "check the teacher's weights, or set precision to fp32"
                    )
            _write(tokens_file, np.concatenate(vectors).astype(np.float16))
            _write(lengths_file, np.array([len(one) for one in vectors], np.uint32))
            write(f"    token vectors of {len(ids):,} of {len(corpus):,} passages")
        try:
            part, counts = (np.load(file, allow_pickle=False) for file in (tokens_file, lengths_file))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{tokens_file}: damaged ({error}); delete it, and it is made again") from error
        if len(counts) != len(batch["id"]) or counts.sum() != len(part):
            raise ValueError(f"{tokens_file}: {len(part)} vectors don't fit {lengths_file.name}; delete both")
        parts.append(part)
        lengths.append(counts)
    return TokenVectors(ids, np.concatenate(parts), np.concatenate(lengths), model.device)


def _batches(corpus: Dataset) -> Iterator[dict[str, list[str]]]:
    yield from corpus.iter(_PASSAGES_PER_SHARD)


def _write(path: Path, array: np.ndarray) -> None:
    import numpy as np

    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as file:
            np.save(file, array, allow_pickle=False)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
