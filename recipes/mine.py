"""Mine hard negatives for the train queries of a collection with a student, a TREC run of any system, or BM25.

accelerate launch recipes/mine.py [settings.yaml] --data.source PATH --model PATH --output_dir DIR [--setting value]

Writes triples.parquet (ids, texts, scores, origin; recipes/train.py takes it as --triples.path) and summary.json.
Stopped at any point, the same command goes on where it stopped. Several processes share the work.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.pipeline.settings import DataSettings, MiningSettings
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting


@dataclass
class Settings(MiningSettings):
    output_dir: str = setting("outputs/mine", "where everything is written")
    model: str | None = setting(None, "folder, Hub id or bundled model of one vector a text; BM25 when null")
    run: str | None = setting(None, "TREC file of any system's run on the train queries, instead of a model")
    origin: str | None = setting(None, "name of the source in the triples; says what it was when null")
    teacher: str | None = setting(None, "folder or Hub id of the ColBERT that judges by the margin")
    seed: int = setting(13, "seed of the sample")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of encoding; auto: bf16 where it is as good"
    )
    data: DataSettings = field(default_factory=DataSettings)


def main(settings: Settings) -> None:
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.mine import check_judged, check_mining, mine
    from tct_hf.progress import quieten
    from tct_hf.training.stages import precision, process_state

    if settings.model is not None and settings.run is not None:
        raise SettingsError("model, run: candidates come from one of them; leave the other out")
    if (settings.margin is None) != (settings.teacher is None):
        raise SettingsError("margin, teacher: the ColBERT judges by the margin; give both, or leave both out")
    rules = MiningSettings(**{one.name: getattr(settings, one.name) for one in fields(MiningSettings)})
    check_mining(rules)
    quieten()
    state = process_state()
    write = partial(print, flush=True) if state.is_main_process else lambda line: None
    stages = Stages({"data": 0.5, "candidates": 5.0, "mine": 2.0}, enabled=state.is_main_process)
    output = Path(settings.output_dir)
    with stages.stage("data"), state.main_process_first():
        collection = read_collection(settings.data, test=False)  # nothing is reported
        check_judged(collection, settings.data.labels)
        write(f"  {collection.summary()}")
    with stages.stage("candidates"):
        source = source_of(settings, collection, output, state, write)
    with stages.stage("mine"):
        counts = mine(
            collection,
            source,
            rules,
            output / "mined",
            seed=settings.seed,
            labels=settings.data.labels,
            teacher=settings.teacher,
            bf16=precision(settings.precision, state.device)["bf16"],
            state=state,
            write=write,
        )
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
        names = {"rows": "triples", "drawn": "candidates drawn", "random_negatives": "random passages"}
        cells = {names.get(name, name).replace("_", " "): f"{count:,}" for name, count in asdict(counts).items()}
        print(f"\n{one_row({'origin': source.origin, **cells})}\n\n{output / 'mined' / 'triples.parquet'}", flush=True)
    stages.finish()
    state.destroy_process_group()


def source_of(settings: Settings, collection: Any, output: Path, state: Any, write: Any) -> Any:
    from tct_hf.evaluation.workspace import Workspace, open_student
    from tct_hf.pipeline.mine import bm25_source, run_source, student_source

    if settings.run is not None:
        return run_source(settings.run, settings.origin)
    if settings.model is None:
        return bm25_source(collection, depth=settings.depth, origin=settings.origin or "bm25")
    student = open_student(settings.model, str(state.device))
    workspace = Workspace(
        collection, student, settings.model, output / "search", precision=settings.precision, write=write
    )
    origin = settings.origin or f"student {settings.model}"
    return student_source(workspace, origin, depth=settings.depth, state=state)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
