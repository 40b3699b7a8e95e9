from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
import transformers
from sentence_transformers.base import model_card

from tct_hf.pipeline.job import Job
from tct_hf.progress import NOTICES, PassageProgress, _no_notice, human_duration, quieten


def test_durations_read_well() -> None:
    seconds = (0.99, 59.4, 59.6, 200, 3599.7, 7500, 90000)
    said = ["under 1 s", "59 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "1 d 1 h"]
    assert [human_duration(one) for one in seconds] == said


def test_stages_are_told_by_their_place_by_the_main_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tct_hf.pipeline.job.quieten", lambda: None)
    for is_main in (True, False):
        job = Job(["read", "train"])
        job.is_main = is_main
        job.skip("read", "already there")
        with job.stage("train"):
            pass
        job.finish()
        said = "[1/2] read: skipped, already there\n[2/2] train\ndone in under 1 s\n"
        assert capsys.readouterr().out == said * is_main


def test_passages_are_counted_over_all_processes_with_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines, two = Mock(return_value=100.0), list[str](), SimpleNamespace(num_processes=2, process_index=0)
    monkeypatch.setattr("tct_hf.progress.time", SimpleNamespace(monotonic=clock))
    for total in (1000, None):
        progress = PassageProgress(total, two, lines.append, 10.0)  # type: ignore[arg-type]
        progress.skipped(100)
        clock.return_value += 20
        progress.encoded(200)
        progress.encoded(10)  # too soon for another line
        clock.return_value += 30
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
