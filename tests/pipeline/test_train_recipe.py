"""The training recipe from end to end on a tiny encoder: whole, in parts, interrupted, refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from tct_hf import read_run, validate_checkpoint
from tct_hf.files import LOG_FILE
from tests.models import tiny_modernbert
from tests.recipe import STEPS, Check, Run, results

RECIPE = "train"
SYSTEMS = ["bm25", "base-native", "base-maxsim", "student", "teacher"]
FUSED = ["base-native-bm25", "student-bm25"]
TITLES = ["BM25", "base as it is", "base reranked by its own MaxSim", "student", "ColBERT teacher"]
TITLES += ["base as it is + BM25", "student + BM25"]
SETTINGS = "extends: tiny.yaml\n"
# Where the interrupted run is killed: the line it has just printed, one of each stage.
KILLED = [f"step     3 of {STEPS}   loss", f"step     5 of {STEPS}   loss", ": student"]


@pytest.mark.usefixtures("warm_checks")
def test_a_whole_run_leaves_models_that_load_without_this_package(whole: Path) -> None:
    student = SentenceTransformer(str(whole / "student"), device="cpu")
    assert student.encode_query("dense tokens").shape == (32,)
    assert student[0].model.config.num_hidden_layers == 1
    validate_checkpoint(whole / "student")
    teacher = MultiVectorEncoder(str(whole / "teacher"), device="cpu")
    assert teacher.encode_query("dense tokens").shape == (16, 16)
    assert not list(whole.glob("training/*/checkpoint-*"))


def test_a_whole_run_leaves_complete_runs_of_all_systems(whole: Path) -> None:
    folder = whole / "runs"
    assert {file.name for file in folder.glob("*.trec")} == {
        f"{s}.{x}.trec" for s in [*SYSTEMS, *FUSED] for x in ("dev", "test")
    }
    for system in SYSTEMS:
        for split, count in (("dev", 10), ("test", 12)):
            found = read_run(folder / f"{system}.{split}.trec")
            assert set(found) == {f"{split}{number}" for number in range(count)}
            if system != "bm25":  # which leaves out passages without a word of the query
                assert all(len(hits) == 20 for hits in found.values())


def test_a_whole_run_reports_one_row_a_system_and_the_same_figures_as_json(whole: Path) -> None:
    report = (whole / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row[2:].startswith(title) for row, title in zip(rows, TITLES, strict=True)] == [True] * 7
    metrics = json.loads((whole / "metrics.json").read_text())
    for row, system in zip(rows, [*SYSTEMS, *FUSED], strict=True):
        shown = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        measured = metrics["measured"]["test"][system]
        assert shown == [f"{measured[name]['mean']:.3f}" for name in ("RR@10", "nDCG@10", "R@20")]
    assert set(metrics["measured"]) == {"dev", "test"} and report.count("Question: ") == 3
    assert (whole / "losses.png").read_bytes().startswith(b"\x89PNG")
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["corpus"] == metrics["corpus"]
    assert len(environment["corpus"]["sha256"]) == 64 and environment["corpus"]["passages"] == 60
    assert f"max_steps: {STEPS}" in (whole / "settings.yaml").read_text()


@pytest.mark.slow
def test_a_run_killed_in_every_stage_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    whole: Path, apart: Run, tmp_path: Path
) -> None:
    in_teacher, in_student, in_evaluate = (apart(tmp_path, kill_at=line).stdout for line in KILLED)
    assert "goes on" not in in_teacher and "goes on after step 2 of 6" in in_student
    assert "goes on after step 4 of 6" in in_evaluate
    early = tmp_path / "runs" / "base-maxsim.test.trec"
    os.utime(early, ns=(1, 1))
    last = apart(tmp_path, launched=1)
    assert early.stat().st_mtime_ns == 1  # runs that were there are not made again
    assert "step" not in last.stdout.partition("# ")[0] and (tmp_path / "report.md").read_text() in last.stdout
    assert results(tmp_path, "metrics.json") == results(whole, "metrics.json")
    # Some queries of the collection are longer than 16 tokens, and a user can fix that: this warning stays.
    warning = "queries filled the entire query_expansion length of 16 tokens"
    assert all(warning in line for line in last.stderr.splitlines()), last.stderr


@pytest.mark.slow
def test_stages_alone_give_the_bytes_of_all_at_once(whole: Path, tmp_path: Path, recipe: Run) -> None:
    for stage in ("teacher", "student", "evaluate"):
        recipe(tmp_path / "alone", "--stages", stage)
    assert results(tmp_path / "alone", "metrics.json") == results(whole, "metrics.json")


def test_a_finished_run_called_again_redoes_nothing_and_prints_the_report(whole: Path, recipe: Run) -> None:
    def made() -> dict[Path, tuple[int, bytes]]:
        return {
            file: (file.stat().st_mtime_ns if file.parent != whole else 0, file.read_bytes())
            for file in whole.rglob("*")
            if file.is_file()
        }

    before = made()
    said = recipe(whole).stdout
    assert made() == before
    assert "  step " not in said and (whole / "report.md").read_text() in said
    off = recipe(whole, "--verify", "--expected.figures={test: {bm25: {RR@10: 2}}}", code=1)
    assert "verify: 1 figure is off" in off.stderr and (whole / "report.md").read_text() in off.stdout


@pytest.mark.parametrize("name", ["data.num_negatives", "teacher.training.learning_rate", "evaluation.depth"])
def test_other_settings_in_the_same_output_are_refused_by_name_with_the_fix(kept: Check, name: str) -> None:
    kept(f"--{name}=30", name)


@pytest.mark.slow
def test_two_processes_run_the_recipe_as_one_and_neither_repeats_the_other(
    whole: Path, apart: Run, tmp_path: Path
) -> None:
    done = apart(tmp_path / "two", launched=2)
    for line, times in (("[1/4] data", 1), ("[4/4] evaluate", 1), ("# ", 1), (f"step     6 of {STEPS}", 2)):
        assert sum(said.strip().startswith(line) for said in done.stdout.splitlines()) == times, line
    assert results(tmp_path / "two", "metrics.json").keys() == results(whole, "metrics.json").keys()
    shutil.rmtree(tmp_path / "two" / "runs")
    assert apart(tmp_path / "two", launched=2).stdout.count(": base as it is\n") == 1  # of both, one evaluates


def test_a_ready_teacher_is_not_trained_and_may_be_cached_and_followed_on_a_schedule(
    recipe: Run, whole: Path, tmp_path: Path
) -> None:
    options = ["--stages=[teacher, student]", f"--teacher.model={whole / 'teacher'}"]
    options += [f"--student.teacher_cache={tmp_path / 'cache'}"]
    options += ["--student.schedules={temperature: {start: 2.0, end: 0.5}}"]
    said = recipe(tmp_path / "run", *options).stdout
    assert f"teacher: skipped, {whole / 'teacher'} is used as it is" in said
    assert not (tmp_path / "run" / "teacher").exists() and not (tmp_path / "run" / "training" / "teacher").exists()
    log = json.loads((tmp_path / "run" / "student" / LOG_FILE).read_text())
    assert [entry["temperature"] for entry in log if "temperature" in entry] == pytest.approx(
        [2.0 - 0.3 * step for step in range(STEPS)], abs=1e-3
    )
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.sqlite")) > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("warm_checks")
def test_a_student_beyond_the_papers_is_trained_and_measured_at_each_size(recipe: Run, tmp_path: Path) -> None:
    options = [*OWN, f"--encoder.base_model={tiny_modernbert(tmp_path / 'base')}", "--student.layers=[0, 2]"]
    options += ['--encoder.prompts={query: "query: ", document: "passage: "}']
    options += ["--student.pooling=cls", "--student.training.matryoshka_dims=[8, 16, 32]"]
    options += ["--teacher.training.max_steps=1", "--student.training.max_steps=2"]
    options += ["--student.training.passage_bits=[32, 8]"]
    output = tmp_path / "output"
    said = recipe(output, *options).stdout
    for title in ("base as it is", "student, SQ8", "student, first 16 dimensions", "student, first 8 dimensions, SQ8"):
        assert f"\n| {title}" in said
    assert "first 32" not in said and "Models keep 48 tokens of a passage." in said
    student = SentenceTransformer(str(output / "student"), device="cpu")
    assert [type(module).__name__ for module in student] == ["Transformer", "Pooling"]
    assert student.prompts == {"query": "query: ", "document": "passage: "} and student[1].pooling_mode == "cls"
    assert len(student[0].model.layers) == student[0].model.config.num_hidden_layers == 2
    validate_checkpoint(output / "student")
    assert {file.name for file in (output / "runs").glob("student*")} == {
        f"student{part}.{split}.trec"
        for part in ("", "-first-16", "-first-8", "-sq8", "-first-16-sq8", "-first-8-sq8", "-bm25")
        for split in ("dev", "test")
    }


@pytest.mark.usefixtures("warm_checks")
def test_a_sparse_student_is_trained_saved_and_measured(recipe: Run, settings: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*SPLADE, f"--encoder.base_model={settings.parent / 'mlm'}"]
    options += ["--student.training.document_regularizer_weight=0.003"]
    options += ["--student.training.query_regularizer_weight=0.002"]
    options += [EVAL, "--student.training.eval_steps=3"]
    said, report = recipe(output, *options).stdout, (output / "report.md").read_text()
    assert "active dimensions: " in said and "| student (weights of words)" in said
    assert f"SparseEncoder('{output / 'student'}')" in report
    assert f"in the last batches of its training (step {STEPS}): " in report
    log = json.loads((output / "student" / LOG_FILE).read_text())
    assert len([entry for entry in log if "document_active_dims" in entry]) == STEPS
    assert any("eval_dev_dot_mrr@10" in entry for entry in log)
    student = SparseEncoder(str(output / "student"), device="cpu")
    assert student.encode_query("dense tokens").is_sparse
    assert (student[0].query_length, student[0].document_length) == (16, 48)
    found = read_run(output / "runs" / "student.test.trec")
    assert len(found) == 12 and all(found.values())


def test_a_stage_without_what_it_needs_is_refused_with_the_fix(tmp_path: Path, recipe: Run) -> None:
    for stage, message in (
        ("student", "is not there. Add the stage teacher, or name a trained ColBERT with --teacher.model"),
        ("evaluate", "Add the stage student"),
    ):
        assert message in recipe(tmp_path / "new", f"--stages={stage}", code=2).stderr.splitlines()[-1]


OWN = ["--encoder.encoding=own", "--teacher.kind=colbert", "--teacher.dim=null"]
SPLADE = ["--student.kind=splade", "--student.initialise_from=base", "--student.layers=null"]
PROMPTED = [*SPLADE, "--teacher.model=a/b", "--encoder.encoding=own", "--encoder.prompts={query: 'q: '}"]
EVAL = "--student.training.eval_strategy=steps"
STREAMED = ["--triples.streaming=true", "--triples.path=triples.tsv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder.base_modle=x"], "Did you mean: 'base_model'?"),
        (["--stages=train"], "\"stages[0]\": Invalid value 'train', expected one of ['teacher', "),
        (["--student.training.temprature=2"], "\"student.training.temprature\": Key 'temprature'"),
        (["--student.training.output_dir=x"], "student.training.output_dir is set by the stage itself"),
        ([EVAL, "--data.dev_split=null"], "student.training.eval_strategy is 'steps'"),
        (["--student.training.kl_direction=both"], "student.training.kl_direction='both' must be 'forward' or"),
        (["--student.schedules={temprature: {start: 2.0}}"], "student.schedules: 'temprature' has no schedule"),
        (["--student.layers=[2]"], "student.layers=[2]: name distinct layers of the encoder, 0 to 1"),
        (["--student.training.matryoshka_dims=[16, 33]"], "matryoshka_dims: 33 is not between 1 and the"),
        (["--evaluation.codes=[SQ9]"], "evaluation.codes: Faiss knows no index 'SQ9'"),
        (["--student.training.embedding_weight=1"], "embedding_weight: a colbert teacher has no vector of a text"),
        (['--encoder.prompts={query: "query: "}'], "encoder.prompts={'query': 'query: '}: the TCT encoding"),
        ([*OWN, "--student.scale=20"], "scale and query_augmentation are settings of encoding"),
        ([*STREAMED, "--teacher.training.max_steps=-1"], "training.max_steps: streamed triples have no length"),
        ([*STREAMED, "--triples.path=null"], "triples.streaming: there is nothing to stream"),
        ([*SPLADE, "--student.scale=20"], "student.scale is of dense students"),
        ([*SPLADE, "--student.initialise_from=teacher"], "there is no encoder to take for a sparse student"),
        (PROMPTED, "encoder.prompts: a sparse student reads texts without any"),
        (SPLADE, "lacks cls.predictions"),  # the base has no head
        (["--student.training.document_regularizer_weight=1"], "argument 'document_regularizer_weight'"),
    ],
)
def test_wrong_settings_are_one_message_before_anything(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)
