"""Compare sparse, dense, hybrid and late-interaction retrieval on one collection: effectiveness, latency, storage.

accelerate launch recipes/evaluate.py recipes/evaluate.yaml [--setting value ...]
accelerate launch recipes/evaluate.py --data.source FOLDER --student PATH [--teacher PATH] --output_dir DIR
    [--base NAME] [--sparse_student PATH] [--expansion.path FOLDER]
    [--data.test_split dev --also_report '{dl19: [trec-dl]}'] [--tasks nanobeir]

Writes report.md, report.json, latency.png, storage.png and runs/. --runs.NAME FILE adds another system's TREC run.
If it is stopped, the same command resumes it; with several processes, they share the encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tct_hf.evaluation.expected import ExpectedSettings
from tct_hf.evaluation.settings import ReportSettings
from tct_hf.pipeline.settings import DataSettings
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings(ReportSettings):
    output_dir: str = setting("outputs/evaluate", "where everything is written")
    student: str | None = setting(None, "folder, Hub id or bundled name of a dense or sparse student")
    sparse_student: str | None = setting(None, "folder or Hub id of a sparse student, in addition to a dense one")
    base: str | None = setting(None, "folder, Hub id or bundled name of the student's base, reported as it is")
    teacher: str | None = setting(
        "own", "folder or Hub id of a ColBERT; own: the student's own token vectors; null: no late interaction"
    )
    dims: list[int] | None = setting(
        None, "numbers of first dimensions to measure as well; those of its training when null"
    )
    runs: dict[str, str] = setting({}, "name to TREC file of another system's run on the reported queries")
    tasks: list[str] = setting(
        [], "tasks of mteb to measure the models on as well: nanobeir, mteb:SciFact,NFCorpus, or a BEIR folder"
    )
    data: DataSettings = field(default_factory=DataSettings)
    verify: bool = setting(False, "compare the report with the figures of `expected`, and fail where one is off")
    expected: ExpectedSettings = field(default_factory=ExpectedSettings)


def main(settings: Settings) -> None:
    from tct_hf.evaluation.report import JSON_FILE
    from tct_hf.evaluation.reporting import build_report, check_report, encode_corpora
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.job import Job

    if settings.student is None:
        raise SettingsError("student: name the folder or Hub id of the model to evaluate, for instance --student PATH")
    if settings.verify:
        settings.expected.check()
    job = Job(["data", "report"])
    shares = job.state.num_processes > 1  # one process alone encodes as part of the report
    if shares:
        job.stages.insert(1, "encode")
    with job.first("data"):
        collection = read_collection(settings.data, train=False, also=list(settings.also_report))
        job.write(f"  {collection.summary()}")
        check_report(collection, settings, settings.runs)
    models = {name: getattr(settings, name) for name in ("teacher", "sparse_student", "base", "dims", "runs")}
    arguments = (collection, settings.student, Path(settings.output_dir))
    if shares:
        with job.stage("encode"):
            encode_corpora(*arguments, settings=settings, state=job.state, write=job.write, **models)
    job.end_group()
    if job.is_main:
        with job.stage("report"):
            report = build_report(*arguments, settings=settings, write=job.write, tasks=settings.tasks, **models)
        job.record(settings, corpus=collection.fingerprint)
        print("\n" + report.markdown())
    job.finish()
    job.verify(settings, Path(settings.output_dir) / JSON_FILE)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
