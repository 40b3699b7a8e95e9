"""The tables of a comparison of training arms: effectiveness over seeds, paired tests, a log of trials."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.measures import Evaluation
from tct_hf.evaluation.significance import holm, paired_randomisation_test
from tct_hf.files import write_text_atomic

if TYPE_CHECKING:
    from tct_hf.pipeline.arms import Arm


@dataclass(frozen=True)
class ArmResult:
    """What an arm's students came to.

    Args:
        arm: how they were trained.
        evaluations: seed to split ("dev", "test") to evaluation.
        logs: seed to the training log.
        arguments: of the training, shared and its own.
    """

    arm: Arm
    evaluations: Mapping[int, Mapping[str, Evaluation]]
    logs: Mapping[int, Sequence[Mapping[str, Any]]]
    arguments: Mapping[str, Any]

    def mean(self, split: str, measure: str) -> float:
        """Mean over seeds of the mean over queries."""
        return math.fsum(parts[split].mean[measure] for parts in self.evaluations.values()) / len(self.evaluations)

    def per_query(self, split: str, measure: str, seeds: Iterable[int]) -> list[float]:
        """Each query's mean over some seeds, in the order of the queries' ids."""
        several = [self.evaluations[seed][split].per_query[measure] for seed in seeds]
        return [math.fsum(one[query] for one in several) / len(several) for query in sorted(several[0])]

    def spread(self, split: str, measure: str) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        values = [parts[split].mean[measure] for parts in self.evaluations.values()]
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def steps(self) -> int:
        """Steps of each training."""
        return max(int(entry["step"]) for log in self.logs.values() for entry in log)

    def minutes(self) -> float:
        """Minutes a training took, evaluation on dev during it included; mean over seeds."""
        taken = [entry["seconds"] for log in self.logs.values() for entry in log if "seconds" in entry]
        return math.fsum(taken) / len(self.logs) / 60

    def curve(self) -> dict[int, dict[int, float]]:
        """Seed to step to RR@10 on dev as training measured it."""
        return {
            seed: {entry["step"]: entry[name] for entry in log for name in entry if name.endswith("_mrr@10")}
            for seed, log in self.logs.items()
        }


def difference(one: ArmResult, other: ArmResult, split: str, measure: str) -> tuple[float, float, list[int]]:
    """Compare two arms on the seeds that both have: each query's value is its mean over these seeds.

    Returns:
        Mean difference, two-sided p of the paired randomisation test over queries, the seeds.

    Raises:
        ValueError: the arms have no seed in common.
    """
    seeds = sorted(one.evaluations.keys() & other.evaluations.keys())
    if not seeds:
        raise ValueError("the two arms have no seed in common: give them one with arms.NAME.seeds")
    a, b = (arm.per_query(split, measure, seeds) for arm in (one, other))
    return math.fsum(a) / len(a) - math.fsum(b) / len(b), paired_randomisation_test(a, b), seeds


def arm_table(
    results: Mapping[str, ArmResult], references: Mapping[str, Evaluation], split: str, measures: Sequence[str]
) -> str:
    """A Markdown table: the reference systems, then a line for each arm, mean over seeds ± their deviation.

    Args:
        results: name to result.
        references: title to evaluation of systems that no arm trained.
        split: "dev" or "test".
        measures: columns; empty for a reference that was not measured by one.
    """
    reads = any(result.arm.reads() for result in results.values())
    middle = ["layers", *(["texts"] if reads else [])]
    rows = [["system", "learns from", "starts from", *middle, *measures, "seeds", "steps", "minutes"]]
    for title, evaluation in references.items():
        figures = [f"{evaluation.mean[name]:.3f}" if name in evaluation.mean else "" for name in measures]
        rows.append([title, "", "", *("" for _ in middle), *figures, "", "", ""])
    for name, result in results.items():
        arm = result.arm
        cells = []
        for measure in measures:
            spread = result.spread(split, measure)
            cells.append(f"{result.mean(split, measure):.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        signal = arm.signal + (", also unlabelled" if arm.unlabelled else "")
        layers = "all" if arm.layers is None else str(len(arm.layers))
        seeds, steps, minutes = str(len(result.evaluations)), str(result.steps()), f"{result.minutes():.1f}"
        texts = [arm.reads()] if reads else []
        rows.append([name, signal, str(arm.initialise_from), layers, *texts, *cells, seeds, steps, minutes])
    return _markdown(rows, left=3 + len(middle))


def against_table(
    results: Mapping[str, ArmResult],
    references: Mapping[str, Evaluation],
    split: str,
    measures: Sequence[str],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> str:
    """A Markdown table of arms against others: difference, p of the paired randomisation test, and p after Holm's
    correction over the lines of the table.

    Empty when there is nothing to compare.

    Args:
        results: name to result.
        references: key to evaluation of systems that no arm trained.
        split: "dev" or "test".
        measures: columns; a line is empty where its reference was not measured by one.
        pairs: who is tested against whom; each arm against those it names, where they are there, when None.
    """
    if pairs is None:
        there = results.keys() | references.keys()
        pairs = [(name, other) for name, result in results.items() for other in result.arm.against if other in there]
    if not pairs:
        return ""
    rows = [["arm", "against", "seeds"], *([name, other, ""] for name, other in pairs)]
    for measure in measures:
        found = [
            (row, *difference(results[name], results[other], split, measure))
            if other in results
            else (row, *_difference_to(results[name], references[other], split, measure))
            for row, (name, other) in zip(rows[1:], pairs, strict=True)
            if other in results or measure in references[other].mean
        ]
        rows[0].append(f"{measure} (p; Holm)")
        corrected = holm([p for *_, p, _ in found])
        for (row, delta, p, seeds), with_holm in zip(found, corrected, strict=True):
            row[2] = str(len(seeds))
            row.append(f"{delta:+.3f} ({_shown(p)}; {_shown(with_holm)})")
        for row in rows[1:]:
            row += [""] * (len(rows[0]) - len(row))
    return _markdown(rows, left=2)


def _difference_to(one: ArmResult, other: Evaluation, split: str, measure: str) -> tuple[float, float, list[int]]:
    """As :func:`difference`, to a system without seeds."""
    seeds = sorted(one.evaluations)
    same = ArmResult(one.arm, {seed: {split: other} for seed in seeds}, {}, {})
    return difference(one, same, split, measure)


def _shown(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _markdown(rows: list[list[str]], *, left: int) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    marks = ["-" * (width + 2) if at < left else "-" * (width + 1) + ":" for at, width in enumerate(widths)]
    lines.insert(1, "|" + "|".join(marks) + "|")
    return "\n".join(lines)


# The arguments that tell students apart, in their log.
_VARIED = (
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "warmup_steps",
    "temperature",
    "student_temperature",
    "hard_label_weight",
)


def write_students(path: str | Path, results: Mapping[str, ArmResult], splits: Sequence[str], name: str) -> None:
    """Write a CSV file, one line a student: its settings and figures; the trial log of tuning.

    A temperature that is empty is the default, 1 / the scale the teacher was trained at.

    Args:
        path: file.
        results: arm's name to result.
        splits: whose figures are written.
        name: of the collection, first column.
    """
    from tct_hf.training.arguments import DEFAULTS

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    anyone = next(iter(next(iter(results.values())).evaluations.values()))
    measures = [(split, measure) for split in splits for measure in anyone[split].mean]
    head = ["collection", "arm", "learns_from", "starts_from", "layers", "texts", "unlabelled", "seed", *_VARIED]
    writer.writerow([*head, *(f"{split} {measure}" for split, measure in measures), "minutes"])
    for arm, result in results.items():
        arguments = {**DEFAULTS, **result.arguments}
        for seed, parts in result.evaluations.items():
            taken = [entry["seconds"] / 60 for entry in result.logs[seed] if "seconds" in entry]
            kept = "all" if result.arm.layers is None else " ".join(map(str, result.arm.layers))
            writer.writerow(
                [
                    name,
                    arm,
                    result.arm.signal,
                    result.arm.initialise_from,
                    kept,
                    result.arm.reads(),
                    result.arm.unlabelled,
                    seed,
                    *(arguments.get(key, "") for key in _VARIED),
                    *(f"{parts[split].mean[measure]:.4f}" for split, measure in measures),
                    f"{taken[0]:.1f}" if taken else "",
                ]
            )
    write_text_atomic(path, text.getvalue())
