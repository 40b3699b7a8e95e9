"""Texts to vectors in memory: tokenised once, sorted by length, encoded in passes under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from torch import Tensor

# bfloat16 is good enough where the worst of the probed texts keeps this cosine to its float32 vector.
ENOUGH_COSINE = 0.9999
PROBE_TEXTS = 48

# Texts that are tokenised, then sorted by their number of tokens, together.
POOL = 4096
# Texts a call of the tokenizer; sorted by characters before, so that its own padding stays small.
_TOKENISED_TOGETHER = 256
# Measured on the CPU with a 6-layer MiniLM: 1,024 to 2,048 tokens are alike, 16,384 leave the caches and are slower.
# Accelerators are filled by tens of thousands: an estimate, not a measurement.
CPU_TOKENS = 2048
ACCELERATOR_TOKENS = 32_768
# A sparse student computes a score of every term for every token, of which pooling makes a copy: with 30,522 terms,
# 125 MB each of 1,024 tokens, and 1 GB of 8,192.
SPARSE_CPU_TOKENS = 1024
SPARSE_ACCELERATOR_TOKENS = 8192


def encode_texts(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    *,
    task: str,
    bf16: bool = False,
    batch_size: int | None = None,
    tokens_per_pass: int | None = None,
) -> Any:
    """Encode texts with the model's own prompt of a task: the vectors of `encode_query` or `encode_document`.

    Texts are tokenised once, sorted by their number of tokens and encoded in passes of like length, so that hardly
    any padding is computed. A text without words is encoded like any other.

    Args:
        model: of one vector a text, dense or sparse.
        texts: queries or passages.
        task: "query" or "document".
        bf16: compute in bfloat16.
        batch_size: at most so many texts a forward pass; no limit of its own when None.
        tokens_per_pass: at most so many tokens a forward pass, padding included (a single text may be longer); by
            the model's device when None.

    Returns:
        `(texts, dim)` float32, in the order of `texts`: an array, or of a sparse encoder a scipy CSR matrix.

    Raises:
        ValueError: an unknown task, or a limit below 1.
    """
    return encode(model, texts, task=task, bf16=bf16, batch_size=batch_size, tokens_per_pass=tokens_per_pass)


def encode(
    model: Any,
    texts: Sequence[str],
    *,
    task: str,
    bf16: bool,
    batch_size: int | None = None,
    tokens_per_pass: int | None = None,
    done: Callable[[int], None] | None = None,
) -> Any:
    """As :func:`encode_texts`; `done` is told after every pass how many texts it held."""
    import numpy as np
    import torch

    if task not in ("query", "document"):
        raise ValueError(f'task={task!r} is not known: use "query" or "document".')
    for name, limit in (("batch_size", batch_size), ("tokens_per_pass", tokens_per_pass)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}.")
    device = model.device
    budget = budget_of(model, tokens_per_pass)
    model.eval()
    sparse = is_sparse_encoder(model)
    active = model.max_active_dims if sparse else None
    options = {} if active is None else {"max_active_dims": active}
    pools: list[Any] = []
    # One context for all passes: weights are cast to bfloat16 once, not once a pass.
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for start in range(0, len(texts), POOL):
            pool = list(texts[start : start + POOL])
            pending: list[tuple[list[int], Tensor]] = []
            for rows, features in _passes(model, pool, task, budget, batch_size):
                inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in features.items()}
                embeddings = model(inputs, task=task, **options)["sentence_embedding"]
                if sparse:
                    # At once: a pool of vectors with their zeros would take 500 MB.
                    embeddings = _sparsified(embeddings, active)
                elif model.truncate_dim is not None:
                    embeddings = embeddings[..., : model.truncate_dim]
                # Copied to the host after the pool: a copy a pass would have an accelerator wait for each.
                pending.append((rows, embeddings.float()))
                if done is not None:
                    done(len(rows))
            if sparse:
                pools.append(_in_order(pending))
                continue
            found = np.empty((len(pool), pending[0][1].shape[1]), dtype=np.float32)
            for rows, embeddings in pending:
                found[rows] = embeddings.cpu().numpy()
            pools.append(found)
    if sparse:
        return stacked(pools, int(model.get_embedding_dimension() or 0))
    if not pools:
        return np.empty((0, int(model.get_embedding_dimension() or 0)), dtype=np.float32)
    return np.concatenate(pools) if len(pools) > 1 else pools[0]


def is_sparse_encoder(model: Any) -> bool:
    """Whether a model gives sparse vectors over a vocabulary."""
    from sentence_transformers import SparseEncoder

    return isinstance(model, SparseEncoder)


def _sparsified(embeddings: Tensor, active: int | None) -> Tensor:
    """Vectors without their zeros, at most `active` of their weights kept, on the device they are on."""
    from sentence_transformers.util import select_max_active_dims

    return select_max_active_dims(embeddings, max_active_dims=active).to_sparse()


def _in_order(pending: Sequence[tuple[list[int], Tensor]]) -> csr_matrix:
    """The sparse vectors of all passes over a pool, by row."""
    import numpy as np

    from tct_hf.retrieval.sparse_rows import of_torch

    found = stacked([of_torch(vectors) for _, vectors in pending], pending[0][1].shape[1])
    return found[np.argsort(np.concatenate([rows for rows, _ in pending]))]


def finite_rows(vectors: Any) -> np.ndarray:
    """Whether all of a row is finite, `(rows,)` bool, of an array or CSR rows."""
    import numpy as np

    if isinstance(vectors, np.ndarray):
        whole: np.ndarray = np.asarray(np.isfinite(vectors).all(axis=1))
        return whole
    finite = np.ones(vectors.shape[0], bool)
    finite[np.repeat(np.arange(len(finite)), np.diff(vectors.indptr))[~np.isfinite(vectors.data)]] = False
    return finite


def stacked(parts: Sequence[csr_matrix], dim: int) -> csr_matrix:
    """CSR matrices one upon the other; one without rows, of `dim` columns, where there is none."""
    import numpy as np
    from scipy.sparse import csr_matrix, vstack

    if not parts:
        return csr_matrix((0, dim), dtype=np.float32)
    return vstack(parts, format="csr") if len(parts) > 1 else parts[0]


def budget_of(model: Any, tokens_per_pass: int | None) -> int:
    """Tokens a forward pass: as asked for, or by the model's device and kind."""
    if tokens_per_pass:
        return tokens_per_pass
    if is_sparse_encoder(model):
        return SPARSE_CPU_TOKENS if model.device.type == "cpu" else SPARSE_ACCELERATOR_TOKENS
    return CPU_TOKENS if model.device.type == "cpu" else ACCELERATOR_TOKENS


