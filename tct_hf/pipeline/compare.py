"""A comparison of ways to train: arms that are one training run but for some settings, several seeds each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.files import json_digest
from tct_hf.pipeline.checks import of_section
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.job import Job
from tct_hf.pipeline.settings import CompareSettings, DataSettings, overridden
from tct_hf.pipeline.train import STUDENTS, Training
from tct_hf.settings import SettingsError

# Systems that no arm trains, by their keys: an arm can be tested against them too.
REFERENCES = ("bm25", "base-native", "base-maxsim", "teacher")


def slug_of(name: str) -> str:
    """An arm's name as the name of a folder."""
    return name.replace(" ", "-").replace(",", "").replace("/", "-")


@dataclass
class Arm:
    """One way to train: what it changes, the arms and references it is tested against, the stage of its model.

    Args:
        runs: its training runs by their seed.
    """

    changes: Mapping[str, Any]
    against: Sequence[str]
    model: str
    runs: dict[int, Training]

    @property
    def says(self) -> str:
        """What it changes, in words."""
        return json.dumps(self.changes).replace('"', "")[1:-1] or "nothing changed"

    @property
    def students(self) -> dict[int, Path]:
        """Seed to folder of its students."""
        return {seed: run.folder_of(self.model) for seed, run in self.runs.items()}


class Comparison:
    """The training runs of some arms, in one folder.

    Teachers, collections and the vectors of a mixture are shared by all arms that would make the same.
    """

    def __init__(self, settings: CompareSettings, job: Job) -> None:
        if not settings.arms or settings.seeds == []:
            raise SettingsError(
                "arms, seeds: there is nothing to compare; compare/labels.yaml, among the recipes, is an example"
            )
        self.settings, self.job, self.output = settings, job, Path(settings.output_dir)
        self.collections: dict[str, Collection] = {}
        slugs = [slug_of(name) for name in settings.arms]
        if same := [name for name in settings.arms if slugs.count(slug_of(name)) > 1]:
            raise SettingsError(f"arms: {' and '.join(map(repr, same))} would share a folder; rename one")
        _check_names("only", settings.only or (), settings.arms)
        self.arms = {name: self._arm(name) for name in settings.arms if name in (settings.only or settings.arms)}
        made = {folder.resolve() for arm in self.arms.values() for folder in arm.students.values()}
        for run in self.runs.values():
            run.tower_comes = Path(run.settings.student.tower_of or "").resolve() in made

    def _arm(self, name: str) -> Arm:
        settings = self.settings
        changes = dict(settings.arms[name] or {})
        against, seeds = changes.pop("against", settings.against), changes.pop("seeds", settings.seeds)
        _check_names(f"arms.{name}.against", against, (*settings.arms, *REFERENCES))
        whole = overridden(settings, changes, f"arms.{name}")
        whole.stages = [stage for stage in whole.stages if stage != "evaluate"]
        models = [stage for stage in whole.stages if stage in STUDENTS]
        if len(models) != 1:
            raise SettingsError(f"arms.{name}.stages: name one of {', '.join(STUDENTS)}, the model that is compared")
        folder = self.output / "arms" / slug_of(name)
        with of_section(f"arms.{name}: "):
            runs = {
                seed: Training(
                    replace(whole, seed=seed),
                    self.job,
                    output=folder / f"seed-{seed}",
                    teacher_seed=settings.seed,
                    mixtures=folder,
                    vectors=self.output / "vectors",
                )
                for seed in seeds or [settings.seed]
            }
        return Arm(changes, against, models[0], runs)

    @property
    def runs(self) -> dict[tuple[str, int], Training]:
        """All training runs, by arm and seed."""
        return {(name, seed): run for name, arm in self.arms.items() for seed, run in arm.runs.items()}

    @property
    def dims(self) -> list[int]:
        """First dimensions that some arm is trained at, at which all are measured."""
        return sorted(
            {dim for run in self.runs.values() for dim in run.settings.student.training.get("matryoshka_dims") or []}
        )

    @property
    def codes(self) -> list[str]:
        """Faiss factories of all arms, by which all are searched."""
        return list(dict.fromkeys(code for run in self.runs.values() for code in run.settings.codes))

    @property
    def teachers(self) -> dict[Path, Training]:
        """The teachers to train: folder to the first run that learns from it."""
        found: dict[Path, Training] = {}
        for run in self.runs.values():
            if run.trains_teacher and "teacher" in run.settings.stages:
                found.setdefault(run.folder_of("teacher"), run)
        return found

    def read(self, split: str) -> Collection:
        """Read the data of all arms, build what is to be trained once, and refuse folders of other settings.

        Returns:
            The collection whose `split` is reported, the same for all arms.
        """
        first = next(iter(self.runs.values()))
        for (name, _), run in self.runs.items():
            with of_section(f"arms.{name}: "):
                # All arms read much the same: the first says what.
                run.read(self._read, write=self.job.write if run is first else lambda line: None)
                if run.trains_teacher:  # in one folder for all that would train the same
                    run.teacher = self.output / "teachers" / json_digest(run.of_teacher)[:8]
                run.claim_models()
            for measured in (lambda one: one.fingerprint["sha256"], lambda one: one.splits.get(split)):
                if measured(run.collection) != measured(first.collection):
                    raise SettingsError(
                        f"arms.{name}.data: it would be measured on other passages or {split} queries than the first "
                        "arm; leave its source and splits as they are"
                    )
        return first.collection

    def _read(self, data: DataSettings, *, train: bool) -> Collection:
        """The collection of an arm, read once for all that differ in labels and negatives alone."""
        same = DataSettings()
        later = {name: getattr(same, name) for name in ("num_negatives", "negative_depth", "negatives")}
        read = replace(data, labels=float(data.labels > 0), unlabelled=False, max_questions=None, **later)
        key = json.dumps([asdict(read), train])
        if key not in self.collections:
            self.collections[key] = read_collection(read, train=train)
        return self.collections[key]

    @property
    def stages(self) -> list[str]:
        """The names of the stages of :meth:`train`, in order."""
        return [f"teacher {folder.name}" for folder in self.teachers] + [f"{n}, seed {seed}" for n, seed in self.runs]

    def train(self) -> None:
        """Train the teachers, then every student; what is there is skipped."""
        for folder, run in self.teachers.items():
            run.run("teacher", f"teacher {folder.name}")
        for (name, seed), run in self.runs.items():
            run.run(self.arms[name].model, f"{name}, seed {seed}")

    @property
    def teacher(self) -> str | None:
        """The ColBERT that all arms which learn from one share; None where there is none, or several."""
        found = {
            run.teacher_model
            for arm in self.arms.values()
            for run in arm.runs.values()
            if run.settings.teacher.kind == "colbert" and arm.model != "stock"
        }
        return found.pop() if len(found) == 1 else None


def _check_names(setting: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"{setting}: {unknown[0]!r} is not one of {', '.join(map(repr, known))}")
