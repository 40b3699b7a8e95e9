"""The comparison recipe from end to end on a tiny encoder: whole, resumed, in parts, refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tct_hf import read_run
from tests.recipe import ROOT, Check, Run, results

RECIPE = "compare"
ARMS = {"stock": [13], "few-labels": [13, 14], "trained-ColBERT": [13]}
NAMES = {"stock": "stock", "few-labels": "few, labels", "trained-ColBERT": "trained ColBERT"}


TRAINING = "{per_device_train_batch_size: 8, max_steps: 4, learning_rate: 1.0e-3, logging_steps: 1, save_steps: 4}"
SETTINGS = f"""
precision: fp32
stages: [student]
data: {{source: FOLDER/beir, negative_depth: 10}}
encoder: {{base_model: FOLDER/mean, query_length: 16, document_length: 24}}
student: {{training: {TRAINING}}}
evaluation: {{depth: 20, measures: [RR@10, nDCG@10]}}
seeds: [13, 14]
arms:
  stock: {{stages: [stock], seeds: [13]}}
  few, labels:
    data: {{labels: 0.5, unlabelled: true}}
    student.training: {{max_steps: 3, passage_bits: [32, 8], matryoshka_dims: [8, 32]}}
    against: [stock, bm25]
  trained ColBERT:
    stages: [teacher, student]
    teacher: {{kind: colbert, training: {TRAINING}}}
    student.training: {{eval_strategy: steps, eval_steps: 2}}
    seeds: [13]
    against: [stock, teacher]
"""


@pytest.mark.slow  # by default, test_tower_recipe.py makes a whole comparison
def test_a_whole_comparison_leaves_a_student_a_seed_its_runs_and_one_table(whole: Path) -> None:
    assert {folder.name for folder in (whole / "arms").iterdir()} == set(ARMS)
    weights = set()
    for arm, seeds in ARMS.items():
        for seed in seeds:
            folder = whole / "arms" / arm / f"seed-{seed}"
            for split, count in (("dev", 10), ("test", 12)):
                assert len(read_run(folder / "runs" / f"student.{split}.trec")) == count
            assert not list(folder.glob("training/*/checkpoint-*"))
            weights.add((folder / ("stock" if arm == "stock" else "student") / "model.safetensors").read_bytes())
    assert len(weights) == 4 and len(list((whole / "teachers").glob("*/model.safetensors"))) == 1
    # What the mixture finds is shared by the seeds of an arm, and its vectors by all.
    few = whole / "arms" / "few-labels"
    assert (few / "mixture-student" / "weights.json").is_file() and not (few / "seed-13" / "vectors").exists()
    assert any((whole / "vectors").rglob("*.sqlite"))
    systems = {file.name.partition(".")[0] for file in (whole / "runs").glob("*.trec")}
    assert systems == {"bm25", "base-native", "base-native-bm25", "base-maxsim", "teacher"}
    report = (whole / "report.test.md").read_text()
    measured = json.loads((whole / "metrics.test.json").read_text())["measured"]["test"]
    assert {f"{NAMES[arm]}, seed {seed}" for arm, seeds in ARMS.items() for seed in seeds} <= set(measured)
    assert all(f"\n| {name} " in report for name in ("BM25", *NAMES.values()))
    assert "- few, labels: data: {labels: 0.5, unlabelled: true}" in report
    assert "| few, labels     | stock   |     1 |" in report and "| trained ColBERT | teacher |     1 |" in report
    coded = {"RR@10, SQ8", "RR@10, first 8 dimensions", "RR@10, first 8 dimensions, SQ8"}  # of one arm's training
    assert "RR@10, SQ8 (p; Holm)" in report and coded <= measured["stock, seed 13"].keys()
    latency, storage = ((whole / f"{file}.test.svg").read_text() for file in ("latency", "storage"))
    for name in ("BM25", *NAMES.values(), "stock, SQ8"):
        assert f">{name}<" in latency and f">{name}<" in storage
    assert "Plot: curves.test.png" in report and (whole / "curves.test.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_comparison_does_nothing_again_and_a_missing_student_is_made_the_same(
    whole: Path, recipe: Run
) -> None:
    before = results(whole)
    shutil.rmtree(whole / "arms" / "few-labels" / "seed-14")
    said = recipe(whole).stdout
    assert "few, labels, seed 13: skipped, it is trained" in said and said.count("  step ") == 3
    assert results(whole) == before


def test_only_some_arms_on_dev_search_for_no_test_query(recipe: Run, tmp_path: Path) -> None:
    off = ["--verify", "--expected.figures={dev: {bm25: {RR@10: 2}}}"]
    recipe(tmp_path / "out", "--only=[stock]", "--report=dev", "--seeds=[13]", *off, code=1)
    assert {file.name.split(".")[1] for file in (tmp_path / "out").rglob("*.trec")} == {"dev"}
    report = (tmp_path / "out" / "report.dev.part.md").read_text()
    assert "few, labels" not in report and "dev queries, exact search" in report


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused_by_name(kept: Check) -> None:
    kept("--student.training.temperature=2.0", "student.training.temperature")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=[plian]"], "only: 'plian' is not one of 'stock', 'few, labels'"),
        (["--arms={few labels: {}}"], "'few, labels' and 'few labels' would share a folder; rename one"),
        (["--arms={x: {against: [y]}}"], "arms.x.against: 'y' is not one of 'stock',"),
        (["--arms={x: {stages: [stock, student]}}"], "arms.x.stages: name one of unlabelled, stock, student"),
        (["--arms={x: {student: {layers: [7]}}}"], "arms.x: student.layers=[7]: name distinct layers"),
        (["--arms={x: {student: {trianing: {max_steps: 3}}}}"], "student.trianing"),
        (["--arms={x: {data: {max_passages: 50}}}"], "arms.x.data: it would be measured on other passages"),
        (["--seeds=[]"], "there is nothing to compare"),
        (["--only=[stock]", "--report=dev", "--data.dev_split=null"], "has no judged dev split; set data.dev_share"),
    ],
)
def test_wrong_settings_are_one_message_before_anything(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "compare").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_comparisons_that_come_along_are_valid_settings(file: Path, recipe: Run) -> None:
    from tct_hf.pipeline.compare import Comparison
    from tct_hf.pipeline.job import Job
    from tct_hf.settings import load_settings

    loaded = load_settings(sys.modules["compare_recipe"].Settings, [str(file)], description="")
    made = Comparison(loaded, Job([]))
    assert list(made.arms) == list(loaded.arms)
