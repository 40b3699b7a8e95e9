"""Compare ways to train a student on one collection: arms that differ in some settings, in one table.

accelerate launch recipes/compare.py recipes/compare/labels.yaml [--setting value ...]

An arm is a run of recipes/train.py but for the settings it names. If it is stopped, the same command resumes with
the arm where it stopped. --only trains and shows some of the arms; --report dev never searches for the test queries.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tct_hf.pipeline.settings import CompareSettings as Settings
from tct_hf.settings import SettingsError, run_recipe


def main(settings: Settings) -> None:
    from tct_hf.evaluation.arms import report_arms
    from tct_hf.evaluation.experiment import check_evaluation
    from tct_hf.evaluation.references import References
    from tct_hf.files import claim, file_digest
    from tct_hf.pipeline.compare import Comparison
    from tct_hf.pipeline.job import Job

    job, output, measured = Job(["data"]), Path(settings.output_dir), settings.evaluation
    name = settings.report + ("" if settings.only is None else ".part")
    comparison = Comparison(settings, job)
    with job.first("data"):
        collection = comparison.read(settings.report)
        if settings.report not in collection.splits or not collection.splits[settings.report].qrels:
            fix = "set data.dev_share" if settings.report == "dev" else "name one with data.test_split"
            raise SettingsError(f"report: {collection.name} has no judged {settings.report} split; {fix}")
        check_evaluation(collection, measured.measures, measured.depth)
    job.record(settings, corpus=collection.fingerprint)
    job.stages = [*comparison.stages, "evaluate"]
    comparison.train()
    job.end_group()
    if job.is_main:
        with job.stage("evaluate"):
            base, teacher = comparison.runs[next(iter(comparison.runs))], comparison.teacher
            colbert = None if teacher is None else file_digest(Path(teacher) / "model.safetensors") or teacher
            corpus, shared = collection.fingerprint["sha256"], settings.encoder
            depends = {"corpus": corpus, "depth": measured.depth, "encoder": asdict(shared), "teacher": colbert}
            depends |= collection.own_rule
            claim(output / "runs", depends, {"teacher": teacher})
            report = report_arms(
                {name: arm.students for name, arm in comparison.arms.items()},
                {name: arm.says for name, arm in comparison.arms.items()},
                {name: arm.against for name, arm in comparison.arms.items()},
                References(collection, measured.depth, base.base["bf16"]).systems(
                    base_model=None if settings.teacher.model and teacher else shared.base_model,
                    teacher=teacher,
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
                name=name,
                dims=comparison.dims,
                codes=comparison.codes,
                stored=[folder for run in comparison.runs.values() for folder in run.passage_folders],
                settings=asdict(settings),
            )
        print("\n" + report.read_text(encoding="utf-8"))
        print(f"{report}, and metrics and plots of that name beside it", flush=True)
    job.finish()
    job.verify(settings, output / f"metrics.{name}.json")


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
