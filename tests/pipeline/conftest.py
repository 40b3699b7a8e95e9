from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipe import in_this_process


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest, settings: Path, patch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the module's RECIPE with its `settings` in this process; the exit status."""
    return in_this_process(request.module.RECIPE, settings, patch)


@pytest.fixture(scope="module")
def whole(settings: Path, recipe: Callable[..., int]) -> Path:
    """The folder of a whole run."""
    assert recipe(settings.parent / "whole") == 0
    return settings.parent / "whole"
