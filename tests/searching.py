"""What tests of searching share: a small collection, a student and a teacher on disk, a recipe in its own process."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tct_hf.data.collection import Collection, load_collection
from tests.models import tiny_bert, tiny_colbert
from tests.recipe import ROOT, environment, write_beir
from tests.warm_process import run_warm


@dataclass(frozen=True)
class Material:
    folder: Path
    beir: Path
    student: Path
    teacher: Path

    def collection(self) -> Collection:
        return load_collection(str(self.beir))


def write_material(folder: Path) -> Material:
    from tct_hf import build_student, save_student

    base = tiny_bert(folder / "base")
    save_student(build_student(str(base), encoding="tct", query_length=16, document_length=48), folder / "student")
    return Material(folder, write_beir(folder / "beir"), folder / "student", tiny_colbert(folder / "teacher"))


def run_recipe(
    name: str, material: Material, *options: str, code: int = 0, stdin: str | None = None, kill_at: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run recipes/NAME.py in a process of its own and expect its exit status.

    Args:
        name: of the recipe.
        material: whose folder holds the cache.
        *options: for the command line.
        code: the status; that of SIGKILL with `kill_at`.
        stdin: standard input.
        kill_at: kill it once it has printed a line that holds this.
    """
    words: list[str] = []
    if kill_at is not None:
        words, code = ["-m", "tests.recipe_worker", kill_at], -signal.SIGKILL
    words += [str(ROOT / "recipes" / f"{name}.py"), *options]
    done = run_warm(words, env=environment(material.folder), stdin=stdin or "")
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done
