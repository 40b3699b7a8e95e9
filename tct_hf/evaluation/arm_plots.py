"""The plots of a comparison of training arms: dev figures over the steps, effectiveness over what arms differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tct_hf.evaluation.arm_table import ArmResult
from tct_hf.evaluation.comparison import standard_error
from tct_hf.evaluation.measures import Evaluation


def plot_curves(results: Mapping[str, ArmResult], path: Path, ylabel: str) -> list[str]:
    """Plot the dev curves, one panel a kind of student.

    Args:
        results: name to result of each arm.
        path: PNG file.
        ylabel: what is measured.

    Returns:
        What to say in the report.
    """
    from tct_hf.evaluation.plots import plot_dev_curves

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


# Name in the file's name to training argument, axis, title, whether values double from one to the next.
_SWEPT = {
    "candidates": (
        "per_device_train_batch_size",
        "the candidates of a query, on one device",
        "Passages that a query is scored against in training",
        True,
    ),
    "temperature": ("temperature", "what the teacher's scores are divided by", "Temperature of the teacher", True),
    "hard-labels": (
        "hard_label_weight",
        "the weight of the hard labels",
        "Hard labels beside the teacher's scores",
        False,
    ),
}


def plot_swept(
    results: Mapping[str, ArmResult],
    references: Mapping[str, Evaluation],
    output: Path,
    name: str,
    split: str,
    measure: str,
    columns: int,
) -> list[str]:
    """Plot effectiveness against a training argument, where arms differ in it: batch, temperature, hard-label weight.

    Args:
        results: name to result of each arm; those of own candidates stay out.
        references: title to evaluation of what no arm trained, drawn across.
        output: folder of the PNG files.
        name: of the report, in their names.
        split: that is shown.
        measure: likewise.
        columns: passages of a triple.

    Returns:
        What to say in the report: nothing where fewer than three arms of a signal differ in an argument, each from
        each. Arms of hard labels are the end of the line of weights, and lines of their own elsewhere.
    """
    from tct_hf.evaluation.plots import plot_sweep

    across = {title: [(0.0, found.mean[measure], 0.0)] for title, found in references.items()}
    said = []
    for what, (argument, xlabel, title, doubling) in _SWEPT.items():
        lines = _lines(results, argument, split, measure, columns if what == "candidates" else 1)
        if not any(len(points) > 2 for points in lines.values()):
            continue
        path = output / f"{what}.{name}.png"
        try:
            plot_sweep(
                {**lines, **across},
                path,
                xlabel=xlabel,
                ylabel=f"{split} {measure} (bar: its standard error)",
                title=title,
                doubling=doubling,
            )
        except ImportError as error:
            return [f"No plot: {error}", ""]
        said += [f"{measure} against {xlabel.partition(',')[0]}: {path.name}", ""]
    return said


def _lines(
    results: Mapping[str, ArmResult], argument: str, split: str, measure: str, factor: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Signal to (value of the argument, effectiveness, standard error), for signals whose arms all differ in it.

    A line is of the seeds that all its arms have.
    """
    from tct_hf.pipeline.arms import HARD, IN_BATCH, OWN
    from tct_hf.training.arguments import DEFAULTS

    found: dict[str, list[tuple[float, ArmResult]]] = {}
    for result in results.values():
        value = {**DEFAULTS, **result.arguments}.get(argument)
        if result.arm.signal == OWN or value is None:
            continue
        # Without the teacher there is neither a temperature nor a part of the loss beside the hard labels.
        if argument == "temperature" and result.arm.signal == HARD:
            continue
        signal = IN_BATCH if argument == "hard_label_weight" else result.arm.signal
        found.setdefault(signal, []).append((factor * float(value), result))
    lines = {}
    for signal, arms in found.items():
        # A point of more seeds than its neighbours would show the other seed, not the other value.
        seeds = set.intersection(*(set(result.evaluations) for _, result in arms))
        if seeds and len({x for x, _ in arms}) == len(arms) > 1:
            lines[signal] = [(x, *_point(result, sorted(seeds), split, measure)) for x, result in arms]
    return lines


def _point(result: ArmResult, seeds: Sequence[int], split: str, measure: str) -> tuple[float, float]:
    """Mean and standard error over the queries, of each query's mean over some seeds."""
    values = result.per_query(split, measure, seeds)
    return math.fsum(values) / len(values), standard_error(values)
