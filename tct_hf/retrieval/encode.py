"""A corpus to vectors: shards on disk that survive a kill and are shared out among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.data.passages import Passage, checked_passages, passage_shards
from tct_hf.encoding.digests import tokenizer_digest, weights_digest
from tct_hf.progress import PassageProgress, print_at_once
from tct_hf.retrieval import vectors as stored
from tct_hf.retrieval.text_vectors import (
    POOL,
    budget_of,
    choose_precision,
    encode,
    encode_texts,
    finite_rows,
    is_sparse_encoder,
    prompt_of,
)

if TYPE_CHECKING:
    from accelerate import PartialState
    from sentence_transformers import SentenceTransformer, SparseEncoder

__all__ = ["describe_model", "encode_corpus", "encode_texts"]

Precision = Literal["auto", "bf16", "fp32"]


def encode_corpus(
    model: SentenceTransformer | SparseEncoder,
    corpus: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    *,
    model_id: str | None = None,
    precision: Precision = "auto",
    dtype: Literal["float32", "float16"] = "float32",
    shard_size: int = POOL,
    tokens_per_pass: int | None = None,
    allow_empty: bool = False,
    total: int | None = None,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
    write_every: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Encode a corpus into a folder of shards, in the corpus's order, in memory that hardly grows with it.

    A shard is `00000.npy` (vectors) and `00000.json` (ids and checksums), written aside and renamed; a call that finds
    shards of an earlier one goes on after them, once it has seen that they are of the same model, settings and
    passages. `manifest.json` comes last; `load_vectors` reads the folder.
    What grows with the corpus is 16 bytes a passage, by which an id that comes twice is found.

    Several processes split the shards among them, each given the whole corpus in the same order. Vectors depend
    neither on the number of processes nor on interruptions, as long as hardware, threads and libraries are the same.

    Args:
        model: of one vector a text, dense or sparse, on the device that encodes.
        corpus: passages with "id" and "text"; a data set, or any iterable, read once.
        out_dir: the folder; made when missing.
        model_id: name or path of the model, recorded and shown; by default what the encoder was loaded from.
        precision: to compute in. "auto": bfloat16 where the hardware has it and a few dozen passages of the first
            shard keep a cosine of 0.9999 to float32; a folder that was begun keeps its precision.
        dtype: to store vectors in; those of a sparse encoder only in float32.
        shard_size: passages a shard: what is lost at most when a process is killed, and what memory holds.
        tokens_per_pass: as `encode_texts`; recorded, since the last bits of a vector depend on it.
        allow_empty: encode passages without words instead of refusing them (a student's vector of one is zero).
        total: passages in all, for the time left, where the corpus has no length.
        state: the processes of a distributed run; one process when None.
        write: takes a line of progress without its line end; printed by the main process when None.
        write_every: seconds between such lines.
        clock: seconds from a fixed moment, never going back.

    Returns:
        The manifest; see `load_vectors`.

    Raises:
        ValueError: an unknown setting; a folder with vectors of another model, other settings or another corpus,
            naming what differs; an empty corpus; a passage without id, text or words, with the id of an earlier one,
            or with a NaN vector, naming it.
        OSError: the folder can't be written, or holds something else.
    """
    import numpy as np

    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f'precision={precision!r} is not known: use "auto", "bf16" or "fp32".')
    if dtype not in ("float32", "float16"):
        raise ValueError(f'dtype={dtype!r} is not known: use "float32" or "float16".')
    sparse = is_sparse_encoder(model)
    if sparse and dtype != "float32":
        raise ValueError(f'dtype={dtype!r}: the weights of sparse vectors are stored as they are: use "float32".')
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}.")
    if tokens_per_pass is not None and tokens_per_pass < 1:
        raise ValueError(f"tokens_per_pass must be at least 1, got {tokens_per_pass}.")
    folder = Path(out_dir)
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    shards = passage_shards(checked_passages(corpus, allow_empty), shard_size)
    first = next(shards, None)
    if first is None:
        raise ValueError("corpus: it has no passage; check its source.")
    settings = describe_model(model, model_id) | {
        "dtype": dtype,
        "shard_size": shard_size,
        "device": model.device.type,
        "tokens_per_pass": budget_of(model, tokens_per_pass),
    }
    if sparse:
        settings["layout"] = "sparse"
    if rank == 0:
        stored.begin(folder, settings, precision, lambda: choose_precision(model, [text for _, text in first]))
    if state is not None:
        state.wait_for_everyone()
    plan = stored.read_plan(folder)
    finished = stored.finished_shards(folder)
    if state is not None:  # nobody writes a shard before all have seen which are there
        state.wait_for_everyone()

    if total is None and hasattr(corpus, "__len__"):
        total = len(corpus)  # type: ignore[arg-type]
    progress = PassageProgress(total, processes, write or print_at_once, write_every, clock, enabled=rank == 0)
    number, missing, count = 0, 0, 0
    shard: list[Passage] | None = first
    while shard:
        if number in finished:
            # All processes compare passages, so that none adds to a folder that another refuses; files are read once.
            stored.check_shard(folder, number, shard, vectors=number % processes == rank)
            progress.skipped(len(shard))
        else:
            if missing % processes == rank:
                bf16 = plan["precision"] == "bf16"
                vectors = encode(
                    model,
                    [text for _, text in shard],
                    task="document",
                    bf16=bf16,
                    tokens_per_pass=tokens_per_pass,
                    done=progress.encoded,
                ).astype(np.dtype(dtype))
                _refuse_not_finite(vectors, shard, plan)
                stored.write_shard(folder, number, shard, vectors)
            missing += 1
        count += len(shard)
        number += 1
        shard = next(shards, None)
    if state is not None:
        state.wait_for_everyone()
    progress.finish(count)
    if rank == 0:
        stored.finish(folder, number, count, kept=finished)
    if state is not None:
        state.wait_for_everyone()
    return stored.read_manifest(folder)


