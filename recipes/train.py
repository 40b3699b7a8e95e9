"""Train a single-vector student from a live teacher, with labels or without, and measure it on held-out queries.

accelerate launch recipes/train.py recipes/quickstart.yaml [--setting value ...]

If it is stopped, the same command resumes it. --stages runs some of the stages.
"""

from __future__ import annotations

from tct_hf.pipeline.settings import TrainSettings as Settings
from tct_hf.settings import run_recipe

STAGES = ("data", "teacher", "unlabelled", "stock", "student", "evaluate")


def main(settings: Settings) -> None:
    from tct_hf.pipeline.job import Job
    from tct_hf.pipeline.train import Training

    job = Job([name for name in STAGES if name in ("data", *settings.stages)])
    run = Training(settings, job)
    with job.first("data"):
        run.read()
    run.claim()  # a folder of other settings is refused before these are written beside it
    job.record(settings, corpus=run.collection.fingerprint)
    for name in job.stages:
        if name not in ("data", "evaluate"):
            run.run(name)
    job.end_group()
    if "evaluate" in job.stages and job.is_main:
        with job.stage("evaluate"):
            report = run.report()
        print(f"\n{report}")
    job.finish()
    job.verify(settings, run.folder / "metrics.json")


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
