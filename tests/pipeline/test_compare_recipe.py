"""The comparison recipe from end to end on a tiny encoder: whole, interrupted, in parts, refused."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipe import ROOT, in_this_process, killed_at, write_material

RECIPE = ROOT / "recipes" / "compare.py"
STUDENTS = {"plain-hard": [13, 14], "in-batch-few-labels": [13]}
NAMES = {"plain-hard": "plain, hard", "in-batch-few-labels": "in-batch, few labels"}
MEASURES = ["RR@10", "nDCG@10", "R@20"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_material(folder)
    training = "{per_device_train_batch_size: 8, max_steps: 4, learning_rate: 1.0e-3, logging_steps: 1, save_steps: 2}"
    (folder / "compare.yaml").write_text(
        f"""
precision: fp32
data: {{source: {folder / "collection"}, negative_depth: 10, labels: 0.5}}
encoder: {{encoding: tct, base_model: {folder / "encoder"}, query_length: 16, document_length: 48}}
teacher:
  dim: 16
  training: {training}
training: {training}
teacher_cache: {folder / "tokens"}
curve: {{steps: 2, queries: 5, passages: 20}}
arms:
  plain, hard: {{signal: hard labels, layers: [1], seeds: [13, 14]}}
  in-batch, few labels: {{layers: [1], unlabelled: true, against: ["plain, hard", bm25], training: {{max_steps: 5}}}}
