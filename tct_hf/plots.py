"""Plots of a run's figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Plots need matplotlib ({error}): pip install 'tct_hf[plots]'.") from error

    curves = {title: [entry for entry in log if "loss" in entry] for title, log in logs.items()}
    curves = {title: log for title, log in curves.items() if log}
    if not curves:
        raise ValueError("There is no loss to plot: no stage has logged a step. Lower logging_steps.")
    figure = Figure(figsize=(5.2 * len(curves), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(aside, dpi=150)
    os.replace(aside, path)
    return path
