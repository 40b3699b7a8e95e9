"""Stages and corpora tell how far a run is and about how long it has to go; libraries stay quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import transformers
from sentence_transformers.base import model_card

from tct_hf.progress import NOTICES, PassageProgress, Stages, _no_notice, human_duration, quieten


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_durations_read_well() -> None:
    seconds = (0.99, 59.4, 59.6, 200, 3599.7, 7500, 90000)
    said = ["under 1 s", "59 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "1 d 1 h"]
    assert [human_duration(one) for one in seconds] == said


def test_time_taken_so_far_scales_the_estimate_by_weight_without_skipped_stages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock, lines = Clock(), list[str]()
    stages = Stages({"old": 5, "read": 1, "train": 4, "measure": 1}, clock=clock, write=lines.append)
    stages.skip("old", "already there")
    with pytest.raises(RuntimeError, match="boom"), stages.stage("read"):
        clock.now += 5
        raise RuntimeError("boom")
    with stages.stage("read"):
        clock.now += 60
    with stages.stage("train"):
        clock.now += 300
    with stages.stage("measure"):
        clock.now += 1
    stages.finish()
    assert lines == [
        "[1/4] old: skipped, already there",
        "[2/4] read",
        "[2/4] read",
        "[3/4] train",  # too little is measured
        "[4/4] measure (about 1 min left in all)",
        "done in 6 min 6 s",
    ]
    for enabled, expected in ((False, ""), (True, "[1/1] train\n")):  # only the main process prints
        with Stages({"train": 1}, enabled=enabled).stage("train"):
            pass
        assert capsys.readouterr().out == expected


def test_passages_are_counted_over_all_processes_with_what_was_there_before() -> None:
    clock, lines = Clock(), list[str]()
    for total in (1000, None):
        progress = PassageProgress(total, 2, lines.append, 10.0, clock, enabled=True)
        progress.skipped(100)
        clock.now += 20
        progress.encoded(200)
        progress.encoded(10)  # too soon for another line
        clock.now += 30
        progress.finish(1000)
    assert lines == [
        "  500 of 1,000 passages   20 passages/s   25 s left",
        "  1,000 passages (100 were there) in 50 s, 18 passages/s",
        "  500 passages   20 passages/s",
        "  1,000 passages (100 were there) in 50 s, 18 passages/s",
    ]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made quiet for one test."""
    monkeypatch.setattr(model_card, "tqdm", model_card.tqdm)
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quieten()
        quieten()  # once more changes nothing
        yield
    transformers.utils.logging.set_verbosity(level)
    if bars:
        transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()
    for name in NOTICES:
        logging.getLogger(name).removeFilter(_no_notice)


def test_bars_and_notices_are_dropped_and_other_warnings_kept(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    for name, start in NOTICES.items():
        logger = logging.getLogger(name)
        logger.addHandler(keep)
        logger.warning(f"{start} and so on")
        logger.warning("Something is wrong")
        logger.removeHandler(keep)
    assert seen == ["Something is wrong"] * len(NOTICES)
    with pytest.warns(UserWarning, match="fix this"):
        warnings.warn("fix this", stacklevel=1)
    bar: Any = model_card.tqdm
    assert list(bar([1, 2], desc="Computing widget examples")) == [1, 2]
    assert capsys.readouterr().err == ""