depth: 20
measures: {MEASURES}
"""
    )
    return folder / "compare.yaml"


@pytest.fixture(scope="module")
def recipe(settings: Path, patch: pytest.MonkeyPatch) -> Callable[..., int]:
    return in_this_process(RECIPE, settings, patch)


@pytest.fixture(scope="module")
def whole(settings: Path, recipe: Callable[..., int]) -> Path:
    assert recipe(settings.parent / "whole") == 0
    return settings.parent / "whole"


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a comparison went: runs and weights."""
    files = [*folder.rglob("*.trec"), *folder.rglob("model.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def rows_of(report: str, first: str) -> list[list[str]]:
    """The cells of the table whose first column is called `first`."""
    table = report[report.index(f"| {first}") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def lines_of(report: str) -> dict[str, list[str]]:
    """The first table's rows by their first cell."""
    return {row[0]: row[1:] for row in rows_of(report, "system")}


def test_a_whole_comparison_leaves_a_student_a_seed_and_its_runs(whole: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from tct_hf import read_run

    assert {folder.name for folder in (whole / "arms").iterdir()} == set(STUDENTS)
    for arm, seeds in STUDENTS.items():
        assert {folder.name for folder in (whole / "arms" / arm).iterdir()} == {f"seed-{seed}" for seed in seeds}
        for seed in seeds:
            folder = whole / "arms" / arm / f"seed-{seed}"
            for split, count in (("dev", 10), ("test", 12)):
                assert len(read_run(folder / "runs" / f"student.{split}.trec")) == count
            assert not list(folder.glob("training/checkpoint-*"))
    student = SentenceTransformer(str(whole / "arms" / "plain-hard" / "seed-14" / "student"), device="cpu")
    assert student[0].model.config.num_hidden_layers == 1
    weights = {
        (whole / "arms" / a / f"seed-{s}" / "student" / "model.safetensors").read_bytes()
        for a, s in (("plain-hard", 13), ("plain-hard", 14), ("in-batch-few-labels", 13))
    }
    assert len(weights) == 3
    systems = {file.name.partition(".")[0] for file in (whole / "runs").glob("*.trec")}
    assert systems == {"bm25", "base-native", "base-native-bm25", "base-maxsim", "teacher"}
    assert any((whole.parent / "tokens").rglob("*.f16"))  # the teacher's, for all arms


def test_the_lines_of_the_table_are_the_figures_of_metrics_json(whole: Path) -> None:
    measured = json.loads((whole / "metrics.test.json").read_text())["measured"]["test"]
    lines = lines_of((whole / "report.test.md").read_text())
    head = lines.pop("system")
    assert head == ["learns from", "starts from", "layers", *MEASURES, "RR@10 + BM25", "seeds", "steps", "minutes"]
    assert list(lines)[:1] == ["BM25"] and list(lines)[-2:] == list(NAMES.values())
    for key, title in (("bm25", "BM25"), ("teacher", "ColBERT teacher (one vector a token)")):
        assert lines[title][3:6] == [f"{measured[key][name]['mean']:.3f}" for name in MEASURES]
    for arm, seeds in STUDENTS.items():
        means = {m: [measured[f"{NAMES[arm]}, seed {seed}"][m]["mean"] for seed in seeds] for m in MEASURES}
        shown = [cell.partition(" ± ")[0] for cell in lines[NAMES[arm]][3:6]]
        assert shown == [f"{sum(values) / len(values):.3f}" for values in means.values()]
        fused = [measured[f"{NAMES[arm]}, seed {seed}"]["RR@10 + BM25"]["mean"] for seed in seeds]
        assert lines[NAMES[arm]][6].partition(" ± ")[0] == f"{sum(fused) / len(fused):.3f}"
        assert lines[NAMES[arm]][7:9] == [str(len(seeds)), "5" if "few" in arm else "4"]
    assert lines["plain, hard"][:3] == ["hard labels", "teacher", "1"]
    assert lines["in-batch, few labels"][:3] == ["in-batch, also unlabelled", "teacher", "1"]


def test_arms_are_tested_against_the_one_they_name_on_common_seeds(whole: Path) -> None:
    from tct_hf import evaluate_run, read_run
    from tct_hf.evaluation.significance import paired_randomisation_test

    rows = rows_of((whole / "report.test.md").read_text(), "arm")
    qrels = (whole.parent / "collection" / "qrels" / "test.tsv").read_text().splitlines()[1:]
    judged = {query: {passage: int(grade)} for query, passage, grade in (line.split("\t") for line in qrels)}

    def values(run: Path) -> list[float]:
        found = evaluate_run(read_run(run), judged, ["RR@10"]).per_query["RR@10"]
        return [found[query] for query in sorted(judged)]

    own = values(whole / "arms" / "in-batch-few-labels" / "seed-13" / "runs" / "student.test.trec")
    rivals = {
        "plain, hard": values(whole / "arms" / "plain-hard" / "seed-13" / "runs" / "student.test.trec"),
        "bm25": values(whole / "runs" / "bm25.test.trec"),
    }
    p_values = [paired_randomisation_test(own, rival) for rival in rivals.values()]
    assert [row[:3] for row in rows[1:]] == [["in-batch, few labels", name, "1"] for name in rivals]
    for row, rival, p in zip(rows[1:], rivals.values(), p_values, strict=True):
        other = max(p_values) if p == min(p_values) else min(p_values)
        holm = min(1.0, 2 * p) if p <= other else max(p, min(1.0, 2 * other))
        shown = [f"{value:.3f}" if value >= 0.001 else "<0.001" for value in (p, holm)]
        assert row[3] == f"{(sum(own) - sum(rival)) / len(own):+.3f} ({'; '.join(shown)})"


def test_every_student_is_a_line_of_the_log_of_trials_and_a_curve_of_the_plot(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "students.test.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"]) for row in rows] == [(NAMES[a], str(s)) for a in STUDENTS for s in STUDENTS[a]]
    measured = json.loads((whole / "metrics.test.json").read_text())["measured"]
    for row in rows:
        assert row["dev RR@10"] == f"{measured['dev'][row['arm'] + ', seed ' + row['seed']]['RR@10']['mean']:.4f}"
        assert float(row["minutes"]) >= 0 and row["learning_rate"] == "0.001"
    log = json.loads((whole / "arms" / "plain-hard" / "seed-13" / "student" / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "eval_dev_dot_mrr@10" in entry] == [0, 2, 4]
    assert not {"top_agreement", "teacher_entropy"} & {name for entry in log for name in entry}
    assert (whole / "curves.test.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_killed_in_its_second_arm_goes_on_there_and_ends_with_the_same_bytes(
    whole: Path, settings: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = settings.parent / "killed"
    said = killed_at("step     3 of 5", settings, output, RECIPE)
    assert "in-batch, few labels, seed 13" in said and not (output / "report.test.md").exists()
    first = output / "arms" / "plain-hard" / "seed-13" / "student" / "model.safetensors"
    made = first.stat().st_mtime_ns
    assert recipe(output) == 0
    assert results(output) == results(whole) and len(results(whole)) == 27
    measured = [json.loads((folder / "metrics.test.json").read_text())["measured"] for folder in (output, whole)]
    assert measured[0] == measured[1]
    assert first.stat().st_mtime_ns == made
    said = capsys.readouterr().out
    assert "teacher: skipped, it is trained" in said and "goes on after step 2 of 5" in said


def test_some_arms_alone_have_a_report_of_their_own(
    whole: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole, tmp_path / "copy")
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert recipe(output, '--only=["in-batch, few labels"]') == 0
    assert "  step " not in capsys.readouterr().out
    lines = lines_of((output / "report.test.part.md").read_text())
    assert "in-batch, few labels" in lines and "plain, hard" not in lines
    for file, content in before.items():  # the whole comparison's report, figures and plot stay
        if file.parent != output or ".test." in file.name:
            assert file.read_bytes() == content, file
    rows = csv.DictReader((output / "students.test.part.csv").read_text().splitlines())
    assert [row["arm"] for row in rows] == ["in-batch, few labels"]


TABLES = """{
  One: {arms: ["in-batch, few labels", "plain, hard"]},
  Two: {arms: ["in-batch, few labels", "plain, hard"], against: ["plain, hard", teacher]},
  Three: {arms: ["plain, hard"]},
}"""


def test_trained_arms_stand_in_several_tables_and_rerank_without_another_training(
    whole: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

    from tct_hf import evaluate_run, read_run
    from tct_hf.data.collection import load_collection

    output = shutil.copytree(whole, tmp_path / "copy")
    assert recipe(output, "--reranking=10", f"--tables={TABLES}") == 0
    said = capsys.readouterr().out
    assert "  step " not in said and "reranking" in said
    assert {name: content for name, content in results(output).items() if "reranking" not in name} == results(whole)

    report = (output / "report.test.md").read_text()
    parts = report.split("\n## ")[1:]
    assert [part.partition("\n")[0] for part in parts] == ["One", "Two", "Three"]
    first = [lines_of(part) for part in parts]
    assert [list(lines)[-2:] for lines in first[:2]] == [["in-batch, few labels", "plain, hard"]] * 2
    assert "in-batch, few labels" not in first[2] and first[0]["plain, hard"] == first[2]["plain, hard"]
    assert first[0]["system"][3:5] == ["RR@10 reranking", "RR@10"]
    pairs = [[row[:2] for row in rows_of(part, "arm")[1:]] for part in parts[:2]]
    few, hard = "in-batch, few labels", "plain, hard"
    assert pairs == [[[few, hard], [few, "bm25"]], [[few, hard], [few, "teacher"], [hard, "teacher"]]]
    assert rows_of(parts[0], "arm")[2][3] == "" != rows_of(parts[1], "arm")[2][3]  # BM25 reranks nothing
    assert "| arm" not in parts[2]
    for name in ("curves.test.One.png", "curves.test.Two.png", "curves.test.Three.png"):
        assert (output / name).is_file()

    # The student's order of BM25's ten, by its vectors; the teacher's by its own scores.
    collection = load_collection(str(whole.parent / "collection"))
    texts = dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True))
    test = collection.splits["test"]
    bm25 = read_run(output / "runs" / "bm25.test.trec")
    student_folder = output / "arms" / "plain-hard" / "seed-13"
    student = SentenceTransformer(str(student_folder / "student"), device="cpu")
    teacher = MultiVectorEncoder(str(output / "teacher"), device="cpu")
    measured = json.loads((output / "metrics.test.json").read_text())["measured"]["test"]
    for model, runs, key in (
        (student, student_folder / "runs" / "student-reranking-10.test.trec", "plain, hard, seed 13"),
        (teacher, output / "runs" / "teacher-reranking-10.test.trec", "teacher"),
    ):
        run = read_run(runs)
        for query, hits in run.items():
            ten = sorted(bm25[query], key=lambda name: (-bm25[query][name], name))[:10]
            assert set(hits) == set(ten)
            vectors = model.encode_query([test.queries[query]]), model.encode_document([texts[name] for name in hits])
            scores = model.similarity(*vectors)[0].tolist()
            assert list(hits.values()) == pytest.approx(scores, abs=1e-4)
        found = evaluate_run(run, test.qrels, ["RR@10"]).mean["RR@10"]
        assert measured[key]["RR@10 reranking"]["mean"] == pytest.approx(found)
        assert "RR@10 reranking" not in measured["bm25"]
    [row] = [
        row
        for row in csv.DictReader((output / "students.test.csv").read_text().splitlines())
        if (row["arm"], row["seed"]) == ("plain, hard", "13")
    ]
    assert row["test RR@10 reranking"] == f"{measured['plain, hard, seed 13']['RR@10 reranking']['mean']:.4f}"

    assert recipe(output, "--reranking=10", f"--tables={TABLES}", "--only=[Three]") == 0
    alone = (output / "report.test.part.md").read_text()
    assert "## Three" in alone and "## Two" not in alone and "few labels" not in alone


def test_a_report_on_dev_never_searches_for_the_test_queries(
    whole: Path, settings: Path, recipe: Callable[..., int], tmp_path: Path
) -> None:
    options = ["--report=dev", '--only=["plain, hard"]', "--seeds=[13]", "--teacher.model", str(whole / "teacher")]
    assert recipe(tmp_path / "dev", *options, "--training.max_steps=2", "--curve.steps=0") == 0
    names = {file.name for file in (tmp_path / "dev").rglob("*.trec")}
    assert names == {"bm25.dev.trec", "teacher.dev.trec", "student.dev.trec", "student-bm25.dev.trec"}
    assert set(json.loads((tmp_path / "dev" / "metrics.dev.part.json").read_text())["measured"]) == {"dev"}
    report = (tmp_path / "dev" / "report.dev.part.md").read_text()
    assert "dev queries, exact search" in report and "No plot: " in report


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--training.learning_rate=0.1", "training.learning_rate"),
        ("--data.num_negatives=2", "data.num_negatives"),
        ("--curve.steps=1", "curve.steps"),
        ("--arms={'in-batch, few labels': {initialise_from: base}}", "arm.initialise_from"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name_before_anything_is_written(
    whole: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    assert recipe(whole, option) == 1
    [message] = capsys.readouterr().err.splitlines()
    assert f"holds a run with {name} = " in message and f"but now {name} = " in message
    assert "choose another --output_dir" in message
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=[in-batch, few labels]"], """only: 'in-batch' is not one of 'plain, hard',"""),  # two names to YAML
        (["--only=[plian]"], "only: 'plian' is not one of 'plain, hard', 'in-batch, few labels'"),
        (["--arms={plain hard: {layers: [0]}}"], "'plain, hard' and 'plain hard' would share a folder; rename one"),
        (["--arms={x: {against: [y]}}"], "arms.x.against: 'y' is not one of 'plain, hard',"),
        (["--tables={A: {arms: [y]}}"], "tables.A.arms: 'y' is not one of 'plain, hard',"),
        (['--tables={A: {arms: ["plain, hard"], against: [y]}}'], "tables.A.against: 'y' is not one of"),
        (['--tables={A: {arms: ["plain, hard"]}}'], "no table has the arm 'in-batch, few labels'; add it"),
        (
            ['--tables={"A, b": {arms: ["plain, hard", "in-batch, few labels"]}, A b: {}}'],
            "tables: 'A, b' and 'A b' would",
        ),
        (["--reranking=0"], "reranking: 0 passages are nothing to put in order"),
        (["--arms={x: {layers: [7]}}"], "arms.x.layers: there is no layer 7 in an encoder"),
        (["--arms={x: {encoder: {base_model: y}}}"], "base_model is not what it starts from"),
        (["--arms={x: {encoder: {prompts: {query: 'q '}}}}"], "arms.x.encoder.prompts: the TCT encoding has its own"),
        (["--arms={x: {signal: all}}"], "arms.x.signal"),
        (["--arms={x: {signl: in-batch}}"], 'did you mean "arms.x.signal"?'),
        (["--arms={x: {unlabelled: true, signal: hard labels}}"], "rows without one teach nothing"),
        (["--seeds=[]"], "there is nothing to compare"),
        (["--data.unlabelled=true"], r"set arms.NAME.unlabelled"),
        (["--report=dev", "--data.dev_split=none"], "has no judged dev split; set data.dev_share"),
    ],
)
def test_a_wrong_comparison_is_one_message_before_anything_runs(
    tmp_path: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert recipe(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_other_questions_are_other_students(
    whole: Path, recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.txt").write_text("dense retrieval\n")
    options = [
        '--only=["in-batch, few labels"]',
        f"--teacher.model={whole / 'teacher'}",
        f"--data.questions={tmp_path / 'questions.txt'}",
        "--training.max_steps=1",
        "--curve.steps=0",
        "--report=dev",
    ]
    assert recipe(tmp_path / "out", *options) == 0
    (tmp_path / "questions.txt").write_text("dense retrieval\nof tokens\n")
    capsys.readouterr()
    assert recipe(tmp_path / "out", *options) == 1
    assert "holds a run with questions." in capsys.readouterr().err


OWN = sorted(
    {path.name for path in (ROOT / "recipes" / "compare").glob("*.yaml")} - {"common.yaml"}
)  # which has no arms


@pytest.mark.parametrize("name", OWN)
def test_the_comparisons_that_come_along_are_valid_settings(name: str, recipe: Callable[..., int]) -> None:
    from tct_hf.settings import load_settings

    module = sys.modules["compare_recipe"]
    loaded = load_settings(module.Settings, [str(ROOT / "recipes" / "compare" / name)], description="")
    arms, tables = module.chosen_arms(loaded)
    assert list(arms) == list(loaded.arms) and tables == loaded.tables
    folders = {module.folder_of(Path("x"), arm, 13) for arm in loaded.arms}
    assert len(folders) == len(loaded.arms)
