"""What hard-negative rounds came to: every round's student searched, one table, what mining refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.evaluation.comparison import System, evaluate_all, run_systems, write_metrics
from tct_hf.evaluation.measures import Evaluation, standard_error
from tct_hf.evaluation.plots import plot_sweep
from tct_hf.evaluation.quick_report import placed
from tct_hf.evaluation.references import BM25, STUDENT, TEACHER, reference_systems, teacher_system
from tct_hf.evaluation.stores import Stores, open_student
from tct_hf.evaluation.tables import means_table
from tct_hf.files import claim, file_digest, write_text_atomic
from tct_hf.retrieval.mining import MiningCounts


@dataclass(frozen=True)
class RoundResult:
    """A round as it is to be reported.

    Args:
        folder: of the round; its runs and the encoded corpus go there.
        student: folder of its student.
        teacher: folder of the teacher trained in it; None where it took the one before.
        mined: what its mining did; None for the base.
    """

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
    """Search with every round's student and write report.md, metrics.json and the runs.

    What an earlier call has searched is read.

    Args:
        rounds: the base first.
        collection: with its test split and, where there is one, dev.
        output: folder.
        base_model: encoder that teacher and student come from; None where it is not known.
        teacher: folder or Hub id of the base's ColBERT.
        measures: ir-measures names; the first decides on dev which round is best.
        depth: passages a query in the runs.
        precision: the students encode in: "auto", "bf16" or "fp32".
        bf16: the others encode in bfloat16.
        settings: JSON-ready, all that the last round depends on.
        write: takes lines of progress.

    Returns:
        The report, Markdown.

    Raises:
        ValueError: a folder of runs belongs to other models or settings.
    """
    queries = {name: split.queries for name, split in collection.splits.items() if name != "train"}
    shared = {"corpus": collection.fingerprint["sha256"], "depth": depth, "bf16": bf16}
    weights = file_digest(Path(teacher) / "model.safetensors") or teacher
    claim(output / "runs", {**shared, "teacher": weights, "base": base_model})
    systems = reference_systems(collection, base_model=base_model, teacher=teacher, depth=depth, bf16=bf16)
    runs = run_systems(systems, queries, output / "runs", write=write)
    titles = {system.key: system.title for system in systems}
    students, teachers = [f"{STUDENT}-{number}" for number in range(len(rounds))], {0: TEACHER}
    for number, result in enumerate(rounds):
        name = round_name(number)
        own = [_student_system(result, students[number], f"student, {name}", collection, depth, precision, write)]
        if number and result.teacher is not None:
            key, title = f"{TEACHER}-{number}", f"ColBERT teacher, {name}"
            teachers[number] = key
            own.append(teacher_system(collection, key, title, str(result.teacher), depth=depth, bf16=bf16))
        models = {"student": result.student, "teacher": result.teacher}
        digests = {role: path and file_digest(path / "model.safetensors") for role, path in models.items()}
        claim(result.folder / "runs", {**digests, **shared, "precision": precision})
        runs |= run_systems(own, queries, result.folder / "runs", write=write)
        titles |= {system.key: system.title for system in own}
    evaluations = evaluate_all(runs, collection, measures)
    write_metrics(output / "metrics.json", evaluations, corpus=collection.fingerprint, settings=dict(settings))
    order = [key for key in titles if key not in (*students, *teachers.values())]
    columns = [(split, measure) for split in evaluations for measure in measures]
    rows = [
        (titles[key], {f"{s} {m}": evaluations[s][key].mean[m] for s, m in columns})
        for key in (*order, *students, *teachers.values())
    ]
    lines = [
        f"# {collection.summary()}",
        "",
        f"Exact search; {' and '.join(evaluations)} queries.",
        "",
        means_table(rows, [f"{split} {measure}" for split, measure in columns]),
        "",
        *_remarks(rounds, students, teachers, evaluations, measures[0]),
        "",
    ]
    for number, result in enumerate(rounds):
        if result.mined is not None:
            lines += [f"Mined for {round_name(number)}: {'; '.join(result.mined.summary().splitlines())}.", ""]
    lines += _plot(output / "rounds.png", evaluations["test"], students, teachers, measures[0])
    path = output / "report.md"
    write_text_atomic(path, "\n".join(lines))
    return path


def _student_system(
    result: RoundResult,
    key: str,
    title: str,
    collection: Collection,
    depth: int,
    precision: str,
    write: Callable[[str], None],
) -> System:
    """Exact search with a round's student, in the vectors that the next round has mined with."""

    def search(queries: Mapping[str, str]) -> Any:
        stores = open_stores(collection, str(result.student), result.folder, precision=precision, write=write)
        return stores.exact().index.run(list(queries), stores.encode_queries(queries), depth)

    return System(key, title, search)


def open_stores(
    collection: Collection,
    student: str,
    folder: Path,
    *,
    precision: str,
    device: str | None = None,
    write: Callable[[str], None] = print,
) -> Stores:
    """The encoded corpus and index of a round's student, in `folder/search`; see `Stores`."""
    model = open_student(student, device)
    # Named without its folder, so that a run that is moved stays the same run.
    return Stores(collection, model, "student", folder / "search", precision=precision, write=write)


def _remarks(
    rounds: Sequence[RoundResult],
    students: Sequence[str],
    teachers: Mapping[int, str],
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    measure: str,
) -> list[str]:
    """Which round is best on dev, and which differences on test may be chance."""
    lines = []
    if "dev" in evaluations:
        best = max(range(len(students)), key=lambda number: evaluations["dev"][students[number]].mean[measure])
        lines.append(
            f"On the dev queries the student of {round_name(best)} is best in {measure}: {rounds[best].student}"
        )
    test = evaluations["test"]
    for number in range(1, len(students)):
        others = {
            "the one before it": students[number - 1],
            "BM25": BM25,
            "its teacher": teachers[max(at for at in teachers if at <= number)],
        }
        own = test[students[number]]
        places = [f"{placed(own, test[key], measure)} {title}" for title, key in others.items()]
        lines.append(f"On the test queries the student of {round_name(number)} is, in {measure}, {', '.join(places)}.")
    return [*lines, "p: paired randomisation test, above 0.05 it may be chance."]


def _plot(
    path: Path, test: Mapping[str, Evaluation], students: Sequence[str], teachers: Mapping[int, str], measure: str
) -> list[str]:
    """Plot the rounds' students, and teachers where each has its own; what to say in the report."""
    if len(students) < 2:
        return []

    def point(number: int, key: str) -> tuple[float, float, float]:
        return (number, test[key].mean[measure], standard_error(list(test[key].per_query[measure].values())))

    lines = {
        "student": [point(number, key) for number, key in enumerate(students)],
        "ColBERT teacher": [point(number, key) for number, key in teachers.items()],
        "BM25": [point(0, BM25)],
    }
    labels = {"ylabel": f"test {measure} (bar: its standard error)", "title": "Hard-negative rounds"}
    try:
        plot_sweep(lines, path, xlabel="rounds of hard negatives", **labels)  # type: ignore[arg-type]
    except ImportError as error:
        return [f"No plot: {error}", ""]
    return [f"Plot: {path.name}", ""]
