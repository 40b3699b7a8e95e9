"""A corpus to generated queries (doc2query): many a passage, each drawn with random numbers of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.util import get_device_name
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from tct_hf.batches import padding_of, passes
from tct_hf.data import shards
from tct_hf.data.expansion import query_columns
from tct_hf.data.texts import Passage, checked_passages, passage_shards
from tct_hf.encoding.encoders import told_of_files
from tct_hf.encoding.weights import compute_dtype, tokenizer_digest, weights_digest
from tct_hf.progress import PassageProgress

if TYPE_CHECKING:
    from accelerate import PartialState

DEFAULT_EXPANDER = "castorini/doc2query-t5-base-msmarco"
# Passage tokens times queries a pass. Estimates for accelerators, not measurements.
CPU_TOKENS = 16_384
ACCELERATOR_TOKENS = 262_144
# Rows that have ended are taken out once they are this share: taking rows out copies the rest.
_ENDED_SHARE = 0.1


@dataclass(frozen=True)
class Sampling:
    """How queries are drawn; the fields are the arguments of :func:`expand_corpus`."""

    num_queries: int
    top_k: int
    max_length: int
    passage_length: int
    tokens_per_pass: int
    prompt: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_queries", "top_k", "max_length", "passage_length", "tokens_per_pass"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


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
    place = torch.device("cpu" if device is None else device)
    with told_of_files(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
    if not config.is_encoder_decoder:
        raise ValueError(f"{name_or_path}: no seq2seq model (T5, BART ...) that was trained to write queries")
    with told_of_files(name_or_path):
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
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
    write_every: float = 10.0,
) -> dict[str, Any]:
    """Write queries that each passage might answer, into a folder of shards in the corpus's order.

    Called again after a kill it goes on after the last whole shard, once it has seen that model, settings and
    passages are the same. `load_expansions` reads the folder.

    Each query is drawn with random numbers that depend on `seed`, the passage's id, the query's number, the token's
    place and `max_length` alone: files are the same, byte for byte, for any number of processes and after any
    interruption. Another `shard_size`, `tokens_per_pass` or machine changes probabilities in their last bits, and so
    a few queries in a hundred thousand. Fewer queries are the first of more.

    Args:
        model: a seq2seq model on the device that generates, or folder or Hub id of one, which is put on that of
            `state`, and without it on an accelerator where there is one.
        corpus: passages with "id" and "text"; a data set, or any iterable, read once. One without words gets no query.
        out_dir: the folder; made when missing.
        tokenizer: of a model that is given as such.
        dtype: of a model that is named; see `load_expander`.
        num_queries: queries of a passage; how many of them an index takes is decided when it is built.
        top_k: tokens that are drawn among (10 in docTTTTTquery).
        max_length: tokens a query may have (64 in docTTTTTquery).
        passage_length: tokens a passage keeps.
        prompt: before each text, for models that were trained with one.
        seed: of the random numbers.
        shard_size: passages a shard: what is lost at most when a process is killed, and what memory holds.
        tokens_per_pass: passage tokens times queries that are computed together; by the device when None.
        state: the processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress; printed by the main process when None.
        write_every: seconds between such lines.

    Returns:
        The manifest: the settings, "model", "count" and "shards".

    Raises:
        ValueError: a folder of another model, other settings or other passages; an empty corpus; a passage without
            id or text, or with the id of an earlier one, naming it.
    """
    if isinstance(model, (str, Path)):
        device = state.device if state is not None else get_device_name()
        model, tokenizer = load_expander(str(model), dtype=dtype, device=device)
    elif tokenizer is None:
        raise ValueError("tokenizer: give that of the model, or name the model instead of loading it.")
    if tokens_per_pass is None:
        tokens_per_pass = CPU_TOKENS if model.device.type == "cpu" else ACCELERATOR_TOKENS
    sampling = Sampling(num_queries, top_k, max_length, passage_length, tokens_per_pass, prompt, seed)
    passages_of = passage_shards(checked_passages(corpus, True), shard_size)
    parts = ((shards.digest_of(chain.from_iterable(shard)), shard) for shard in passages_of)
    total = len(corpus) if isinstance(corpus, Sized) else None
    progress = PassageProgress(total, state, write, write_every)

    def make(passages: Sequence[Passage]) -> dict[str, Any]:
        queries = generate_queries(model, tokenizer, passages, sampling, done=progress.encoded)
        return query_columns([passage_id for passage_id, _ in passages], queries)

    settings = {
        "weights_sha256": weights_digest(model),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        **asdict(sampling),
        "shard_size": shard_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    about = {"model": getattr(model.config, "_name_or_path", None) or None}
    names = {"weights_sha256": about["model"]}
    manifest = shards.run_shards(
        out_dir, settings, parts, make, about=about, names=names, state=state, progress=progress
    )
    progress.finish(manifest["count"])
    return manifest


def uniform_numbers(seed: int, passage_id: str, num_queries: int, steps: int) -> np.ndarray:
    """The random numbers of a passage's queries, `(num_queries, steps)` in [0, 1), the same for the first of more."""
    named = f"{seed} {passage_id}".encode("utf-8", "surrogatepass")
    key = int.from_bytes(blake2b(named, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random((num_queries, steps))


def sample(logits: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Draw a token of each row, `(rows,)`, among the `top_k` likeliest of logits `(rows, vocabulary)`.

    By inverting the distribution function at `uniform`, `(rows,)` in [0, 1), over tokens in the order of their ids,
    not of their scores: two that are all but equally likely may change places in the last bits.
    """
    scores, tokens = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    tokens, order = tokens.sort(dim=-1)
    reached = scores.gather(1, order).to(uniform.dtype).softmax(-1).cumsum(-1)
    place = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=tokens.shape[1] - 1)
    return tokens.gather(1, place)[:, 0]


def generate_queries(
    model: Any,
    tokenizer: Any,
    passages: Sequence[Passage],
    sampling: Sampling,
    *,
    done: Callable[[int], None] = lambda passages: None,
) -> list[list[str]]:
    """Sample queries of passages, in passes of similar length; `done` is told after each how many it held."""
    found: list[list[str]] = [[] for _ in passages]
    rows = [row for row, (_, text) in enumerate(passages) if text.strip()]
    if empty := len(passages) - len(rows):
        done(empty)
    if not rows:
        return found
    texts = [sampling.prompt + passages[row][1] for row in rows]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=sampling.passage_length)["input_ids"]
    count, budget = sampling.num_queries, max(1, sampling.tokens_per_pass // sampling.num_queries)
    # From the longest to the shortest: a pass that doesn't fit in memory fails at once.
    for group in reversed(passes([len(tokens) for tokens in ids], budget, padding_of(model.device))):
        names = [passages[rows[item]][0] for item in group]
        numbers = [uniform_numbers(sampling.seed, name, count, sampling.max_length) for name in names]
        inputs = tokenizer.pad({"input_ids": [ids[item] for item in group]}, return_tensors="pt").to(model.device)
        exact = torch.float32 if model.device.type == "mps" else torch.float64  # which Apple's devices don't have
        uniform = torch.from_numpy(np.concatenate(numbers)).to(model.device, exact)
        tokens = decode(model.eval(), inputs, uniform, sampling)
        written = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        for place, item in enumerate(group):
            found[rows[item]] = written[place * count : (place + 1) * count]
        done(len(group))
    return found


@torch.inference_mode()
def decode(model: Any, inputs: Any, uniform: Tensor, sampling: Sampling) -> list[list[int]]:
    """Sample token ids of each input, all of the first one first, by `(passages * samples, max_length)` numbers.

    `generate` prepares, the loop is ours: all samples of a passage begin with the same token, so its first step, and
    the keys and values of its tokens, are computed once. Rows that have ended are taken out of the batch.
    """
    found: list[list[int]] = []

    def loop(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **more: Any) -> Tensor:
        ends = generation_config._eos_token_tensor
        drawn = uniform.new_full(uniform.shape, -1, dtype=torch.long)
        for step, rows, tokens in _steps(model, input_ids, logits_processor, more, ends, uniform, sampling.top_k):
            drawn[rows, step] = tokens
        found.extend([token for token in row if token >= 0] for row in drawn.tolist())
        return input_ids

    # Ours alone decides: what a checkpoint recommends beside (beams, its own length) does not count.
    config = copy.deepcopy(model.generation_config)
    ours = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    config.update(max_length=None, max_new_tokens=sampling.max_length, cache_implementation=None, **ours)
    model.generate(**inputs, generation_config=config, custom_generate=loop)
    return found


def _steps(
    model: Any, input_ids: Tensor, processors: Any, inputs: dict[str, Any], ends: Any, uniform: Tensor, top_k: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    mask, states, cache = inputs["attention_mask"], inputs["encoder_outputs"][0], inputs["past_key_values"]
    rows = torch.arange(len(uniform), device=uniform.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    fresh = input_ids
    for step in range(uniform.shape[1]):
        outputs = model(
            # Read in the first step only: later ones have keys and values of the passages in the cache.
            encoder_outputs=(states if not step else states[:1].expand(len(rows), -1, -1),),
            attention_mask=mask,
            decoder_input_ids=fresh,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        logits, cache = processors(input_ids, outputs.logits[:, -1]), outputs.past_key_values
        if not step:
            samples = len(uniform) // len(input_ids)
            logits, mask, input_ids = (part.repeat_interleave(samples, 0) for part in (logits, mask, input_ids))
            cache.batch_repeat_interleave(samples)
        tokens = sample(logits, uniform[rows, step], top_k)
        yield step, rows[alive], tokens[alive]
        if ends is not None:
            alive &= ~torch.isin(tokens, ends)
        left = int(alive.sum())
        if not left:
            return
        input_ids, fresh = torch.cat([input_ids, tokens[:, None]], 1), tokens[:, None]
        if len(rows) - left > _ENDED_SHARE * len(rows):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask, input_ids, fresh, alive = (part[kept] for part in (rows, mask, input_ids, fresh, alive))
