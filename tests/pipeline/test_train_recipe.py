"""The training recipe from end to end on a tiny encoder: whole, in parts, interrupted, refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from tct_hf import read_run, validate_checkpoint
from tct_hf.files import LOG_FILE
from tests.models import tiny_colbert, tiny_modernbert
from tests.recipe import RECIPE as RECIPE  # of the fixture `recipe`
from tests.recipe import STEPS, killed_at, launch, run, write_material
from tests.warm_process import free_port

SYSTEMS = ["bm25", "base-native", "base-maxsim", "student", "teacher"]
FUSED = ["base-native-bm25", "student-bm25"]
TITLES = ["BM25", "base as it is", "base reranked by its own MaxSim", "student", "ColBERT teacher"]
TITLES += ["base as it is + BM25", "student + BM25"]
SPLADE = ["--student.kind=splade", "--student.initialise_from=base", "--student.layers=null"]
KILLED = {  # where the interrupted run is killed: the line it has just printed
    "teacher": f"step     3 of {STEPS}   loss",
    "student": f"step     5 of {STEPS}   loss",
    "evaluate": ": student",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a run went: runs, weights, metrics."""
    files = [*folder.glob("runs/*.trec"), *folder.glob("*/model.safetensors"), folder / "metrics.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.usefixtures("warm_checks")
def test_a_whole_run_leaves_models_that_load_without_this_package(whole: Path) -> None:
    output = whole
    student = SentenceTransformer(str(output / "student"), device="cpu")
    assert student.encode_query("dense tokens").shape == (32,)
    assert student[0].model.config.num_hidden_layers == 1
    validate_checkpoint(output / "student")
    teacher = MultiVectorEncoder(str(output / "teacher"), device="cpu")
    assert teacher.encode_query("dense tokens").shape == (16, 16)
    assert not list(output.glob("training/*/checkpoint-*"))


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


def test_a_whole_run_reports_one_row_a_system_and_the_same_figures_as_json(
    whole: Path,
) -> None:
    output = whole
    report = (output / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row[2:].startswith(title) for row, title in zip(rows, TITLES, strict=True)] == [True] * 7
    metrics = json.loads((output / "metrics.json").read_text())
    for row, system in zip(rows, [*SYSTEMS, *FUSED], strict=True):
        shown = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        measured = metrics["measured"]["test"][system]
        assert shown == [f"{measured[name]['mean']:.3f}" for name in ("RR@10", "nDCG@10", "R@20")]
    assert set(metrics["measured"]) == {"dev", "test"}
    assert report.count("Question: ") == 3
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_run_records_its_settings_and_the_corpus(whole: Path) -> None:
    output = whole
    environment = json.loads((output / "environment.json").read_text())
    metrics = json.loads((output / "metrics.json").read_text())
    assert environment["corpus"] == metrics["corpus"]
    assert len(environment["corpus"]["sha256"]) == 64 and environment["corpus"]["passages"] == 60
    resolved = (output / "settings.yaml").read_text()
    assert f"max_steps: {STEPS}" in resolved and "learning_rate" in resolved


@pytest.mark.slow
def test_a_run_killed_in_every_stage_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    whole: Path, settings: Path, tmp_path: Path
) -> None:
    in_teacher, in_student, in_evaluate = (killed_at(KILLED[stage], settings, tmp_path) for stage in KILLED)
    assert "goes on" not in in_teacher and "goes on after step 2 of 6" in in_student
    assert "goes on after step 4 of 6" in in_evaluate
    early = tmp_path / "runs" / "base-maxsim.test.trec"
    os.utime(early, ns=(1, 1))
    last = run(settings, tmp_path, before=launch())
    assert early.stat().st_mtime_ns == 1  # runs that were there are not made again
    assert "step" not in last.stdout.partition("# ")[0] and (tmp_path / "report.md").read_text() in last.stdout
    assert results(tmp_path) == results(whole) and len(results(whole)) == 17
    # Some queries of the collection are longer than 16 tokens, and a user can fix that: this warning stays.
    warning = "queries filled the entire query_expansion length of 16 tokens"
    assert all(warning in line for line in last.stderr.splitlines()), last.stderr


