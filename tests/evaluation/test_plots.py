from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from tct_hf.evaluation import plots
from tct_hf.evaluation.plots import TradeOff, plot_dev_curves, plot_losses, plot_sweep, plot_trade_off

TEACHER = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "train_loss": 1.7}]
STUDENT = [{"step": 1, "loss": 0.9, "hard_label": 0.4, "distillation": 0.5}]
LABELS: dict[str, Any] = {"xlabel": "x", "ylabel": "y", "title": "t"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, which are saved too."""
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def width(path: Path) -> int:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big")


def test_each_stage_with_losses_has_a_panel_and_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plot_losses({"teacher": TEACHER, "student": []}, tmp_path / "deep" / "one.png")
    two = plot_losses({"teacher": TEACHER, "student": STUDENT}, tmp_path / "deep" / "two.png")
    assert width(two) == 2 * width(one)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["one.png", "two.png"]
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'tct_hf\[plots\]'"):
        plot_losses({"teacher": TEACHER}, tmp_path / "x.png")


def test_a_curve_is_the_mean_over_seeds_at_the_steps_that_all_have_and_the_band_their_range(
    tmp_path: Path, drawn: list[Any]
) -> None:
    arms: dict[str, Any] = {
        "hard labels": [{0: 0.1, 10: 0.3}, {0: 0.3, 10: 0.5, 20: 0.9}],
        "in-batch": [{0: 0.2, 10: 0.6}, {}],
        "never measured": [{}],
    }
    plot_dev_curves(arms, tmp_path / "x.png", ylabel="dev RR@10")
    [axes] = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert axes.get_ylabel() == "dev RR@10" and lines == {
        "hard labels": [[0, pytest.approx(0.2)], [10, pytest.approx(0.4)]],
        "in-batch": [[0, 0.2], [10, 0.6]],
    }
    [band] = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(0, 0.1), (0, 0.3), (10, 0.3), (10, 0.5)}


def test_a_sweep_draws_a_line_a_series_and_single_points_across(tmp_path: Path, drawn: list[Any]) -> None:
    lines = {"in-batch": [(64, 0.5, 0.01), (16, 0.4, 0.02), (512, 0.6, 0.01)], "BM25": [(0, 0.3, 0.0)]}
    plot_sweep(lines, tmp_path / "x.png", **LABELS)
    [axes] = drawn[0].axes
    found = [line.get_xydata().tolist() for line in axes.lines]
    assert [[0, 0.3], [1, 0.3]] in found  # from edge to edge
    assert [[16, 0.4], [64, 0.5], [512, 0.6]] in found
    assert sorted(axes.get_legend_handles_labels()[1]) == ["BM25", "in-batch"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "64", "512"]


def test_costs_are_plotted_with_a_mark_a_system(tmp_path: Path, drawn: list[Any]) -> None:
    points = [TradeOff("BM25", 0.3, 0.49, 0.01, "sparse"), TradeOff("dense", 410.0, 0.43, 0.012, "dense")]
    assert width(plot_trade_off(points, tmp_path / "x.png", **LABELS)) > 0
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["BM25", "dense"] and axes.get_xscale() == "log"
    marks = [line for line in axes.lines if line.get_marker() in "so"]
    assert [line.get_marker() for line in marks] == ["s", "o"] and len({line.get_color() for line in marks}) == 2


def test_names_of_systems_stand_beside_their_marks_and_cover_nothing(tmp_path: Path, drawn: list[Any]) -> None:
    points = [TradeOff(f"a system, number {n}", 1 + n / 100, 0.5 + n % 3 / 1000, 0.01, "dense") for n in range(12)]
    assert plot_trade_off(points, tmp_path / "x.svg", **LABELS).read_text().count("a system, number ") == 12
    [axes], _ = drawn[0].axes, drawn[0].draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 12 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    marks = axes.transData.transform([(point.cost, point.effect) for point in points])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)


def test_sizes_of_one_system_are_joined_and_named_once(tmp_path: Path, drawn: list[Any]) -> None:
    sizes = [TradeOff("student", 512, 0.6, 0.01, "dense"), TradeOff("student", 256, 0.5, 0.01, "dense")]
    plot_trade_off([*sizes, TradeOff("student, SQ8", 128, 0.6, 0.01, ", SQ8")], tmp_path / "x.svg", **LABELS)
    [axes], [legend] = drawn[0].axes, drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["student", "student, SQ8"] and not axes.texts
    assert axes.lines[0].get_xydata().tolist() == [[256, 0.5], [512, 0.6]]
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()


@pytest.mark.parametrize(
    ("plot", "of", "options", "message"),
    [
        (plot_losses, {"teacher": [{"step": 2, "train_loss": 1.7}], "student": []}, {}, "Lower logging_steps"),
        (plot_sweep, {"BM25": [(0, 0.3, 0)]}, LABELS, "needs two points"),
        (plot_trade_off, [], LABELS, "no system with a cost"),
        (plot_trade_off, [TradeOff("BM25", 0, 0.5, 0.0, "sparse")], LABELS, "or a cost of 0"),
    ],
)
def test_nothing_to_plot_is_refused_with_the_fix(
    plot: Any, of: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plot(of, tmp_path / "x.png", **options)
    assert not list(tmp_path.iterdir())
