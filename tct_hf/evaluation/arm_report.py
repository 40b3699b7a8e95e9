"""What a comparison of training arms writes: every student searched, the tables, the plots, the log of students."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.arm_plots import plot_curves, plot_swept
from tct_hf.evaluation.arm_table import ArmResult, against_table, arm_table, write_students
from tct_hf.evaluation.comparison import (
    System,
    evaluate_all,
    fuse_with_bm25,
    fused_key,
    read_log,
    run_systems,
    write_metrics,
)
from tct_hf.evaluation.measures import Evaluation
from tct_hf.evaluation.quick_report import BASE_NATIVE, BM25
from tct_hf.files import claim, file_digest, write_text_atomic
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.pipeline.arms import Arm, ArmTable

STUDENT = "student"


def reranked_name(measure: str) -> str:
    """What a measure is called where a system has put another's passages in order, and has not searched itself."""
    return f"{measure} reranking"


def fused_name(measure: str) -> str:
    """What a measure is called where a system is fused with BM25."""
    return f"{measure} + BM25"


def _reranked_key(system: str, count: int) -> str:
    return f"{system}-reranking-{count}"


def search_arm(
    name: str,
    arm: Arm,
    students: Mapping[int, Path],
    collection: Collection,
    queries: Mapping[str, Mapping[str, str]],
    *,
    measures: Sequence[str],
    depth: int,
    bf16: bool,
    arguments: Mapping[str, Any],
    bm25: Mapping[str, Run],
    reranking: int | None = None,
) -> ArmResult:
    """Search with every student of an arm, or read the runs that an earlier call has left.

    Args:
        name: of the arm.
        arm: how the students were trained.
        students: seed to the student's folder; its runs go beside it.
        collection: to search.
        queries: split to its queries.
        measures: ir-measures names.
        depth: passages a query.
        bf16: encode in bfloat16.
        arguments: of the training.
        bm25: split to BM25's run, which every student is fused with.
        reranking: also put so many of BM25's passages a query in order, and measure that by the first measure.
    """
    evaluations, logs = {}, {}
    for seed, student in students.items():
        runs = student.parent / "runs"
        claim(runs, {"weights": file_digest(student / "model.safetensors"), "depth": depth})
        systems = _student_systems(
            collection, student, f"{name}, seed {seed}", depth=depth, bf16=bf16, reranking=reranking
        )
        searched = run_systems(systems, queries, runs)
        fuse_with_bm25([STUDENT], searched, bm25, collection, measures[0], depth=depth, folder=runs)
        found = evaluate_all(searched, collection, measures)
        evaluations[seed] = {
            split: with_fused(with_reranking(parts, STUDENT, measures[0], reranking), STUDENT, measures[0])[STUDENT]
            for split, parts in found.items()
        }
        logs[seed] = read_log(student)
    return ArmResult(arm, evaluations, logs, arguments)


def _student_systems(
    collection: Collection, student: Path, title: str, *, depth: int, bf16: bool, reranking: int | None
) -> list[System]:
    """A student that searches, and one that orders BM25's passages, which encode the texts once for both."""
    from sentence_transformers import SentenceTransformer

    from tct_hf.evaluation.quick_report import dense_system
    from tct_hf.evaluation.references import dense_and_reranked_run

    if reranking is None:
        return [
            dense_system(collection, STUDENT, title, lambda: SentenceTransformer(str(student)), depth=depth, bf16=bf16)
        ]
    made: list[tuple[Run, Run]] = []

    def search(part: int, queries: Mapping[str, str]) -> Run:
        if not made:
            first = collection_bm25(collection).run(queries, reranking)
            model = SentenceTransformer(str(student))
            ids, texts = collection.corpus["id"], collection.corpus["text"]
            made.append(dense_and_reranked_run(model, ids, texts, queries, first, k=depth, bf16=bf16))
        return made[0][part]

    return [
        System(STUDENT, title, partial(search, 0)),
        System(_reranked_key(STUDENT, reranking), f"{title}, reranking", partial(search, 1)),
    ]


def reranking_teacher(collection: Collection, key: str, teacher: str, count: int, *, bf16: bool) -> System:
    """MaxSim of BM25's first passages, by a ColBERT (folder or Hub id), loaded when it is asked.

    Args:
        collection: to search.
        key: of the teacher's own search.
        teacher: folder or Hub id.
        count: of BM25's passages a query.
        bf16: encode in bfloat16.
    """
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.reranking import rerank_run

    def search(queries: Mapping[str, str]) -> Run:
        first = collection_bm25(collection).run(queries, count)
        return rerank_run(MultiVectorEncoder(teacher), first, collection.corpus, queries, count, bf16=bf16)

    return System(_reranked_key(key, count), f"ColBERT teacher over BM25's first {count:,}", search)


def with_reranking(
    evaluations: Mapping[str, Evaluation], key: str, measure: str, count: int | None
) -> dict[str, Evaluation]:
    """Put what a system reached by reranking beside what it reached by searching, as one more measure.

    Args:
        evaluations: system key to evaluation.
        key: of the system.
        measure: that is taken over from the reranked run.
        count: passages that were reranked; None: there is nothing to add.

    Returns:
        The evaluations, the reranked run's own left out.
    """
    if count is None:
        return dict(evaluations)
    return _merged(evaluations, key, _reranked_key(key, count), measure, reranked_name(measure))


