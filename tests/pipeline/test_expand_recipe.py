"""Training an expander and expanding with it: whole, interrupted, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny_colbert, tiny_t5
from tests.recipe import ROOT, environment, in_this_process, killed_at, launch, write_beir

EXPAND = ROOT / "recipes" / "expand.py"
TRAIN = ROOT / "recipes" / "train_expander.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expand")
    tiny_t5(folder / "t5")
    colbert = tiny_colbert(folder / "made")
    colbert.rename(folder / "colbert")
    write_beir(folder / "collection")
    (folder / "expand.yaml").write_text(
        f"model: {folder / 't5'}\nsource: {folder / 'collection'}\ndtype: float32\nnum_queries: 3\nmax_length: 6\n"
        "shard_size: 20\nprogress_every: 0\n"
    )
    (folder / "train.yaml").write_text(
        f"data: {{source: {folder / 'collection'}}}\nprecision: fp32\npassage_length: 32\nquery_length: 8\n"
        "from_scratch: true\nsizes: {vocabulary: 90, d_model: 16, layers: 1, heads: 2, d_ff: 32}\n"
        "training:\n  per_device_train_batch_size: 8\n  gradient_accumulation_steps: 1\n  max_steps: 4\n"
        "  save_steps: 2\n  logging_steps: 1\n  learning_rate: 1.0e-2\n  eval_strategy: steps\n  eval_steps: 2\n"
    )
    return folder


@pytest.fixture
def expand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(EXPAND, folder / "expand.yaml", monkeypatch)


@pytest.fixture
def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(TRAIN, folder / "train.yaml", monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    """All that a run writes but what it says of itself."""
    said = ("settings.yaml", "environment.json")
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in said
    }


@pytest.mark.slow
def test_a_killed_run_and_one_of_two_processes_give_the_same_files(
    folder: Path, expand: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tct_hf import expanded_texts, load_expansions
    from tct_hf.data.beir import load_beir_corpus

    teacher = f"--teacher={folder / 'colbert'}"
    assert expand(tmp_path / "whole", teacher) == 0
    row = capsys.readouterr().out.splitlines()[-2]
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["60", "180"] and "| colbert | 3 |" in row
    killed_at("40 of 60 passages", folder / "expand.yaml", tmp_path / "killed", EXPAND)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.arrow")}
    assert made
    assert expand(tmp_path / "killed", teacher) == 0
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in made.items())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    words = [*launch(2), str(EXPAND), str(folder / "expand.yaml"), f"--output_dir={tmp_path / 'two'}", teacher]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "two") == files(tmp_path / "whole")
    corpus = load_beir_corpus(folder / "collection")
    found = load_expansions(tmp_path / "two")
    assert len(list(expanded_texts(corpus, found, drop_share=0.3, drop_repeats=True))) == 60


@pytest.mark.slow
def test_a_killed_expander_is_trained_and_writes(
    folder: Path,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tct_hf import expand_corpus, load_expander
    from tct_hf.data.collection import load_collection
    from tct_hf.training.expander import expander_pairs

    killed_at("step     3 of 4", folder / "train.yaml", tmp_path / "killed", TRAIN)
    assert (tmp_path / "killed" / "training" / "checkpoint-2").is_dir()
    assert train(tmp_path / "killed") == 0
    said = capsys.readouterr().out
    assert "goes on after step 2 of 4" in said
    assert train(tmp_path / "whole") == 0
    weights = [(tmp_path / name / "expander" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "whole" / "training").glob("checkpoint-*"))
    log = json.loads((tmp_path / "whole" / "expander" / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] and any("eval_loss" in entry for entry in log)
    model, tokenizer = load_expander(str(tmp_path / "whole" / "expander"))
    manifest = expand_corpus(
        model,
        [{"id": "a", "text": "what is dense retrieval"}],
        tmp_path / "out",
        tokenizer=tokenizer,
        num_queries=2,
        write=lambda line: None,
    )
    assert manifest["count"] == 1 and manifest["model"] == str(tmp_path / "whole" / "expander")
    pairs = expander_pairs(load_collection(str(folder / "collection")))
    assert len(pairs) == 40 and set(pairs[0]["query"].split()) <= set(pairs[0]["passage"].split())
    capsys.readouterr()
    assert train(tmp_path / "whole", "--query_length=9") == 1
    assert "query_length = 8, but now query_length = 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher=./nowhere"], "teacher: ./nowhere is not there"),
        (["--num_queries=0"], "num_queries: must be at least 1, got 0"),
        (["--numqueries=3"], 'did you mean "num_queries"?'),
    ],
)
def test_wrong_settings_of_expanding_are_one_message(
    expand: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert expand(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--query_length=0"], 2, "query_length: must be at least 1, got 0"),
        (["--training.hub_token=abc"], 2, "hub_token"),
        (["--training.push_to_hub=true"], 1, "releases are of students; upload the finished folder yourself"),
        (["--sizes.heads=3"], 1, "d_model is 16, which 3 heads don't divide"),
    ],
)
def test_wrong_settings_of_training_are_one_message(
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert train(tmp_path / "new", *options) == code
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("recipe", [EXPAND, TRAIN])
def test_help_is_instant_and_names_every_setting(recipe: Path) -> None:
    words = [sys.executable, "-X", "importtime", str(recipe), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ}, check=True)
    assert "--prompt" in done.stdout and "torch" not in done.stderr
