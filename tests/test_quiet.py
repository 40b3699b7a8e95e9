from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made quiet for one test."""
    import datasets
    import transformers
    from sentence_transformers.base import model_card

    from tct_hf.quiet import NOTICES, _no_notice, quieten

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


def emitted(logger: str, message: str) -> bool:
    seen: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    keep = Keep()
    logging.getLogger(logger).addHandler(keep)
    logging.getLogger(logger).warning(message)
    logging.getLogger(logger).removeHandler(keep)
    return bool(seen)


def test_notices_are_dropped_and_other_warnings_of_the_same_logger_kept(quiet: None) -> None:
    from tct_hf.quiet import NOTICES

    for logger, start in NOTICES.items():
        assert not emitted(logger, f"{start} and so on")
        assert emitted(logger, "Something is wrong")
    assert emitted("sentence_transformers.base.modules.transformer", "Default prompt name is set to")


def test_warnings_that_a_user_can_mend_come_through(quiet: None) -> None:
    with pytest.warns(UserWarning, match="mend this"):
        warnings.warn("mend this", stacklevel=1)


def test_bars_write_nothing(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    from sentence_transformers.base import model_card
    from transformers.utils import logging as transformers_logging

    bar: Any = model_card.tqdm
    assert list(bar([1, 2], desc="Computing widget examples")) == [1, 2]
    assert list(transformers_logging.tqdm([1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
