"""From a collection, a student and a teacher to a report; a stopped run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tct_hf.data.collection import Split
from tct_hf.evaluation.experiment import check_ids, effectiveness
from tct_hf.evaluation.measures import named_measures
from tct_hf.evaluation.report import Report, SystemResult
from tct_hf.evaluation.report_work import Work
from tct_hf.evaluation.settings import BM25, ReportSettings
from tct_hf.evaluation.significance import compare_evaluations
from tct_hf.evaluation.tune_alpha import tuning_queries
from tct_hf.evaluation.workspace import OWN
from tct_hf.files import file_digest
from tct_hf.retrieval.runs import Run, read_run, write_run

if TYPE_CHECKING:
    from accelerate import PartialState

    from tct_hf.data.collection import Collection

Search: TypeAlias = Callable[[Mapping[str, str]], Mapping[str, Mapping[str, float]]]  # queries, id to text, to a run


def build_report(
    collection: Collection,
    student: str,
    output: str | Path,
    *,
    teacher: str | None = OWN,
    sparse_student: str | None = None,
    base: str | None = None,
    settings: ReportSettings | None = None,
    runs: Mapping[str, str | Search] | None = None,
    dims: Sequence[int] | None = None,
    write: Callable[[str], None] = print,
) -> Report:
    """Search a collection with every system, measure what each finds and costs, and write the report to a folder.

    What is there from an earlier call with the same settings is used again: the encoded corpus, indexes, runs, and
    times. What belongs to other settings is refused.

    Args:
        collection: collection whose split "test" is reported, with those of `also` that `settings.also_report` names;
            dev, or train where there is no dev, is tuned on.
        student: folder, Hub id or bundled name of a model of one vector a text, dense or sparse.
        output: folder of everything.
        teacher: folder or Hub id of a model of one vector a token; OWN ("own") takes the student's own token vectors,
            where it has some to compare; None reports without.
        sparse_student: folder or Hub id of a sparse student, reported beside the dense `student` and fused with it.
        base: folder, Hub id or bundled name of the embedding model that the student was trained from, reported as it
            is.
        settings: what to measure and how.
        runs: other systems by name: a TREC file of a run on the reported queries, or a function from queries, id to
            text, to a run, query id to passage id to score, which every call asks again.
        dims: first dimensions of the student to measure alone too; those that its training recorded when None.
        write: takes lines of progress.

    Returns:
        The report, saved in `output`.

    Raises:
        ValueError: a setting, a measure, an id, a run or a model that the report can't be made with, or a folder that
            holds the work of other settings.
        FileNotFoundError: there is no such run or model.
        OSError: a model can't be loaded.
    """
    settings = settings or ReportSettings()
    record = asdict(settings)
    settings = replace(settings, measures=replace(settings.measures, names=named_measures(settings.measures.names)))
    foreign = check_report(collection, settings, runs or {})
    models: dict[str, Any] = {"teacher": teacher, "sparse_student": sparse_student, "base": base, "dims": dims}
    files = {name: None if callable(given) else given for name, given in (runs or {}).items()}
    work = Work(collection, student, Path(output), settings, write, runs=files, **models)
    work.claim()
    systems = work.systems()
    measured = _measured(work, "test", work.test, settings.measures.names, foreign)
    costs = {
        system.key: work.cost(system, place, len(systems), measured[system.key]["run"]["sha256"])
        for place, system in enumerate(systems, 1)
    }
    also = {}
    for split, names in settings.also_report.items():
        judged, measures = collection.also[split], named_measures(names)
        theirs = {name: run for name, run in foreign.items() if not judged.qrels.keys().isdisjoint(run)}
        found = _measured(work, split, judged, measures, theirs)
        heads = {"queries": len(judged.qrels), "measures": measures, "relevance": settings.measures.relevance}
        also[split] = {**heads, "systems": found}
    report = _assemble(work, measured, costs, foreign, record, also)
    for problem in report.save(output):
        write(f"  {problem}")
    return report


def encode_corpora(
    collection: Collection,
    student: str,
    output: Path,
    *,
    settings: ReportSettings,
    state: PartialState,
    write: Callable[[str], None] = print,
    **models: Any,
) -> None:
    """Encode the corpus with each student of a report, as `build_report` takes them, several processes sharing it."""
    work = Work(collection, student, output, settings, write, device=str(state.device), **models)
    for workspace in work.workspaces.values():
        workspace.encode(state)


def check_report(collection: Collection, settings: ReportSettings, runs: Mapping[str, str | Search]) -> dict[str, Run]:
    """Find out before any model is loaded what would stop the report later; the runs from elsewhere, read."""
    settings.check()
    for split in settings.also_report:
        if split not in collection.also or not collection.also[split].queries:
            raise ValueError(
                f"also_report.{split}: {collection.name} has no judged query of this split; load the collection with "
                "it (also=), or leave it out"
            )
    test = collection.splits.get("test")
    if test is None or not test.queries:
        raise ValueError(f"{collection.name}: no judged query to report on; check data.source and data.test_split")
    for judged in (*collection.splits.values(), *collection.also.values()):
        for query, text in judged.queries.items():
            if not text.strip():
                raise ValueError(f"{collection.name}: query {query!r} is blank; write its text, or take it out")
    check_ids(collection)
    tuning_queries(collection, settings.hybrid)
    known = set(collection.corpus["id"]) if runs else set()
    read: dict[str, Run] = {}
    reported = {"": test, **{split: collection.also[split] for split in settings.also_report}}
    asked = {query: text for judged in reported.values() for query, text in judged.queries.items()}
    for name, given in runs.items():
        read[name] = _ask(name, given, asked) if callable(given) else read_run(given)
        file = "the function" if callable(given) else given
        for split, judged in reported.items():
            needed = not split or name == settings.measures.baseline
            if needed and judged.queries.keys().isdisjoint(read[name]):
                where = f" of {split}" if split else ""
                raise ValueError(
                    f"runs.{name}: {file} has none of the {len(judged.queries):,} reported queries{where} "
                    f"(for instance {next(iter(judged.queries))!r}); give a run of this split, with the same ids"
                )
        for query in test.queries:
            for passage in read[name].get(query, {}):
                if passage not in known:
                    raise ValueError(
                        f"runs.{name}: {file} has passage {passage!r} for query {query!r}, which is not in the corpus "
                        f"of {collection.name}; give a run made on this corpus"
                    )
    return read


def _ask(name: str, search: Search, queries: Mapping[str, str]) -> Run:
    """The run that a function returns, its scores as Python's own numbers."""
    found: Any = search(queries)
    try:
        return {query: {passage: float(score) for passage, score in hits.items()} for query, hits in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"runs.{name}: the function returns no run ({error}); return query id to passage id to score"
        ) from error


