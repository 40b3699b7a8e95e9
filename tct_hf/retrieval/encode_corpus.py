"""A corpus to a folder of vectors: in shards that survive a kill, shared out among processes or jobs."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sentence_transformers import SentenceTransformer, SparseEncoder

from tct_hf.data.ids import SeenIds
from tct_hf.data.shards import digest_of, has_shards, run_job, run_shards
from tct_hf.data.texts import Passage, checked_passages, job_shards, passage_shards, refuse_repeated
from tct_hf.encoding.engine import OpenVINOEngine
from tct_hf.encoding.routes import passage_model, prompt_of
from tct_hf.encoding.weights import tokenizer_digest, weights_digest
from tct_hf.files import CLAIM_FILE, read_json, write_json_atomic
from tct_hf.progress import PassageProgress
from tct_hf.retrieval.encode import POOL, budget_of, choose_engine, encode_texts, is_sparse_encoder
from tct_hf.retrieval.vectors import finite_rows, vector_facts, vector_table

if TYPE_CHECKING:
    from accelerate import PartialState


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
    engines: dict[bool, OpenVINOEngine | None] = {}  # in bfloat16 or not

    def settings() -> dict[str, Any]:
        computed_in, computed_by = str(precision), str(backend)
        if is_main:
            kept = _begun(folder) if job is not None or has_shards(folder) else {}
            computed_in = kept.get("precision", computed_in) if precision == "auto" else computed_in
            computed_by = kept.get("backend", "torch" if kept else backend) if backend == "auto" else computed_by
            if "auto" in (computed_in, computed_by):
                engine, computed_in = choose_engine(model, [text for _, text in first], computed_by, computed_in)
                computed_by = "torch" if engine is None else "openvino"
                engines[computed_in == "bf16"] = engine
        return {
            "weights_sha256": description["model"]["weights_sha256"],
            "encoding": description["encoding"],
            "precision": computed_in,
            "backend": computed_by,
            "dtype": dtype,
            "shard_size": shard_size,
            "device": model.device.type,
            "tokens_per_pass": budget,
            **({"layout": "sparse"} if sparse else {}),
        }

    total = len(corpus) if isinstance(corpus, Sized) else None
    own = total
    if job is not None and total is not None:
        own = sum(min(shard_size, total - start) for start in range(job[0] * shard_size, total, job[1] * shard_size))
    progress = PassageProgress(own, state, write, write_every)

    def make(passages: Sequence[Passage]) -> Any:
        begun = _begun(folder)  # by the main process
        chosen = begun["precision"]
        bf16, by_engine = chosen == "bf16", begun["backend"] == "openvino"
        if by_engine and engines.get(bf16) is None:  # begun by an earlier call, or another job
            engines[bf16] = OpenVINOEngine(passage_model(model), bf16=bf16)  # type: ignore[arg-type]
        options: dict[str, Any] = {"tokens_per_pass": tokens_per_pass}
        options |= {"engine": engines[bf16]} if by_engine else {"bf16": bf16}
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
