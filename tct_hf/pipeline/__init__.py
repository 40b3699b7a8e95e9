"""What the recipes share: the sections of their settings, and one function a stage."""

from collections.abc import Mapping


def one_row(cells: Mapping[str, str]) -> str:
    """A Markdown table of one row.

    Args:
        cells: heading to text.
    """
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}\n| {' | '.join(cells.values())} |"
