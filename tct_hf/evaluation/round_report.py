"""What hard-negative rounds came to: every round's student searched, one table, what mining refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.evaluation.experiment import Experiment, effectiveness, write_metrics
from tct_hf.evaluation.plots import missing_plot, plot_sweep
from tct_hf.evaluation.references import BM25, STUDENT, TEACHER, References
from tct_hf.evaluation.significance import placed
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import means_table
from tct_hf.evaluation.workspace import Workspace, open_student
from tct_hf.files import claim, file_digest, write_text_atomic
from tct_hf.retrieval.mining import MiningCounts
from tct_hf.retrieval.runs import Run


@dataclass(frozen=True)
class RoundResult:
    """A round as it is to be reported: its folder, its student's, its own teacher's and mining's, where there are."""

    folder: Path
    student: Path
    teacher: Path | None
    mined: MiningCounts | None


def round_name(number: int) -> str:
    """What a round is called: "base", then "round 1" and so on."""
    return "base" if number == 0 else f"round {number}"


def report_rounds(
    rounds: Sequence[RoundResult],
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    teacher: str,
    measures: Sequence[str],
    depth: int,
    precision: str,
    bf16: bool,
    settings: Mapping[str, Any],
    write: Callable[[str], None] = print,
) -> Path:
    """Search with every round's student, the base first; write report.md, metrics.json and the runs.

    `base_model` is None where it is not known; `teacher` is the base's ColBERT; the first measure decides on dev which
    round is best; the students encode in `precision`, the others in bfloat16 with `bf16`. Returns the report.
    """
    shared = {"corpus": collection.fingerprint["sha256"], "depth": depth, "bf16": bf16, **collection.own_rule}
    weights = file_digest(Path(teacher) / "model.safetensors") or teacher
    claim(output / "runs", {**shared, "teacher": weights, "base": base_model}, {"teacher": teacher})
    references = References(collection, depth, bf16)
    experiment = Experiment.of(collection, measures, depth, write=write)
    experiment.search(references.systems(base_model=base_model, teacher=teacher), output / "runs")
    students, teachers = [f"{STUDENT}-{number}" for number in range(len(rounds))], {0: TEACHER}
    for number, result in enumerate(rounds):
        name = round_name(number)

        def search(queries: Mapping[str, str], result: RoundResult = result) -> Run:
            workspace = open_workspace(collection, result.student, result.folder, precision=precision, write=write)
            return workspace.search(queries, collection.reach(depth))

        own = [System(students[number], f"student, {name}", search)]
        if number and result.teacher is not None:
            teachers[number], title = f"{TEACHER}-{number}", f"ColBERT teacher, {name}"
            own.append(references.teacher(teachers[number], title, str(result.teacher)))
        models: dict[str, Path | None] = {"student": result.student, "teacher": result.teacher}
        digests = {role: path and file_digest(path / "model.safetensors") for role, path in models.items()}
        names = {role: str(path) for role, path in models.items()}
        claim(result.folder / "runs", {**digests, **shared, "precision": precision}, names)
        experiment.search(own, result.folder / "runs")
    evaluations, titles = experiment.evaluate(), experiment.titles
    write_metrics(output / "metrics.json", evaluations, corpus=collection.fingerprint, settings=dict(settings))
    columns = {f"{split} {measure}": (split, measure) for split in evaluations for measure in measures}
    last = [*students, *teachers.values()]
    rows = [
        (titles[key], {name: evaluations[split][key].mean[measure] for name, (split, measure) in columns.items()})
        for key in (*(key for key in titles if key not in last), *last)
    ]
    said = [f"Exact search; {' and '.join(evaluations)} queries.", *collection.own_note]
    parts = [f"# {collection.summary()}", "\n".join(said), means_table(rows, [*columns])]
    remarks = []
    test, measure = evaluations["test"], measures[0]
    if "dev" in evaluations:
        best = max(range(len(rounds)), key=lambda number: evaluations["dev"][students[number]].mean[measure])
        remarks.append(
            f"On the dev queries the student of {round_name(best)} is best in {measure}: {rounds[best].student}"
        )
    for number in range(1, len(rounds)):
        taught_by = teachers[max(at for at in teachers if at <= number)]
        others = {"the one before it": students[number - 1], "BM25": BM25, "its teacher": taught_by}
        places = [f"{placed(test[students[number]], test[key], measure)} {title}" for title, key in others.items()]
        remarks.append(
            f"On the test queries the student of {round_name(number)} is, in {measure}, {', '.join(places)}."
        )
    parts.append("\n".join([*remarks, "p: paired randomisation test, above 0.05 it may be chance."]))
    for number, result in enumerate(rounds):
        if result.mined is not None:
            parts.append(f"Mined for {round_name(number)}: {'; '.join(result.mined.summary().splitlines())}.")
    if len(rounds) > 1:
        series = {"student": dict(enumerate(students)), "ColBERT teacher": teachers, "BM25": {0: BM25}}
        found = {key: effectiveness(evaluation)[measure] for key, evaluation in test.items()}
        points = {
            title: [(number, found[key]["mean"], found[key]["standard_error"]) for number, key in keys.items()]
            for title, keys in series.items()
        }
        labels = {"xlabel": "rounds of hard negatives", "ylabel": f"test {measure} (bar: its standard error)"}
        plot = output / "rounds.png"
        labels["title"] = "Hard-negative rounds"
        parts.append(missing_plot(plot_sweep, points, plot, **labels) or f"Plot: {plot.name}")
    return write_text_atomic(output / "report.md", "\n\n".join(parts) + "\n")


def open_workspace(
    collection: Collection,
    student: Path,
    folder: Path,
    *,
    precision: str,
    device: str | None = None,
    write: Callable[[str], None] = print,
) -> Workspace:
    """The encoded corpus and index of a round's student, with which the next round mines, in `folder/search`."""
    model = open_student(str(student), device)
    # Named without its folder, so that a run that is moved stays the same run.
    return Workspace(collection, model, "student", folder / "search", precision=precision, write=write)