def prompt_of(model: Any, task: str) -> str | None:
    """The prompt that `encode_query` and `encode_document` would take."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in model.prompts), model.default_prompt_name)
    return model.prompts[name] if name else None


def _passes(
    model: Any, texts: Sequence[str], task: str, budget: int, batch_size: int | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Row numbers and features of each forward pass over some texts."""
    from tct_hf.batches import padding_of, passes, token_lengths

    prompt = prompt_of(model, task)
    by_characters = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    tokenised: list[tuple[dict[str, Tensor], int, int]] = []  # of a row: its block, its place there, its length
    owners: list[int] = []
    shared: dict[str, Any] = {}
    for first in range(0, len(by_characters), _TOKENISED_TOGETHER):
        block = by_characters[first : first + _TOKENISED_TOGETHER]
        features = dict(model.preprocess([texts[row] for row in block], prompt=prompt, task=task))
        if not _can_be_cut(features):
            # Packed for flash attention, padded on the left, not text: the model's own batches, of like length.
            size = min(batch_size or 32, 32)
            for start in range(0, len(block), size):
                part = block[start : start + size]
                yield part, dict(model.preprocess([texts[row] for row in part], prompt=prompt, task=task))
            continue
        matrices = {key: value for key, value in features.items() if _is_matrix(value)}
        shared = {key: value for key, value in features.items() if key not in matrices}
        tokenised += [(matrices, place, length) for place, length in enumerate(token_lengths(features))]
        owners += block
    if not tokenised:
        return
    filler = getattr(getattr(model, "tokenizer", None), "pad_token_id", None) or 0
    # From the longest to the shortest: a pass that doesn't fit in memory fails at once.
    for group in reversed(passes([length for *_, length in tokenised], budget, padding_of(model.device))):
        size = batch_size or len(group)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield [owners[item] for item in part], _assemble([tokenised[item] for item in part], filler) | shared


def _is_matrix(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == 2


def _can_be_cut(features: Mapping[str, Any]) -> bool:
    """Whether features are text padded on the right, each tensor `(rows, tokens)`."""
    import torch

    mask: Any = features.get("attention_mask")
    if not _is_matrix(mask) or not bool(mask[:, 0].all()):
        return False
    tensors = [v for key, v in features.items() if isinstance(v, torch.Tensor) and key != "prompt_length"]
    return all(tensor.shape == mask.shape for tensor in tensors)


def _assemble(rows: Sequence[tuple[Mapping[str, Tensor], int, int]], filler: int) -> dict[str, Tensor]:
    """The features of some tokenised rows, as wide as the longest."""
    import torch

    width = max(length for *_, length in rows)
    made: dict[str, torch.Tensor] = {}
    for key, like in rows[0][0].items():
        made[key] = torch.full((len(rows), width), filler if key == "input_ids" else 0, dtype=like.dtype)
        for number, (matrices, place, length) in enumerate(rows):
            made[key][number, :length] = matrices[key][place, :length]
    return made


def choose_precision(
    model: SentenceTransformer | SparseEncoder, texts: Sequence[str], *, task: str = "document"
) -> tuple[bool, dict[str, Any]]:
    """Decide whether to encode in bfloat16: where the hardware has it and the vectors stay the same.

    Args:
        model: of one vector a text, dense or sparse.
        texts: some of the texts to encode; at most 48 of them are probed.
        task: "query" or "document".

    Returns:
        Whether bfloat16 is chosen, and why, JSON-ready: "hardware" and, where it was probed, "texts" and the lowest
        "cosine" between the two vectors of a text.
    """
    import numpy as np

    from tct_hf.encoding.precision import has_bfloat16

    if not has_bfloat16(model.device):
        return False, {"hardware": False}
    step = max(1, len(texts) // PROBE_TEXTS)
    probed = list(texts[::step][:PROBE_TEXTS])
    if not probed:
        return False, {"hardware": True, "texts": 0}
    full, half = (encode_texts(model, probed, task=task, bf16=bf16).astype(np.float64) for bf16 in (False, True))
    if is_sparse_encoder(model):
        full, half = full.toarray(), half.toarray()  # of some dozen texts
    lengths = np.linalg.norm(full, axis=1) * np.linalg.norm(half, axis=1)
    same = (full == half).all(axis=1)  # the zero vector of a text without words has no cosine
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.where(same, 1.0, (full * half).sum(axis=1) / lengths)
    # A NaN or an infinity on one side only refuses bfloat16; on both, the encoding itself names the passage.
    lowest = float(np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0).min())
    return lowest >= ENOUGH_COSINE, {"hardware": True, "texts": len(probed), "cosine": lowest}
