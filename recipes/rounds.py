"""Train a student in rounds of hard negatives: base, mine with the student, train, mine, train; one table of them all.

accelerate launch recipes/rounds.py recipes/rounds.yaml [--rounds N] [--variant HN+] [--setting value ...]

HN trains the student alone on what is mined, HN+ first its teacher. Stopped at any point, the same command goes on
where it stopped; with more --rounds it goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.steps import EvaluationSettings
from tct_hf.pipeline.training_rounds import RoundsSettings
from tct_hf.progress import Stages
from tct_hf.settings import run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.evaluation.round_report import RoundResult


@dataclass
class Settings(RoundsSettings):
    output_dir: str = setting("outputs/rounds", "where everything is written")
    rounds: int = setting(1, "of mining and training after the base")
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def main(settings: Settings) -> None:
    from tct_hf.evaluation.quick_report import check_evaluation
    from tct_hf.pipeline import training_rounds
    from tct_hf.progress import quieten
    from tct_hf.training.stages import precision, process_state

    training_rounds.check_rounds(settings, settings.rounds)
    quieten()
    state = process_state()
    output = Path(settings.output_dir)
    base: dict[str, Any] = {"seed": settings.seed, **precision(settings.precision, state.device)}
    write: Callable[[str], None] = partial(print, flush=True) if state.is_main_process else lambda line: None
    trained = training_rounds.round_stages(settings.rounds, settings.variant)
    stages = Stages({"data": 0.5, **trained, "evaluate": 2.0 + settings.rounds}, enabled=state.is_main_process)

    with stages.stage("data"), state.main_process_first():
        collection = pipeline.read_collection(settings.data)
        write(f"  {collection.summary()}")
        check_evaluation(collection, settings.evaluation.measures, settings.evaluation.depth)
        training_rounds.check_rounds_training(settings, collection, base)
    # A folder of other settings is refused before these are written beside it.
    training_rounds.refuse_other_rounds(settings, collection, base, output, settings.rounds)
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    results: list[RoundResult] = []
    for _ in range(settings.rounds + 1):
        results.append(
            training_rounds.train_round(
                settings, collection, results, output, stages, base=base, state=state, write=write
            )
        )
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if state.is_main_process:
        with stages.stage("evaluate"):
            report = evaluate(settings, collection, results, output, base)
        print("\n" + report.read_text(encoding="utf-8"))
    stages.finish()


def evaluate(
    settings: Settings, collection: Collection, results: list[RoundResult], output: Path, base: dict[str, Any]
) -> Path:
    from tct_hf.evaluation.round_report import report_rounds
    from tct_hf.pipeline.training_rounds import depends_of_round

    _, of_last_student = depends_of_round(settings, collection, base, settings.rounds)
    return report_rounds(
        results,
        collection,
        output,
        base_model=settings.encoder.base_model if settings.teacher.model is None else None,
        teacher=settings.teacher.model or str(output / "round-0" / "teacher"),
        measures=settings.evaluation.measures,
        depth=settings.evaluation.depth,
        precision=settings.precision,
        bf16=base["bf16"],
        settings=of_last_student,
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
