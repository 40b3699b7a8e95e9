"""Compare ways to train a student on one collection: same steps, batches and encoder, tables and plots.

accelerate launch recipes/compare.py recipes/compare/builtin.yaml [--setting value ...]

Stopped at any point, the same command goes on with the arm where it stopped. --only trains and shows some of the arms
or tables; --report dev never searches for the test queries, for tuning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.pipeline import steps as pipeline
from tct_hf.pipeline.arms import REFERENCES, Arm, ArmTable, check_arms, check_students, slug_of, train_arm
from tct_hf.pipeline.steps import DataSettings, EncoderSettings, TeacherSettings
from tct_hf.pipeline.teacher import check_colbert
from tct_hf.progress import Stages
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


@dataclass
class CurveSettings:
    steps: int = setting(25, "measure on dev every so many steps; 0 for never")
    queries: int = setting(200, "with so many of the dev queries")
    passages: int = setting(500, "among so many passages, the relevant ones first: quick, and easier than the whole")


@dataclass
class Settings:
    output_dir: str = setting("outputs/compare", "where everything is written")
    seeds: list[int] = setting([13], "one student an arm and seed; the first is also the teacher's")
    only: list[str] | None = setting(
        None, """arms or tables to train and show, as '["half, in-batch"]'; all when none"""
    )
    report: Literal["test", "dev"] = setting("test", "split of the table; dev for tuning")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of training; auto: bf16 where the hardware has it")
    data: DataSettings = field(default_factory=DataSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    teacher_cache: str | None = setting(
        None, "folder where all arms keep the teacher's token vectors, in half precision; none: encode every time"
    )
    training: dict[str, Any] = setting(
        {}, "training arguments that all arms share", keys_of="tct_hf:TCTTrainingArguments"
    )
    curve: CurveSettings = field(default_factory=CurveSettings)
    arms: dict[str, Arm] = setting({}, "name to arm")
    tables: dict[str, ArmTable] = setting({}, "heading to arms; one table of all arms when there is none")
    reranking: int | None = setting(
        None, "also measure the order that a student gives BM25's first so many passages; not when none"
    )
    measures: list[str] = setting(["RR@10", "nDCG@10", "R@100"], "ir-measures names")
    depth: int = setting(100, "passages a query in the runs")


def main(settings: Settings) -> None:
    from tct_hf.evaluation.quick_report import check_evaluation
    from tct_hf.files import is_claimed
    from tct_hf.progress import quieten
    from tct_hf.training.stages import precision, process_state

    check_colbert(settings.teacher)
    quieten()
    state = process_state()
    arms, tables = chosen_arms(settings)
    check_students(arms, settings.encoder, settings.teacher)
    output = Path(settings.output_dir)
    base: dict[str, Any] = {"seed": settings.seeds[0], **precision(settings.precision, state.device)}
    students = {
        f"{name}, seed {seed}": (name, seed) for name, arm in arms.items() for seed in arm.seeds or settings.seeds
    }
    weights = {"data": 0.5, "teacher": 6.0, **dict.fromkeys(students, 6.0), "evaluate": 0.5 * len(students) + 2.0}
    stages = Stages(weights, enabled=state.is_main_process)

    with stages.stage("data"), state.main_process_first():
        collection = pipeline.read_collection(settings.data)
        if state.is_main_process:
            print(f"  {collection.summary()}", flush=True)
        if settings.report not in collection.splits or not collection.splits[settings.report].qrels:
            mend = "set data.dev_share" if settings.report == "dev" else "name one with data.test_split"
            raise SettingsError(f"report: {collection.name} has no judged {settings.report} split; {mend}")
        check_evaluation(collection, settings.measures, settings.depth, name="depth")
        check_arms(arms, collection, shared_training(settings, base), curve_of(settings))
    of_teacher = pipeline.teacher_depends(settings.data, settings.encoder, settings.teacher, collection, base)
    of_students = {
        **of_teacher,
        "training": settings.training,
        **({} if settings.teacher_cache is None else {"teacher_tokens": "in half precision"}),
        "curve": asdict(settings.curve),
        "questions": collection.fingerprint.get("questions"),
    }
    trained = settings.teacher.model is None and is_claimed(output / "teacher", of_teacher)
    for name, seed in students.values():  # a folder of other settings is refused before these are written beside it
        for part in ("training", "student"):
            is_claimed(folder_of(output, name, seed) / part, arms[name].depends(seed, of_students))
    if state.is_main_process:
        save_resolved(settings, output, extra={"corpus": collection.fingerprint})
    teacher = settings.teacher.model or str(output / "teacher")
    if settings.teacher.model is not None:
        stages.skip("teacher", f"{teacher} is used as it is")
    elif trained:
        stages.skip("teacher", "it is trained")
    else:
        with stages.stage("teacher"):
            pipeline.train_teacher(
                collection,
                lambda: pipeline.training_triples(collection, settings.data, seed=settings.seeds[0], unlabelled=False),
                settings.encoder,
                settings.teacher,
                output,
                seed=settings.seeds[0],
                base=base,
                settings=of_teacher,
            )
    for title, (name, seed) in students.items():
        with stages.stage(title):
            train_arm(
                arms[name],
                seed,
                folder_of(output, name, seed),
                collection=collection,
                data=settings.data,
                encoder=settings.encoder,
                teacher=teacher,
                dtype=settings.teacher.dtype,
                cache=settings.teacher_cache,
                training=shared_training(settings, base),
                curve=curve_of(settings),
                settings=of_students,
            )
    state.destroy_process_group()
    if state.is_main_process:
        with stages.stage("evaluate"):
            report = evaluate(settings, arms, tables, collection, output, teacher, base)
        print("\n" + report.read_text(encoding="utf-8"))
        print(f"{report}, and metrics, students and curves of that name beside it", flush=True)
    stages.finish()


def chosen_arms(settings: Settings) -> tuple[dict[str, Arm], dict[str, ArmTable]]:
    if not settings.arms or not settings.seeds:
        raise SettingsError("arms, seeds: there is nothing to compare; recipes/compare/builtin.yaml is an example")
    if settings.reranking is not None and settings.reranking < 1:
        raise SettingsError(f"reranking: {settings.reranking} passages are nothing to put in order; leave it out")
    others = [*settings.arms, *REFERENCES]
    named = {"only": (settings.only or [], [*settings.arms, *settings.tables])}
    named |= {f"arms.{name}.against": (arm.against, others) for name, arm in settings.arms.items()}
    for name, table in settings.tables.items():
        named[f"tables.{name}.arms"] = (table.arms, [*settings.arms])
        named[f"tables.{name}.against"] = (table.against, others)
    for setting_name, (names, known) in named.items():
        if unknown := [name for name in names if name not in known]:
            raise SettingsError(
                f"{setting_name}: {unknown[0]!r} is not one of {', '.join(map(repr, known))}. On the command line "
                """names with a comma are written --only '["half, in-batch"]'."""
            )
    shown = {arm for table in settings.tables.values() for arm in table.arms}
    if settings.tables and (lost := [name for name in settings.arms if name not in shown]):
        raise SettingsError(f"tables: no table has the arm {lost[0]!r}; add it to the arms of one")
    for kind, all_of in (("arms", settings.arms), ("tables", settings.tables)):
        slugs = [slug_of(name) for name in all_of]
        if alike := [name for name in all_of if slugs.count(slug_of(name)) > 1]:
            raise SettingsError(f"{kind}: {' and '.join(map(repr, alike))} would share a folder; rename one")
    arms = {}
    for name, arm in settings.arms.items():
        start = arm.encoder_settings(settings.encoder).starts_from(arm.initialise_from)
        try:
            arms[name] = replace(arm, initialise_from=start)
        except ValueError as error:
            raise SettingsError(f"arms.{name}.{error}") from error
    tables = settings.tables
    if settings.only is not None:
        only = set(settings.only)
        tables = {name: table for name, table in tables.items() if name in only or only & {*table.arms}}
        wanted = only | {arm for name, table in tables.items() if name in only for arm in table.arms}
        arms = {name: arm for name, arm in arms.items() if name in wanted}
    used = any(arm.unlabelled for arm in settings.arms.values())
    if settings.data.unlabelled or (settings.data.questions and not used):
        raise SettingsError(
            "data.unlabelled, data.questions: an arm says itself that it learns from what nobody has judged: set "
            "arms.NAME.unlabelled"
        )
    return arms, tables


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / "arms" / slug_of(name) / f"seed-{seed}"


def curve_of(settings: Settings) -> dict[str, int]:
    return {"queries": settings.curve.queries, "passages": settings.curve.passages}


def shared_training(settings: Settings, base: dict[str, Any]) -> dict[str, Any]:
    steps = settings.curve.steps
    curve = {"eval_strategy": "steps", "eval_steps": steps, "eval_on_start": True} if steps else {}
    return {**base, **curve, **settings.training}


def evaluate(
    settings: Settings,
    arms: dict[str, Arm],
    tables: dict[str, ArmTable],
    collection: Collection,
    output: Path,
    teacher: str,
    base: dict[str, Any],
) -> Path:
    from tct_hf.evaluation.arm_report import report_arms, reranking_teacher, search_arm
    from tct_hf.evaluation.quick_report import TEACHER, reference_systems
    from tct_hf.files import claim, file_digest

    # Tuning never searches for the test queries.
    splits = [split for split in ("dev", "test") if split in collection.splits and split in ("dev", settings.report)]
    queries: dict[str, dict[str, str]] = {split: collection.splits[split].queries for split in splits}
    bm25 = {split: collection_bm25(collection).run(asked, settings.depth) for split, asked in queries.items()}
    results = {
        name: search_arm(
            name,
            arm,
            {seed: folder_of(output, name, seed) / "student" for seed in arm.seeds or settings.seeds},
            collection,
            queries,
            measures=settings.measures,
            depth=settings.depth,
            bf16=base["bf16"],
            arguments=arm.arguments(shared_training(settings, base)),
            bm25=bm25,
            reranking=settings.reranking,
        )
        for name, arm in arms.items()
    }
    depends = {"weights": file_digest(Path(teacher) / "model.safetensors"), "corpus": collection.fingerprint["sha256"]}
    claim(output / "runs", {**depends, "depth": settings.depth, "encoder": asdict(settings.encoder)})
    systems = reference_systems(
        collection,
        base_model=settings.encoder.base_model if settings.teacher.model is None else None,
        teacher=teacher,
        depth=settings.depth,
        bf16=base["bf16"],
    )
    if settings.reranking is not None:
        systems.append(reranking_teacher(collection, TEACHER, teacher, settings.reranking, bf16=base["bf16"]))
    return report_arms(
        results,
        systems,
        collection,
        output,
        split=settings.report,
        splits=splits,
        measures=settings.measures,
        depth=settings.depth,
        name=settings.report + ("" if settings.only is None else ".part"),
        curve=f"dev RR@10 (among {settings.curve.passages:,} passages)",
        columns=1 + settings.data.num_negatives,
        settings=asdict(settings),
        tables=tables,
        reranking=settings.reranking,
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