@pytest.mark.slow
def test_stages_alone_give_the_bytes_of_all_at_once(whole: Path, tmp_path: Path, recipe: Callable[..., int]) -> None:
    for stage in ("teacher", "student", "evaluate"):
        assert recipe(tmp_path / "alone", "--stages", stage) == 0
    assert results(tmp_path / "alone") == results(whole)


def test_a_ready_teacher_is_not_trained(
    tmp_path: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    colbert, output = tiny_colbert(tmp_path / "ready"), tmp_path / "output"
    assert recipe(output, "--teacher.model", str(colbert), "--stages=[teacher, student]") == 0
    assert f"teacher: skipped, {colbert} is used as it is" in capsys.readouterr().out
    assert (output / "student" / "model.safetensors").is_file()
    assert not (output / "teacher").exists() and not (output / "training" / "teacher").exists()


def test_a_finished_run_called_again_redoes_nothing_and_prints_the_report(
    whole: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = whole

    def made() -> dict[Path, tuple[int, bytes]]:
        return {
            file: (file.stat().st_mtime_ns if file.parent != output else 0, file.read_bytes())
            for file in output.rglob("*")
            if file.is_file()
        }

    before = made()
    assert recipe(output) == 0
    assert made() == before
    said = capsys.readouterr().out
    assert "  step " not in said and (output / "report.md").read_text() in said


def test_the_student_without_a_teacher_is_refused_with_the_fix(
    settings: Path, tmp_path: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "new", "--stages=student") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "which is not there. Add the stage teacher, or name a trained ColBERT with --teacher.model" in message
    assert recipe(tmp_path / "new", "--stages=evaluate") == 2
    assert "Add the stage student" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--data.num_negatives=2", "data.num_negatives"),
        ("--teacher.training.learning_rate=0.1", "teacher.training.learning_rate"),
        ("--evaluation.depth=30", "evaluation.depth"),
    ],
)
def test_other_settings_in_the_same_output_are_refused_by_name_with_the_fix(
    whole: Path,
    recipe: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
) -> None:
    output = whole
    before = results(output)
    settings_before = (output / "settings.yaml").read_text()
    assert recipe(output, option) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"holds a run with {name} = " in message and f"but now {name} = {option.partition('=')[2]}" in message
    assert "choose another --output_dir, or delete the folder" in message
    assert results(output) == before
    assert (output / "settings.yaml").read_text() == settings_before


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("--encoder.base_modle=x", 'did you mean "encoder.base_model"?'),
        ("--student.training.temprature=2", 'did you mean "student.training.temperature"?'),
        ("--stages=train", "teacher or unlabelled or stock or student or evaluate"),
    ],
)
def test_a_wrong_setting_is_one_message_before_anything_runs(
    tmp_path: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str], option: str, fix: str
) -> None:
    assert recipe(tmp_path / "new", option) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and fix in message
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_run_the_recipe_as_one_and_neither_repeats_the_other(settings: Path, tmp_path: Path) -> None:
    before = launch(2, "--multi_gpu", f"--main_process_port={free_port()}")
    done = run(settings, tmp_path / "two", before=before)
    for line, times in (("[1/4] data", 1), ("[4/4] evaluate", 1), ("# ", 1), (f"step     6 of {STEPS}", 2)):
        assert sum(said.strip().startswith(line) for said in done.stdout.splitlines()) == times, line
    assert len(results(tmp_path / "two")) == 17
    shutil.rmtree(tmp_path / "two" / "runs")
    before = launch(2, "--multi_gpu", f"--main_process_port={free_port()}")
    again = run(settings, tmp_path / "two", before=before)
    assert again.stdout.count(": base as it is\n") == 1  # of both, one evaluates


