"""From a collection, a student and a teacher to a report; a stopped run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil

from tct_hf.data.collection import Collection, Split
from tct_hf.evaluation.experiment import check_ids, effectiveness
from tct_hf.evaluation.measures import named_measures
from tct_hf.evaluation.report import Report, SystemResult
from tct_hf.evaluation.report_systems import ReportSystems
from tct_hf.evaluation.settings import ReportSettings
from tct_hf.evaluation.significance import compare_evaluations
from tct_hf.evaluation.systems import System, measure_cost
from tct_hf.evaluation.tasks import evaluate_tasks, find_tasks
from tct_hf.evaluation.tune_alpha import tuning_queries
from tct_hf.evaluation.workspace import OWN
from tct_hf.files import MADE_AGAIN, claim, file_digest, read_json, write_json_atomic
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.settings import hide_passwords

if TYPE_CHECKING:
    from accelerate import PartialState

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
    tasks: Sequence[Any] = (),
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
        tasks: retrieval tasks of mteb to measure the models on as well, see `find_tasks`.
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
    record["engine"]["url"] = hide_passwords(settings.engine.url or "") or None
    settings = replace(settings, measures=replace(settings.measures, names=named_measures(settings.measures.names)))
    found = find_tasks(tasks)
    foreign = check_report(collection, settings, runs or {})
    models: dict[str, Any] = {"teacher": teacher, "sparse_student": sparse_student, "base": base, "dims": dims}
    files = {name: None if callable(given) else given for name, given in (runs or {}).items()}
    work = Work(collection, student, Path(output), settings, write, runs=files, **models)
    work.foreign = foreign
    work.claim()
    work.measure_tasks(found)  # first: whether their data can be had shows here
    for key, make in work.plan.items():
        work.made[key] = make()
    report = work.report(record)
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
        if blank := [query for query, text in judged.queries.items() if not text.strip()]:
            raise ValueError(f"{collection.name}: query {blank[0]!r} is blank; write its text, or take it out")
    check_ids(collection)
    tuning_queries(collection, settings.hybrid)
    known = set(collection.corpus["id"]) if runs else set()
    read: dict[str, Run] = {}
    reported = {"": test, **{split: collection.also[split] for split in settings.also_report}}
    asked = {query: text for judged in reported.values() for query, text in judged.queries.items()}
    for name, given in runs.items():
        run = read[name] = _ask(name, given, asked) if callable(given) else read_run(given)
        file = "the function" if callable(given) else given
        for split, judged in reported.items():
            needed = not split or name == settings.measures.baseline
            if needed and judged.queries.keys().isdisjoint(run):
                where = f" of {split}" if split else ""
                raise ValueError(
                    f"runs.{name}: {file} has none of the {len(judged.queries):,} reported queries{where} "
                    f"(for instance {next(iter(judged.queries))!r}); give a run of this split, with the same ids"
                )
        for query in test.queries:
            if strange := run.get(query, {}).keys() - known:
                raise ValueError(
                    f"runs.{name}: {file} has passage {min(strange)!r} for query {query!r}, which is not in the "
                    f"corpus of {collection.name}; give a run made on this corpus"
                )
    return read


def _ask(name: str, search: Search, queries: Mapping[str, str]) -> Run:
    """The run that a function returns, its scores as Python's own numbers."""
    found: Any = search(queries)
    try:
        run = {query: {passage: float(score) for passage, score in hits.items()} for query, hits in found.items()}
        if bad := [query for query, hits in run.items() if not all(map(isfinite, hits.values()))]:
            raise ValueError(f"query {bad[0]!r} has a score that is not finite")
        return run
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"runs.{name}: the function returns no run ({error}); return query id to passage id to score"
        ) from error


