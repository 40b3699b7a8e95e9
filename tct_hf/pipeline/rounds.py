"""Hard negatives: mining for a collection, and rounds of training on what the last round's student finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from sentence_transformers import MultiVectorEncoder

from tct_hf.data.collection import Collection
from tct_hf.evaluation.maxsim import rerank_run
from tct_hf.evaluation.training_reports import RoundResult, open_workspace, round_name
from tct_hf.evaluation.workspace import Workspace, open_teacher
from tct_hf.files import claim, command
from tct_hf.pipeline.checks import named, of_section
from tct_hf.pipeline.job import Job
from tct_hf.pipeline.settings import MiningSettings, RoundsSettings, overridden
from tct_hf.pipeline.train import Training
from tct_hf.retrieval.mining import (
    SUMMARY_FILE,
    TRIPLES_FILE,
    MiningCounts,
    PairScorer,
    Rules,
    Scores,
    mine_triples,
    read_counts,
)
from tct_hf.retrieval.triples import load_triples
from tct_hf.settings import SettingsError
from tct_hf.teachers.colbert import describe_teacher


def check_mining(settings: MiningSettings, section: str = "") -> None:
    """Refuse rules that nothing could be mined with, before there are candidates; `section` is theirs in a recipe."""
    given = asdict(settings)
    if given.pop("queries_a_part") < 1:
        raise SettingsError(f"{section}.queries_a_part: {settings.queries_a_part} is below 1".lstrip("."))
    with named(section):
        Rules(**given, seed=0)


def check_judged(collection: Collection, labels: float) -> None:
    """Refuse a collection without queries to mine for."""
    if not collection.labelled(labels):
        raise SettingsError(f"data: {collection.name} has no judged train queries to mine for; raise data.labels")


class Source(NamedTuple):
    """Where candidates come from: a name for the triples, a run or what makes one, and all that the run depends on."""

    origin: str
    run: Scores | Callable[[Mapping[str, str]], Scores]
    depends: Mapping[str, Any]


def student_source(workspace: Workspace, origin: str, depth: int, state: PartialState) -> Source:
    """Exact search with a student; the corpus is encoded first, or the encoding is resumed."""
    workspace.encode(state)
    with state.main_process_first():  # one writes the index, the others open it
        workspace.exact()
    return Source(origin, lambda queries: workspace.search(queries, depth), workspace.depends)


def pair_scorer(model: MultiVectorEncoder, *, bf16: bool = False) -> PairScorer:
    """A function that scores (query, passage) texts by MaxSim; it encodes each text of a call once."""

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        run: dict[str, dict[str, float]] = {}
        for query, passage in pairs:
            run.setdefault(query, {})[passage] = 0.0
        most = max(map(len, run.values()))
        found = rerank_run(model, run, {p: p for _, p in pairs}, {q: q for q in run}, k=most, bf16=bf16)
        return [found[query][passage] for query, passage in pairs]

    return score


def mine(
    collection: Collection,
    source: Source,
    settings: MiningSettings,
    output: Path,
    job: Job,
    *,
    seed: int,
    labels: float,
    teacher: str | None,
    bf16: bool,
) -> MiningCounts:
    """Mine negatives for the judged train queries of a collection, into `output/triples.parquet`.

    Stopped and called again, it goes on after the last whole part; finished, it returns at once.

    Args:
        labels: share of the train queries whose judgements are used.
        teacher: folder or Hub id of the ColBERT that judges by the margin; not loaded without one.

    Returns:
        What was refused, filled up and left out.
    """
    judge: PairScorer | None = None
    depends: dict[str, Any] = dict(source.depends)
    if settings.margin is not None or settings.relative_margin is not None:
        if teacher is None:
            raise ValueError("margin, relative_margin: there is no teacher to judge by them; name a ColBERT")
        model = open_teacher(teacher)
        judge = pair_scorer(model, bf16=bf16)
        depends["teacher"] = {**describe_teacher(model), "bf16": bf16}
    counts = MiningCounts()
    mine_triples(
        source.run,
        collection.corpus,
        collection.splits["train"].queries,
        collection.labelled(labels),
        **asdict(settings),
        origin=source.origin,
        seed=seed,
        teacher=judge,
        counts=counts,
        output_dir=output,
        depends=depends,
        state=job.state,
        write=job.write,
    )
    return counts


class Rounds:
    """A base and rounds of mining and training after it, each in a folder of its own: round-0, round-1, ..."""

    def __init__(self, settings: RoundsSettings, job: Job) -> None:
        data, teacher = settings.data, settings.teacher
        if settings.student.tower_of is not None:
            raise SettingsError("student.tower_of: rounds train both sides; train the query tower after them")
        if settings.rounds < 0:
            raise SettingsError(f"rounds: {settings.rounds} is below 0")
        if data.unlabelled or data.questions is not None or settings.triples.path is not None:
            raise SettingsError("data, triples: negatives are mined for judged train queries; leave others out")
        if settings.student.kind != "dense":
            raise SettingsError("student.kind: only a dense student mines; train a sparse one on its triples")
        teacher.kind = teacher.kind or "colbert"
        if teacher.kind != "colbert" or teacher.mixed_with:
            fix = f"use {command('train')} for others"
            raise SettingsError(f"teacher.kind, teacher.mixed_with: only a ColBERT works here; {fix}")
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
        settings, job, run, last = self.settings, self.job, self.rounds[number], self.results[-1]
        name, mined = f"{round_name(number)}: mine", run.folder / "mined"
        if (mined / SUMMARY_FILE).is_file():
            job.skip(name, "they are mined")
        else:
            with job.stage(name):
                where = {"device": str(job.state.device), "precision": settings.precision}
                workspace = open_workspace(run.collection, last.student, last.folder, write=job.write, **where)
                origin = f"student {round_name(number - 1)}"
                mine(
                    run.collection,
                    student_source(workspace, origin, settings.mining.depth, job.state),
                    settings.mining,
                    mined,
                    job,
                    seed=settings.seed + number,
                    labels=settings.data.labels,
                    teacher=run.start.get("teacher", run.teacher_model),
                    bf16=run.base["bf16"],
                )
        counts = read_counts(mined)
        job.write("  " + counts.summary().replace("\n", "\n  "))
        return counts
