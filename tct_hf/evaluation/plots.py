"""Plots of a run's figures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any


def plot_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Plot the training loss of each stage over its steps, one panel a stage.

    Args:
        logs: title of a panel to a trainer's log history.
        path: PNG file to write.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no loss in any log.
    """
    curves = {title: [entry for entry in log if "loss" in entry] for title, log in logs.items()}
    curves = {title: log for title, log in curves.items() if log}
    if not curves:
        raise ValueError("There is no loss to plot: no stage has logged a step. Lower logging_steps.")
    figure = _figure(5.2 * len(curves), 3.8)
    for column, (title, log) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), column)
        steps = [entry["step"] for entry in log]
        axes.plot(steps, [entry["loss"] for entry in log], label="loss", color="black")
        for name, label in (("hard_label", "hard labels (weighted)"), ("distillation", "distillation (weighted)")):
            if name in log[0]:
                axes.plot(steps, [entry[name] for entry in log], label=label)
        axes.set(title=title, xlabel="step", ylabel="training loss", ylim=(0, None))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    return _save(figure, path)


def plot_dev_curves(
    panels: Mapping[str, Mapping[str, Sequence[Mapping[int, float]]]], path: str | Path, *, ylabel: str
) -> Path:
    """Plot a measure on dev over the steps of training, one panel a kind of student, one line an arm.

    Args:
        panels: title to arm's name to one {step: value} a seed. The line is the mean over seeds, the band their range.
        path: PNG file to write.
        ylabel: what is measured.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to plot.
    """
    panels = {title: {arm: [c for c in curves if c] for arm, curves in arms.items()} for title, arms in panels.items()}
    panels = {title: kept for title, arms in panels.items() if (kept := {a: c for a, c in arms.items() if c})}
    if not panels:
        raise ValueError("There is no dev figure to plot: set curve.steps, and have a dev split.")
    figure = _figure(4.6 * len(panels), 3.8)
    first = None
    for column, (title, arms) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), column, sharey=first)
        first = first or axes
        for name, curves in arms.items():
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            [line] = axes.plot(steps, [sum(v) / len(v) for v in values], marker="o", markersize=3, label=name)
            if len(curves) > 1:
                low, high = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        axes.set(title=title, xlabel="step", ylabel=ylabel if column == 1 else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    return _save(figure, path)


def plot_sweep(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    doubling: bool = False,
) -> Path:
    """Plot a measure against something that was varied, one line a series.

    Args:
        lines: name to (what was varied, value, half the length of the error bar); a line of one point is drawn across.
        path: PNG file to write.
        xlabel: what was varied.
        ylabel: what is measured, and what the bars are.
        title: of the plot.
        doubling: each point of the axis is about twice the one before it.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no line has two points.
    """
    if not any(len(points) > 1 for points in lines.values()):
        raise ValueError("There is nothing to plot: a sweep needs two points.")
    figure = _figure(5.6, 3.8)
    axes = figure.add_subplot()
    styles = cycle(("--", ":", "-."))
    for name, points in lines.items():
        xs, ys, bars = (list(values) for values in zip(*sorted(points), strict=True))
        if len(xs) == 1:
            axes.axhline(ys[0], linestyle=next(styles), linewidth=1.2, color="gray", label=name)
        else:
            axes.errorbar(xs, ys, yerr=bars, marker="o", markersize=3, capsize=3, label=name)
    ticks = sorted({x for points in lines.values() if len(points) > 1 for x, _, _ in points})
    if doubling:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, path)


@dataclass(frozen=True)
class TradeOff:
    """A system in a plot of effectiveness against cost.

    Args:
        label: written beside its point.
        cost: above 0.
        effect: what is measured.
        error: its standard error, drawn as a bar up and down.
        kind: systems of one kind share a colour and a mark.
    """

    label: str
    cost: float
    effect: float
    error: float
    kind: str


_MARKS = {"sparse": "s", "learned sparse": "v", "dense": "o", "hybrid": "D", "late interaction": "^"}


def plot_trade_off(points: Sequence[TradeOff], path: str | Path, *, xlabel: str, ylabel: str, title: str) -> Path:
    """Plot effectiveness against cost on a logarithmic axis, every point labelled, labels clear of each other.

    Args:
        points: the systems.
        path: PNG file to write.
        xlabel: what it costs.
        ylabel: what is measured.
        title: of the plot.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to plot, or a cost is not above 0.
    """
    if not points:
        raise ValueError("There is no system with a cost to plot.")
    for point in points:
        if not point.cost > 0:
            raise ValueError(f"{point.label}: its cost of {point.cost} has no place on a logarithmic axis.")
    figure = _figure(7.4, 4.6)
    axes = figure.add_subplot(1, 1, 1)
    kinds = list(dict.fromkeys(point.kind for point in points))
    for number, kind in enumerate(kinds):
        own = [point for point in points if point.kind == kind]
        axes.errorbar(
            [point.cost for point in own],
            [point.effect for point in own],
            yerr=[point.error for point in own],
            fmt=_MARKS.get(kind, "o"),
            markersize=7,
            linewidth=1,
            capsize=2,
            color=f"C{number}",
            label=kind,
        )
    axes.set_xscale("log")
    # Room for labels beside the outermost points.
    low, high = min(point.cost for point in points), max(point.cost for point in points)
    room = max((high / low) ** 0.25, 2.0)
    axes.set_xlim(low / room, high * room)
    axes.margins(y=0.18)
    _plain_ticks(axes, low / room, high * room)
    axes.set(title=title, xlabel=f"{xlabel} (log scale)", ylabel=f"{ylabel} (± standard error)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(kinds), frameon=False)
    _label(figure, axes, points)
    return _save(figure, path)


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Numbers such as 0.5, 20 and 3,000 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axes: Any, points: Sequence[TradeOff]) -> None:
    """Write each label where it covers no point and no other label, as near to its point as that allows."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # places are known only after the layout
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    pixels = figure.dpi / 72
    spots = axes.transData.transform([(point.cost, point.effect) for point in points])
    taken = [Bbox.from_extents(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels) for x, y in spots]
    for point, (x, y) in zip(points, spots, strict=True):
        bar = abs(axes.transData.transform((point.cost, point.effect + point.error))[1] - y)
        taken.append(Bbox.from_extents(x - pixels, y - bar, x + pixels, y + bar))
    for point in points:
        text, best = None, None
        for across, up, horizontal, vertical in _places():
            text = axes.annotate(
                point.label,
                (point.cost, point.effect),
                xytext=(across, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize="small",
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6} if abs(up) > 16 else None,
            )
            box = text.get_window_extent(renderer).padded(1)
            covered = sum(_overlap(box, other) for other in taken)
            covered += box.width * box.height - _overlap(box, inside)  # what would be cut off
            text.remove()
            if best is None or covered < best[0]:
                best = covered, text, box
            if covered <= 0:
                break
        assert best is not None
        axes.add_artist(best[1])
        taken.append(best[2])


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points with alignments, nearest first."""
    for distance in (9, 22, 36, 50, 64):
        if distance == 9:
            yield from ((9, 0, "left", "center"), (-9, 0, "right", "center"))
        for up, vertical in ((distance, "bottom"), (-distance, "top")):
            yield from ((0, up, "center", vertical), (8, up, "left", vertical), (-8, up, "right", vertical))


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Plots need matplotlib ({error}): pip install 'tct_hf[plots]'.") from error

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(aside, dpi=150)
    os.replace(aside, path)
    return path