def _measured(
    work: Work, split: str, judged: Split, measures: Sequence[str], foreign: Mapping[str, Run]
) -> dict[str, dict[str, Any]]:
    """Effectiveness, significance and run of each system on a split, as in report.json."""
    experiment = replace(work.experiment(split, judged), measures=measures)
    folder = work.output / "runs" / ("" if split == "test" else split)
    experiment.search(list(work.made.values()), folder)
    experiment.runs |= {(name, split): run for name, run in foreign.items()}
    for name, run in foreign.items():
        if work.runs[name] is None:
            theirs = {query: run[query] for query in judged.queries if query in run}
            write_run(theirs, folder / f"{name}.{split}.trec", "function")
    found = experiment.evaluate()[split]
    tests: dict[str, dict[str, Any]] = {key: {} for key in found}
    for measure in measures if len(judged.qrels) > 1 else ():
        for key, one in compare_evaluations(found, work.baseline, measure).systems.items():
            tests[key][measure] = asdict(one)
    measured = {}
    for key, evaluation in found.items():
        own = folder / f"{key}.{split}.trec"
        measured[key] = {
            "effectiveness": effectiveness(evaluation),
            "significance": tests[key] or None,
            "run": {
                "file": work.runs.get(key) or str(own.relative_to(work.output)),
                "sha256": file_digest(work.runs.get(key) or own),
                "missing_queries": len(judged.qrels.keys() - experiment.runs[key, split].keys()),
            },
        }
    return measured


