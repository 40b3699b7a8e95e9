"""A comparison of ways to train: arms that are one training run but for some settings, several seeds each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tct_hf.data.collection import Collection
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.settings import DataSettings, TrainSettings, overridden
from tct_hf.pipeline.train import STUDENTS, Training
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError

# Systems that no arm trains, by their keys: an arm can be tested against them too.
REFERENCES = ("bm25", "base-native", "base-maxsim", "teacher")


def slug_of(name: str) -> str:
    """An arm's name as the name of a folder."""
    return name.replace(" ", "-").replace(",", "").replace("/", "-")


@dataclass
class Arm:
    """One way to train: its settings, what they change, the arms and references it is tested against, its seeds."""

    name: str
    settings: TrainSettings
    changes: Mapping[str, Any]
    against: Sequence[str]
    seeds: Sequence[int]

    @property
    def model(self) -> str:
        """The stage whose model is compared."""
        return next(stage for stage in self.settings.stages if stage in STUDENTS)

    @property
    def says(self) -> str:
        """What it changes, in words."""
        return json.dumps(self.changes).replace('"', "")[1:-1] or "nothing changed"


def arms_of(
    settings: TrainSettings, arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], against: Sequence[str]
) -> dict[str, Arm]:
    """The arms of a comparison.

    Args:
        settings: what all arms share.
        arms: name to what an arm changes, by dotted or nested names; its own `seeds` and `against` beside these.
        seeds, against: of arms that name none.
    """
    if not arms or not seeds:
        raise SettingsError(
            "arms, seeds: there is nothing to compare; compare/labels.yaml, among the recipes, is an example"
        )
    found: dict[str, Arm] = {}
    for name, given in arms.items():
        changes = dict(given or {})
        others, own = changes.pop("against", against), changes.pop("seeds", seeds)
        if unknown := [other for other in others if other not in (*arms, *REFERENCES)]:
            names = ", ".join(map(repr, (*arms, *REFERENCES)))
            raise SettingsError(f"arms.{name}.against: {unknown[0]!r} is not one of {names}")
        whole = overridden(settings, changes, f"arms.{name}")
        whole.stages = [stage for stage in whole.stages if stage != "evaluate"]
        if sum(stage in STUDENTS for stage in whole.stages) != 1:
            raise SettingsError(f"arms.{name}.stages: name one of {', '.join(STUDENTS)}, the model that is compared")
        found[name] = Arm(name, whole, changes, others, own)
    slugs = [slug_of(name) for name in found]
    if same := [name for name in found if slugs.count(slug_of(name)) > 1]:
        raise SettingsError(f"arms: {' and '.join(map(repr, same))} would share a folder; rename one")
    return found


class Comparison:
    """The training runs of some arms, in one folder.

    Teachers, collections and the vectors of a mixture are shared by all arms that would make the same.
    """

    def __init__(
        self, arms: Mapping[str, Arm], state: PartialState, output: Path, write: Callable[[str], None] = print
    ) -> None:
        self.output = output
        self.collections: dict[str, Collection] = {}
        self.runs: dict[tuple[str, int], Training] = {}
        for name, arm in arms.items():
            folder = output / "arms" / slug_of(name)
            for seed in arm.seeds:
                try:
                    self.runs[name, seed] = Training(
                        replace(arm.settings, seed=seed),
                        state,
                        write if not self.runs else lambda line: None,
                        output=folder / f"seed-{seed}",
                        teacher_seed=next(iter(arms.values())).settings.seed,
                        mixtures=folder,
                        vectors=output / "vectors",
                    )
                except SettingsError as error:
                    raise SettingsError(f"arms.{name}: {error}") from error
        self.arms = arms
        self.write = write

    def students(self, name: str) -> dict[int, Path]:
        """Seed to folder of an arm's students."""
        arm = self.arms[name]
        return {seed: self.runs[name, seed].folder_of(arm.model) for seed in arm.seeds}

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
        for (name, _), run in self.runs.items():
            try:
                run.read(self._read)
                self._share_teacher(run)
                run.claim_models()
            except SettingsError as error:
                raise SettingsError(f"arms.{name}: {error}") from error
            run.write = self.write
        (first, _), run = next(iter(self.runs.items()))
        for (name, _), other in self.runs.items():
            same = [one.collection.fingerprint["sha256"] for one in (run, other)]
            asked = [one.collection.splits.get(split) for one in (run, other)]
            if same[0] != same[1] or asked[0] != asked[1]:
                raise SettingsError(
                    f"arms.{name}.data: it would be measured on other passages or {split} queries than {first!r}; "
                    "leave its source and splits as they are"
                )
        return run.collection

    def _read(self, data: DataSettings, *, train: bool) -> Collection:
        """The collection of an arm, read once for all that differ in labels and negatives alone."""
        read = replace(
            data,
            labels=float(data.labels > 0),
            unlabelled=False,
            max_questions=None,
            num_negatives=1,
            negative_depth=100,
            negatives="bm25",
        )
        key = json.dumps([asdict(read), train])
        if key not in self.collections:
            self.collections[key] = read_collection(read, train=train)
        return self.collections[key]

    def _share_teacher(self, run: Training) -> None:
        """Give runs that would train the same ColBERT one folder for it."""
        if run.trains_teacher:
            digest = sha256(json.dumps(run.of_teacher, sort_keys=True).encode()).hexdigest()[:8]
            run.teacher = self.output / "teachers" / digest

    def train(self, stages: Stages) -> None:
        """Train the teachers, then every student; what is there is skipped."""
        for folder, run in self.teachers.items():
            self._stage(stages, f"teacher {folder.name}", run, "teacher")
        for (name, seed), run in self.runs.items():
            self._stage(stages, f"{name}, seed {seed}", run, self.arms[name].model)

    @property
    def stages(self) -> list[str]:
        """The names of the stages of :meth:`train`, in order."""
        return [f"teacher {folder.name}" for folder in self.teachers] + [f"{n}, seed {seed}" for n, seed in self.runs]

    def _stage(self, stages: Stages, title: str, run: Training, stage: str) -> None:
        if reason := run.reason_to_skip(stage):
            stages.skip(title, reason)
        else:
            with stages.stage(title):
                run.train(stage)

    @property
    def teacher(self) -> str | None:
        """The ColBERT that all arms which learn from one share; None where there is none, or several."""
        found = {
            run.teacher_model
            for (name, _), run in self.runs.items()
            if run.settings.teacher.kind == "colbert" and self.arms[name].model != "stock"
        }
        return found.pop() if len(found) == 1 else None
