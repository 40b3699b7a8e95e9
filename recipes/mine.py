"""Mine hard negatives for the train queries of a collection with a student, a TREC run of any system, or BM25.

accelerate launch recipes/mine.py [settings.yaml] --data.source PATH --model PATH --output_dir DIR [--setting value]

Writes triples.parquet (ids, texts, scores, origin; recipes/train.py takes it as --triples.path) and summary.json.
Stopped at any point, the same command goes on where it stopped. Several processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.rounds import MiningSettings
from tct_hf.pipeline.steps import DataSettings
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.pipeline.rounds import Source
    from tct_hf.retrieval.mining import MiningCounts


@dataclass
class Settings(MiningSettings):
    output_dir: str = setting("outputs/mine", "where everything is written")
    model: str | None = setting(None, "folder, Hub id or bundled model of one vector a text; BM25 when none")
    run: str | None = setting(None, "TREC file of any system's run on the train queries, in place of a model")
    origin: str | None = setting(None, "name of the source in the triples; says what it was when none")
    teacher: str | None = setting(None, "folder or Hub id of the ColBERT that judges by the margin")
    seed: int = setting(13, "of the sample")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of encoding; auto: bf16 where it is as good")
    data: DataSettings = field(default_factory=DataSettings)


def main(settings: Settings) -> None:
    from tct_hf.pipeline import rounds
    from tct_hf.progress import quieten
    from tct_hf.training.stages import precision, process_state

    if settings.model is not None and settings.run is not None:
        raise SettingsError("model, run: candidates come from one of them; leave the other out")
    if settings.margin is not None and settings.teacher is None:
        raise SettingsError(f"margin is {settings.margin}: name the ColBERT that judges by it with --teacher PATH")
    if settings.teacher is not None and settings.margin is None:
        raise SettingsError("teacher: it judges by the margin, and there is none; set --margin, or leave it out")
    rules = MiningSettings(**{one.name: getattr(settings, one.name) for one in fields(MiningSettings)})
    rounds.check_mining(rules)
    quieten()
    state = process_state()
    write: Callable[[str], None] = partial(print, flush=True) if state.is_main_process else lambda line: None
    stages = Stages({"data": 0.5, "candidates": 5.0, "mine": 2.0}, enabled=state.is_main_process)
    output = Path(settings.output_dir)
    with stages.stage("data"), state.main_process_first():
        collection = pipeline.read_collection(settings.data, test=False)  # nothing is reported
        rounds.check_judged(collection, settings.data.labels)
        write(f"  {collection.summary()}")
    with stages.stage("candidates"):
        source = source_of(settings, collection, output, state, write)
    with stages.stage("mine"):
        counts = rounds.mine(
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
        print(f"\n{table(counts, source.origin)}\n\n{output / 'mined' / 'triples.parquet'}", flush=True)
    stages.finish()
    state.destroy_process_group()


def source_of(
    settings: Settings, collection: Collection, output: Path, state: Any, write: Callable[[str], None]
) -> Source:
    from dataclasses import replace

    from tct_hf.evaluation.stores import Stores, open_student
    from tct_hf.pipeline import rounds

    if settings.run is not None:
        return rounds.run_source(settings.run, settings.origin)
    if settings.model is None:
        source = rounds.bm25_source(collection, depth=settings.depth)
        return replace(source, origin=settings.origin or source.origin)
    student = open_student(settings.model, str(state.device))
    stores = Stores(collection, student, settings.model, output / "search", precision=settings.precision, write=write)
    origin = settings.origin or f"student {settings.model}"
    return rounds.student_source(stores, origin, depth=settings.depth, state=state)


def table(counts: MiningCounts, origin: str) -> str:
    cells = {
        "origin": origin,
        "triples": f"{counts.rows:,}",
        "queries": f"{counts.queries:,}",
        "candidates drawn": f"{counts.drawn:,}",
        "known positives": f"{counts.known_positives:,}",
        "near-duplicates": f"{counts.near_duplicates:,}",
        "repeated": f"{counts.repeated:,}",
        "above the margin": f"{counts.above_margin:,}",
        "random passages": f"{counts.random_negatives:,}",
        "rows left out": f"{counts.skipped_rows:,}",
    }
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}\n| {' | '.join(cells.values())} |"


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