def _models(work: Work) -> dict[str, Any]:
    """All models, as in report.json."""

    def described(name: str | None, weights: str, model: Any, **more: Any) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"name": name, "weights_sha256": weights, "parameters": parameters, **more}

    models: dict[str, Any] = {"student": None, "teacher": None}
    for role, space in work.workspaces.items():
        more = {"dimension": space.manifest["dim"], "similarity": space.student.similarity_fn_name}
        more |= {"encoded_in": space.manifest["precision"], **(work.active_dims if space.is_sparse else {})}
        models[role] = described(space.name, space.built_by["weights_sha256"], space.student, **more)
    if work.teacher is not None:
        more = {**work.measured, "encoded_in": "bf16" if work.bf16 else "fp32"}
        models["teacher"] = described(work.teacher_name, work.depends["teacher"]["weights"], work.teacher, **more)
    return models


def _timing_notes(costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes, cores = [], costs[BM25]["machine"]["cpu_count"] or 1
    timed = min(cost["latency"]["total"]["queries"] for cost in costs.values())
    if timed < 100:
        notes.append(f"Of {timed} timed queries p99 is little more than the slowest one: read it as that.")
    busiest = max((cost.get("load_average") or 0.0) for cost in costs.values())
    if busiest > cores:
        notes.append(
            f"The machine was busy while timing (load {busiest:.1f} on {cores} cores): times are too long, and those "
            "of two systems may not compare. Delete the folder costs and run again when it is idle."
        )
    return notes


def _assemble(
    work: Work,
    measured: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    foreign: Mapping[str, Run],
    record: Mapping[str, Any],
    also: dict[str, Any],
) -> Report:
    """Put all figures together."""
    measures, count = work.settings.measures, len(work.test.qrels)
    if work.collection.skipped.total:
        work.notes.append(f"{work.collection.name}: {work.collection.skipped.line()}.")
    if count == 1:
        work.notes.append("One query: no test can tell systems apart.")
    results = []
    for key, system in work.made.items():
        cost = {name: value for name, value in costs[key].items() if name not in ("machine", "threads", "run")}
        results.append(SystemResult(key, system.title, system.kind, cost=cost, **measured[key]))
    for key, run in foreign.items():
        missing, deepest = measured[key]["run"]["missing_queries"], max(map(len, run.values()), default=0)
        lacks = f"; it lacks {missing:,} of the reported queries, which count as 0" if missing else ""
        origin = work.runs[key] or "a function"
        work.notes.append(f"{key}: run from {origin}, at most {deepest:,} passages a query{lacks}.")
        results.append(SystemResult(key, key, "other", cost=None, **measured[key]))
    work.notes += _timing_notes(costs)
    machine, collection = costs[BM25]["machine"], work.collection
    threads = {name: count for cost in costs.values() for name, count in cost["threads"].items()}
    # What numba may use says nothing: bm25s searches on one thread unless it is asked for more.
    threads.pop("numba", None)
    return Report(
        collection={
            "name": collection.name,
            "passages": len(collection.corpus),
            "split": collection.test_split,
            "queries": count,
            "fingerprint": collection.fingerprint,
        },
        models=_models(work),
        measures=list(measures.names),
        relevance=measures.relevance,
        depth=measures.depth,
        baseline=work.baseline,
        tuning=work.tuned(),
        systems=results,
        machine={name: machine[name] for name in ("processor", "memory_bytes", "cpu_count", "platform")}
        | {"device": str(work.student.student.device)},
        threads=threads | {"bm25s": 1},
        environment={"packages": machine["packages"], "python": machine["python"]},
        settings=dict(record),
        notes=list(work.notes),
        also=also,
    )
