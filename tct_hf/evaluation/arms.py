"""The report of a comparison: ways to train, several seeds each, in one table with tests of their gains."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from tct_hf.data.collection import Collection
from tct_hf.evaluation.cost import BYTES, MILLISECONDS, Footprint
from tct_hf.evaluation.experiment import Experiment, fused_key, read_log, write_metrics
from tct_hf.evaluation.measures import Evaluation, standard_error
from tct_hf.evaluation.plots import TradeOff, missing_plot, plot_dev_curves, plot_trade_off
from tct_hf.evaluation.references import BASE_NATIVE, BM25, STUDENT, References
from tct_hf.evaluation.significance import holm, paired_randomisation_test
from tct_hf.evaluation.systems import System, bm25_system
from tct_hf.evaluation.tables import markdown_table, p_value
from tct_hf.evaluation.workspace import Stored
from tct_hf.files import claim, read_json, weights_file_digest, write_json_atomic, write_text_atomic
from tct_hf.retrieval.negatives import collection_bm25

Found: TypeAlias = Mapping[str, Evaluation]
Costs: TypeAlias = Mapping[str, Mapping[str, float]]
# What a measure is called where a system is fused with BM25.
_FUSED = "{} + BM25"
COSTS_FILE = "costs.json"  # beside runs: what their systems cost


@dataclass(frozen=True)
class ArmResult:
    """What an arm's students came to: evaluations by seed and split, training logs by seed.

    `says` is what the arm changes, in words; `against` the arms and keys of systems that it is tested against; `costs`
    what searching with one of its seeds costs, by measure: that of whole vectors, of first dimensions and codes.
    """

    says: str
    against: Sequence[str]
    evaluations: Mapping[int, Found]
    logs: Mapping[int, Sequence[Mapping[str, Any]]]
    costs: Costs = field(default_factory=dict)


def search_student(
    student: Path,
    title: str,
    collection: Collection,
    experiment: Experiment,
    *,
    bf16: bool,
    timed: bool,
    dims: Sequence[int] | None = None,
    codes: Sequence[str] | None = None,
    stored: Sequence[Path] = (),
) -> tuple[Found, Costs]:
    """Search with a student (folder), alone and fused with the BM25 of an experiment: split to evaluation.

    What its first dimensions reach, and Faiss's `codes`, are further measures of it. The runs go beside the student,
    and are read where an earlier call has left them; so do their costs, by measure, where they are `timed`.
    """
    folder, depth = student.parent / "runs", experiment.depth
    weights = weights_file_digest(student)
    claim(folder, {"weights": weights, "depth": depth, **collection.own_rule}, {"weights": str(student)})
    references = References(collection, depth, bf16, stored, costs={} if timed else None)
    system, *parts = references.students({STUDENT: str(student)}, dims, codes)
    bm25 = {(key, split): run for (key, split), run in experiment.runs.items() if key == BM25}
    own = replace(experiment, runs=bm25, titles={}, write=print)
    own.search([replace(system, title=title), *parts], folder)
    costs = _kept_costs(folder, references)
    own.fuse_with_bm25([STUDENT], folder)
    measure = own.measures[0]
    names = {part.key: part.title.replace(system.title, measure, 1) for part in parts}
    found = {split: with_fused(found, STUDENT, measure, names)[STUDENT] for split, found in own.evaluate().items()}
    return found, {name: costs[key] for key, name in ({STUDENT: measure} | names).items() if key in costs}


def _kept_costs(folder: Path, references: References) -> dict[str, dict[str, float]]:
    """What systems cost, as measured now or when their runs in the folder were made; empty where neither was."""
    file = folder / COSTS_FILE
    if references.costs:
        write_json_atomic(file, references.costs)
    return read_json(file, "delete its folder, to search again.") if file.is_file() else {}


def with_fused(
    evaluations: Found, key: str, measure: str, parts: Mapping[str, str] | None = None
) -> dict[str, Evaluation]:
    """Put what a system reached fused with BM25 beside what it reached alone, as one more measure.

    The same of other systems, whose keys `parts` maps to the names of such measures.
    """
    kept = dict(evaluations)
    for other, name in {fused_key(key): _FUSED.format(measure), **(parts or {})}.items():
        found, own = kept.pop(other), kept[key]
        mean, per_query = {name: found.mean[measure]}, {name: found.per_query[measure]}
        kept[key] = Evaluation(own.mean | mean, own.per_query | per_query)
    return kept


def report_arms(
    students: Mapping[str, Mapping[int, Path]],
    says: Mapping[str, str],
    against: Mapping[str, Sequence[str]],
    systems: Sequence[System],
    collection: Collection,
    output: Path,
    *,
    split: str,
    measures: Sequence[str],
    depth: int,
    bf16: bool,
    name: str,
    settings: Mapping[str, Any],
    dims: Sequence[int] | None = None,
    codes: Sequence[str] | None = None,
    stored: Sequence[Path] = (),
    write: Callable[[str], None] = print,
) -> Path:
    """Search with every arm's students (seed to folder) and the reference systems; write report, metrics and plot.

    `systems` begin with BM25; `split` is "test", or "dev", which never searches for the test queries; `name` is in
    the names of all files. Students are also searched with their first `dims` dimensions and by Faiss's `codes`, and
    those whose passages' vectors are in a folder of `stored` read them there.
    Returns the report, Markdown.
    """
    experiment = Experiment.of(collection, measures, depth, splits=("dev", split), write=write)
    experiment.search(systems, output / "runs")
    titles = experiment.titles
    base = [BASE_NATIVE] if BASE_NATIVE in titles else []
    experiment.fuse_with_bm25(base, output / "runs")
    measured = experiment.evaluate()
    for one in experiment.splits:
        for key in base:
            measured[one] = with_fused(measured[one], key, measures[0])
    references = dict(measured[split])
    timed = References(collection, depth, bf16, costs={})
    if not (output / "runs" / COSTS_FILE).is_file():
        index = collection_bm25(collection)
        bm25 = bm25_system(BM25, titles[BM25], Stored(index, Footprint()), depth)
        timed.time(bm25, index, experiment.splits[split].queries)
    of_bm25 = ArmResult(
        "", [], {0: {split: references[BM25]}}, {}, {measures[0]: _kept_costs(output / "runs", timed)[BM25]}
    )
    results: dict[str, ArmResult] = {}
    how: Any = {"bf16": bf16, "dims": dims, "codes": codes, "stored": stored}
    for arm, folders in students.items():
        searched = {
            seed: search_student(folder, f"{arm}, seed {seed}", collection, experiment, timed=not at, **how)
            for at, (seed, folder) in enumerate(folders.items())
        }
        found = {seed: evaluations for seed, (evaluations, _) in searched.items()}
        logs = {seed: read_log(folder) for seed, folder in folders.items()}
        costs = next((costs for _, costs in searched.values() if costs), {})
        results[arm] = ArmResult(says[arm], against[arm], found, logs, costs)
        for seed, parts in found.items():
            for one, evaluation in parts.items():
                measured[one][f"{arm}, seed {seed}"] = evaluation
    shown = [*measures, _FUSED.format(measures[0])]
    said = [
        f"{split} queries, exact search. Mean over seeds ± their standard deviation; minutes of a training.",
        f"{shown[-1]}: fused with BM25, alpha tuned on dev where it is judged.",
        *collection.own_note,
    ]
    sections = [
        f"# {collection.summary()}",
        "\n".join(said),
        arm_table(results, {titles[key]: found for key, found in references.items()}, split, shown),
        "\n".join(f"- {arm}: {result.says}" for arm, result in results.items()),
    ]
    if tests := against_table(results, references, split, shown):
        sections += [
            "Gains (p of the paired randomisation test over the queries; the same after Holm's correction over the "
            "lines). A query counts with its mean over the seeds that both have; with one seed, p says nothing about "
            "another seed.",
            tests,
        ]
    found_of = [parts[split].mean for result in results.values() for parts in result.evaluations.values()]
    if coded := [name for name in dict.fromkeys(chain(*found_of)) if name not in shown]:
        sections += ["## In codes and first dimensions", arm_table(results, {}, split, coded)]
        sections += [tests] if (tests := against_table(results, {}, split, coded)) else []
    plot = output / f"curves.{name}.png"
    curves = {arm: [_curve(log) for log in result.logs.values()] for arm, result in results.items()}
    if any(map(any, curves.values())):
        sections.append(missing_plot(plot_dev_curves, curves, plot, ylabel="dev RR@10") or f"Plot: {plot.name}")
    for axis, file in ((MILLISECONDS, f"latency.{name}.svg"), (BYTES, f"storage.{name}.svg")):
        labels = {"xlabel": axis, "ylabel": measures[0], "title": collection.name}
        points = trade_offs({titles[BM25]: of_bm25, **results}, split, measures[0], axis)
        sections.append(missing_plot(plot_trade_off, points, output / file, **labels) or f"Plot: {file}")
    write_metrics(output / f"metrics.{name}.json", measured, corpus=collection.fingerprint, settings=settings)
    return write_text_atomic(output / f"report.{name}.md", "\n\n".join(sections) + "\n")


def trade_offs(results: Mapping[str, ArmResult], split: str, measure: str, axis: str) -> list[TradeOff]:
    """The points of a plot: each arm's mean over seeds, and first dimensions in the same code under one label."""
    points = []
    for arm, result in results.items():
        for name, cost in result.costs.items():
            found = [parts[split] for parts in result.evaluations.values()]
            error = standard_error([*found[0].per_query[name].values()])
            label = re.sub(r", first \d+ dimensions", "", name).replace(measure, arm, 1)
            effect = fmean(one.mean[name] for one in found)
            points.append(TradeOff(label, cost[axis], effect, error, label.removeprefix(arm) or "dense"))
    return points


