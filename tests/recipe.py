"""What recipe tests share: a small BEIR folder, a run in a process of its own or in this one."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

from tct_hf.evaluation.settings import CostSettings
from tests.models import WORDS
from tests.warm_process import free_port, run_warm

ROOT = Path(__file__).parent.parent
STEPS = 6
Run = Callable[..., subprocess.CompletedProcess[str]]
Check = Callable[..., None]


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


def environment(folder: Path) -> dict[str, str]:
    """As the tests' own, and a cache that no other run shares."""
    return {**os.environ, "TCT_HF_CACHE": str(folder / "cache")}


def run(
    name: str,
    folder: Path,
    *options: object,
    code: int = 0,
    stdin: str = "",
    kill_at: str | None = None,
    processes: int = 1,
    launched: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run recipes/NAME.py in a process of its own and expect its exit status.

    Args:
        name: of the recipe.
        folder: holds the cache.
        *options: for the command line.
        code: the status; that of SIGKILL with `kill_at`.
        stdin: standard input.
        kill_at: kill it once it has printed a line that holds this.
        processes: that run it together.
        launched: processes that `accelerate launch` starts instead.
    """
    words, env = [str(ROOT / "recipes" / f"{name}.py"), *map(str, options)], environment(folder)
    if kill_at is not None:
        words, code = ["-m", "tests.recipe_worker", kill_at, *words], -signal.SIGKILL
    if launched:
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--num_machines=1",
        ]
        launch += [f"--num_processes={launched}", "--num_cpu_threads_per_process=1"]
        launch += ["--multi_gpu", f"--main_process_port={free_port()}"] if launched > 1 else []
        words = [sys.executable, *launch, *words]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
    else:
        done = run_warm(words, env=env, stdin=stdin, processes=processes)
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def load_recipe(script: Path) -> ModuleType:
    """A recipe as the module `STEM_recipe`, loaded once."""
    name = f"{script.stem}_recipe"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def results(folder: Path, *kinds: str) -> dict[str, bytes]:
    """Files that must not depend on how a run went: runs, weights and files of more kinds."""
    files = [file for kind in ("*.trec", "model.safetensors", *kinds) for file in folder.rglob(kind)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@contextmanager
def drawn(plots: bool) -> Iterator[None]:
    """Whether reports draw their plots, which take much of their time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if plots else ("report", "training_reports", "arms"):
            patch.setattr(f"tct_hf.evaluation.{name}.missing_plot", lambda *of, **labels: None)
        yield


def in_this_process(name: str, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function of output_dir and options that does as :func:`run` in this process, with a settings file.

    Few queries are timed, and plots are drawn where it is told `plots=True`.
    """
    script = ROOT / "recipes" / f"{name}.py"
    module = load_recipe(script)
    for where in ("tct_hf.progress", "tct_hf.pipeline.job"):
        monkeypatch.setattr(f"{where}.quieten", lambda: None)  # it changes what later tests would see
    few = {"queries": 3, "warm_up": 1}
    monkeypatch.setattr("tct_hf.evaluation.references.CostSettings", lambda queries: CostSettings(**few))
    monkeypatch.setenv("TCT_HF_CACHE", str(settings.parent / "cache"))

    def call(output: Path, *options: str, code: int = 0, plots: bool = False) -> subprocess.CompletedProcess[str]:
        words, ended = [str(settings), f"--output_dir={output}", *options], 0
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, drawn(plots):
            try:
                module.run_recipe(module.main, module.Settings, "", words)
            except SystemExit as end:
                ended = int(str(end.code))
        assert ended == code, f"{out.getvalue()[-3000:]}\n{err.getvalue()[-5000:]}"
        return subprocess.CompletedProcess(words, ended, out.getvalue(), err.getvalue())

    return call
