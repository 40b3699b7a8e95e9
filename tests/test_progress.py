"""Stages tell where a run is and about how long it has to go."""

from __future__ import annotations

import pytest

from tct_hf.progress import Stages, human_duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "under 1 s"),
        (0.99, "under 1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


def test_negative_and_undefined_durations_are_refused() -> None:
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="0 seconds or more"):
            human_duration(seconds)


def test_time_taken_so_far_scales_the_estimate_by_weight() -> None:
    clock, lines = Clock(), list[str]()
    stages = Stages({"read": 1, "train": 4, "measure": 1}, clock=clock, write=lines.append)
    with stages.stage("read"):
        clock.now += 60
    with stages.stage("train"):
        clock.now += 300
    with stages.stage("measure"):
        clock.now += 1
    stages.finish()
    assert lines == [
        "[1/3] read",
        "[2/3] train (about 5 min left in all)",
        "[3/3] measure (about 1 min left in all)",
        "done in 6 min 1 s",
    ]


def test_skipped_stages_count_neither_as_done_nor_as_time() -> None:
    clock, lines = Clock(), list[str]()
    stages = Stages({"read": 5, "train": 1, "measure": 1}, clock=clock, write=lines.append)
    stages.skip("read", "already there")
    with stages.stage("train"):
        clock.now += 30
    with stages.stage("measure"):
        pass
    assert lines == [
        "[1/3] read: skipped, already there",
        "[2/3] train",
        "[3/3] measure (less than a minute left in all)",
    ]


def test_only_the_main_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled, expected in ((False, ""), (True, "[1/1] train\n")):
        with Stages({"train": 1}, enabled=enabled).stage("train"):
            pass
        assert capsys.readouterr().out == expected


def test_a_failed_stage_may_be_run_again_and_a_finished_one_may_not() -> None:
    stages = Stages({"train": 1}, write=lambda line: None)
    with pytest.raises(RuntimeError, match="boom"), stages.stage("train"):
        raise RuntimeError("boom")
    with stages.stage("train"), pytest.raises(ValueError, match="under way"):
        stages.skip("train", "no")
    with pytest.raises(ValueError, match="has run already"):
        stages.skip("train", "no")


def test_misnamed_stages_and_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="no stage 'tain'; the stages are train"):
        Stages({"train": 1}).skip("tain", "no")
    with pytest.raises(ValueError, match="at least one"):
        Stages({})
    with pytest.raises(ValueError, match="'train' must weigh more than 0"):
        Stages({"train": 0})
