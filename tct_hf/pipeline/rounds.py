"""Rounds of hard negatives: a training run each, on what the last round's student finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from tct_hf.data.collection import Collection
from tct_hf.evaluation.round_report import RoundResult, open_workspace, round_name
from tct_hf.files import claim, command
from tct_hf.pipeline.checks import check_colbert
from tct_hf.pipeline.mine import check_judged, check_mining, mine, student_source
from tct_hf.pipeline.settings import MiningSettings, TrainSettings, overridden
from tct_hf.pipeline.train import Training
from tct_hf.progress import Stages
from tct_hf.retrieval.mining import SUMMARY_FILE, TRIPLES_FILE, MiningCounts, read_counts
from tct_hf.retrieval.triples import load_triples
from tct_hf.settings import SettingsError


@dataclass
class Rounds:
    """A base and rounds of mining and training after it, each in a folder of its own: round-0, round-1, ...

    Args:
        settings: settings of the base.
        later: what differs in the rounds, by dotted or nested names.
        count: number of rounds after the base.
        variant: "HN", the student alone is trained on mined negatives, or "HN+", first its teacher.
        start_from: "previous", a round's student is the last round's trained further, or "new".
    """

    settings: TrainSettings
    later: Mapping[str, Any]
    mining: MiningSettings
    count: int
    variant: Literal["HN", "HN+"]
    start_from: Literal["previous", "new"]
    state: PartialState
    write: Callable[[str], None] = print
    results: list[RoundResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        if self.count < 0:
            raise SettingsError(f"rounds: {self.count} is below 0")
        if settings.data.unlabelled or settings.data.questions is not None or settings.triples.path is not None:
            raise SettingsError(
                "data.unlabelled, data.questions, triples.path: negatives are mined for judged train queries; leave "
                f"them out, or train with {command('train')}"
            )
        if settings.student.kind != "dense":
            raise SettingsError(
                "student.kind: negatives are mined with a dense student; train a sparse one on its triples"
            )
        check_colbert(settings.teacher)
        check_mining(self.mining, "mining")
        self.output = Path(settings.output_dir)
        own = {"stages": ["teacher", "student"], "evaluation.depth": settings.evaluation.depth}
        self.rounds = [self._training(number, overridden(settings, own, "rounds")) for number in range(self.count + 1)]

    def _training(self, number: int, settings: TrainSettings) -> Training:
        folder = self.output / f"round-{number}"
        if number == 0:
            return Training(settings, self.state, self.write, output=folder)
        last, with_teacher = self.output / f"round-{number - 1}", self.variant == "HN+"
        teacher = settings.teacher.model or str(self.output / "round-0" / "teacher")
        if with_teacher and number > 1:
            teacher = str(last / "teacher")
        start = {"teacher": teacher} if with_teacher else {}
        if self.start_from == "previous":
            start["student"] = str(last / "student")
        ready = None if with_teacher or settings.teacher.model is not None else Path(teacher)
        changed = overridden(settings, self.later, "later")
        changed.stages = ["teacher", "student"] if with_teacher else ["student"]
        return Training(
            changed,
            self.state,
            self.write,
            output=folder,
            teacher=ready,
            start=start,
            make_rows=partial(load_triples, folder / "mined" / TRIPLES_FILE),
            also_depends={
                "variant": self.variant,
                "start_from": self.start_from,
                "mining": asdict(self.mining),
                "base": {"teacher": asdict(settings.teacher), "student": asdict(settings.student)},
                "round": number,
            },
        )

    @property
    def stages(self) -> dict[str, float]:
        """Name to expected share of the time of all stages, in order."""
        found: dict[str, float] = {}
        for number, run in enumerate(self.rounds):
            name = round_name(number)
            found |= {f"{name}: mine": 3.0} if number else {}
            found |= {f"{name}: teacher": 6.0} if number == 0 or run.trains_teacher else {}
            found |= {f"{name}: student": 6.0}
        return found

    def read(self) -> Collection:
        """Read the data, build what is to be trained once, and refuse folders of other settings."""
        first, *later = self.rounds
        first.read()
        check_judged(first.collection, first.settings.data.labels)
        for run in later:
            try:
                run.read(lambda *args, **kwargs: first.collection)
            except SettingsError as error:
                raise SettingsError(f"later.{error}") from error
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

    def train(self, number: int, stages: Stages) -> None:
        """Run a round, 0 for the base: mine, train the teacher where that is asked for, train the student."""
        run, name = self.rounds[number], round_name(number)
        if self.state.is_main_process:
            claim(run.folder, run.depends("student"))
        mined = self._mined(number, stages) if number else None
        for stage in ("teacher", "student"):
            if stage == "teacher" and number and not run.trains_teacher:
                continue
            if reason := run.reason_to_skip(stage):
                stages.skip(f"{name}: {stage}", reason)
            else:
                with stages.stage(f"{name}: {stage}"):
                    run.train(stage)
        own = run.folder_of("teacher") if run.trains_teacher else None
        self.results.append(RoundResult(run.folder, run.folder / "student", own, mined))

    def _mined(self, number: int, stages: Stages) -> MiningCounts:
        """Mine the round's triples with the student of the last round, or find them mined."""
        run, last, name = self.rounds[number], self.results[-1], f"{round_name(number)}: mine"
        mined = run.folder / "mined"
        if (mined / SUMMARY_FILE).is_file():
            stages.skip(name, "they are mined")
        else:
            with stages.stage(name):
                workspace = open_workspace(
                    run.collection,
                    last.student,
                    last.folder,
                    precision=self.settings.precision,
                    device=str(self.state.device),
                    write=self.write,
                )
                origin = f"student {round_name(number - 1)}"
                mine(
                    run.collection,
                    student_source(workspace, origin, depth=self.mining.depth, state=self.state),
                    self.mining,
                    mined,
                    seed=self.settings.seed + number,
                    labels=self.settings.data.labels,
                    teacher=run.start.get("teacher", run.teacher_model),
                    bf16=run.base["bf16"],
                    state=self.state,
                    write=self.write,
                )
        counts = read_counts(mined)
        self.write("  " + counts.summary().replace("\n", "\n  "))
        return counts
