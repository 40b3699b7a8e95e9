"""From a collection, a student and a teacher to a report; stopped at any point, it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation import settings as keys
from tct_hf.evaluation.comparison import effectiveness
from tct_hf.evaluation.measures import evaluate_run, named_measures
from tct_hf.evaluation.quick_report import check_ids
from tct_hf.evaluation.report import Report, SystemResult
from tct_hf.evaluation.report_work import Work
from tct_hf.evaluation.settings import BM25, ReportSettings
from tct_hf.evaluation.significance import compare_evaluations
from tct_hf.evaluation.stores import OWN, Stores
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tune_alpha import TunedAlpha, tuning_queries
from tct_hf.files import file_digest
from tct_hf.retrieval.runs import Run, read_run

if TYPE_CHECKING:
    from accelerate import PartialState

    from tct_hf.data.collection import Collection


def build_report(
    collection: Collection,
    student: str,
    output: str | Path,
    *,
    teacher: str | None = OWN,
    sparse_student: str | None = None,
    base: str | None = None,
    settings: ReportSettings | None = None,
    runs: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
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
        runs: name to TREC file of other systems' runs on the reported queries.
        record: settings to keep in the report, JSON-ready; those of `settings` when None.
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
    record = record or asdict(settings)
    settings = replace(settings, measures=replace(settings.measures, names=named_measures(settings.measures.names)))
    foreign = check_report(collection, settings, runs or {})
    models: dict[str, Any] = {"teacher": teacher, "sparse_student": sparse_student, "base": base, "dims": dims}
    work = Work(collection, student, Path(output), settings, write, runs=runs or {}, **models)
    work.claim()
    systems = work.systems()
    found = work.search(systems, "test") | foreign
    costs = {system.key: work.cost(system, place, len(systems)) for place, system in enumerate(systems, 1)}
    files, also = {name: Path(file) for name, file in (runs or {}).items()}, {}
    for split, names in settings.also_report.items():
        measures, qrels = named_measures(names), collection.also[split].qrels
        theirs = {name: run for name, run in foreign.items() if not qrels.keys().isdisjoint(run)}
        measured = _measure(work, work.search(systems, split) | theirs, split, qrels, measures, files)
        relevance = settings.measures.relevance
        also[split] = {"queries": len(qrels), "measures": measures, "relevance": relevance, "systems": measured}
    report = _assemble(work, systems, found, costs, files, record, also)
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
    for stores in (work.stores, work.base, work.sparse):
        if stores is not None:
            stores.encode(state)


def check_report(collection: Collection, settings: ReportSettings, runs: Mapping[str, str]) -> dict[str, Run]:
    """Find out before any model is loaded what would stop the report later; the runs from elsewhere, read."""
    settings.check(len(collection.corpus))
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
    for name, file in runs.items():
        if name in keys.KEYS:
            raise ValueError(f"runs.{name}: a system of the report has this name; give the run another")
        read[name] = read_run(file)
        more = settings.also_report if name == settings.measures.baseline else ()
        for split, judged in {"": test, **{one: collection.also[one] for one in more}}.items():
            if judged.queries.keys().isdisjoint(read[name]):
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


def _measure(
    work: Work,
    runs: Mapping[str, Run],
    split: str,
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
    foreign: Mapping[str, Path],
) -> dict[str, dict[str, Any]]:
    """Effectiveness, significance and run of each system on a split, as in report.json."""
    relevance = work.settings.measures.relevance
    found = {key: evaluate_run(run, qrels, measures, relevance=relevance) for key, run in runs.items()}
    tests: dict[str, dict[str, Any]] = {key: {} for key in runs}
    for measure in measures if len(qrels) > 1 else ():
        for key, one in compare_evaluations(found, work.baseline, measure).systems.items():
            tests[key][measure] = asdict(one)
    folder = Path("runs") if split == "test" else Path("runs") / split
    measured = {}
    for key, run in runs.items():
        file = foreign.get(key, work.output / folder / f"{key}.{split}.trec")
        shown = str(file if key in foreign else file.relative_to(work.output))
        missing = len(qrels.keys() - run.keys())
        measured[key] = {
            "effectiveness": effectiveness(found[key]),
            "significance": tests[key] or None,
            "run": {"file": shown, "sha256": file_digest(file), "missing_queries": missing},
        }
    return measured


def _model(work: Work, stores: Stores) -> dict[str, Any]:
    """A student or base, as in report.json."""
    manifest = stores.manifest()
    return {
        "name": stores.name,
        "weights_sha256": stores.built_by["weights_sha256"],
        "parameters": sum(parameter.numel() for parameter in stores.student.parameters()),
        "dimension": manifest["dim"],
        "similarity": stores.student.similarity_fn_name,
        "encoded_in": manifest["precision"],
        **(work.active_dims if stores.is_sparse else {}),
    }


def _models(work: Work) -> dict[str, Any]:
    """All models, as in report.json."""
    models: dict[str, Any] = {"student": _model(work, work.stores), "teacher": None}
    for role, stores in (("sparse_student", work.sparse), ("base", work.base)):
        if stores is not None:
            models[role] = _model(work, stores)
    if work.teacher is not None:
        models["teacher"] = {
            "name": work.teacher_name,
            "weights_sha256": work.depends["teacher"]["weights"],
            "parameters": sum(parameter.numel() for parameter in work.teacher.parameters()),
            **work.measured,
            "encoded_in": "bf16" if work.bf16 else "fp32",
        }
    return models


def _tuning(work: Work) -> dict[str, Any]:
    """What was tuned and how, as in report.json."""
    hybrids, tuning = {}, work.tuning
    for key, alpha in work.alphas.items():
        hybrids[key] = {
            "fusion": "ranks" if alpha is None else "alpha",
            "alpha": None if alpha is None else float(alpha),
            "split": None,
            "normalize": work.settings.hybrid.normalize,
        }
        if isinstance(alpha, TunedAlpha) and tuning is not None:
            hybrids[key] |= {**alpha.to_dict(), "split": tuning.split, "left_out": tuning.left_out}
    record: dict[str, Any] = {"hybrid": hybrids[work.first_hybrid], "ann": None}
    if len(hybrids) > 1:
        record["hybrids"] = hybrids
    if work.ann is not None:
        index, split = work.ann.index, tuning.split if tuning is not None else None
        found = {"factory": index.factory, "parameters": index.parameters}
        record["ann"] = {**found, **(index.tuning or {}), "split": split}
    return record


def _timing_notes(costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    timed = min(cost["latency"]["total"]["queries"] for cost in costs.values())
    if timed < 100:
        notes.append(f"Of {timed} timed queries p99 is little more than the slowest one: read it as that.")
    busiest = max((cost.get("load_average") or 0.0) for cost in costs.values())
    cores = costs[BM25]["machine"]["cpu_count"] or 1
    if busiest > cores:
        notes.append(
            f"The machine was busy while timing (load {busiest:.1f} on {cores} cores): times are too long, and those "
            "of two systems may not compare. Delete the folder costs and run again when it is idle."
        )
    return notes


def _assemble(
    work: Work,
    systems: Sequence[System],
    found: Mapping[str, Run],
    costs: Mapping[str, Mapping[str, Any]],
    foreign: Mapping[str, Path],
    record: Mapping[str, Any],
    also: dict[str, Any],
) -> Report:
    """Put all figures together."""
    measures, qrels, own = work.settings.measures, work.test.qrels, {system.key: system for system in systems}
    measured = _measure(work, found, "test", qrels, measures.names, foreign)
    if len(qrels) == 1:
        work.notes.append("One query: no test can tell systems apart.")
    results = []
    for key, figures in measured.items():
        title, kind, cost = key, "other", None
        if key in own:
            title, kind = own[key].title, own[key].kind
            cost = {name: value for name, value in costs[key].items() if name not in ("machine", "threads")}
        else:
            missing, deepest = figures["run"]["missing_queries"], max(map(len, found[key].values()), default=0)
            lacks = f"; it lacks {missing:,} of the reported queries, which count as 0" if missing else ""
            work.notes.append(f"{key}: run from {foreign[key]}, at most {deepest:,} passages a query{lacks}.")
        results.append(SystemResult(key=key, title=title, kind=kind, cost=cost, **figures))
    work.notes += _timing_notes(costs)
    machine = costs[BM25]["machine"]
    threads = {name: count for cost in costs.values() for name, count in cost["threads"].items()}
    # What numba may use says nothing: bm25s searches on one thread unless it is asked for more.
    threads.pop("numba", None)
    return Report(
        collection={
            "name": work.collection.name,
            "passages": len(work.collection.corpus),
            "split": work.collection.test_split,
            "queries": len(qrels),
            "fingerprint": work.collection.fingerprint,
        },
        models=_models(work),
        measures=list(measures.names),
        relevance=measures.relevance,
        depth=measures.depth,
        baseline=work.baseline,
        tuning=_tuning(work),
        systems=results,
        machine={name: machine[name] for name in ("processor", "memory_bytes", "cpu_count", "platform")}
        | {"device": str(work.stores.student.device)},
        threads=threads | {"bm25s": 1},
        environment={"packages": machine["packages"], "python": machine["python"]},
        settings=dict(record),
        notes=list(work.notes),
        also=also,
    )
