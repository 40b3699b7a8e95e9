"""From a collection, a student and a teacher to a report; stopped at any point, it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.first_dims import key_of, sizes_to_measure
from tct_hf.evaluation.measures import named_measures
from tct_hf.evaluation.report import Report, SystemResult
from tct_hf.evaluation.report_checks import check_report
from tct_hf.evaluation.report_settings import ReportSettings
from tct_hf.evaluation.report_splits import measure_systems, split_record
from tct_hf.evaluation.report_systems import BM25, ReportSystem
from tct_hf.evaluation.report_work import Work, rows_of
from tct_hf.evaluation.stores import (
    BASE_FOLDER,
    OWN,
    SPARSE_FOLDER,
    Stores,
    has_own_maxsim,
    open_beside,
    open_reranker,
    open_student,
)
from tct_hf.files import file_digest
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
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
        collection: its split "test" is reported, and those of `also` that `settings.also_report` names; dev, or train
            where there is no dev, is tuned on.
        student: folder, Hub id or bundled name of a model of one vector a text, dense or sparse.
        output: folder of everything.
        teacher: folder or Hub id of a model of one vector a token; OWN ("own") takes the student's own token vectors,
            where it has some to compare; the report does without when None.
        sparse_student: folder or Hub id of a sparse student, to be reported beside the dense `student` and fused with
            it.
        base: folder, Hub id or bundled name of the embedding model that the student was trained from, to be reported
            as it is.
        settings: what to measure and how.
        runs: name to TREC file of other systems' runs on the reported queries.
        record: settings to keep in the report, JSON-ready; those of `settings` when None.
        dims: first dimensions of the student to measure alone too; None: those that its training recorded.
        write: takes lines of progress.

    Returns:
        The report; it is saved in `output`.

    Raises:
        ValueError, FileNotFoundError, OSError: as `check_report`, as loading the models; or the folder holds the work
            of other settings.
    """
    settings = settings or ReportSettings()
    record = record or asdict(settings)
    measures = settings.measures
    settings = replace(settings, measures=replace(measures, names=named_measures(measures.names)))
    runs = runs or {}
    output = Path(output)
    foreign = check_report(collection, settings, runs)
    options: dict[str, Any] = {
        "precision": settings.precision,
        "threads": settings.build_threads,
        "write": write,
    }
    stores = Stores(collection, open_student(student), student, output, **options)
    sparse_stores = None
    if sparse_student is not None:
        model = open_beside(stores, sparse_student)
        sparse_stores = Stores(collection, model, sparse_student, output / SPARSE_FOLDER, **options)
    base_stores = (
        None if base is None else Stores(collection, open_student(base), base, output / BASE_FOLDER, **options)
    )
    sizes = check_student(
        stores,
        settings,
        runs,
        dims,
        beside=sparse_student is not None,
        teacher=teacher,
        base=base is not None,
    )
    if teacher == OWN and not has_own_maxsim(stores.student):
        teacher = None
    loaded = open_reranker(teacher, stores) if teacher is not None else None
    work = Work(collection, stores, loaded, teacher, output, settings, write, sparse_stores, sizes, base_stores)
    systems = work.systems()
    found = {system.key: work.run(system, place, len(systems)) for place, system in enumerate(systems, 1)}
    costs = {system.key: work.cost(system, place, len(systems)) for place, system in enumerate(systems, 1)}
    files = {key: work.run_file(key, "test") for key in found} | {name: Path(file) for name, file in runs.items()}
    also = {name: _also(work, systems, name, foreign, runs) for name in settings.also_report}
    report = _assemble(work, systems, found, costs, foreign, files, record, also)
    for problem in report.save(output):
        write(f"  {problem}")
    return report


