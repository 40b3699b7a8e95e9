from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import recipe as recipes
from tests.models import tiny_bert, tiny_cross_encoder, tiny_mlm
from tests.recipe import Check, Run
from tests.searching import Material, write_material

TRAINING = f"""{{per_device_train_batch_size: 8, max_steps: {recipes.STEPS}, learning_rate: 1.0e-3, logging_steps: 1,
    save_steps: 2}}"""
TINY = f"""
extends: {recipes.ROOT / "recipes" / "paper.yaml"}
precision: fp32
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{encoding: tct, base_model: FOLDER/encoder, query_length: 16, document_length: 48}}
teacher: {{dim: 16, training: {TRAINING}}}
student: {{layers: [1], training: {TRAINING}}}
evaluation: {{depth: 20, measures: [RR@10, nDCG@10, R@20]}}
"""


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A small collection and tiny models for all recipes, which share the folder's cache."""
    from tct_hf import build_student

    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.yaml").write_text(TINY.replace("FOLDER", str(folder)))
    tiny_bert(folder / "encoder", dropout=0.1)  # dropout: a run that goes on needs its random state back
    tiny_mlm(folder / "mlm", dropout=0.1)
    tiny_cross_encoder(folder / "cross-encoder")
    base = build_student(str(tiny_bert(folder / "bare")))
    base.similarity_fn_name = "cosine"
    base.save_pretrained(str(folder / "mean"))  # mean pooling, the encoder's own tokens
    return write_material(folder)


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest, material: Material) -> Path:
    """The file of the module's SETTINGS, where FOLDER is the material's."""
    file = material.folder / f"{request.module.__name__.rpartition('.')[2]}.yaml"
    file.write_text(request.module.SETTINGS.replace("FOLDER", str(material.folder)))
    return file


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest, settings: Path, patch: pytest.MonkeyPatch) -> Run:
    """Runs the module's RECIPE with its `settings` in this process."""
    return recipes.in_this_process(request.module.RECIPE, settings, patch)


@pytest.fixture(scope="module")
def apart(request: pytest.FixtureRequest, settings: Path) -> Run:
    """Runs the module's RECIPE with its `settings` in a process of its own."""
    name, folder = request.module.RECIPE, settings.parent
    return lambda output, *options, **how: recipes.run(
        name, folder, settings, f"--output_dir={output}", *options, **how
    )


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, settings: Path, recipe: Run) -> Path:
    """The folder of a whole run, with its plots, unless the module says PLOTS = False."""
    output = settings.with_suffix("") / "whole"
    recipe(output, plots=getattr(request.module, "PLOTS", True))
    return output


@pytest.fixture
def refused(recipe: Run, tmp_path: Path) -> Check:
    """Expects that options end a run with one message before anything is written."""

    def check(options: list[str], message: str, *, code: int = 2) -> None:
        assert message in recipe(tmp_path / "new", *options, code=code).stderr.splitlines()[-1]
        assert not (tmp_path / "new").exists()

    return check


@pytest.fixture
def kept(whole: Path, recipe: Run) -> Check:
    """Expects that an option is refused by name in the folder of a whole run, which stays as it is."""

    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}

    def check(option: str, name: str) -> None:
        before = contents()
        message = recipe(whole, option, code=1).stderr.splitlines()[-1]
        assert f"holds a run with {name} = " in message and f"but now {name} = " in message
        assert "choose another folder, or delete this one" in message
        assert contents() == before

    return check


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that students were trained on."""
    from tct_hf.pipeline import train

    found: list[Any] = []
    original = train.collection_triples

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(original(*args, **options))
        return found[-1]

    monkeypatch.setattr(train, "collection_triples", recorded)
    return found
