"""Plots of a run's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from tct_hf.files import write_aside


def missing_plot(plot: Callable[..., Path], of: Any, path: Path, **labels: str) -> str | None:
    """Draw a plot; a line that says why there is none, where matplotlib is not installed or nothing can be drawn."""
    try:
        plot(of, path, **labels)
    except (ImportError, ValueError) as error:  # the figures count, the plot is for the eye
        return f"no {path.name}: {error}"
    return None


def plot_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Plot the training loss of each stage over its steps, one panel a stage."""
    curves = {title: [entry for entry in log if "loss" in entry] for title, log in logs.items()}
    curves = {title: log for title, log in curves.items() if log}
    if not curves:
        raise ValueError("no stage has logged a loss. Lower logging_steps.")
    figure, panels = _panels(5.2 * len(curves), 3.8, len(curves))
    for axes, (title, log) in zip(panels, curves.items(), strict=True):
        steps = [entry["step"] for entry in log]
        axes.plot(steps, [entry["loss"] for entry in log], label="loss", color="black")
        for name, label in (("hard_label", "hard labels (weighted)"), ("distillation", "distillation (weighted)")):
            if name in log[0]:
                axes.plot(steps, [entry[name] for entry in log], label=label)
        axes.set(title=title, xlabel="step", ylabel="training loss", ylim=(0, None))
        if len(axes.lines) > 1:
            axes.legend()
    return _save(figure, path)


def plot_dev_curves(arms: Mapping[str, Sequence[Mapping[int, float]]], path: str | Path, *, ylabel: str) -> Path:
    """Plot a measure on dev over the steps of training, one line an arm: the mean of its seeds, with their range."""
    arms = {name: kept for name, curves in arms.items() if (kept := [curve for curve in curves if curve])}
    figure, [axes] = _panels(4.6, 3.8)
    for name, curves in arms.items():
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        [line] = axes.plot(steps, [sum(v) / len(v) for v in values], marker="o", markersize=3, label=name)
        if len(curves) > 1:
            low, high = list(map(min, values)), list(map(max, values))
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="step", ylabel=ylabel)
    axes.legend(fontsize="small", loc="lower right")
    return _save(figure, path)


def plot_sweep(lines: Mapping[str, Sequence[tuple[float, float, float]]], path: str | Path, **labels: str) -> Path:
    """Plot a measure against something that was varied, (x, y, error) by series; one of one point is drawn across."""
    if not any(len(points) > 1 for points in lines.values()):
        raise ValueError("There is nothing to plot: a sweep needs two points.")
    figure, [axes] = _panels(5.6, 3.8)
    styles = cycle(("--", ":", "-."))
    for name, points in lines.items():
        xs, ys, bars = (list(values) for values in zip(*sorted(points), strict=True))
        if len(xs) == 1:
            axes.axhline(ys[0], linestyle=next(styles), linewidth=1.2, color="gray", label=name)
        else:
            axes.errorbar(xs, ys, yerr=bars, marker="o", markersize=3, capsize=3, label=name)
    ticks = sorted({x for points in lines.values() if len(points) > 1 for x, _, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(**labels)
    axes.legend(fontsize="small")
    return _save(figure, path)


class TradeOff(NamedTuple):
    """A system in a plot of effectiveness, with its standard error, against a cost above 0; `kind` sets its mark."""

    label: str
    cost: float
    effect: float
    error: float
    kind: str


_MARKS = {"sparse": "s", "learned sparse": "v", "dense": "o", "hybrid": "D", "late interaction": "^"}


def plot_trade_off(points: Sequence[TradeOff], path: str | Path, *, xlabel: str, ylabel: str, **labels: str) -> Path:
    """Plot effectiveness against cost on a logarithmic axis, a mark for each kind and a colour for each system."""
    if not points or min(point.cost for point in points) <= 0:
        raise ValueError("there is no system with a cost to plot, or a cost of 0.")
    figure, [axes] = _panels(8.6, 4.6)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for number, point in enumerate(points):
        style: dict[str, Any] = {"fmt": _MARKS.get(point.kind, "P"), "markersize": 8, "linewidth": 1, "capsize": 2}
        label = {"color": f"C{number % 10}", "label": point.label}
        axes.errorbar(point.cost, point.effect, yerr=point.error, **style, **label)
    axes.set_xscale("log")
    costs = [point.cost for point in points]
    axes.set_xlim(min(costs) / 2, max(costs) * 2)
    # Numbers such as 0.5, 20 and 3,000 instead of powers of ten.
    subs = (1.0, 2.0, 5.0) if max(costs) / min(costs) < 100 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=f"{xlabel} (log scale)", ylabel=f"{ylabel} (± standard error)", **labels)
    figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    return _save(figure, path)


def _panels(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    """A figure that is drawn without a display, and its axes side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Plots need matplotlib ({error}): pip install 'tct_hf[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, count, column + 1) for column in range(count)]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, path: str | Path) -> Path:
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=150, format="png")
    return Path(path)
