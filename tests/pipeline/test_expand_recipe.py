"""Training an expander and expanding with it: whole, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tct_hf import expand_corpus, expanded_texts, load_expander, load_expansions
from tct_hf.data.beir import open_beir
from tct_hf.data.collection import load_collection
from tct_hf.training.expander import expander_pairs
from tests.models import tiny_t5
from tests.recipe import Check, Run, in_this_process
from tests.searching import Material

RECIPE = "expand"


# Of expanding, by the fixture `settings`; of training an expander.
SETTINGS = """
model: FOLDER/t5
source: FOLDER/beir
dtype: float32
num_queries: 3
max_length: 6
shard_size: 20
progress_every: 0
"""
TRAINING = """
data: {source: FOLDER/beir}
precision: fp32
passage_length: 32
query_length: 8
from_scratch: true
sizes: {vocabulary: 90, d_model: 16, layers: 1, heads: 2, d_ff: 32}
training: {per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_steps: 4, save_steps: 2,
  logging_steps: 1, learning_rate: 1.0e-2, eval_strategy: steps, eval_steps: 2}
"""


@pytest.fixture(scope="module", autouse=True)
def writer(material: Material) -> Path:
    return tiny_t5(material.folder / "t5")


@pytest.fixture
def train(material: Material, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the training recipe with TRAINING."""
    file = material.folder / "train_expander.yaml"
    file.write_text(TRAINING.replace("FOLDER", str(material.folder)))
    return in_this_process("train_expander", file, monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    """All that a run writes but what it says of itself."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    said = ("settings.yaml", "environment.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.name not in said}


@pytest.fixture(scope="module")
def whole(material: Material, recipe: Run) -> Path:
    """The folder of a whole run with a teacher."""
    recipe(material.folder / "expansions", f"--teacher={material.teacher}")
    return material.folder / "expansions"


def test_each_passage_gets_queries_with_scores_and_a_finished_run_says_so_again(
    material: Material, whole: Path, recipe: Run
) -> None:
    before = files(whole)
    row = recipe(whole, f"--teacher={material.teacher}").stdout.splitlines()[-2]
    assert files(whole) == before
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["60", "180"] and "| colbert | 3 |" in row
    corpus, found = open_beir(material.beir).corpus(), load_expansions(whole)
    assert len(list(expanded_texts(corpus, found, drop_share=0.3, drop_repeats=True))) == 60


def test_a_model_from_nothing_is_trained_and_writes(material: Material, train: Run, tmp_path: Path) -> None:
    made = tmp_path / "whole"
    train(made)
    assert not list((made / "training").glob("checkpoint-*"))
    log = json.loads((made / "expander" / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] and any("eval_loss" in entry for entry in log)
    model, tokenizer = load_expander(str(made / "expander"))
    texts, out = [{"id": "a", "text": "what is dense retrieval"}], tmp_path / "out"
    manifest = expand_corpus(model, texts, out, tokenizer=tokenizer, num_queries=2, write=lambda line: None)
    assert manifest["count"] == 1 and manifest["model"] == str(made / "expander")
    pairs = expander_pairs(load_collection(str(material.beir)))
    assert len(pairs) == 40 and set(pairs[0]["query"].split()) <= set(pairs[0]["passage"].split())
    assert "query_length = 8, but now query_length = 9" in train(made, "--query_length=9", code=1).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher=./nowhere"], "teacher: ./nowhere is not there"),
        (["--num_queries=0"], "num_queries: must be at least 1, got 0"),
        (["--numqueries=3"], "Did you mean: 'num_queries'?"),
    ],
)
def test_wrong_settings_are_one_message(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("--query_length=0", 2, "query_length: must be at least 1, got 0"),
        ("--training.push_to_hub=true", 1, "releases are of students; upload the finished folder yourself"),
        ("--sizes.heads=3", 1, "d_model is 16, which 3 heads don't divide"),
    ],
)
def test_wrong_settings_of_training_are_one_message(
    train: Run, tmp_path: Path, option: str, code: int, message: str
) -> None:
    assert message in train(tmp_path / "new", option, code=code).stderr.splitlines()[-1]