class Work(ReportSystems):
    """What the systems of a report find and cost, measured once and read from then on."""

    def measure_tasks(self, tasks: Sequence[Any]) -> None:
        """Measure the models that are searched exactly, BM25 and their hybrids on tasks of mteb."""
        if tasks:
            folder, words = self.output / "tasks", self.collection.words
            depends = {role: space.depends["student"] for role, space in self.workspaces.items()}
            names = {f"{role}.weights": space.name for role, space in self.workspaces.items()}
            claim(folder, {**depends, "words": words}, names)
            models = {key: space.student for key, space in self.exact.items()}
            self.tasks = evaluate_tasks(tasks, models, folder, words=words, write=self.write)

    def measure(
        self, split: str, judged: Split, measures: Sequence[str], foreign: Mapping[str, Run]
    ) -> dict[str, dict[str, Any]]:
        """Effectiveness, significance and run of each system on a split, as in report.json."""
        experiment = replace(self.experiment(split, judged), measures=measures)
        folder = self.output / "runs" / ("" if split == "test" else split)
        experiment.search(list(self.made.values()), folder)
        experiment.runs |= {(name, split): run for name, run in foreign.items()}
        for name, own_run in foreign.items():
            if self.runs[name] is None:
                theirs = {query: own_run[query] for query in judged.queries if query in own_run}
                write_run(theirs, folder / f"{name}.{split}.trec", "function")
        found = experiment.evaluate()[split]
        tests: dict[str, dict[str, Any]] = {key: {} for key in found}
        for measure in measures if len(judged.qrels) > 1 else ():
            for key, one in compare_evaluations(found, self.baseline, measure).systems.items():
                tests[key][measure] = asdict(one)
        measured = {}
        for key, evaluation in found.items():
            own = folder / f"{key}.{split}.trec"
            run = {
                "file": self.runs.get(key) or str(own.relative_to(self.output)),
                "sha256": file_digest(self.runs.get(key) or own),
                "missing_queries": len(judged.qrels.keys() - experiment.runs[key, split].keys()),
            }
            figures = {"effectiveness": effectiveness(evaluation), "significance": tests[key] or None}
            measured[key] = {**figures, "run": run}
        return measured

    def _cost(self, place: int, system: System, run: str) -> dict[str, Any]:
        """What the system costs, measured or read where it was for the same run (its sha256)."""
        file = self.output / "costs" / f"{system.key}.json"
        needs = ["latency", "machine", "threads"]
        if not file.is_file() or read_json(file, MADE_AGAIN, needs=needs).get("run", run) != run:
            self.write(f"  time {place} of {len(self.made)}: {system.title}")
            load = psutil.getloadavg()[0]
            measured = measure_cost(system, self.test.queries, len(self.collection.corpus), self.settings.cost)
            write_json_atomic(file, {**measured.to_dict(), "load_average": load, "run": run})
        return read_json(file, MADE_AGAIN)

    def report(self, record: Mapping[str, Any]) -> Report:
        """Search with and time what was made, and put all figures together."""
        measures, count, collection = self.settings.measures, len(self.test.qrels), self.collection
        measured = self.measure("test", self.test, measures.names, self.foreign)
        costs = {
            key: self._cost(place, system, measured[key]["run"]["sha256"])
            for place, (key, system) in enumerate(self.made.items(), 1)
        }
        also = {}
        for split, names in self.settings.also_report.items():
            judged, theirs = collection.also[split], named_measures(names)
            foreign = {name: run for name, run in self.foreign.items() if not judged.qrels.keys().isdisjoint(run)}
            heads = {"queries": len(judged.qrels), "measures": theirs, "relevance": measures.relevance}
            also[split] = {**heads, "systems": self.measure(split, judged, theirs, foreign)}
        if collection.skipped.total:
            self.notes.append(f"{collection.name}: {collection.skipped.line()}.")
        if count == 1:
            self.notes.append("One query: no test can tell systems apart.")
        results = []
        for key, system in self.made.items():
            cost = {name: value for name, value in costs[key].items() if name not in ("machine", "threads", "run")}
            results.append(SystemResult(key, system.title, system.kind, cost=cost, **measured[key]))
        for key, run in self.foreign.items():
            missing, deepest = measured[key]["run"]["missing_queries"], max(map(len, run.values()), default=0)
            lacks = f"; it lacks {missing:,} of the reported queries, which count as 0" if missing else ""
            self.notes.append(
                f"{key}: run from {self.runs[key] or 'a function'}, at most {deepest:,} passages a query{lacks}."
            )
            results.append(SystemResult(key, key, "other", cost=None, **measured[key]))
        machine = costs["bm25"]["machine"]
        self.notes += _timing_notes(costs, machine["cpu_count"] or 1)
        threads = {name: count for cost in costs.values() for name, count in cost["threads"].items()}
        several = {"hybrids": self.hybrids} if len(self.hybrids) > 1 else {}
        return Report(
            collection={
                "name": collection.name,
                "passages": len(collection.corpus),
                "split": collection.test_split,
                "queries": count,
                "fingerprint": collection.fingerprint,
            },
            models=self._models(),
            measures=list(measures.names),
            relevance=measures.relevance,
            depth=measures.depth,
            baseline=self.baseline,
            tuning={"hybrid": self.hybrids[self.first_hybrid], "ann": self.ann, **several},
            systems=results,
            machine={name: machine[name] for name in ("processor", "memory_bytes", "cpu_count", "platform")}
            | {"device": str(self.student.student.device)},
            threads=threads | {"bm25s": 1},  # unless it is asked for more
            environment={"packages": machine["packages"], "python": machine["python"]},
            settings=dict(record),
            notes=list(self.notes),
            also=also,
            tasks=self.tasks,
        )

    def _models(self) -> dict[str, Any]:

        def described(name: str | None, weights: str, model: Any, **more: Any) -> dict[str, Any]:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            return {"name": name, "weights_sha256": weights, "parameters": parameters, **more}

        models: dict[str, Any] = {"student": None, "teacher": None}
        for role, space in self.workspaces.items():
            more = {"dimension": space.manifest["dim"], "similarity": space.student.similarity_fn_name}
            more |= {"encoded_in": space.manifest["precision"], **(self.active_dims if space.is_sparse else {})}
            models[role] = described(space.name, space.weights, space.student, **more)
        if self.teacher is not None:
            more = {**self.measured, "encoded_in": "bf16" if self.bf16 else "fp32"}
            weights = self.depends["teacher"]["weights"]
            models["teacher"] = described(self.teacher_name, weights, self.teacher, **more)
        return models


def _timing_notes(costs: Mapping[str, Mapping[str, Any]], cores: int) -> list[str]:
    notes = []
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
