"""The plot of effectiveness against cost: a PNG whose labels can be read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tct_hf.evaluation import plots
from tct_hf.evaluation.plots import TradeOff, plot_trade_off

pytest.importorskip("matplotlib")

CROWDED = [
    TradeOff("BM25", 0.3, 0.49, 0.01, "sparse"),
    TradeOff("dense, exact", 12.0, 0.43, 0.012, "dense"),
    TradeOff("dense, ANN (HNSW32)", 11.6, 0.43, 0.012, "dense"),
    TradeOff("dense + BM25, alpha 0.42", 12.4, 0.52, 0.012, "hybrid"),
    TradeOff("teacher, every passage by MaxSim", 410.0, 0.537, 0.012, "late interaction"),
    TradeOff("teacher over the student's top 100", 35.0, 0.53, 0.012, "late interaction"),
]


def plot(points: list[TradeOff], path: Path) -> Path:
    return plot_trade_off(points, path, xlabel="milliseconds", ylabel="RR@10", title="a collection")


def test_it_is_a_png_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    assert plot(CROWDED, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_labels_of_near_points_do_not_overlap_and_lie_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot(CROWDED, tmp_path / "plot.png")
    [figure] = figures
    [axes] = figure.axes
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(boxes) == {point.label for point in CROWDED}
    inside = axes.get_window_extent()
    for box in boxes.values():
        assert plots._overlap(box, inside) == pytest.approx(box.width * box.height)
    for one, other in combinations(boxes.values(), 2):
        assert not one.overlaps(other)


def test_a_single_point_is_plotted(tmp_path: Path) -> None:
    assert plot(CROWDED[:1], tmp_path / "plot.png").is_file()


def test_nothing_to_plot_and_a_cost_of_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no system with a cost"):
        plot([], tmp_path / "plot.png")
    with pytest.raises(ValueError, match=r"BM25: its cost of 0 has no place"):
        plot([TradeOff("BM25", 0, 0.5, 0.0, "sparse")], tmp_path / "plot.png")
