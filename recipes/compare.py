"""Compare ways to train a student on one collection: arms that differ in some settings, in one table.

accelerate launch recipes/compare.py recipes/compare/labels.yaml [--setting value ...]

An arm is a run of recipes/train.py but for the settings it names. Stopped at any point, the same command goes on with
the arm where it stopped. --only trains and shows some of the arms; --report dev never searches for the test queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline.settings import TrainSettings
from tct_hf.progress import Stages
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting


@dataclass
class Settings(TrainSettings):
    output_dir: str = setting("outputs/compare", "where everything is written")
    stages: list[Literal["teacher", "unlabelled", "stock", "student", "evaluate"]] = setting(
        ["teacher", "student"], "stages of an arm: the model to compare, and teacher where it learns from a ColBERT"
    )
    arms: dict[str, dict[str, Any]] = setting(
        {}, "name to settings that differ, such as {stock: {stages: [stock]}}; also seeds and against"
    )
    seeds: list[int] | None = setting(None, "seeds, one student an arm each; seed alone when null")
    against: list[str] = setting([], "what arms are tested against: arms, bm25, base-native, base-maxsim, teacher")
    only: list[str] | None = setting(None, """arms to train and show, as '["stock", "a tenth"]'; all when null""")
    report: Literal["test", "dev"] = setting("test", "split of the table; dev for tuning")


def main(settings: Settings) -> None:
    from tct_hf.evaluation.arms import report_arms
    from tct_hf.evaluation.experiment import check_evaluation
    from tct_hf.evaluation.references import reference_systems
    from tct_hf.files import claim, file_digest
    from tct_hf.pipeline.compare import Comparison, arms_of
    from tct_hf.progress import quieten
    from tct_hf.training.stages import process_state

    seeds = [settings.seed] if settings.seeds is None else settings.seeds
    arms = arms_of(settings, settings.arms, seeds, settings.against)
    if unknown := [name for name in settings.only or [] if name not in arms]:
        raise SettingsError(f"only: {unknown[0]!r} is not one of {', '.join(map(repr, arms))}")
    arms = {name: arm for name, arm in arms.items() if settings.only is None or name in settings.only}
    quieten()
    state = process_state()
    main_process, output, measured = state.is_main_process, Path(settings.output_dir), settings.evaluation
    write = partial(print, flush=True) if main_process else lambda line: None
    comparison = Comparison(arms, state, output, write)
    with Stages({"data": 0.5}, enabled=main_process).stage("data"), state.main_process_first():
        collection = comparison.read(settings.report)
        if settings.report not in collection.splits or not collection.splits[settings.report].qrels:
            fix = "set data.dev_share" if settings.report == "dev" else "name one with data.test_split"
            raise SettingsError(f"report: {collection.name} has no judged {settings.report} split; {fix}")
        check_evaluation(collection, measured.measures, measured.depth)
    if main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    stages = Stages(dict.fromkeys([*comparison.stages, "evaluate"], 1.0), enabled=main_process)
    comparison.train(stages)
    state.destroy_process_group()
    if main_process:
        with stages.stage("evaluate"):
            base, teacher = comparison.runs[next(iter(comparison.runs))], comparison.teacher
            colbert = None if teacher is None else file_digest(Path(teacher) / "model.safetensors") or teacher
            corpus, shared = collection.fingerprint["sha256"], settings.encoder
            depends = {"corpus": corpus, "depth": measured.depth, "encoder": asdict(shared), "teacher": colbert}
            claim(output / "runs", depends)
            report = report_arms(
                {name: comparison.students(name) for name in arms},
                {name: arm.says for name, arm in arms.items()},
                {name: arm.against for name, arm in arms.items()},
                reference_systems(
                    collection,
                    base_model=None if settings.teacher.model and teacher else shared.base_model,
                    teacher=teacher,
                    depth=measured.depth,
                    bf16=base.base["bf16"],
                    prompts=shared.prompts,
                    lengths=shared.lengths,
                    vectors=base.vectors_folder,
                ),
                collection,
                output,
                split=settings.report,
                measures=measured.measures,
                depth=measured.depth,
                bf16=base.base["bf16"],
                name=settings.report + ("" if settings.only is None else ".part"),
                settings=asdict(settings),
            )
        print("\n" + report.read_text(encoding="utf-8"))
        print(f"{report}, and metrics and curves of that name beside it", flush=True)
    stages.finish()


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
