from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tct_hf.plots import plot_losses

TEACHER = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "train_loss": 1.7}]
STUDENT = [{"step": 1, "loss": 0.9, "hard_label": 0.4, "distillation": 0.5}]


def width(path: Path) -> int:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big")


def test_each_stage_with_losses_has_a_panel(tmp_path: Path) -> None:
    one = plot_losses({"teacher": TEACHER, "student": []}, tmp_path / "deep" / "one.png")
    two = plot_losses({"teacher": TEACHER, "student": STUDENT}, tmp_path / "deep" / "two.png")
    assert width(two) == 2 * width(one)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["one.png", "two.png"]


def test_no_loss_in_any_log_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Lower logging_steps"):
        plot_losses({"teacher": [{"step": 2, "train_loss": 1.7}], "student": []}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install 'tct_hf\[plots\]'"):
        plot_losses({"teacher": TEACHER}, tmp_path / "x.png")
