"""What recipe tests share: a tiny encoder, a small BEIR folder, a settings file, and a run in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.models import WORDS, tiny_bert
from tests.warm_process import run_warm

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "train.py"
STEPS = 6


def write_beir(folder: Path, *, passages: int = 60, train: int = 40, dev: int = 10, test: int = 12) -> Path:
    """A collection of random words; each query is a few words of one passage."""
    draw = random.Random(0)
    words = [*WORDS[4:], *(f"{a}{b}" for a in "bcdf" for b in "xyz123")]
    texts = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(passages)]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for row, text in enumerate(texts):
            file.write(json.dumps({"_id": f"p{row}", "title": "", "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for split, count in (("train", train), ("dev", dev), ("test", test)):
            lines = ["query-id\tcorpus-id\tscore"]
            for number in range(count):
                passage = draw.randrange(passages)
                query = " ".join(draw.sample(texts[passage].split(), 3))
                file.write(json.dumps({"_id": f"{split}{number}", "text": query}) + "\n")
                lines.append(f"{split}{number}\tp{passage}\t1")
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_material(folder: Path) -> Path:
    """An encoder and a collection under `folder`, and the settings file that uses them."""
    tiny_bert(folder / "encoder", dropout=0.1)  # dropout: a run that goes on needs its random state back
    write_beir(folder / "collection")
    training = {"per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1}
    training["save_steps"] = 2
    encoder = {"encoding": "tct", "base_model": str(folder / "encoder"), "query_length": 16, "document_length": 48}
    settings = {
        "extends": os.path.relpath(ROOT / "recipes" / "paper.yaml", folder),
        "precision": "fp32",
        "data": {"source": str(folder / "collection"), "negative_depth": 10},
        "encoder": encoder,
        "teacher": {"dim": 16, "training": training},
        "student": {"layers": [1], "training": training},
        "evaluation": {"depth": 20, "measures": ["RR@10", "nDCG@10", "R@20"]},
    }
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    return folder / "tiny.yaml"


def environment(folder: Path) -> dict[str, str]:
    """As the tests' own, one thread, and a cache that no other run shares."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TCT_HF_CACHE": str(folder / "cache")}


def launch(processes: int = 1, *more: str) -> list[str]:
    """The words before the recipe's name."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *more, f"--num_processes={processes}"]
    return [
        *words,
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--num_cpu_threads_per_process=1",
    ]


def run(
    settings: Path,
    output: Path,
    *options: str,
    before: list[str] | None = None,
    code: int = 0,
    recipe: Path = RECIPE,
    processes: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run a recipe in a process of its own and expect its exit status.

    Args:
        settings: of :func:`write_material`.
        output: its output_dir.
        *options: more for the command line.
        before: the words before the recipe's name, python alone when None.
        code: the status.
        recipe: the script.
        processes: that run it together, without `before`.
    """
    words = [*(before or [sys.executable]), str(recipe), str(settings), f"--output_dir={output}", *options]
    env = environment(settings.parent)
    if before is None or "tests.recipe_worker" in before:
        done = run_warm(words[1:], env=env, processes=processes)
    else:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def killed_at(line: str, settings: Path, output: Path, recipe: Path = RECIPE) -> str:
    """Run a recipe until it has printed a line that holds `line`; what it printed."""
    before = [sys.executable, "-m", "tests.recipe_worker", line]
    return run(settings, output, before=before, code=-signal.SIGKILL, recipe=recipe).stdout


def load_recipe(script: Path) -> ModuleType:
    """A recipe as the module `STEM_recipe`, loaded once."""
    name = f"{script.stem}_recipe"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def in_this_process(recipe: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function of output_dir and options that runs a recipe in this process and returns the exit status."""
    module = load_recipe(recipe)
    for where in ("tct_hf.progress", "tct_hf.pipeline.job"):
        monkeypatch.setattr(f"{where}.quieten", lambda: None)  # it changes what later tests would see
    monkeypatch.setenv("TCT_HF_CACHE", str(settings.parent / "cache"))

    def call(output: Path, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(recipe)])
        try:
            module.run_recipe(module.main, module.Settings, "", [str(settings), f"--output_dir={output}", *options])
        except SystemExit as end:
            return int(str(end.code))
        return 0

    return call
