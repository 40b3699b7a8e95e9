"""What a comparison of training arms writes: every student searched, the tables, the plot, the log of students."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.arm_table import ArmResult, against_table, arm_table, write_students
from tct_hf.evaluation.comparison import System, evaluate_all, read_log, run_systems, standard_error, write_metrics
from tct_hf.evaluation.effectiveness import Evaluation
from tct_hf.files import claim, file_digest, write_text_atomic

if TYPE_CHECKING:
    from tct_hf.arms import Arm
    from tct_hf.data.collection import Collection


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
    """
    from sentence_transformers import SentenceTransformer

    from tct_hf.evaluation.quick_report import dense_system

    evaluations, logs = {}, {}
    for seed, student in students.items():
        runs = student.parent / "runs"
        claim(runs, {"weights": file_digest(student / "model.safetensors"), "depth": depth})
        load: Callable[[], SentenceTransformer] = lambda student=student: SentenceTransformer(str(student))  # type: ignore[misc]  # noqa: E731
        system = dense_system(collection, "student", f"{name}, seed {seed}", load, depth=depth, bf16=bf16)
        found = evaluate_all(run_systems([system], queries, runs), collection, measures)
        evaluations[seed] = {split: parts["student"] for split, parts in found.items()}
        logs[seed] = read_log(student)
    return ArmResult(arm, evaluations, logs, arguments)


def report_arms(
    results: Mapping[str, ArmResult],
    systems: Sequence[System],
    collection: Collection,
    output: Path,
    *,
    split: str,
    splits: Sequence[str],
    measures: Sequence[str],
    name: str,
    curve: str,
    columns: int,
    settings: Mapping[str, Any],
    write: Callable[[str], None] = print,
) -> Path:
    """Search with the reference systems, and write report, metrics, students and plot of a comparison.

    Args:
        results: name to result of each arm.
        systems: that no arm trained, the teacher last.
        collection: to search.
        output: folder.
        split: of the tables.
        splits: that were searched.
        measures: ir-measures names.
        name: of the report, in the names of all its files.
        curve: what the plot shows over the steps.
        columns: passages of a triple, the positive and its negatives.
        settings: JSON-ready, of the comparison.
        write: takes lines of progress.

    Returns:
        The report, Markdown.
    """
    queries = {part: collection.splits[part].queries for part in splits}
    evaluations = evaluate_all(run_systems(systems, queries, output / "runs", write=write), collection, measures)
    references = {system.key: (system.title, evaluations[split][system.key]) for system in systems}
    lines = [
        f"# {collection.summary()}",
        "",
        f"{split} queries, exact search. Mean over seeds ± their standard deviation; minutes: of a training, dev "
        "figures during it included.",
        "",
        arm_table(results, dict(references.values()), split, measures),
        "",
    ]
    if against := against_table(results, {key: found for key, (_, found) in references.items()}, split, measures):
        lines += [
            "Differences (p of the paired randomisation test over the queries; the same after Holm's correction over "
            "the lines). A query counts with its mean over the seeds that both have; with one seed, p says nothing "
            "about another seed.",
            "",
            against,
            "",
        ]
    lines += _plot(results, output / f"curves.{name}.png", curve)
    swept = output / f"candidates.{name}.png"
    lines += plot_candidates(results, dict(references.values()), swept, split, measures[0], columns)
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


def _plot(results: Mapping[str, ArmResult], path: Path, ylabel: str) -> list[str]:
    """Plot the dev curves, one panel a kind of student; what to say in the report."""
    from tct_hf.plots import plot_dev_curves

    panels: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        arm = result.arm
        size = "all layers" if arm.layers is None else f"{len(arm.layers)} layers"
        panels.setdefault(f"{size}, from the {arm.initialise_from}", {})[name] = list(result.curve().values())
    try:
        plot_dev_curves(panels, path, ylabel=ylabel)
    except (ImportError, ValueError) as error:
        return [f"No plot: {error}", ""]
    return [f"Plot: {path.name}", ""]


def plot_candidates(
    results: Mapping[str, ArmResult],
    references: Mapping[str, Evaluation],
    path: Path,
    split: str,
    measure: str,
    columns: int,
) -> list[str]:
    """Plot effectiveness against the passages of a batch where arms differ in them.

    Args:
        results: name to result of each arm; those of own candidates stay out.
        references: title to evaluation of what no arm trained, drawn across.
        path: PNG file.
        split: that is shown.
        measure: likewise.
        columns: passages of a triple.

    Returns:
        What to say in the report: nothing where fewer than three arms of a signal differ in their batch alone.
    """
    from tct_hf.arms import OWN
    from tct_hf.plots import plot_sweep

    lines: dict[str, list[tuple[float, float, float]]] = {}
    for result in results.values():
        if result.arm.signal == OWN:
            continue
        first = next(iter(result.evaluations.values()))[split]
        bar = standard_error(list(first.per_query[measure].values()))
        point = (columns * int(result.arguments["per_device_train_batch_size"]), result.mean(split, measure), bar)
        lines.setdefault(result.arm.signal, []).append(point)
    lines = {signal: points for signal, points in lines.items() if len({x for x, _, _ in points}) == len(points) > 1}
    if not any(len(points) > 2 for points in lines.values()):
        return []
    across = {title: [(0.0, evaluation.mean[measure], 0.0)] for title, evaluation in references.items()}
    try:
        plot_sweep(
            {**lines, **across},
            path,
            xlabel="candidates of a query, on one device",
            ylabel=f"{split} {measure} (bar: its standard error)",
            title="Passages that a query is scored against in training",
            doubling=True,
        )
    except ImportError as error:
        return [f"No plot: {error}", ""]
    return [f"{measure} against the candidates of a query: {path.name}", ""]