def describe_model(model: SentenceTransformer | SparseEncoder, model_id: str | None = None) -> dict[str, Any]:
    """What the vectors of a model depend on, JSON-ready.

    Args:
        model: of one vector a text, dense or sparse.
        model_id: its name or path; by default what its encoder was loaded from.

    Returns:
        "model": "id", "weights_sha256" over names and values of all weights, and a digest of each part of "encoding";
        "encoding": prompt, tokenizer, lengths and the configuration of each module.
    """
    import hashlib
    import json
    import math

    if model_id is None:
        model_id = getattr(getattr(getattr(model[0], "model", None), "config", None), "_name_or_path", None)
    sparse = is_sparse_encoder(model)
    modules = [{"type": type(module).__name__, **getattr(module, "get_config_dict", dict)()} for module in model]
    for module in modules:
        if module["type"] == "SpladePooling":
            module.pop("embedding_dimension", None)  # set by the first text that is encoded
    longest = model.max_seq_length
    encoding = {
        "task": "document",
        "prompt": prompt_of(model, "document"),
        # Infinite where nothing is cut, as with static embeddings, which JSON can't say.
        "max_length": None if longest is None or math.isinf(longest) else longest,
        **({"max_active_dims": model.max_active_dims} if sparse else {"truncate_dim": model.truncate_dim}),
        "tokenizer_sha256": tokenizer_digest(getattr(model, "tokenizer", None)),
        "modules": json.loads(json.dumps(modules, default=str)),
    }
    digests = {
        part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for part, value in encoding.items()
    }
    return {
        "model": {"id": model_id, "weights_sha256": weights_digest(model), "encoding": digests},
        "encoding": encoding,
    }


def _refuse_not_finite(vectors: Any, shard: Sequence[Passage], plan: Mapping[str, Any]) -> None:
    finite = finite_rows(vectors)
    if not finite.all():
        passage_id, _ = shard[int(finite.argmin())]
        raise ValueError(
            f"corpus: passage {passage_id!r} has a NaN or infinite vector (model {plan['model']['id']}, computed in "
            f'{plan["precision"]}, stored in {plan["dtype"]}): check the weights, or encode with precision="fp32" and '
            'dtype="float32" in another folder.'
        )
