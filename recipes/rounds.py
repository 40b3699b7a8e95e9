"""Train a student in rounds of hard negatives: base, mine with the student, train, mine, train; one table of them all.

accelerate launch recipes/rounds.py recipes/rounds.yaml [--rounds N] [--variant HN+] [--setting value ...]

HN trains the student alone on what is mined, HN+ first its teacher. Stopped at any point, the same command goes on
where it stopped; with more --rounds it goes on after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from tct_hf.pipeline.settings import MiningSettings, TrainSettings
from tct_hf.progress import Stages
from tct_hf.settings import run_recipe, save_resolved, setting


@dataclass
class Settings(TrainSettings):
    output_dir: str = setting("outputs/rounds", "where everything is written")
    rounds: int = setting(1, "rounds of mining and training after the base")
    variant: Literal["HN", "HN+"] = setting("HN", "HN+: the teacher is trained on the mined negatives too")
    start_from: Literal["previous", "new"] = setting(
        "previous", "a round's student: the last round's trained further, or made anew"
    )
    mining: MiningSettings = field(default_factory=MiningSettings)
    later: dict[str, Any] = setting(
        {}, "settings that differ in the rounds, such as {student.training.learning_rate: 1.0e-4}"
    )


def main(settings: Settings) -> None:
    from tct_hf.evaluation.experiment import check_evaluation
    from tct_hf.evaluation.round_report import report_rounds
    from tct_hf.pipeline.rounds import Rounds
    from tct_hf.progress import quieten
    from tct_hf.training.stages import process_state

    quieten()
    state = process_state()
    write = partial(print, flush=True) if state.is_main_process else lambda line: None
    variant, start_from = settings.variant, settings.start_from
    rounds = Rounds(settings, settings.later, settings.mining, settings.rounds, variant, start_from, state, write)
    weights = {"data": 0.5, **rounds.stages, "evaluate": 2.0 + settings.rounds}
    stages = Stages(weights, enabled=state.is_main_process)
    measured = settings.evaluation
    with stages.stage("data"), state.main_process_first():
        collection = rounds.read()  # a folder of other settings is refused before these are written beside it
        check_evaluation(collection, measured.measures, measured.depth)
    if state.is_main_process:
        save_resolved(settings, settings.output_dir, extra={"corpus": collection.fingerprint})
    for number in range(settings.rounds + 1):
        rounds.train(number, stages)
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if state.is_main_process:
        with stages.stage("evaluate"):
            report = report_rounds(
                rounds.results,
                collection,
                rounds.output,
                base_model=settings.encoder.base_model if settings.teacher.model is None else None,
                teacher=rounds.base_teacher,
                measures=measured.measures,
                depth=measured.depth,
                precision=settings.precision,
                bf16=rounds.rounds[0].base["bf16"],
                settings=rounds.depends,
            )
        print("\n" + report.read_text(encoding="utf-8"))
    stages.finish()


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
