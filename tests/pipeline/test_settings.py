"""One tree of settings: overrides of it, and what contradicts itself in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tct_hf.pipeline.checks import check_part
from tct_hf.pipeline.settings import OneTeacher, TrainSettings, overridden
from tct_hf.settings import SettingsError
from tests.recipe import ROOT


def test_overrides_are_dotted_or_nested_and_leave_the_rest() -> None:
    settings = TrainSettings(seed=5)
    settings.student.training = {"max_steps": 3, "temperature": 2.0}
    changes = {
        "data.labels": 0.25,
        "student": {"layers": [0, 2], "training": {"temperature": 4.0}},
        "stages": ["stock"],
        "encoder.prompts": {"query": "query: "},
        "teacher.mixed_with": [{"kind": "bm25", "weight": 0.5}],
        "data.dev_split": None,
    }
    found = overridden(settings, changes, "arms.x")
    assert (found.data.labels, found.student.layers, found.stages, found.seed) == (0.25, [0, 2], ["stock"], 5)
    assert found.student.training == {"max_steps": 3, "temperature": 4.0}
    assert found.encoder.prompts == {"query": "query: "} and found.data.dev_split is None
    assert found.teacher.mixed_with[0].weight == 0.5
    assert settings.data.labels == 1.0 and settings.student.training["temperature"] == 2.0
    assert overridden(settings, {}, "arms.x") == settings


def test_a_bundled_model_is_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tct_hf.pipeline.checks.resolve_model", {"bundled": str(tmp_path), "other": "other"}.get)
    for kind in ("own", "dense"):
        check_part(OneTeacher(kind, model="bundled"), "teacher.")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"teacher\.model: other is not there"):
        check_part(OneTeacher("own", model="other"), "teacher.")


def test_no_recipe_imports_torch_before_it_has_its_settings() -> None:
    scripts = [str(file) for file in (ROOT / "recipes").glob("*.py")]
    code = "import runpy, sys; [runpy.run_path(file) for file in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    assert len(scripts) > 9 and subprocess.run([sys.executable, "-c", code, *scripts]).returncode == 0
