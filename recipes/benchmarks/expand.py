"""How fast queries are generated: a plain loop over `generate` in batches of 16 against `expand_corpus`'s decoding.

    python recipes/benchmarks/expand.py [--model PATH] [--shape small] [--texts 48] [--queries 10]

Same texts, same model, one process, float32, the sides in turn with the order changing, ratio of medians, also of
processor time, which a busy machine disturbs less. Plain: 16
passages in the corpus's order, do_sample, top_k 10, max_new_tokens 64, num_return_sequences. Texts are beginnings of
the built-in corpus's passages, 20 to 200 words.

--model names a trained checkpoint. Without one, a T5 of random weights in the shape of t5-small or t5-base computes
what a trained one would, and each query's length is taken from those of the built-in corpus's test queries, by a rule
of its first tokens that both sides obey: random weights would never end a query.

--memory 10000 100000 expands corpora of so many passages with a tiny model instead and shows the peak of memory.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from common import begin, clocked, median, memory_of, options, table, take_turns
from encode import make_texts

SHAPES = {
    "tiny": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 512},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128},
}
PLAIN, OURS = "generate, batches of 16", "expand_corpus"


def make_model(shape: str, texts: list[str]) -> tuple[Any, Any, list[int]]:
    """A T5 of random weights with a tokenizer for the texts, and lengths of real queries in its tokens."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from tct_hf import builtin_corpus
    from tct_hf.training.expander import new_expander

    size = SHAPES[shape]
    pieces = min(size["vocab_size"], 4000)
    _, tokenizer = new_expander(texts, seed=0, vocabulary=pieces, d_model=8, layers=1, heads=1, d_ff=8)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).eval()
    _, queries, _ = builtin_corpus("test", packages=["numpy", "scipy"])
    return model, tokenizer, [len(ids) for ids in tokenizer(list(queries.values()))["input_ids"]]


class Lengths:
    """A rule for logits: a query ends at a length that its first two tokens choose."""

    def __init__(self, lengths: list[int], end: int, pieces: int) -> None:
        import torch

        self.lengths = torch.tensor(lengths)
        self.end = end
        self.pieces = pieces  # the model's vocabulary is larger, so that it costs what a trained one costs

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        written = input_ids.shape[1]  # the start token, and what came after it
        ending = input_ids[:, 0] < 0
        if written > 2:
            drawn = (input_ids[:, 1] * 31 + input_ids[:, 2]) % 997 % len(self.lengths)
            ending = self.lengths[drawn] <= written
        scores = scores.clone()
        scores[:, self.end] = float("-inf")
        scores[:, self.pieces :] = float("-inf")
        scores[ending] = float("-inf")
        scores[ending, self.end] = 0.0
        return scores


def obey(model: Any, rule: Lengths) -> None:
    """Put a rule before top-k, on both sides."""
    usual = model._get_logits_processor

    def with_rule(*args: Any, **more: Any) -> Any:
        found = usual(*args, **more)
        found.insert(0, rule)
        return found

    model._get_logits_processor = with_rule


def sides_of(model: Any, tokenizer: Any, texts: list[str], queries: int) -> dict[str, Callable[[], list[list[str]]]]:
    import torch

    from tct_hf.data import expander as decoding

    @torch.inference_mode()
    def plain() -> list[list[str]]:
        found: list[list[str]] = []
        for start in range(0, len(texts), 16):
            inputs = tokenizer(
                texts[start : start + 16], padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            tokens = model.generate(
                **inputs, do_sample=True, top_k=10, max_new_tokens=64, num_return_sequences=queries
            )
            written = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            found += [written[at : at + queries] for at in range(0, len(written), queries)]
        return found

    def ours() -> list[list[str]]:
        passages = [(f"p{row}", text) for row, text in enumerate(texts)]
        sampling = decoding.Sampling(queries, 10, 64, 512, decoding.CPU_TOKENS, prompt="", seed=1)
        return decoding.generate_queries(model, tokenizer, passages, sampling)

    return {PLAIN: plain, OURS: ours}


def measure(sides: dict[str, Callable[[], list[list[str]]]], tokenizer: Any, rounds: int) -> None:
    times, found = take_turns(sides, rounds)
    rows = []
    for name, taken in times.items():
        written = [query for queries in found[name] for query in queries]
        tokens = statistics.mean(len(ids) for ids in tokenizer(written)["input_ids"])
        every = f"{median(taken):.2f} ({', '.join(f'{seconds:.2f}' for seconds, _ in taken)})"
        faster = [f"{median(times[PLAIN], clock) / median(taken, clock):.2f}" for clock in (0, 1)]
        rows.append([name, every, f"{len(written) / median(taken):.1f}", f"{tokens:.1f}", *faster])
    table("side | median s (all) | queries/s | tokens a query | times faster | times less processor time", rows)


def measure_memory(counts: list[int]) -> None:
    from tct_hf import expand_corpus, expanded_texts, load_expansions

    texts = make_texts(200, 1)
    model, tokenizer, _ = make_model("tiny", texts)

    def corpus(count: int) -> Iterator[dict[str, str]]:
        for row in range(count):
            yield {"id": f"p{row}", "text": " ".join(texts[row % len(texts)].split()[: 5 + row % 20])}

    def measured() -> Iterator[list[Any]]:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                given: dict[str, Any] = {"num_queries": 2, "max_length": 4, "write": lambda line: None}
                _, (seconds, _) = clocked(expand_corpus, model, corpus(count), folder, tokenizer=tokenizer, **given)
                first = memory_of("VmHWM")
                expansions = load_expansions(folder)
                for _ in expanded_texts(corpus(count), expansions):
                    pass
            yield [f"{count:,}", f"{seconds:.0f}", f"{first:.0f}", f"{memory_of('VmHWM'):.0f}"]

    table("passages | s | peak MB so far, expanding | peak MB so far, joining", measured())


def main() -> None:
    parser = options(__doc__, texts=48, queries=10, rounds=3, threads=2, seed=1)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--memory", type=int, nargs="+")
    args = parser.parse_args()

    from tct_hf import load_expander

    if args.memory:
        measure_memory(args.memory)
        return
    texts = make_texts(args.texts, args.seed)
    what = args.model or f"T5 of random weights, {args.shape}"
    begin(args.threads, what, f"{len(texts)} passages, {args.queries} queries each")
    if args.model is not None:
        model, tokenizer = load_expander(args.model, dtype="float32")
    else:
        model, tokenizer, lengths = make_model(args.shape, texts)
        obey(model, Lengths(lengths, tokenizer.eos_token_id, len(tokenizer)))
    for warm_up in sides_of(model, tokenizer, texts[:2], 1).values():  # untimed
        warm_up()
    measure(sides_of(model, tokenizer, texts, args.queries), tokenizer, args.rounds)


if __name__ == "__main__":
    main()
