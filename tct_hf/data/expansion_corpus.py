"""A corpus to generated queries (doc2query): shards on disk that survive a kill and are shared out among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data import expansion_store as store
from tct_hf.data.passages import checked_passages, passage_shards
from tct_hf.encoding.digests import tokenizer_digest, weights_digest
from tct_hf.files import claim
from tct_hf.progress import PassageProgress, print_at_once

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["DEFAULT_EXPANDER", "expand_corpus", "load_expander"]

DEFAULT_EXPANDER = "castorini/doc2query-t5-base-msmarco"


def load_expander(name_or_path: str = DEFAULT_EXPANDER, *, dtype: str = "auto", device: Any = None) -> tuple[Any, Any]:
    """Load a seq2seq model and its tokenizer.

    Args:
        name_or_path: folder or Hub id.
        dtype: of its weights: "bfloat16", "float32", or "auto", bfloat16 where the hardware has it.
        device: to generate on; the CPU when None.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: an unknown dtype, or a model that is no seq2seq model.
        OSError: there is no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    from tct_hf.encoding.precision import check_dtype, compute_dtype
    from tct_hf.hub_client import told_when_missing

    check_dtype(dtype)
    place = torch.device("cpu" if device is None else device)
    with told_when_missing(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{name_or_path}: no seq2seq model (T5, BART ...): name one that was trained to write queries"
        )
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, dtype=compute_dtype(dtype, place))
    return model.eval().to(place), AutoTokenizer.from_pretrained(name_or_path)


def expand_corpus(
    model: Any,
    corpus: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    num_queries: int = 40,
    top_k: int = 10,
    max_length: int = 64,
    passage_length: int = 512,
    prompt: str = "",
    seed: int = 13,
    shard_size: int = 1024,
    tokens_per_pass: int | None = None,
    total: int | None = None,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
    write_every: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Write queries that each passage might answer, into a folder of shards in the corpus's order.

    A shard is written aside and renamed; called again after a kill it goes on after the last whole one, once it has
    seen that model, settings and passages are the same. `load_expansions` reads the folder.

    Each query is drawn with random numbers that depend on `seed`, the passage's id, the query's number, the token's
    place and `max_length` alone. Files are therefore the same, byte for byte, for any number of processes and after
    any interruption, as long as hardware, threads and libraries are the same. Another `shard_size` or
    `tokens_per_pass` puts other passages beside one another, which changes probabilities in their last bits: in
    float32 all but a few queries in a hundred thousand stay the same, in bfloat16 fewer. Fewer queries are the first
    of more, in the same sense.

    Args:
        model: a seq2seq model on the device that generates, or folder or Hub id of one, which is put on that of
            `state`, and without it on an accelerator where there is one.
        corpus: passages with "id" and "text"; a data set, or any iterable, read once. One without words gets no query.
        out_dir: the folder; made when missing.
        tokenizer: of a model that is given as such.
        dtype: of a model that is named; see `load_expander`.
        num_queries: of a passage; how many of them an index takes is decided when it is built.
        top_k: tokens that are drawn among (10 in docTTTTTquery).
        max_length: tokens a query may have (64 in docTTTTTquery).
        passage_length: tokens a passage keeps.
        prompt: before each text, for models that were trained with one.
        seed: of the random numbers.
        shard_size: passages a shard: what is lost at most when a process is killed, and what memory holds.
        tokens_per_pass: passage tokens times queries that are computed together; by the device when None.
        total: passages in all, for the time left, where the corpus has no length.
        state: the processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress without its line end; printed by the main process when None.
        write_every: seconds between such lines.
        clock: seconds from a fixed moment, never going back.

    Returns:
        The manifest: the settings, "model", "count" and "shards".

    Raises:
        ValueError: an unknown setting; a folder of another model, other settings or other passages; an empty corpus;
            a passage without id or text, or with the id of an earlier one, naming it.
        OSError: the folder can't be written.
    """
    from sentence_transformers.util import get_device_name

    from tct_hf.data import expansion_decoding as decoding

    sizes = {
        "num_queries": num_queries,
        "top_k": top_k,
        "max_length": max_length,
        "passage_length": passage_length,
        "shard_size": shard_size,
    }
    for name, size in {**sizes, "tokens_per_pass": 1 if tokens_per_pass is None else tokens_per_pass}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    if isinstance(model, (str, Path)):
        device = state.device if state is not None else get_device_name()
        model, tokenizer = load_expander(str(model), dtype=dtype, device=device)
    elif tokenizer is None:
        raise ValueError("tokenizer: give that of the model, or name the model in place of loading it.")
    if tokens_per_pass is None:
        tokens_per_pass = decoding.CPU_TOKENS if model.device.type == "cpu" else decoding.ACCELERATOR_TOKENS
    model.eval()
    folder = Path(out_dir)
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    settings = {
        "weights_sha256": weights_digest(model),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "prompt": prompt,
        "seed": seed,
        **sizes,
        "tokens_per_pass": tokens_per_pass,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    shards = passage_shards(checked_passages(corpus, True), shard_size)
    shard = next(shards, None)
    if shard is None:
        raise ValueError("corpus: it has no passage; check its source.")
    if rank == 0:
        claim(folder, settings)
        for left in folder.glob(".*.tmp"):  # by a killed process
            left.unlink()
    if state is not None:
        state.wait_for_everyone()
    if total is None and hasattr(corpus, "__len__"):
        total = len(corpus)  # type: ignore[arg-type]
    there = _there(folder)
    if state is not None:  # nobody writes a shard before all have seen which are there
        state.wait_for_everyone()
    progress = PassageProgress(total, processes, write or print_at_once, write_every, clock, enabled=rank == 0)
    number, missing, count = 0, 0, 0
    while shard:
        made_of = store.passages_digest(shard)
        if number in there:
            store.is_made_of(folder, number, made_of)  # refuses another corpus, in every process
            progress.skipped(len(shard))
        else:
            if missing % processes == rank:
                queries = decoding.generate_queries(
                    model,
                    tokenizer,
                    shard,
                    num_queries=num_queries,
                    top_k=top_k,
                    max_length=max_length,
                    passage_length=passage_length,
                    prompt=prompt,
                    seed=seed,
                    tokens_per_pass=tokens_per_pass,
                    done=progress.encoded,
                )
                store.write_shard(folder, number, [name for name, _ in shard], "queries", queries, made_of)
            missing += 1
        count += len(shard)
        number += 1
        shard = next(shards, None)
    if state is not None:
        state.wait_for_everyone()
    progress.finish(count)
    if rank == 0:
        store.finish(folder, number, count, about={"model": getattr(model.config, "_name_or_path", None) or None})
    if state is not None:
        state.wait_for_everyone()
    return store.read_manifest(folder, "expansions")


def _there(folder: Path) -> set[int]:
    """Numbers of the shards that are there."""
    return {int(file.stem) for file in folder.glob("*.parquet") if file.stem.isdecimal()}
