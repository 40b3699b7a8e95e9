"""A smaller student by sentence-transformers' own EmbedDistillLoss, beside the arms of a finished comparison.

    python recipes/benchmarks/embed_distill.py outputs/compare/embeddings [--seed 13]

Collection, base, layers, lengths, steps and learning rate are those of the comparison. A batch has as many texts as a
step there, questions and passages in equal parts, with the base's vectors as labels: what its documentation shows.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from random import Random

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from transformers import set_seed

from tct_hf import build_student, evaluate_run, read_run
from tct_hf.evaluation.references import References
from tct_hf.evaluation.significance import paired_randomisation_test
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.settings import CompareSettings
from tct_hf.retrieval.encode import encode_texts
from tct_hf.settings import load_settings
from tct_hf.training.stages import precision

MEASURES = ["nDCG@10", "RR@10"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=13)
    asked = parser.parse_args()
    settings = load_settings(CompareSettings, [str(asked.folder / "settings.yaml")], description="")
    training, encoder = settings.student.training, settings.encoder
    collection = read_collection(settings.data, train=True)
    base = resolve_model(encoder.base_model)
    teacher = build_student(base, **encoder.reads)
    student = build_student(base, layers=settings.student.layers, **encoder.reads)
    kind = precision(settings.precision, student.device)
    bf16 = kind["bf16"]

    batch = training["per_device_train_batch_size"] * (2 + settings.data.num_negatives)
    half, draw = batch * training["max_steps"] // 2, Random(asked.seed)
    sides = {"query": [*collection.splits["train"].queries.values()], "document": collection.corpus["text"][:]}
    rows = []
    for task, texts in sides.items():
        some = draw.sample(texts, half) if half <= len(texts) else draw.choices(texts, k=half)
        rows += zip(some, encode_texts(teacher, some, task=task, bf16=bf16).tolist(), strict=True)
    draw.shuffle(rows)
    set_seed(asked.seed)
    arguments = SentenceTransformerTrainingArguments(
        str(asked.folder / f"embed-distill-{asked.seed}"),
        per_device_train_batch_size=batch,
        **{name: training[name] for name in ("max_steps", "learning_rate", "warmup_steps")},
        **kind,
        seed=asked.seed,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_dict(dict(zip(("text", "label"), zip(*rows, strict=True), strict=True)))
    SentenceTransformerTrainer(student, arguments, data, loss=EmbedDistillLoss(student)).train()

    test = collection.splits[settings.report]
    [system] = References(collection, settings.evaluation.depth, bf16).model("stock", "stock", lambda: student)
    runs = {"EmbedDistillLoss": system.run(test.queries)}
    for arm in sorted((asked.folder / "arms").iterdir()):
        runs[arm.name] = read_run(arm / f"seed-{asked.seed}" / "runs" / f"student.{settings.report}.trec")
    found = {name: evaluate_run(run, test.qrels, MEASURES) for name, run in runs.items()}
    own = found["EmbedDistillLoss"]
    for name, one in found.items():
        for measure in MEASURES:
            pair = [[each.per_query[measure][query] for query in sorted(test.qrels)] for each in (one, own)]
            p = "" if one is own else f", p against EmbedDistillLoss {paired_randomisation_test(*pair):.4f}"
            print(f"{name}: {measure} {one.mean[measure]:.4f}{p}", flush=True)


if __name__ == "__main__":
    main()