def test_a_cached_teacher_and_schedules_are_settings_of_the_student(
    recipe: Callable[..., int], whole: Path, tmp_path: Path
) -> None:
    options = ["--stages=[student]", f"--teacher.model={whole / 'teacher'}"]
    options += [f"--student.teacher_cache={tmp_path / 'cache'}"]
    options += ["--student.schedules={temperature: {start: 2.0, end: 0.5}}"]
    assert recipe(tmp_path / "run", *options) == 0
    log = json.loads((tmp_path / "run" / "student" / LOG_FILE).read_text())
    assert [entry["temperature"] for entry in log if "temperature" in entry] == pytest.approx(
        [2.0 - 0.3 * step for step in range(STEPS)], abs=1e-3
    )
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.f16")) > 10_000


def test_a_schedule_that_is_none_is_refused_before_anything(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "run", "--student.schedules={temprature: {start: 2.0}}") == 2
    assert "student.schedules: 'temprature' has no schedule" in capsys.readouterr().err


@pytest.mark.usefixtures("warm_checks")
def test_a_student_beyond_the_papers_is_trained_and_measured_at_each_size(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--encoder.base_model={tiny_modernbert(tmp_path / 'base')}", "--encoder.encoding=own"]
    options += ["--teacher.kind=colbert"]
    options += ['--encoder.prompts={query: "query: ", document: "passage: "}', "--student.layers=[0, 2]"]
    options += ["--teacher.dim=null", "--student.pooling=cls", "--student.training.matryoshka_dims=[8, 16, 32]"]
    output = tmp_path / "output"
    assert recipe(output, *options) == 0
    said = capsys.readouterr().out
    for title in ("base as it is", "student, first 16 dimensions", "student, first 8 dim"):
        assert f"\n| {title}" in said
    assert "first 32" not in said and "Models keep 48 tokens of a passage." in said
    student = SentenceTransformer(str(output / "student"), device="cpu")
    assert [type(module).__name__ for module in student] == ["Transformer", "Pooling"]
    assert student.prompts == {"query": "query: ", "document": "passage: "} and student[1].pooling_mode == "cls"
    assert len(student[0].model.layers) == student[0].model.config.num_hidden_layers == 2
    validate_checkpoint(output / "student")
    assert {file.name for file in (output / "runs").glob("student*")} == {
        f"student{size}.{split}.trec" for size in ("", "-16", "-8", "-bm25") for split in ("dev", "test")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [*SPLADE, "--student.scale=20"],
            "student.scale is of dense students",
        ),
        (["--student.teacher_cache_gigabytes=0"], "student.teacher_cache_gigabytes=0.0: give a finite number"),
        (["--student.scale=0"], "student.scale=0.0: give a finite number greater than 0"),
        (["--student.layers=[2]"], "student.layers=[2]: name distinct layers of the encoder, 0 to 1"),
        (
            ["--student.training.matryoshka_dims=[16, 33]"],
            "student.training.matryoshka_dims: 33 is not between 1 and the",
        ),
        (['--encoder.prompts={query: "query: "}'], "encoder.prompts={'query': 'query: '}: the TCT encoding"),
        (
            ["--encoder.encoding=own", "--teacher.kind=colbert", "--teacher.dim=null", "--student.scale=20"],
            "scale and query_augmentation are settings of encoding",
        ),
    ],
)
def test_an_impossible_student_is_refused_before_its_teacher_is_trained(
    recipe: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert recipe(tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher.training.max_steps=-1"], "teacher.training.max_steps: streamed triples have no length"),
        (["--triples.shuffle_buffer=0"], "triples.shuffle_buffer: 0 is below 1"),
        (["--triples.path=null"], "triples.streaming: there is nothing to stream"),
    ],
)
def test_streamed_triples_without_an_end_are_refused_before_anything(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    options = ["--triples.streaming=true", f"--triples.path={tmp_path / 'triples.tsv'}", *options]
    assert recipe(tmp_path / "run", *options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and not (tmp_path / "run").exists()


def test_wrong_training_arguments_of_the_student_are_refused_before_the_teacher_is_trained(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, message in (
        (
            "--student.training.hard_label_weight=2",
            "hard_label_weight=2.0 must be a number from 0 to 1",
        ),
        ("--student.training.output_dir=x", "student.training.output_dir is set by the stage itself"),
    ):
        assert recipe(tmp_path / "run", option) == 2
        assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()