def check_student(
    stores: Stores,
    settings: ReportSettings,
    runs: Mapping[str, str],
    dims: Sequence[int] | None,
    *,
    beside: bool,
    teacher: str | None,
    base: bool = False,
) -> list[int]:
    """Find out before anything is encoded what can't be reported of a student.

    Args:
        stores: of the student.
        settings: of the report.
        runs: as in :func:`build_report`.
        dims: as in :func:`build_report`.
        beside: a sparse student is reported beside it.
        teacher: as in :func:`build_report`.
        base: the base as it is is reported, too.

    Returns:
        The first dimensions that are measured alone too.

    Raises:
        ValueError: a baseline or a weighted pair that is not there, `dims` of a sparse student or beyond those of a
            dense one, or a run of their name.
    """
    if stores.is_sparse and dims:
        raise ValueError(
            "dims: a sparse student's dimensions are words, its first are no smaller student; leave it out."
        )
    sizes = [] if stores.is_sparse else sizes_to_measure(stores.name, dims, stores.student.get_embedding_dimension())
    rows = rows_of(
        settings,
        len(stores.collection.corpus),
        sparse=stores.is_sparse,
        beside=beside,
        teacher=teacher is not None and (teacher != OWN or has_own_maxsim(stores.student)),
        dims=sizes,
        base=base,
    )
    asked = settings.measures.baseline
    if asked is not None and asked not in (*rows, *runs):
        raise ValueError(f"measures.baseline: there is no row {asked!r}; there are {', '.join((*rows, *runs))}")
    if isinstance(settings.hybrid.alpha, dict) and (absent := settings.hybrid.alpha.keys() - set(rows)):
        raise ValueError(f"hybrid.alpha.{min(absent)}: this report has no such pair; leave it out")
    if taken := [key for key in map(key_of, sizes) if key in runs]:
        raise ValueError(f"runs.{taken[0]}: the report has a system of that name; give the run another.")
    return sizes


def _assemble(
    work: Work,
    systems: list[ReportSystem],
    found: dict[str, Run],
    costs: dict[str, dict[str, Any]],
    foreign: dict[str, Run],
    files: Mapping[str, Path],
    record: Mapping[str, Any],
    also: dict[str, Any],
) -> Report:
    """Put all figures together."""
    measures = work.settings.measures
    everything = {**found, **foreign}
    qrels = work.test.qrels
    effectiveness, tests = measure_systems(
        everything, qrels, measures.names, relevance=measures.relevance, baseline=work.baseline
    )
    if len(qrels) == 1:
        work.notes.append("One query: no test can tell systems apart.")
    own = {system.key: system for system in systems}
    results = []
    for name in everything:
        system, file = own.get(name), files[name]
        cost = costs.get(name)
        missing = len(qrels.keys() - everything[name].keys())
        if system is None:
            _note_on(work, name, file, everything[name], missing)
        results.append(
            SystemResult(
                key=name,
                title=system.title if system is not None else name,
                kind=system.kind if system is not None else "other",
                effectiveness=effectiveness[name],
                significance=tests[name] or None,
                cost=None if cost is None else {k: v for k, v in cost.items() if k not in ("machine", "threads")},
                run={
                    "file": str(file.relative_to(work.output)) if system is not None else str(file),
                    "sha256": file_digest(file),
                    "missing_queries": missing,
                },
            )
        )
    machine = costs[BM25]["machine"]
    threads: dict[str, int] = {}
    for cost in costs.values():
        threads.update(cost["threads"])
    # What numba may use says nothing: bm25s searches on one thread unless it is asked for more.
    threads.pop("numba", None)
    threads["bm25s"] = 1
    _note_on_timing(work, costs)
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
        tuning=_tuning_record(work),
        systems=results,
        machine={
            "processor": machine["processor"],
            "memory_bytes": machine["memory_bytes"],
            "cpu_count": machine["cpu_count"],
            "platform": machine["platform"],
            "device": str(work.stores.student.device),
        },
        threads=threads,
        environment={"packages": machine["packages"], "python": machine["python"]},
        settings=dict(record),
        notes=list(work.notes),
        also=also,
    )


