"""Rounds of hard negatives: a training run each, on what the last round's student finds."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.evaluation.round_report import RoundResult, open_workspace, round_name
from tct_hf.files import claim, command
from tct_hf.pipeline.checks import of_section
from tct_hf.pipeline.job import Job
from tct_hf.pipeline.mine import check_judged, check_mining, mine, student_source
from tct_hf.pipeline.settings import RoundsSettings, overridden
from tct_hf.pipeline.train import Training
from tct_hf.retrieval.mining import SUMMARY_FILE, TRIPLES_FILE, MiningCounts, read_counts
from tct_hf.retrieval.triples import load_triples
from tct_hf.settings import SettingsError


class Rounds:
    """A base and rounds of mining and training after it, each in a folder of its own: round-0, round-1, ..."""

    def __init__(self, settings: RoundsSettings, job: Job) -> None:
        if settings.rounds < 0:
            raise SettingsError(f"rounds: {settings.rounds} is below 0")
        if settings.data.unlabelled or settings.data.questions is not None or settings.triples.path is not None:
            raise SettingsError(
                "data.unlabelled, data.questions, triples.path: negatives are mined for judged train queries; leave "
                f"them out, or train with {command('train')}"
            )
        if settings.student.kind != "dense":
            raise SettingsError(
                "student.kind: negatives are mined with a dense student; train a sparse one on its triples"
            )
        settings.teacher.kind = settings.teacher.kind or "colbert"
        if settings.teacher.kind != "colbert" or settings.teacher.mixed_with:
            raise SettingsError(
                f"teacher.kind, teacher.mixed_with: only a ColBERT works here; use {command('train')} for others"
            )
        check_mining(settings.mining, "mining")
        self.settings, self.job, self.output = settings, job, Path(settings.output_dir)
        self.results: list[RoundResult] = []
        self.rounds = [self._training(number) for number in range(settings.rounds + 1)]

    def _training(self, number: int) -> Training:
        base, folder = self.settings, self.output / f"round-{number}"
        settings = overridden(base, {"stages": ["teacher", "student"]}, "rounds")
        if number == 0:
            return Training(settings, self.job, output=folder)
        last, with_teacher = self.output / f"round-{number - 1}", base.variant == "HN+"
        teacher = base.teacher.model or str(self.output / "round-0" / "teacher")
        if with_teacher and number > 1:
            teacher = str(last / "teacher")
        start = {"teacher": teacher} if with_teacher else {}
        if base.start_from == "previous":
            start["student"] = str(last / "student")
        settings = overridden(settings, base.later, "later")
        settings.stages = ["teacher", "student"] if with_teacher else ["student"]
        return Training(
            settings,
            self.job,
            output=folder,
            teacher=None if with_teacher or base.teacher.model is not None else Path(teacher),
            start=start,
            make_rows=partial(load_triples, folder / "mined" / TRIPLES_FILE),
            also_depends={
                "variant": base.variant,
                "start_from": base.start_from,
                "mining": asdict(base.mining),
                "base": {"teacher": asdict(base.teacher), "student": asdict(base.student)},
                "round": number,
            },
        )

    @property
    def stages(self) -> list[str]:
        """The names of the stages of all rounds, in order."""
        found = []
        for number, run in enumerate(self.rounds):
            wanted = {"mine": number > 0, "teacher": number == 0 or run.trains_teacher, "student": True}
            found += [f"{round_name(number)}: {stage}" for stage, is_wanted in wanted.items() if is_wanted]
        return found

    def read(self) -> Collection:
        """Read the data, build what is to be trained once, and refuse folders of other settings."""
        first, *later = self.rounds
        first.read()
        check_judged(first.collection, first.settings.data.labels)
        for run in later:
            with of_section("later."):
                run.read(lambda *args, **kwargs: first.collection)
        for run in self.rounds:
            run.claim_models()
        return first.collection

    @property
    def depends(self) -> dict[str, Any]:
        """All that the last round's student depends on."""
        return self.rounds[-1].depends("student")

    @property
    def base_teacher(self) -> str:
        """Folder or Hub id of the base's ColBERT."""
        return str(self.rounds[0].teacher_model)

    def train(self, number: int) -> None:
        """Run a round, 0 for the base: mine, train the teacher where that is asked for, train the student."""
        run, name = self.rounds[number], round_name(number)
        if self.job.is_main:
            claim(run.folder, run.depends("student"))
        mined = self._mined(number) if number else None
        for stage in ("teacher", "student"):
            if f"{name}: {stage}" in self.stages:
                run.run(stage, f"{name}: {stage}")
        own = run.folder_of("teacher") if run.trains_teacher else None
        self.results.append(RoundResult(run.folder, run.folder / "student", own, mined))

    def _mined(self, number: int) -> MiningCounts:
        """Mine the round's triples with the student of the last round, or find them mined."""
        settings, run, last = self.settings, self.rounds[number], self.results[-1]
        name = f"{round_name(number)}: mine"
        mined = run.folder / "mined"
        if (mined / SUMMARY_FILE).is_file():
            self.job.skip(name, "they are mined")
        else:
            with self.job.stage(name):
                workspace = open_workspace(
                    run.collection,
                    last.student,
                    last.folder,
                    precision=settings.precision,
                    device=str(self.job.state.device),
                    write=self.job.write,
                )
                origin = f"student {round_name(number - 1)}"
                mine(
                    run.collection,
                    student_source(workspace, origin, depth=settings.mining.depth, state=self.job.state),
                    settings.mining,
                    mined,
                    seed=settings.seed + number,
                    labels=settings.data.labels,
                    teacher=run.start.get("teacher", run.teacher_model),
                    bf16=run.base["bf16"],
                    state=self.job.state,
                    write=self.job.write,
                )
        counts = read_counts(mined)
        self.job.write("  " + counts.summary().replace("\n", "\n  "))
        return counts
