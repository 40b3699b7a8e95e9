"""The plots of a comparison whose arms differ in a training argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tct_hf.evaluation import plots
from tct_hf.evaluation.arm_plots import plot_swept
from tct_hf.evaluation.arm_table import ArmResult
from tct_hf.evaluation.measures import Evaluation
from tct_hf.pipeline.arms import Arm


def found(*values: float) -> Evaluation:
    mean = sum(values) / len(values)
    return Evaluation({"RR@10": mean}, {"RR@10": {str(at): value for at, value in enumerate(values)}})


def arm(signal: Any, batch: int, *values: float, **more: float) -> ArmResult:
    evaluations = {seed: {"test": found(*values)} for seed in (1, 2)}
    return ArmResult(Arm(signal=signal), evaluations, {}, {"per_device_train_batch_size": batch, **more})


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
    plot_swept(several, {}, tmp_path, "test", "test", "RR@10", columns=3)
    assert [(x, y) for x, y, _ in drawn.pop("hard labels")] == [(24, 1.0), (48, 1.0)]
    said = plot_swept(results, {"BM25": found(0.25)}, tmp_path, "test", "test", "RR@10", columns=3)
    assert said == ["RR@10 against the candidates of a query: candidates.test.png", ""]
    assert [(x, y) for x, y, _ in drawn["in-batch"]] == [(24, 0.5), (48, 0.75), (12, 0.25)]
    assert drawn["in-batch"][0][2] == pytest.approx(0.5)  # of 0 and 1: deviation 0.707, over the root of 2
    assert drawn["BM25"] == [(0.0, 0.25, 0.0)] and set(drawn) == {"in-batch", "BM25"}


def test_temperatures_and_weights_of_hard_labels_are_lines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "plot_sweep", lambda lines, path, **words: drawn.update({path.name: lines}))
    hot = {str(t): arm("in-batch", 8, 0.0, t / 4, temperature=t, hard_label_weight=0.1) for t in (0.5, 1.0, 2.0)}
    hard = arm("hard labels", 8, 1.0, temperature=1.0, hard_label_weight=1.0)
    said = plot_swept({**hot, "hard": hard}, {}, tmp_path, "test.T", "test", "RR@10", columns=2)
    assert said == ["RR@10 against what the teacher's scores are divided by: temperature.test.T.png", ""]
    assert [x for x, *_ in drawn["temperature.test.T.png"].pop("in-batch")] == [0.5, 1.0, 2.0]
    assert drawn.pop("temperature.test.T.png") == {}  # without a teacher there is no temperature
    # Hard labels alone are the end of the line; what nobody has set has its default.
    weights = {"none": arm("in-batch", 8, 0.5, hard_label_weight=0.0), "some": arm("in-batch", 8, 0.5), "hard": hard}
    said = plot_swept(weights, {}, tmp_path, "test.W", "test", "RR@10", columns=2)
    assert said == ["RR@10 against the weight of the hard labels: hard-labels.test.W.png", ""]
    assert [x for x, *_ in drawn["hard-labels.test.W.png"]["in-batch"]] == [0.0, 0.1, 1.0]


def test_other_comparisons_have_no_such_plot(tmp_path: Path) -> None:
    results = {"a": arm("in-batch", 8, 0.0), "b": arm("in-batch", 8, 1.0), "c": arm("in-batch", 16, 1.0)}
    assert plot_swept(results, {}, tmp_path, "test", "test", "RR@10", columns=2) == []
    assert not list(tmp_path.iterdir())


def test_a_line_is_of_the_seeds_that_all_its_points_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "plot_sweep", lambda lines, path, **words: drawn.update(lines))
    results = {str(batch): arm("in-batch", batch, 0.0, 1.0) for batch in (4, 8, 16)}
    results["8"].evaluations[3] = {"test": found(1.0, 1.0)}  # type: ignore[index]
    results["4"].evaluations[1] = results["8"].evaluations[1] = {"test": found(1.0, 1.0)}  # type: ignore[index]
    plot_swept(results, {}, tmp_path, "test", "test", "RR@10", columns=1)
    points = {x: (y, bar) for x, y, bar in drawn["in-batch"]}
    assert points == {4: (0.75, pytest.approx(0.25)), 8: (0.75, pytest.approx(0.25)), 16: (0.5, pytest.approx(0.5))}
