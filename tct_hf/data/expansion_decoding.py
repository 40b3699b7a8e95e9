"""Queries sampled from a seq2seq model: many of a passage, each drawn with random numbers of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tct_hf.batches import padding_of, passes

if TYPE_CHECKING:
    import numpy as np

# Passage tokens times queries a pass. Estimates for accelerators, not measurements.
CPU_TOKENS = 16_384
ACCELERATOR_TOKENS = 262_144
# Rows that have ended are taken out once they are this share: taking rows out copies the rest.
_ENDED_SHARE = 0.1


def uniform_numbers(seed: int, passage_id: str, num_queries: int, steps: int) -> np.ndarray:
    """The random numbers of a passage's queries, `(num_queries, steps)` in [0, 1).

    They depend on these alone, and the first queries have the same numbers however many there are.
    """
    import numpy as np

    named = f"{seed} {passage_id}".encode("utf-8", "surrogatepass")
    key = int.from_bytes(blake2b(named, digest_size=16).digest(), "little")
    drawn = np.random.Generator(np.random.Philox(key=key)).random((num_queries, steps))
    return drawn


def sample(logits: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Draw a token of each row among its `top_k` likeliest.

    By inverting the distribution function over tokens in the order of their ids, not of their scores: two that are
    all but equally likely may change places in the last bits, and nothing would be drawn otherwise for it.

    Args:
        logits: `(rows, vocabulary)`.
        uniform: `(rows,)` in [0, 1), of the type that probabilities are summed in.
        top_k: at least 1.

    Returns:
        `(rows,)` token ids.
    """
    scores, tokens = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    tokens, order = tokens.sort(dim=-1)
    reached = scores.gather(1, order).to(uniform.dtype).softmax(-1).cumsum(-1)
    place = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=tokens.shape[1] - 1)
    return tokens.gather(1, place)[:, 0]


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest type of a device: Apple's have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def generate_queries(
    model: Any,
    tokenizer: Any,
    passages: Sequence[tuple[str, str]],
    *,
    num_queries: int,
    top_k: int,
    max_length: int,
    passage_length: int,
    prompt: str,
    seed: int,
    tokens_per_pass: int,
    done: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """Sample queries of some passages, in passes of like length.

    Args:
        model: seq2seq, in evaluation mode on its device.
        tokenizer: its own.
        passages: (id, text) pairs; one without words gets no queries.
        num_queries: of a passage.
        top_k: tokens that are drawn among.
        max_length: tokens of a query at most.
        passage_length: tokens a passage keeps.
        prompt: before each text.
        seed: with a passage's id, of its random numbers.
        tokens_per_pass: passage tokens times queries, padding included; a single passage may have more.
        done: told after every pass how many passages it held.

    Returns:
        The queries of each passage.
    """
    import numpy as np

    found: list[list[str]] = [[] for _ in passages]
    rows = [row for row, (_, text) in enumerate(passages) if text.strip()]
    if not rows or not num_queries:
        if done is not None:
            done(len(passages))
        return found
    encoded = tokenizer([prompt + passages[row][1] for row in rows], truncation=True, max_length=passage_length)
    ids: list[list[int]] = encoded["input_ids"]
    budget = max(1, tokens_per_pass // num_queries)
    # From the longest to the shortest: a pass that doesn't fit in memory fails at once.
    for group in reversed(passes([len(tokens) for tokens in ids], budget, padding_of(model.device))):
        numbers = [uniform_numbers(seed, passages[rows[item]][0], num_queries, max_length) for item in group]
        inputs = tokenizer.pad({"input_ids": [ids[item] for item in group]}, return_tensors="pt").to(model.device)
        uniform = torch.from_numpy(np.concatenate(numbers)).to(model.device, exact_dtype(model.device))
        tokens = decode(model, inputs, uniform, top_k=top_k, max_length=max_length)
        texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        for place, item in enumerate(group):
            found[rows[item]] = texts[place * num_queries : (place + 1) * num_queries]
        if done is not None:
            done(len(group))
    if done is not None and len(rows) < len(passages):
        done(len(passages) - len(rows))
    return found


@torch.inference_mode()
def decode(model: Any, inputs: Any, uniform: Tensor, *, top_k: int, max_length: int) -> list[list[int]]:
    """Sample several token sequences of each input; `generate` prepares, the loop is ours.

    All samples of a passage begin alike, so the first step is computed once a passage, and with it the keys and values
    of its tokens. Rows that have ended are taken out of the batch.

    Args:
        model: seq2seq.
        inputs: "input_ids" and "attention_mask", `(passages, tokens)`.
        uniform: `(passages * samples, max_length)` in [0, 1).
        top_k: tokens that are drawn among.
        max_length: tokens of a sample at most.

    Returns:
        The token ids of each sample, all of the first passage first.
    """
    found: list[list[int]] = []

    def loop(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **more: Any) -> Tensor:
        ends = generation_config._eos_token_tensor
        samples = len(uniform) // len(input_ids)
        drawn = uniform.new_full(uniform.shape, -1, dtype=torch.long)
        for step, rows, tokens in _steps(model, input_ids, logits_processor, more, ends, uniform, samples, top_k):
            drawn[rows, step] = tokens
        found.extend([token for token in row if token >= 0] for row in drawn.tolist())
        return input_ids

    # Ours alone decides: what a checkpoint recommends beside (beams, its own length) does not count.
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_length=None,
        max_new_tokens=max_length,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        cache_implementation=None,
    )
    model.generate(**inputs, generation_config=config, custom_generate=loop)
    return found


def _steps(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    inputs: dict[str, Any],
    ends: Tensor | None,
    uniform: Tensor,
    samples: int,
    top_k: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields each step, the rows that are still written, and their tokens."""
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
