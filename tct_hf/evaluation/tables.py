"""Markdown tables of figures."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table of cells, the first row its head, the first `left` columns aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if at < left else '>'}{widths[at]}}" for at, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if at < left else ":") for at, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def mean_rows(
    systems: Sequence[tuple[str, Mapping[str, float]]], measures: Sequence[str], marked: Sequence[Container[str]] = ()
) -> list[list[str]]:
    """Title and means of each system, the best of a measure in bold, a dagger where it is `marked` of a system."""
    best = {name: max(means[name] for _, means in systems) for name in measures}
    rows = []
    for (title, means), marks in zip(systems, marked or [()] * len(systems), strict=True):
        cells = [f"**{means[name]:.3f}**" if means[name] == best[name] else f"{means[name]:.3f}" for name in measures]
        rows.append([title, *(cell + " †" * (name in marks) for cell, name in zip(cells, measures, strict=True))])
    return rows


def means_table(systems: Sequence[tuple[str, Mapping[str, float]]], measures: Sequence[str]) -> str:
    """A Markdown table of means, one line a system, the best of each column in bold."""
    return markdown_table([["system", *measures], *mean_rows(systems, measures)])


def difference_table(measure: str, systems: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> str:
    """A Markdown table of (title, mean, fields of `SystemDifference`) each, p values Holm-corrected."""
    rows = [["system", measure, "difference", "better/worse", "p (randomisation)", "p (t-test)"]]
    for title, mean, one in systems:
        cells = [""] * 4
        if one is not None:
            ps = [p_value(one[name], 4) for name in ("p_randomisation_holm", "p_t_test_holm")]
            cells = [f"{one['difference']:+.4f}", f"{one['better']}/{one['worse']}", *ps]
        rows.append([title, mean, *cells])
    return markdown_table(rows)


def p_value(p: float, digits: int = 3) -> str:
    """A p value, or that it is below the least that is shown."""
    least = 10**-digits
    return f"<{least:.{digits}f}" if p < least else f"{p:.{digits}f}"


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
    where = "above" if difference > 0 else "below"
    return f"{where} ({difference:+.3f}, p {p_value(p)})" if difference else "level with"


def shorten(text: str, width: int) -> str:
    """The start of a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."