def with_fused(evaluations: Mapping[str, Evaluation], key: str, measure: str) -> dict[str, Evaluation]:
    """Put what a system reached fused with BM25 beside what it reached alone, as one more measure.

    Args:
        evaluations: system key to evaluation.
        key: of the system.
        measure: that is taken over from the fused run.

    Returns:
        The evaluations, the fused run's own left out.
    """
    return _merged(evaluations, key, fused_key(key), measure, fused_name(measure))


def _merged(
    evaluations: Mapping[str, Evaluation], key: str, other_key: str, measure: str, name: str
) -> dict[str, Evaluation]:
    kept = dict(evaluations)
    other, own = kept.pop(other_key), kept[key]
    kept[key] = Evaluation(
        own.mean | {name: other.mean[measure]}, own.per_query | {name: dict(other.per_query[measure])}
    )
    return kept


def report_arms(
    results: Mapping[str, ArmResult],
    systems: Sequence[System],
    collection: Collection,
    output: Path,
    *,
    split: str,
    splits: Sequence[str],
    measures: Sequence[str],
    depth: int,
    name: str,
    curve: str,
    columns: int,
    settings: Mapping[str, Any],
    tables: Mapping[str, ArmTable] | None = None,
    reranking: int | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    """Search with the reference systems, and write report, metrics, students and plots of a comparison.

    Args:
        results: name to result of each arm.
        systems: that no arm trained, the teacher last, then, where there is `reranking`, the teacher that reranks.
        collection: to search.
        output: folder.
        split: of the tables.
        splits: that were searched.
        measures: ir-measures names.
        depth: passages a query.
        name: of the report, in the names of all its files.
        curve: what the plots show over the steps.
        columns: passages of a triple, the positive and its negatives.
        settings: JSON-ready, of the comparison.
        tables: heading to arms; one table of all arms when None or empty.
        reranking: as for :func:`search_arm`.
        write: takes lines of progress.

    Returns:
        The report, Markdown.
    """
    from tct_hf.pipeline.arms import ArmTable, slug_of

    queries = {part: collection.splits[part].queries for part in splits}
    runs = run_systems(systems, queries, output / "runs", write=write)
    titles = {system.key: system.title for system in systems}
    bm25 = {part: runs[BM25, part] for part in splits}
    base = [BASE_NATIVE] if BASE_NATIVE in titles else []
    fuse_with_bm25(base, runs, bm25, collection, measures[0], depth=depth, folder=output / "runs")
    evaluations = evaluate_all(runs, collection, measures)
    for key, part in itertools.product(base, splits):
        evaluations[part] = with_fused(evaluations[part], key, measures[0])
    shown = [*measures, fused_name(measures[0])]
    if reranking is not None:
        shown.insert(0, reranked_name(measures[0]))
        teacher = systems[-2].key
        for part in splits:
            evaluations[part] = with_reranking(evaluations[part], teacher, measures[0], reranking)
    references = {key: (titles[key], found) for key, found in evaluations[split].items()}
    lines = [
        f"# {collection.summary()}",
        "",
        f"{split} queries, exact search. Mean over seeds ± their standard deviation; minutes: of a training, dev "
        "figures during it included.",
        f"{fused_name(measures[0])}: fused with BM25, alpha tuned on dev where it is judged, where both lists spread "
        "alike otherwise.",
        *(
            []
            if reranking is None
            else [f"Reranking: of BM25's first {reranking:,} passages of each query, put in order by the system."]
        ),
        "",
    ]
    for heading, table in (tables or {"": ArmTable([*results])}).items():
        slug = f"{name}.{slug_of(heading)}" if heading else name
        lines += [f"## {heading}", ""] if heading else []
        lines += _table(table, results, references, split, shown)
        own = {arm: results[arm] for arm in table.arms if arm in results}
        lines += plot_curves(own, output / f"curves.{slug}.png", curve)
        lines += plot_swept(own, dict(references.values()), output, slug, split, measures[0], columns)
    path = output / f"report.{name}.md"
    write_text_atomic(path, "\n".join(lines))
    write_students(output / f"students.{name}.csv", results, splits, collection.name)
    measured = {part: dict(evaluations[part]) for part in splits}
    for arm, result in results.items():
        for seed, parts in result.evaluations.items():
            for part in splits:
                measured[part][f"{arm}, seed {seed}"] = parts[part]
    write_metrics(output / f"metrics.{name}.json", measured, corpus=collection.fingerprint, settings=settings)
    return path


def _table(
    table: ArmTable,
    results: Mapping[str, ArmResult],
    references: Mapping[str, tuple[str, Evaluation]],
    split: str,
    measures: Sequence[str],
) -> list[str]:
    """A table's arms beside the references, and the arms against those they are tested against."""
    own = {arm: results[arm] for arm in table.arms if arm in results}
    figures = {key: found for key, (_, found) in references.items()}
    pairs = table.pairs({arm: result.arm for arm, result in own.items()}, [*results, *figures])
    lines = [arm_table(own, dict(references.values()), split, measures), ""]
    if against := against_table(results, figures, split, measures, pairs):
        lines += [
            "Differences (p of the paired randomisation test over the queries; the same after Holm's correction over "
            "the lines). A query counts with its mean over the seeds that both have; with one seed, p says nothing "
            "about another seed.",
            "",
            against,
            "",
        ]
    return lines