def _also(
    work: Work, systems: list[ReportSystem], split: str, foreign: Mapping[str, Run], runs: Mapping[str, str]
) -> dict[str, Any]:
    """A further split: every system, and the runs from elsewhere that have queries of it."""
    measures, qrels = work.settings.measures, work.collection.also[split].qrels
    found = {system.key: work.run(system, place, len(systems), split) for place, system in enumerate(systems, 1)}
    files = {key: work.run_file(key, split) for key in found}
    for name, run in foreign.items():
        if not qrels.keys().isdisjoint(run):
            found[name], files[name] = run, Path(runs[name])
    return split_record(
        found,
        files,
        qrels,
        named_measures(work.settings.also_report[split]),
        relevance=measures.relevance,
        baseline=work.baseline,
        output=work.output,
    )


def _note_on(work: Work, name: str, file: Path, run: Run, missing: int) -> None:
    deepest = max((len(hits) for hits in run.values()), default=0)
    lacks = f"; it lacks {missing:,} of the reported queries, which count as 0" if missing else ""
    work.notes.append(f"{name}: run from {file}, at most {deepest:,} passages a query{lacks}.")


def _note_on_timing(work: Work, costs: Mapping[str, Mapping[str, Any]]) -> None:
    timed = [cost["latency"]["total"]["queries"] for cost in costs.values()]
    if min(timed) < 100:
        work.notes.append(f"Of {min(timed)} timed queries p99 is little more than the slowest one: read it as that.")
    busiest = max((cost.get("load_average") or 0.0) for cost in costs.values())
    cores = costs[BM25]["machine"]["cpu_count"] or 1
    if busiest > cores:
        work.notes.append(
            f"The machine was busy while timing (load {busiest:.1f} on {cores} cores): times are too long, and those "
            "of two systems may not compare. Delete the folder costs and run again when it is idle."
        )


def _models(work: Work) -> dict[str, Any]:
    models: dict[str, Any] = {"student": _student(work, work.stores), "teacher": None}
    if work.sparse_stores not in (None, work.stores):
        models["sparse_student"] = _student(work, work.sparse_stores)
    if work.base_stores is not None:
        models["base"] = _student(work, work.base_stores)
    if work.teacher is not None:
        measured = work.models["teacher"] or {"dimension": None, "tokens_per_passage": None}
        models["teacher"] = {
            "name": work.teacher_name,
            "weights_sha256": work.depends["teacher"]["weights"],
            "parameters": sum(parameter.numel() for parameter in work.teacher.parameters()),
            **measured,
            "encoded_in": "bf16" if work.bf16 else "fp32",
        }
    return models


def _student(work: Work, stores: Any) -> dict[str, Any]:
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


def _tuning_record(work: Work) -> dict[str, Any]:
    from tct_hf.evaluation.tune_alpha import TunedAlpha

    hybrids = {}
    for key, alpha in work.alphas.items():
        hybrid: dict[str, Any] = {
            "fusion": "ranks" if alpha is None else "alpha",
            "alpha": None if alpha is None else float(alpha),
            "split": None,
            "normalize": work.settings.hybrid.normalize,
        }
        if isinstance(alpha, TunedAlpha) and work.tuning is not None:
            hybrid |= {**alpha.to_dict(), "split": work.tuning.split, "left_out": work.tuning.left_out}
        hybrids[key] = hybrid
    # The first is that of the student and BM25.
    record: dict[str, Any] = {"hybrid": next(iter(hybrids.values())), "ann": None}
    if len(hybrids) > 1:
        record["hybrids"] = hybrids
    if work.ann is not None:
        index = work.ann.index
        split = work.tuning.split if work.tuning is not None else None
        record["ann"] = {
            "factory": index.factory,
            "parameters": index.parameters,
            **(index.tuning or {}),
            "split": split,
        }
    return record
