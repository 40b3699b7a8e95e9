"""Run the whole experiment on MS MARCO passage ranking, step by step, each by the command that README.md prints.

python recipes/msmarco-passage/run.py [--files FOLDER] [--sample N] [--steps [data,teacher]] [--settings FOLDER]

Stopped at any point, the same command goes on with the step that was stopped. --sample N takes N passages, small
models and few steps, and needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.settings import SettingsError, run_recipe, setting

if TYPE_CHECKING:
    from tct_hf.steps import Step

HERE = Path(__file__).parent
# Name, script, YAML, options, what it makes below its output_dir, run by python alone.
STEPS = (
    ("data", HERE / "data.py", "data.yaml", (), "counts.json", True),
    ("teacher", HERE.parent / "train.py", "train.yaml", ("--stages", "teacher"), "teacher", False),
    ("student", HERE.parent / "train.py", "train.yaml", ("--stages", "student"), "student", False),
    ("rounds", HERE.parent / "rounds.py", "rounds.yaml", (), "report.md", False),
    ("expander", HERE.parent / "train_expander.py", "expander.yaml", (), "", False),
    ("expansion", HERE.parent / "expand.py", "expansion.yaml", (), "", False),
    ("index", HERE.parent / "encode.py", "index.yaml", (), "", False),
    ("report", HERE.parent / "evaluate.py", "report.yaml", (), "report.md", False),
    ("index-hn", HERE.parent / "encode.py", "index-hn.yaml", (), "", False),
    ("report-hn", HERE.parent / "evaluate.py", "report-hn.yaml", (), "report.md", False),
    ("release", HERE.parent / "release.py", "release.yaml", ("--dry_run",), "README.md", True),
    ("release-hn", HERE.parent / "release.py", "release-hn.yaml", ("--dry_run",), "README.md", True),
)


@dataclass
class Settings:
    files: str | None = setting(None, "folder of the published files; that of data.yaml when none")
    sample: int | None = setting(None, "passages to run everything on, with small models; all when none")
    steps: list[str] | None = setting(None, "these alone; all when none")
    settings: str | None = setting(None, "folder of YAMLs that stand in for those of the same names here")
    launcher: str = setting("accelerate launch", "words before a script, such as python")


def main(settings: Settings) -> None:
    from tct_hf.steps import run_steps, table

    steps = steps_of(settings)
    names = [step.name for step in steps]
    for name in settings.steps or []:
        if name not in names:
            raise SettingsError(f"steps: there is no step {name!r}; there are {', '.join(names)}")
    write = partial(print, flush=True)
    # The records stand beside what the steps make.
    folder = steps[0].made().parent.parent
    done = run_steps(steps, folder, only=settings.steps, launcher=settings.launcher, write=write)
    print(f"\n{table(done)}", flush=True)


def steps_of(settings: Settings) -> list[Step]:
    """The steps that there are settings for; an expander is trained for a sample alone."""
    from tct_hf.steps import Step

    folders = [*([Path(settings.settings)] if settings.settings else []), HERE / "sample" if settings.sample else HERE]
    of_data: tuple[str, ...] = ("--files", settings.files) if settings.files else ()
    of_data += ("--sample", str(settings.sample)) if settings.sample else ()
    steps: list[Step] = []
    for name, script, file, options, makes, alone in STEPS:
        there = [folder / file for folder in folders if (folder / file).is_file()]
        if there:
            more = of_data if name == "data" else ()
            steps.append(Step(name, script, there[0], (*options, *more), makes, alone))
    return steps


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
