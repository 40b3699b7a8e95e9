"""Train a single-vector student from a live teacher, with labels or without, and measure it on held-out queries.

accelerate launch recipes/train.py recipes/quickstart.yaml [--setting value ...]

Stopped at any point, the same command goes on where it stopped. --stages runs some of the stages.
"""

from __future__ import annotations

from functools import partial

from tct_hf.pipeline.settings import TrainSettings as Settings
from tct_hf.progress import Stages
from tct_hf.settings import run_recipe, save_resolved

# Expected shares of the time.
WEIGHTS = {"data": 0.5, "teacher": 6.0, "unlabelled": 6.0, "stock": 6.0, "student": 6.0, "evaluate": 5.0}


def main(settings: Settings) -> None:
    from tct_hf.pipeline.train import Training
    from tct_hf.progress import quieten
    from tct_hf.training.stages import process_state

    quieten()
    state = process_state()
    main_process = state.is_main_process
    write = partial(print, flush=True) if main_process else lambda line: None
    run = Training(settings, state, write)
    wanted = {name: weight for name, weight in WEIGHTS.items() if name in ("data", *settings.stages)}
    stages = Stages(wanted, enabled=main_process)
    with stages.stage("data"), state.main_process_first():
        run.read()
    run.claim()  # a folder of other settings is refused before these are written beside it
    if main_process:
        save_resolved(settings, settings.output_dir, extra={"corpus": run.collection.fingerprint})
    for name in wanted:
        if name in ("data", "evaluate"):
            continue
        if reason := run.reason_to_skip(name):
            stages.skip(name, reason)
        else:
            with stages.stage(name):
                run.train(name)
    # One process searches; the others are done, and wait at no barrier that could time out.
    state.destroy_process_group()
    if "evaluate" in wanted and main_process:
        with stages.stage("evaluate"):
            report = run.report()
        print(f"\n{report}")
    stages.finish()


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
