"""Mine hard negatives for the train queries of a collection with a student, a TREC run of any system, or BM25.

accelerate launch recipes/mine.py [settings.yaml] --data.source PATH --model PATH --output_dir DIR [--setting value]

Writes triples.parquet (ids, texts, scores, origin; recipes/train.py takes it as --triples.path) and summary.json.
If it is stopped, the same command resumes it. Several processes share the work.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.pipeline.settings import DataSettings, MiningSettings
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings(MiningSettings):
    output_dir: str = setting("outputs/mine", "where everything is written")
    model: str | None = setting(None, "folder, Hub id or bundled name of a dense student; BM25 when null")
    run: str | None = setting(None, "TREC file of any system's run on the train queries, instead of a model")
    origin: str | None = setting(None, "name of the source in the triples; described automatically when null")
    teacher: str | None = setting(None, "folder or Hub id of the ColBERT whose scores are compared with the margin")
    seed: int = setting(13, "random seed of the sampling")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of encoding; auto: bf16 where it is as good"
    )
    data: DataSettings = field(default_factory=DataSettings)


def main(settings: Settings) -> None:
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.job import Job
    from tct_hf.pipeline.rounds import check_judged, check_mining, mine
    from tct_hf.training.stages import precision

    if settings.model is not None and settings.run is not None:
        raise SettingsError("model, run: candidates come from one of them; leave the other out")
    if (settings.margin is None and settings.relative_margin is None) != (settings.teacher is None):
        raise SettingsError("margin, teacher: the ColBERT judges by the margin; give both, or leave both out")
    rules = MiningSettings(**{one.name: getattr(settings, one.name) for one in fields(MiningSettings)})
    check_mining(rules)
    job = Job(["data", "candidates", "mine"])
    output = Path(settings.output_dir)
    with job.first("data"):
        collection = read_collection(settings.data, test=False)  # nothing is reported
        check_judged(collection, settings.data.labels)
        job.write(f"  {collection.summary()}")
    with job.stage("candidates"):
        source = source_of(settings, collection, output, job)
    with job.stage("mine"):
        counts = mine(
            collection,
            source,
            rules,
            output / "mined",
            job,
            seed=settings.seed,
            labels=settings.data.labels,
            teacher=settings.teacher,
            bf16=precision(settings.precision, job.state.device)["bf16"],
        )
    job.record(settings, corpus=collection.fingerprint)
    if job.is_main:
        names = {"rows": "triples", "drawn": "candidates drawn", "random_negatives": "random passages"}
        cells = {names.get(name, name).replace("_", " "): f"{count:,}" for name, count in asdict(counts).items()}
        print(f"\n{one_row({'origin': source.origin, **cells})}\n\n{output / 'mined' / 'triples.parquet'}", flush=True)
    job.finish()


def source_of(settings: Settings, collection: Any, output: Path, job: Any) -> Any:
    from tct_hf.evaluation.workspace import Workspace, open_student
    from tct_hf.pipeline.rounds import Source, student_source
    from tct_hf.retrieval.negatives import collection_bm25
    from tct_hf.retrieval.runs import read_run, read_tag

    if settings.run is not None:
        return Source(settings.origin or read_tag(settings.run) or "run", read_run(settings.run), {})
    if settings.model is None:
        search = lambda queries: collection_bm25(collection).run(queries, settings.depth)  # noqa: E731
        return Source(settings.origin or "bm25", search, {"system": "bm25"})
    student, folder = open_student(settings.model, str(job.state.device)), output / "search"
    workspace = Workspace(collection, student, settings.model, folder, precision=settings.precision, write=job.write)
    origin = settings.origin or f"student {settings.model}"
    return student_source(workspace, origin, settings.depth, job.state)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
