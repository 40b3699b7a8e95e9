"""Texts to vectors: sorted by length, under a token budget, by torch or OpenVINO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.util import select_max_active_dims
from torch import Tensor

from tct_hf.batches import padding_of, parts_of_similar_length, stack_columns
from tct_hf.data.rows import checked_texts
from tct_hf.encoding.engine import OpenVINOEngine, has_openvino
from tct_hf.encoding.routes import passage_model, prompt_of, query_model
from tct_hf.encoding.static import static_modules
from tct_hf.encoding.weights import has_bfloat16, unpack_half
from tct_hf.retrieval.cut_queries import filled_rows, say_cut_queries
from tct_hf.retrieval.vectors import of_torch

logger = logging.getLogger(__name__)

# bfloat16 is good enough where the worst of the probed texts keeps this cosine to its float32 vector.
ENOUGH_COSINE = 0.9999
PROBE_TEXTS = 48
# OpenVINO's graph takes seconds to make: fewer passages are encoded sooner without.
ENOUGH_TEXTS = 1000

# Texts that are tokenised, then sorted by their number of tokens, together.
POOL = 4096
# Texts a call of the tokenizer; sorted by characters before, so that its own padding stays small.
_TOKENISED_TOGETHER = 256
_OWN_BATCH = 32  # texts a pass where features can't be cut
# Measured on the CPU with a 6-layer MiniLM: 1,024 and 2,048 tokens take the same time, 16,384 more.
# Accelerators are filled by tens of thousands: an estimate, not a measurement.
CPU_TOKENS = 2048
ACCELERATOR_TOKENS = 32_768
# A sparse student computes a score of every term for every token, of which pooling makes a copy: with 30,522 terms,
# 125 MB each of 1,024 tokens, and 1 GB of 8,192.
_SPARSE_TOKENS = (1024, 8192)  # on the CPU, on an accelerator


def encode_texts(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    *,
    task: str,
    bf16: bool = False,
    tokens_per_pass: int | None = None,
    done: Callable[[int], None] | None = None,
    engine: OpenVINOEngine | None = None,
) -> Any:
    """Encode texts with the model's own prompt of a task: the vectors of `encode_query` or `encode_document`.

    Texts are tokenised once, sorted by their number of tokens and encoded in passes of similar length, so that hardly
    any padding is computed. A text without words is encoded like any other. A model in half precision is brought to
    float32 first, and stays so. An `engine` made of the model computes instead of it, in its own precision.

    Returns:
        `(texts, dim)` float32, in the order of `texts`: an array, or of a sparse encoder a scipy CSR matrix.
    """
    if task not in ("query", "document"):
        raise ValueError(f'task={task!r} is not known: use "query" or "document".')
    if (static := static_modules(model, task)) is not None:
        return _looked_up(model, static, texts, task, done)
    if engine is not None and task == "query" and len(texts) == 1:
        vector = engine.question(*checked_texts(texts, "texts (task query)", 0))
        if vector is not None:
            return vector[:, : model.truncate_dim]
    sparse = is_sparse_encoder(model)
    device = model.device
    budget = budget_of(model, tokens_per_pass)
    if engine is None:
        model.eval()
        unpack_half(model)
    active: Any = model.max_active_dims if sparse else None
    options: dict[str, Any] = {} if active is None else {"max_active_dims": active}
    stack: Any = partial(vstack, format="csr") if sparse else np.concatenate
    pools: list[Any] = []
    filled: list[str] = []
    # One context for all passes: weights are cast to bfloat16 once, not once a pass.
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for start in range(0, len(texts), POOL):
            pool = checked_texts(texts[start : start + POOL], f"texts (task {task})", start)
            pending: list[tuple[list[int], Tensor]] = []
            for rows, features in _passes(model, pool, task, budget):
                if task == "query":
                    filled += [pool[rows[row]] for row in filled_rows(model, features)]
                inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in features.items()}
                embeddings = (engine or model)(inputs, task=task, **options)["sentence_embedding"]
                if sparse:
                    # At once: a pool of vectors with their zeros would take 500 MB.
                    embeddings = select_max_active_dims(embeddings, max_active_dims=active).to_sparse()
                elif model.truncate_dim is not None:
                    embeddings = embeddings[..., : model.truncate_dim]
                # Copied to the host after the pool: a copy a pass would have an accelerator wait for each.
                pending.append((rows, embeddings.float()))
                if done is not None:
                    done(len(rows))
            if engine is not None:
                engine.wait()
            order = np.argsort(np.concatenate([rows for rows, _ in pending]))
            pools.append(stack([of_torch(one) if sparse else one.cpu().numpy() for _, one in pending])[order])
    say_cut_queries(model, filled, len(texts))
    none = np.empty((0, int(model.get_embedding_dimension() or 0)), dtype=np.float32)
    return stack(pools or [csr_matrix(none) if sparse else none])


def _looked_up(
    model: Any, modules: Sequence[Any], texts: Sequence[str], task: str, done: Callable[[int], None] | None
) -> np.ndarray:
    """Vectors of a static model: nothing is padded, cut or rounded, and a question takes less than 0.1 ms."""
    prompt, table = prompt_of(model, task) or "", modules[0].embedding.weight.detach().numpy()
    found = []
    for start in range(0, len(texts), POOL):
        pool = [prompt + text for text in checked_texts(texts[start : start + POOL], f"texts (task {task})", start)]
        encoded = modules[0].tokenizer.encode_batch_fast(pool, add_special_tokens=False)
        vectors = np.stack([np.add.reduce(table[one.ids]) / np.float32(max(1, len(one))) for one in encoded])
        for module in modules[1:]:
            if type(module) is Normalize:  # 5 microseconds instead of 40
                vectors /= np.maximum(np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None], 1e-12)
            else:
                with torch.inference_mode():
                    vectors = module({"sentence_embedding": torch.from_numpy(vectors)})["sentence_embedding"].numpy()
        found.append(vectors[:, : model.truncate_dim])
        if done is not None:
            done(len(pool))
    if not found:
        return np.empty((0, int(model.get_embedding_dimension() or 0)), np.float32)
    return found[0] if len(found) == 1 else np.concatenate(found)


def is_sparse_encoder(model: Any) -> bool:
    """Whether a model gives sparse vectors over a vocabulary; refuses what gives no vector a text."""
    if not isinstance(model, (SentenceTransformer, SparseEncoder)):
        raise ValueError(
            f"The model is a {type(model).__name__}, not an encoder of one vector a text: give a SentenceTransformer "
            "or a SparseEncoder (of a ColBERT, student_from_teacher makes one)."
        )
    return isinstance(model, SparseEncoder)


def budget_of(model: Any, tokens_per_pass: int | None) -> int:
    """Tokens a forward pass: as asked for, or by the model's device and kind."""
    if tokens_per_pass is not None:
        if tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass must be at least 1, got {tokens_per_pass}.")
        return tokens_per_pass
    on_cpu, elsewhere = _SPARSE_TOKENS if is_sparse_encoder(model) else (CPU_TOKENS, ACCELERATOR_TOKENS)
    return on_cpu if model.device.type == "cpu" else elsewhere


