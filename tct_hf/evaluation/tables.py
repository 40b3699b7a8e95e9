"""Markdown tables of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, the first row its head, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def best_of(rows: Sequence[Mapping[str, float]], measures: Sequence[str]) -> dict[str, float]:
    """The highest mean of each measure."""
    return {measure: max(row[measure] for row in rows) for measure in measures}


def mean_cells(means: Mapping[str, float], best: Mapping[str, float]) -> list[str]:
    """A system's means, the best of each measure in bold."""
    return [f"**{means[name]:.3f}**" if means[name] == top else f"{means[name]:.3f}" for name, top in best.items()]


def difference_cells(one: Mapping[str, Any]) -> list[str]:
    """Difference, better/worse and the two Holm-corrected p values, with the fields of `SystemDifference`."""
    ps = (one["p_randomisation_holm"], one["p_t_test_holm"])
    shown = ["<0.0001" if p < 0.0001 else f"{p:.4f}" for p in ps]
    return [f"{one['difference']:+.4f}", f"{one['better']}/{one['worse']}", *shown]


def milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def whole(value: float | None) -> str:
    """A whole number, "?" where it is not known."""
    return "?" if value is None else f"{value:,.0f}"


def weight_text(alpha: float) -> str:
    """A weight of a fusion: three significant digits, large ones in full."""
    return f"{alpha:.3g}" if alpha < 999.5 else f"{alpha:,.0f}"


def p_text(difference: float, p: float) -> str:
    """Where a system stands beside another, with the p value of the difference."""
    if difference == 0:
        return "level with"
    return (
        f"{'above' if difference > 0 else 'below'} ({difference:+.3f}, {'p < 0.001' if p < 0.001 else f'p {p:.3f}'})"
    )


def shorten(text: str, width: int) -> str:
    """The start of a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."
