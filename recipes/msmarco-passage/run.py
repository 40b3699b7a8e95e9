"""Run the whole experiment on MS MARCO passage ranking, step by step, each by the command that README.md prints.

python recipes/msmarco-passage/run.py [--files FOLDER] [--sample N] [--steps [data,teacher]] [--settings FOLDER]

Stopped at any point, the same command goes on with the step that was stopped. --sample N takes N passages, small
models and few steps, and needs no GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.settings import SettingsError, run_recipe, setting

if TYPE_CHECKING:
    from tct_hf.pipeline.commands import Step

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
    from tct_hf.pipeline.commands import run_steps, table

    if settings.sample is not None and settings.sample < 1:
        raise SettingsError(f"sample: {settings.sample} is below 1; leave it out for all passages")
    steps = steps_of(settings)
    names = [step.name for step in steps]
    for name in settings.steps or []:
        if name not in names:
            raise SettingsError(f"steps: there is no step {name!r}; there are {', '.join(names)}")
    check_data(steps, settings.sample)
    write = partial(print, flush=True)
    # The records stand beside what the steps make.
    folder = steps[0].made().parent.parent
    check_sample(folder, steps[0].made().parent, settings.sample)
    done = run_steps(steps, folder, only=settings.steps, launcher=settings.launcher, write=write)
    print(f"\n{table(done)}", flush=True)


def steps_of(settings: Settings) -> list[Step]:
    """The steps that there are settings for; an expander is trained for a sample alone."""
    from tct_hf.pipeline.commands import Step

    folders = [HERE if settings.sample is None else HERE / "sample"]
    if settings.settings is not None:
        own = Path(settings.settings)
        known = dict.fromkeys(file for _, _, file, *_ in STEPS)
        if not any((own / file).is_file() for file in known):
            raise SettingsError(f"settings: {own} holds none of {', '.join(known)}; name the folder of your own ones")
        folders.insert(0, own)
    files = [folder / file for folder in reversed(folders) for _, _, file, *_ in STEPS]
    found = {file.name: file for file in files if file.is_file()}
    more = {"data.yaml": ("--files", settings.files) if settings.files is not None else ()}
    if settings.sample is not None:
        more["data.yaml"] += ("--sample", str(settings.sample))
    else:
        more["train.yaml"] = triples_of(found["data.yaml"], found["train.yaml"], settings.files)
    return [
        Step(name, script, found[file], (*options, *more.get(file, ())), makes, alone)
        for name, script, file, options, makes, alone in STEPS
        if file in found
    ]


def triples_of(data: Path, train: Path, files: str | None) -> tuple[str, ...]:
    """Where training finds the triples that data.yaml counts, where train.yaml does not say so itself."""
    from tct_hf.pipeline.passage_ranking import place_of
    from tct_hf.settings import read_yaml

    source, said = read_yaml(data), (read_yaml(train).get("triples") or {}).get("path")
    name, folder = source.get("triples"), source.get("files")
    if name is None or folder is None or said is None or Path(said) != Path(folder) / name:
        return ()
    place = place_of(folder if files is None else files, name)
    return () if Path(place) == Path(said) else ("--triples.path", place)


def check_data(steps: list[Step], sample: int | None) -> None:
    """Refuse a data.yaml that writes where training does not look: one of a sample, without one, or the reverse."""
    from tct_hf.settings import read_yaml

    of = {step.name: step for step in steps}
    if "data" not in of or "teacher" not in of:
        return
    data, train = of["data"].settings, of["teacher"].settings
    written, read = of["data"].made().parent, (read_yaml(train).get("data") or {}).get("source")
    if read is None or Path(read) != written:
        ours = (HERE if sample is None else HERE / "sample") / "data.yaml"
        raise SettingsError(
            f"settings: {data} writes {written}, but {train} reads {read}; with sample = {_told(sample)}, a "
            f"data.yaml of your own extends {ours}"
        )


def check_sample(folder: Path, data: Path, sample: int | None) -> None:
    """Refuse a folder that holds another sample: every step would refuse its own part of it."""
    from tct_hf.files import CLAIM_FILE
    from tct_hf.pipeline.passage_ranking import COUNTS_FILE

    if (data / COUNTS_FILE).is_file():
        before = json.loads((data / CLAIM_FILE).read_text(encoding="utf-8"))["sample"]
        if before != sample:
            raise SettingsError(
                f"sample: {folder} holds the experiment with sample = {_told(before)}, but now it is {_told(sample)}; "
                "delete the folder, or run this from another one"
            )


def _told(sample: int | None) -> str:
    return "none" if sample is None else str(sample)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
