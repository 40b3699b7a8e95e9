from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tct_hf.evaluation.expected import ExpectedSettings
from tct_hf.evaluation.measures import named_measures
from tct_hf.pipeline.settings import TrainSettings
from tct_hf.settings import SettingsError, load_settings, read_yaml
from tests.rows import write
from tests.test_recipe_settings import FILES, loaded

FIGURES = {"test": {"bm25": {"RR@10": 0.5, "R@100": 0.9, "tolerance": 0.002}, "student": {"RR@10": 0.6}}}


def means(**systems: dict[str, float]) -> dict[str, Any]:
    return {key: {name: {"mean": mean} for name, mean in one.items()} for key, one in systems.items()}


def verified(tmp_path: Path, content: Any, **changes: Any) -> None:
    ExpectedSettings(**{"source": "a paper", "figures": FIGURES, **changes}).verify(
        write(tmp_path / "figures.json", json.dumps(content))
    )


def test_figures_within_their_tolerance_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = means(bm25={"RR@10": 0.502, "R@100": 0.898}, student={"RR@10": 0.59})
    verified(tmp_path, {"measured": {"test": own}})
    said = capsys.readouterr().out
    assert "Expected: a paper" in said and "| bm25    | RR@10   |   0.5000 |     0.002 |   0.5020 | yes |" in said
    assert said.count("| yes |") == 3 and "student | RR@10   |   0.6000 |      0.01 |   0.5900" in said
    systems = [{"key": key, "effectiveness": one} for key, one in own.items()]
    of_report = {"systems": systems, "collection": {"split": "test"}, "also": {"dl19": {"systems": {}}}}
    verified(tmp_path, of_report)


def test_a_figure_that_is_off_or_missing_ends_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        verified(tmp_path, {"measured": {"test": means(bm25={"RR@10": 0.5021, "R@100": 0.9})}})
    said, error = capsys.readouterr()
    assert error == "verify: 2 figures are off\n"
    assert "0.5021 |  no |" in said and "| not reported |  no |" in said and said.count("yes") == 1


def test_figures_are_of_one_recipe_and_verifying_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 3\nexpected: {figures: {test: {bm25: {RR@10: 0.5}}}}\n")
    heir = write(tmp_path / "heir.yaml", "extends: base.yaml\n")
    assert read_yaml(heir) == {"seed": 3}
    settings = load_settings(TrainSettings, [str(tmp_path / "base.yaml"), "--verify"], description="")
    assert settings.verify and settings.expected.figures["test"]["bm25"] == {"RR@10": 0.5}
    settings.expected.check()
    with pytest.raises(SettingsError, match=r"verify: no figure is expected"):
        ExpectedSettings().check()


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if "\nexpected:" in file.read_text()])
def test_recipes_expect_what_they_report(name: str) -> None:
    settings = loaded(FILES[name])
    names = settings.get("measures", settings.get("evaluation", {"measures": ["RR@10", "nDCG@10", "R@100"]}))
    reported = dict.fromkeys(("dev", "test"), names.get("names", names.get("measures")))
    for split, systems in settings["expected"]["figures"].items():
        measures = named_measures(settings.get("also_report", {}).get(split) or reported[split])
        for figures in systems.values():
            assert figures.keys() - {"tolerance"} <= {*measures}