def _curve(log: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """RR@10 on dev by step, as training measured it, where it did."""
    return {entry["step"]: entry[key] for entry in log for key in entry if key.endswith("_mrr@10")}


def arm_table(results: Mapping[str, ArmResult], references: Found, split: str, measures: Sequence[str]) -> str:
    """A Markdown table: the references by title, then a line for each arm, mean over seeds ± their deviation."""
    rows = [["system", *measures, "seeds", "steps", "minutes"]]
    for title, evaluation in references.items():
        figures = [f"{evaluation.mean[name]:.3f}" if name in evaluation.mean else "" for name in measures]
        rows.append([title, *figures, "", "", ""])
    for name, result in results.items():
        cells = []
        for measure in measures:
            means = [parts[split].mean for parts in result.evaluations.values()]
            values = [mean[measure] for mean in means if measure in mean]  # not of a sparse arm's codes
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}" if values else "")
        entries = [entry for log in result.logs.values() for entry in log]
        steps = max(int(entry["step"]) for entry in entries)
        minutes = sum(entry.get("seconds", 0.0) for entry in entries) / len(result.logs) / 60
        rows.append([name, *cells, str(len(result.evaluations)), str(steps), f"{minutes:.1f}"])
    return markdown_table(rows)


def against_table(results: Mapping[str, ArmResult], references: Found, split: str, measures: Sequence[str]) -> str:
    """A Markdown table of gains over what each arm is tested against, with p values; empty without any.

    `references` are by key. A cell is empty where one of the two was not measured so; two arms without a seed in
    common are refused.
    """

    def found(name: str, seeds: Sequence[int]) -> list[Evaluation]:
        return [results[name].evaluations[seed][split] for seed in seeds] if name in results else [references[name]]

    def values(name: str, seeds: Sequence[int]) -> list[float]:
        """Each query's mean over the seeds, in the order of the queries' ids."""
        arm = found(name, seeds)
        return [fmean(one.per_query[measure][query] for one in arm) for query in sorted(arm[0].per_query[measure])]

    pairs: list[tuple[str, str, list[int]]] = []
    for name, result in results.items():
        for other in result.against:
            if other == name or (other not in results and other not in references):
                continue
            theirs = results[other].evaluations if other in results else result.evaluations
            seeds = sorted(result.evaluations.keys() & theirs.keys())
            if not seeds:
                raise ValueError(f"arms.{name}.against: {other!r} has no seed in common with it: set their seeds")
            pairs.append((name, other, seeds))
    if not pairs:
        return ""
    rows = [["arm", "against", "seeds"], *([name, other, str(len(seeds))] for name, other, seeds in pairs)]
    for measure in measures:
        measured = [all(measure in one.mean for each in both for one in found(each, seeds)) for *both, seeds in pairs]
        tested = [(values(name, seeds), values(other, seeds)) for name, other, seeds in compress(pairs, measured)]
        ps = [paired_randomisation_test(*both) for both in tested]
        cells = [
            f"{fmean(a) - fmean(b):+.3f} ({p_value(p)}; {p_value(corrected)})"
            for (a, b), p, corrected in zip(tested, ps, holm(ps), strict=True)
        ][::-1]
        rows[0].append(f"{measure} (p; Holm)")
        for row, there in zip(rows[1:], measured, strict=True):
            row.append(cells.pop() if there else "")
    return markdown_table(rows, left=2)
