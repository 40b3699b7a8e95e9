"""Texts to vectors: sorted by length, under a token budget, in memory or into shards that survive a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.util import select_max_active_dims
from torch import Tensor

from tct_hf.batches import padding_of, parts_of_similar_length, stack_columns
from tct_hf.data.ids import SeenIds
from tct_hf.data.rows import checked_texts
from tct_hf.data.shards import digest_of, has_shards, run_job, run_shards
from tct_hf.data.texts import Passage, checked_passages, job_shards, passage_shards, refuse_repeated
from tct_hf.encoding.engine import OpenVINOEngine, has_openvino
from tct_hf.encoding.routes import passage_model, prompt_of
from tct_hf.encoding.static import static_modules
from tct_hf.encoding.weights import has_bfloat16, tokenizer_digest, unpack_half, weights_digest
from tct_hf.files import CLAIM_FILE, read_json, write_json_atomic
from tct_hf.progress import PassageProgress
from tct_hf.retrieval.cut_queries import filled_rows, say_cut_queries
from tct_hf.retrieval.vectors import finite_rows, of_torch, vector_facts, vector_table

if TYPE_CHECKING:
    from accelerate import PartialState

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


def choose_engine(model: Any, texts: Sequence[str], backend: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """What to encode passages with, "openvino" or "torch", and in what, "bf16" or "fp32".

    OpenVINO where it is installed, for dense students on the CPU and enough passages, if the vectors of some are the
    same as torch's in float32; torch elsewhere, which a line says where OpenVINO was tried.
    """
    if backend != "openvino" and static_modules(model, "document") is not None:
        return "torch", "fp32" if precision == "auto" else precision
    if backend == "openvino" or len(texts) >= ENOUGH_TEXTS:
        engine, tried = find_engine(model, texts, backend, precision)
        if engine is not None:
            return "openvino", tried
    return "torch", choose_precision(model, texts) if precision == "auto" else precision


def find_engine(
    model: Any, texts: Sequence[str], backend: str, precision: str, *, low_latency: bool = False
) -> tuple[OpenVINOEngine | None, str]:
    """An engine whose vectors of some passages are the same as torch's in float32, and what it computes in.

    None where `backend` is "torch", or "auto" and there is none, which a line says where it was tried.

    Raises:
        ValueError: `backend` is "openvino", and there is none.
        ImportError: it is, and OpenVINO is missing.
    """
    usable = model.device.type == "cpu" and not is_sparse_encoder(model) and isinstance(model[0], Transformer)
    if backend != "openvino" and not (backend == "auto" and usable and has_openvino()):
        return None, precision
    known = ("bf16", "fp32") if has_bfloat16(model.device) else ("fp32",)
    probed, why = _probed(texts), f"the cosines of its vectors to torch's are below {ENOUGH_COSINE}"
    full = encode_texts(model, probed, task="document")
    try:
        for tried in known if precision == "auto" else (precision,):
            engine = OpenVINOEngine(model, bf16=tried == "bf16", low_latency=low_latency)
            if _lowest_cosine(full, encode_texts(model, probed, task="document", engine=engine)) >= ENOUGH_COSINE:
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


def encode_corpus(
    model: SentenceTransformer | SparseEncoder,
    corpus: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    *,
    model_id: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    backend: Literal["auto", "torch", "openvino"] = "auto",
    dtype: Literal["float32", "float16"] = "float32",
    shard_size: int = POOL,
    tokens_per_pass: int | None = None,
    allow_empty: bool = False,
    job: tuple[int, int] | None = None,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
    write_every: float = 10.0,
) -> dict[str, Any]:
    """Encode a corpus into a folder of shards, in the corpus's order, in memory that hardly grows with it.

    A call that finds shards of an earlier one goes on after them, once it has seen that they are of the same model,
    settings and passages. `manifest.json` comes last, and beside it the seconds that encoding took, scaled up to the
    whole where this call encoded a part; `load_vectors` reads the folder. What grows with the corpus is 16 bytes a
    passage, by which an id that comes twice is found.

    Several processes split the shards among them, each given the whole corpus in the same order. Vectors depend
    neither on the number of processes nor on interruptions, as long as hardware, threads and libraries are the same.

    Jobs that share nothing but the folder split the shards, too: each is given the same corpus, of which it reads its
    own part, and none waits for another. The one that finds all shards there writes the manifest.

    Args:
        model: dense or sparse encoder of one vector a text, on the device that encodes.
        corpus: passages with "id" and "text"; a data set, or any iterable, read once.
        out_dir: the folder; made when missing.
        model_id: name or path of the model, recorded and shown; by default what the encoder was loaded from.
        precision: what to compute in. "auto": bfloat16 where the hardware has it and a few dozen passages of the first
            shard keep a cosine of 0.9999 to float32; a folder that was begun keeps its precision, and all jobs take
            that of the first.
        backend: what computes. "auto": OpenVINO where it is installed, for a dense student on the CPU whose first
            shard has a thousand passages, some dozen of which keep a cosine of 0.9999 to torch's in float32; else
            torch. The manifest says which; a folder that was begun keeps it.
        dtype: what to store vectors in; float32 for those of a sparse encoder.
        shard_size: passages a shard: what a kill loses at most, and what memory holds.
        tokens_per_pass: as `encode_texts`; recorded, since the last bits of a vector depend on it.
        allow_empty: encode passages without words instead of refusing them (a student's vector of one is zero).
        job: the number of this job, from 0, and how many there are; the shards whose numbers leave it as remainder are
            its own.
        state: the processes of a distributed run; one process when None.
        write: takes a line of progress without its line end; printed by the main process when None.
        write_every: seconds between such lines.

    Returns:
        The manifest; see `load_vectors`. Of a job, an empty one while shards of others are missing.

    Raises:
        ValueError: an unknown setting; a folder of another model, settings or corpus, naming what differs; an empty
            corpus; a passage without id, text or words, with an earlier one's id or a NaN vector, naming it.
        OSError: the folder holds other files, or can't be written.
    """
    sparse = is_sparse_encoder(model)
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f'precision={precision!r} is not known: use "auto", "bf16" or "fp32".')
    if backend not in ("auto", "torch", "openvino"):
        raise ValueError(f'backend={backend!r} is not known: use "auto", "torch" or "openvino".')
    if dtype not in (known := ("float32",) if sparse else ("float32", "float16")):
        raise ValueError(f"dtype={dtype!r} is not known for these vectors: use one of {', '.join(known)}.")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}.")
    if job is not None and not 0 <= job[0] < job[1]:
        raise ValueError(f"job={job}: the first must be a number from 0, less than the second, of all jobs.")
    if job is not None and state is not None and state.num_processes > 1:
        raise ValueError(f"job={job}: {state.num_processes} processes share this job; start a job for each instead.")
    budget = budget_of(model, tokens_per_pass)
    folder = Path(out_dir)
    passages_of: Any = (
        passage_shards(checked_passages(corpus, allow_empty), shard_size)
        if job is None
        else job_shards(corpus, shard_size, job, allow_empty)
    )
    first = next(passages_of, None)  # what is wrong with all passages leaves no folder
    if first is None:
        raise ValueError("corpus: it has no passage; check its source.")
    is_main = state is None or state.process_index == 0
    description = describe_model(model, model_id)

    def settings() -> dict[str, Any]:
        computed_in, computed_by = str(precision), str(backend)
        if is_main:
            kept = _begun(folder) if job is not None or has_shards(folder) else {}
            computed_in = kept.get("precision", computed_in) if precision == "auto" else computed_in
            computed_by = kept.get("engine", "torch" if kept else backend) if backend == "auto" else computed_by
            if "auto" in (computed_in, computed_by):
                computed_by, computed_in = choose_engine(model, [text for _, text in first], computed_by, computed_in)
        return {
            "weights_sha256": description["model"]["weights_sha256"],
            "encoding": description["encoding"],
            "precision": computed_in,
            "dtype": dtype,
            "shard_size": shard_size,
            "device": model.device.type,
            "tokens_per_pass": budget,
            **({"layout": "sparse"} if sparse else {}),
            **({"engine": computed_by} if computed_by != "torch" else {}),
        }

    total = len(corpus) if isinstance(corpus, Sized) else None
    own = total
    if job is not None and total is not None:
        own = sum(min(shard_size, total - start) for start in range(job[0] * shard_size, total, job[1] * shard_size))
    progress = PassageProgress(own, state, write, write_every)

    engine_in = cache(lambda bf16: OpenVINOEngine(model, bf16=bf16))  # type: ignore[arg-type]

    def make(passages: Sequence[Passage]) -> Any:
        begun = _begun(folder)  # by the main process
        chosen = begun["precision"]
        options: dict[str, Any] = {"bf16": chosen == "bf16", "tokens_per_pass": tokens_per_pass}
        if begun.get("engine") == "openvino":
            options |= {"bf16": False, "engine": engine_in(options["bf16"])}
        texts = [text for _, text in passages]
        vectors = encode_texts(model, texts, task="document", done=progress.encoded, **options).astype(np.dtype(dtype))
        finite = finite_rows(vectors)
        if not finite.all():
            raise ValueError(
                f"corpus: passage {passages[int(finite.argmin())][0]!r} has a NaN or infinite vector (model "
                f"{description['model']['id']}, computed in {chosen}, stored in {dtype}): check the weights, or "
                'encode with precision="fp32" and dtype="float32" in another folder.'
            )
        return vector_table([passage_id for passage_id, _ in passages], vectors)

    def about(tables: Sequence[Any]) -> dict[str, Any]:
        # Not among the settings: the same weights may lie in another place.
        if job is not None:
            seen, count = SeenIds(), 0
            for table in tables:
                refuse_repeated(seen, table["id"].to_pylist(), count)
                count += len(table)
        return {"model": description["model"], **vector_facts(tables)}

    count = 0

    def parts() -> Iterator[Any]:
        nonlocal count
        for one in chain([first if job is None or job[0] == 0 else range(len(first))], passages_of):
            count += len(one)
            yield None if isinstance(one, range) else digest_of(chain.from_iterable(one)), one

    options: dict[str, Any] = {
        "about": about,
        "names": {"weights_sha256": description["model"]["id"]},
        "progress": progress,
    }
    begun = time.monotonic()
    if job is not None:
        size = None if total is None else (math.ceil(total / shard_size), total)
        manifest = run_job(folder, settings, parts(), make, jobs=job[1], size=size, **options)
    else:
        manifest = run_shards(folder, settings(), parts(), make, state=state, **options)
    fresh = progress.finish(count if job is None else None)
    if is_main and fresh:
        seconds = (time.monotonic() - begun) * count / fresh
        file = f"encoding_seconds{'' if job is None else f'-{job[0]}'}.json"
        write_json_atomic(folder / file, {"seconds": seconds, "passages_timed": fresh})
    return manifest


def _begun(folder: Path) -> dict[str, Any]:
    """The settings that a folder was begun with; empty where it was not."""
    file = folder / CLAIM_FILE
    return dict(read_json(file, "delete the folder, and encode again.")) if file.is_file() else {}


def encoding_seconds(folder: str | Path) -> float | None:
    """The seconds that encoding a folder of vectors took in all, by the mean of its jobs; None where not known."""
    found = [*filter(None, map(read_seconds, Path(folder).glob("encoding_seconds*.json")))]
    return sum(found) / len(found) if found else None


def read_seconds(file: Path) -> float | None:
    """What a file of seconds says; None where it is missing."""
    if not file.is_file():
        return None
    fix = "delete it; the time is then unknown."
    seconds = read_json(file, fix, needs=["seconds"])["seconds"]
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
        raise ValueError(f"{file}: {seconds!r} is no number of seconds: {fix}")
    return float(seconds)


def describe_model(model: SentenceTransformer | SparseEncoder, model_id: str | None = None) -> dict[str, Any]:
    """What the vectors of a model's passages depend on, JSON-ready; its id is by default what it was loaded from.

    Where queries go through modules of their own, "weights_sha256" is of all weights, and the rest of the passages'.
    """
    if (alone := passage_model(model)) is not model:
        return {**describe_model(alone, model_id), "weights_sha256": weights_digest(model)}
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
