"""Plots of a run's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from operator import itemgetter
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
    """A system in a plot of effectiveness, with its standard error, against a cost above 0; `kind` sets its mark.

    Systems of one label, such as the sizes of a student, are joined by a line.
    """

    label: str
    cost: float
    effect: float
    error: float
    kind: str


_MARKS = {"sparse": "s", "learned sparse": "v", "dense": "o", "hybrid": "D", "late interaction": "^"}
_OTHER_MARKS = "PX*dph<>8"


def plot_trade_off(points: Sequence[TradeOff], path: str | Path, *, xlabel: str, ylabel: str, **labels: str) -> Path:
    """Plot effectiveness against cost on a logarithmic axis, a mark for each kind and a colour for each system.

    Names stand beside the marks, or in a legend where a line has several.
    """
    if not points or min(point.cost for point in points) <= 0:
        raise ValueError("there is no system with a cost to plot, or a cost of 0.")
    figure, [axes] = _panels(8.6, 4.6)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    others = dict.fromkeys(point.kind for point in points if point.kind not in _MARKS)
    marks = {kind: mark for kind, mark in zip(others, cycle(_OTHER_MARKS), strict=False)} | _MARKS
    systems: dict[str, list[TradeOff]] = {}
    for point in points:
        systems.setdefault(point.label, []).append(point)
    lines = max(map(len, systems.values())) > 1
    barred = not lines and any(point.error for point in points)
    for number, (label, of) in enumerate(systems.items()):
        _, xs, ys, bars, kinds = zip(*sorted(of, key=itemgetter(1)), strict=True)
        style: dict[str, Any] = {"marker": marks[kinds[0]], "markersize": 7, "linewidth": 1, "capsize": 2}
        style |= {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        axes.errorbar(xs, ys, yerr=bars if barred else None, label=label, **style)
    axes.set_xscale("log")
    costs = [point.cost for point in points]
    axes.set_xlim(min(costs) / 2, max(costs) * 2)
    # Numbers such as 0.5, 20 and 3,000 instead of powers of ten.
    subs = (1.0, 2.0, 5.0) if max(costs) / min(costs) < 100 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=f"{xlabel} (log scale)", ylabel=ylabel + " (± standard error)" * barred, **labels)
    if lines or not _name_marks(figure, axes, points):
        figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    return _save(figure, path)


def _name_marks(figure: Any, axes: Any, points: Sequence[TradeOff]) -> bool:
    """Write systems' names near their marks, where they cover no mark and no other name; whether all have room."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # sizes of texts and places of marks are known from here on
    ends = [[(point.cost, point.effect + sign * point.error) for point in points] for sign in (-1, 1)]
    bars = zip(*map(axes.transData.transform, ends), strict=True)
    taken = [Bbox.from_extents(x - 6, low - 6, x + 6, high + 6) for (x, low), (_, high) in bars]
    sides = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}
    around = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    frame, pixels = axes.get_window_extent(), figure.dpi / 72  # a point
    for number, point in enumerate(points):
        line = {"arrowstyle": "-", "color": f"C{number % 10}", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
        how: dict[str, Any] = {"textcoords": "offset points", "arrowprops": line, "fontsize": "small"}
        name = axes.annotate(point.label, (point.cost, point.effect), (0, 0), ha="left", va="bottom", **how)
        name.set_in_layout(False)
        name.update_positions(figure.canvas.get_renderer())
        left, bottom, width, height = Text.get_window_extent(name).bounds
        for reach, (x, y) in product(range(8, 120, 8), around):
            right, up = reach * x * pixels - width * (1 - x) / 2, reach * y * pixels - height * (1 - y) / 2
            box = Bbox.from_bounds(left + right, bottom + up, width, height)
            if frame.contains(*box.min) and frame.contains(*box.max) and not any(map(box.overlaps, taken)):
                break
        else:
            name.remove()
            return False
        name.xyann = (reach * x, reach * y)
        name.set(ha=sides[x][0], va=sides[y][1])
        taken.append(box)
    return True


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
    from matplotlib import rc_context

    with write_aside(path) as aside, rc_context({"svg.fonttype": "none", "svg.hashsalt": "tct_hf"}):
        kind = Path(path).suffix[1:]
        figure.savefig(aside, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return Path(path)
