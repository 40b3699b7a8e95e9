"""Every YAML of recipes/ loads, through the recipe it belongs to, to the settings on record.

`python -m tests.test_recipe_settings` writes the record anew.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tct_hf.settings import load_settings
from tests.recipe import ROOT, load_recipe

RECORD = Path(__file__).with_name("recipe_settings.json")
FILES = {
    file.relative_to(ROOT / "recipes").as_posix(): file
    for file in sorted((ROOT / "recipes").rglob("*.yaml"))
    if file.parent.name != "accelerate"
}


def recipe_of(file: Path) -> Path:
    """The script of the command at the head of a file, of the file it is a sample of, or of one that extends it."""
    command = re.compile(r"(recipes/\S+\.py) (\S+\.yaml)")
    if found := command.search(file.read_text()):
        return ROOT / found[1]
    if file.parent.name == "sample":
        return recipe_of(file.parent.parent / file.name)
    return recipe_of(
        next(heir for heir in file.parent.glob("*.yaml") if f"extends: {file.name}\n" in heir.read_text())
    )


def changed(settings: Any, defaults: Any) -> Any:
    """What differs from the defaults, so that a new setting changes no record."""
    if not isinstance(settings, dict) or not isinstance(defaults, dict):
        return settings
    return {
        key: changed(value, defaults.get(key))
        for key, value in settings.items()
        if key not in defaults or value != defaults[key] or type(value) is not type(defaults[key])
    }


def loaded(file: Path) -> dict[str, Any]:
    schema = load_recipe(recipe_of(file)).Settings
    return changed(asdict(load_settings(schema, [str(file)], description="")), asdict(schema()))


@pytest.mark.parametrize("name", FILES)
def test_settings_files_load_to_the_settings_on_record(name: str) -> None:
    record = json.loads(RECORD.read_text())
    # As text: 1 and 1.0 are equal but not the same.
    assert json.dumps(loaded(FILES[name])) == json.dumps(record[name])


def test_the_record_has_every_file() -> None:
    assert list(json.loads(RECORD.read_text())) == list(FILES)


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(loaded(file))}" for name, file in FILES.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(0)
