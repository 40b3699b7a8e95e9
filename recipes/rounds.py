"""Train a student in rounds of hard negatives: base, mine with the student, train, mine, train; one table of them all.

accelerate launch recipes/rounds.py recipes/rounds.yaml [--rounds N] [--variant HN+] [--setting value ...]

HN trains the student alone on what is mined, HN+ first its teacher. If it is stopped, the same command resumes
where it stopped; with more --rounds it goes on after the last one.
"""

from __future__ import annotations

from tct_hf.pipeline.settings import RoundsSettings as Settings
from tct_hf.settings import run_recipe


def main(settings: Settings) -> None:
    from tct_hf.evaluation.experiment import check_evaluation
    from tct_hf.evaluation.training_reports import report_rounds
    from tct_hf.pipeline.job import Job
    from tct_hf.pipeline.rounds import Rounds

    job, measured = Job([]), settings.evaluation
    rounds = Rounds(settings, job)
    job.stages = ["data", *rounds.stages, "evaluate"]
    with job.first("data"):
        collection = rounds.read()  # a folder of other settings is refused before these are written beside it
        check_evaluation(collection, measured.measures, measured.depth)
    job.record(settings, corpus=collection.fingerprint)
    for number in range(settings.rounds + 1):
        rounds.train(number)
    job.end_group()
    if job.is_main:
        with job.stage("evaluate"):
            report = report_rounds(
                rounds.results,
                collection,
                rounds.output,
                base_model=settings.encoder.base_model if settings.teacher.model is None else None,
                teacher=str(rounds.rounds[0].teacher_model),
                measures=measured.measures,
                depth=measured.depth,
                precision=settings.precision,
                bf16=rounds.rounds[0].base["bf16"],
                settings=rounds.depends,
            )
        print("\n" + report.read_text(encoding="utf-8"))
    job.finish()
    job.verify(settings, rounds.output / "metrics.json")


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