def _passes(model: Any, texts: Sequence[str], task: str, budget: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Row numbers and features of each forward pass over some texts."""

    def tokenised(size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for part in (by_characters[start : start + size] for start in range(0, len(texts), size)):
            yield part, dict(model.preprocess([texts[row] for row in part], prompt=prompt_of(model, task), task=task))

    by_characters = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    merged = stack_columns([features for _, features in tokenised(_TOKENISED_TOGETHER)])
    if merged is None or not bool(merged["attention_mask"][:, 0].all()):
        # Packed for flash attention, padded on the left, not text: the model's own batches, of similar length.
        yield from tokenised(_OWN_BATCH)
        return
    parts = list(parts_of_similar_length(merged, budget, padding_of(model.device)))
    # From the longest to the shortest: a pass that doesn't fit in memory fails at once.
    for rows, features in reversed(parts):
        yield [by_characters[row] for row in rows.tolist()], features


def choose_precision(model: SentenceTransformer | SparseEncoder, texts: Sequence[str]) -> Literal["bf16", "fp32"]:
    """What to encode passages in: "bf16" where the hardware has it and the vectors of some stay the same."""
    probed = _probed(texts)
    if not probed or not has_bfloat16(model.device):
        return "fp32"
    full, half = (encode_texts(model, probed, task="document", bf16=bf16) for bf16 in (False, True))
    return "bf16" if _lowest_cosine(full, half) >= ENOUGH_COSINE else "fp32"


def choose_engine(
    model: Any, texts: Sequence[str], backend: str = "auto", precision: str = "auto"
) -> tuple[OpenVINOEngine | None, str]:
    """What to encode passages with, None for torch, and in what, "bf16" or "fp32".

    OpenVINO where it is installed, for dense students on the CPU and enough passages, if the vectors of some are the
    same as torch's in float32; torch elsewhere, which a line says where OpenVINO was tried.
    """
    if backend != "openvino" and static_modules(model, "document") is not None:
        return None, "fp32" if precision == "auto" else precision
    if backend == "openvino" or len(texts) >= ENOUGH_TEXTS:
        engine, tried = find_engine(model, texts, backend, precision)
        if engine is not None:
            return engine, tried
    return None, choose_precision(model, texts) if precision == "auto" else precision


def find_engine(
    model: Any, texts: Sequence[str], backend: str, precision: str, *, low_latency: bool = False
) -> tuple[OpenVINOEngine | None, str]:
    """An engine whose vectors of some passages are the same as torch's in float32, and what it computes in.

    Of a model with two routes it computes passages, or with low latency questions. None where `backend` is "torch", or
    "auto" and there is none, which a line says where it was tried.

    Raises:
        ValueError: `backend` is "openvino", and there is none.
        ImportError: it is, and OpenVINO is missing.
    """
    model = query_model(model) if low_latency else passage_model(model)
    usable = model.device.type == "cpu" and not is_sparse_encoder(model) and isinstance(model[0], Transformer)
    if backend != "openvino" and not (backend == "auto" and usable and has_openvino()):
        return None, precision
    known = ("bf16", "fp32") if has_bfloat16(model.device) else ("fp32",)
    probed, why = _probed(texts), f"the cosines of its vectors to torch's are below {ENOUGH_COSINE}"

    def vectors(engine: OpenVINOEngine | None = None) -> Any:
        found = encode_texts(model, probed, task="document", engine=engine)
        if not low_latency:
            return found
        return np.concatenate([found, encode_texts(model, ["a question"], task="query", engine=engine)])

    full, engine = vectors(), None
    try:
        for tried in known if precision == "auto" else (precision,):
            if engine is None:
                engine = OpenVINOEngine(model, bf16=tried == "bf16", low_latency=low_latency)
            else:
                engine.compile(bf16=tried == "bf16")
            if _lowest_cosine(full, vectors(engine)) >= ENOUGH_COSINE:
                return engine, tried
    except Exception as error:  # OpenVINO's errors have no common class
        if backend == "openvino" and isinstance(error, ImportError):
            raise
        why = str(error)
    if backend == "openvino":
        raise ValueError(f"backend: OpenVINO does not take this model, use torch: {why}")
    logger.warning(f"Encoding with torch, since OpenVINO does not take this model: {why}")
    return None, precision


def _probed(texts: Sequence[str]) -> list[str]:
    some = texts[:: max(1, len(texts) // PROBE_TEXTS)][:PROBE_TEXTS]
    # With the longest: the graph of an encoder that attends within blocks may hold for short texts only.
    return [*some, max(texts, key=len)] if some else []


def _lowest_cosine(full: Any, half: Any) -> float:
    if not isinstance(full, np.ndarray):
        full, half = full.toarray(), half.toarray()  # of some dozen texts
    full, half = full.astype(np.float64), half.astype(np.float64)
    lengths = np.linalg.norm(full, axis=1) * np.linalg.norm(half, axis=1)
    same = (full == half).all(axis=1)  # the zero vector of a text without words has no cosine
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.where(same, 1.0, (full * half).sum(axis=1) / lengths)
    # A NaN or an infinity on one side only refuses bfloat16; on both, the encoding itself names the passage.
    return float(np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0).min())
