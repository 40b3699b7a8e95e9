"""The plot of a comparison whose arms differ in the passages that a query is scored against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tct_hf import plots
from tct_hf.arms import Arm
from tct_hf.evaluation.arm_report import plot_candidates
from tct_hf.evaluation.arm_table import ArmResult
from tct_hf.evaluation.effectiveness import Evaluation


def found(*values: float) -> Evaluation:
    mean = sum(values) / len(values)
    return Evaluation({"RR@10": mean}, {"RR@10": {str(at): value for at, value in enumerate(values)}})


def arm(signal: Any, batch: int, *values: float) -> ArmResult:
    evaluations = {seed: {"test": found(*values)} for seed in (1, 2)}
    return ArmResult(Arm(signal=signal), evaluations, {}, {"per_device_train_batch_size": batch})


def test_arms_of_one_signal_and_several_batches_are_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "plot_sweep", lambda lines, path, **words: drawn.update(lines))
    results = {
        "a": arm("in-batch", 8, 0.0, 1.0),
        "b": arm("in-batch", 16, 0.5, 1.0),
        "c": arm("in-batch", 4, 0.0, 0.5),
        "d": arm("hard labels", 8, 1.0, 1.0),  # alone: no line
        "e": arm("own candidates", 8, 1.0, 1.0),
    }
    results["f"] = arm("hard labels", 16, 1.0, 1.0)
    several = dict(results)
    del results["f"]
    plot_candidates(several, {}, tmp_path / "c.png", "test", "RR@10", columns=3)
    assert [(x, y) for x, y, _ in drawn.pop("hard labels")] == [(24, 1.0), (48, 1.0)]
    said = plot_candidates(results, {"BM25": found(0.25)}, tmp_path / "c.png", "test", "RR@10", columns=3)
    assert said[0] == "RR@10 against the candidates of a query: c.png"
    assert [(x, y) for x, y, _ in drawn["in-batch"]] == [(24, 0.5), (48, 0.75), (12, 0.25)]
    assert drawn["in-batch"][0][2] == pytest.approx(0.5)  # of 0 and 1: deviation 0.707, over the root of 2
    assert drawn["BM25"] == [(0.0, 0.25, 0.0)] and set(drawn) == {"in-batch", "BM25"}


def test_other_comparisons_have_no_such_plot(tmp_path: Path) -> None:
    results = {"a": arm("in-batch", 8, 0.0), "b": arm("in-batch", 8, 1.0), "c": arm("in-batch", 16, 1.0)}
    assert plot_candidates(results, {}, tmp_path / "c.png", "test", "RR@10", columns=2) == []
    assert not list(tmp_path.iterdir())
