"""Training an expander and expanding with it: whole, interrupted, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tct_hf import expand_corpus, expanded_texts, load_expander, load_expansions
from tct_hf.data.beir import open_beir
from tct_hf.data.collection import load_collection
from tct_hf.training.expander import expander_pairs
from tests.models import tiny_t5
from tests.recipe import ROOT, in_this_process, killed_at, run
from tests.searching import Material

RECIPE = EXPAND = ROOT / "recipes" / "expand.py"
TRAIN = ROOT / "recipes" / "train_expander.py"


# Of expanding, by the fixture `settings`; of training an expander.
SETTINGS = """
model: FOLDER/t5
source: FOLDER/collection
dtype: float32
num_queries: 3
max_length: 6
shard_size: 20
progress_every: 0
"""
TRAINING = """
data: {source: FOLDER/collection}
precision: fp32
passage_length: 32
query_length: 8
from_scratch: true
sizes: {vocabulary: 90, d_model: 16, layers: 1, heads: 2, d_ff: 32}
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  max_steps: 4
  save_steps: 2
  logging_steps: 1
  learning_rate: 1.0e-2
  eval_strategy: steps
  eval_steps: 2
"""


@pytest.fixture(scope="module", autouse=True)
def writer(material: Material) -> Path:
    return tiny_t5(material.folder / "t5")


@pytest.fixture(scope="module")
def training(material: Material) -> Path:
    file = material.folder / "train_expander.yaml"
    file.write_text(TRAINING.replace("FOLDER", str(material.folder)))
    return file


@pytest.fixture
def train(training: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(TRAIN, training, monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    """All that a run writes but what it says of itself."""
    said = ("settings.yaml", "environment.json")
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in said
    }


@pytest.fixture(scope="module")
def whole(material: Material, recipe: Callable[..., int]) -> Path:
    """The folder of a whole run with a teacher."""
    assert recipe(material.folder / "expansions", f"--teacher={material.teacher}") == 0
    return material.folder / "expansions"


def test_each_passage_gets_queries_with_scores_and_a_finished_run_says_so_again(
    material: Material, whole: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    assert recipe(whole, f"--teacher={material.teacher}") == 0 and files(whole) == before
    row = capsys.readouterr().out.splitlines()[-2]
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["60", "180"] and "| colbert | 3 |" in row
    corpus, found = open_beir(material.beir).corpus(), load_expansions(whole)
    assert len(list(expanded_texts(corpus, found, drop_share=0.3, drop_repeats=True))) == 60


@pytest.mark.slow
def test_a_killed_run_and_one_of_two_processes_give_the_same_files(
    settings: Path, material: Material, whole: Path, recipe: Callable[..., int], tmp_path: Path
) -> None:
    teacher = f"--teacher={material.teacher}"
    killed_at("40 of 60 passages", settings, tmp_path / "killed", EXPAND)
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.arrow")}
    assert made and not (tmp_path / "killed" / "manifest.json").exists()
    assert recipe(tmp_path / "killed", teacher) == 0
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in made.items())
    run(settings, tmp_path / "two", teacher, recipe=EXPAND, processes=2)
    assert files(tmp_path / "killed") == files(tmp_path / "two") == files(whole)


def test_a_model_from_nothing_is_trained_and_writes(
    material: Material, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "whole"
    assert train(made) == 0
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
    capsys.readouterr()
    assert train(made, "--query_length=9") == 1
    assert "query_length = 8, but now query_length = 9" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_training_of_an_expander_goes_on_to_the_same_weights(
    training: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at("step     3 of 4", training, tmp_path / "killed", TRAIN)
    assert (tmp_path / "killed" / "training" / "checkpoint-2").is_dir()
    assert train(tmp_path / "killed") == 0
    assert "goes on after step 2 of 4" in capsys.readouterr().out
    assert train(tmp_path / "whole") == 0
    weights = [(tmp_path / name / "expander" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher=./nowhere"], "teacher: ./nowhere is not there"),
        (["--num_queries=0"], "num_queries: must be at least 1, got 0"),
        (["--numqueries=3"], 'did you mean "num_queries"?'),
    ],
)
def test_wrong_settings_of_expanding_are_one_message(
    refused: Callable[..., None], options: list[str], message: str
) -> None:
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
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, code: int, message: str
) -> None:
    assert train(tmp_path / "new", option) == code
    assert message in capsys.readouterr().err.splitlines()[-1]
