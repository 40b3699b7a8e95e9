"""The training recipe with every kind of teacher, and what is refused before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import CausalRerankerTeacher, URLTeacher
from tct_hf.pipeline.checks import check_part, check_together
from tct_hf.pipeline.models import make_part
from tct_hf.pipeline.settings import DataSettings, OneTeacher, TeacherSettings, TrainSettings
from tct_hf.settings import SettingsError
from tests.models import tiny_causal
from tests.recipe import Check, Run
from tests.reranker import serving
from tests.searching import Material
from tests.train_helpers import with_scores

RECIPE = "train"
SETTINGS = "extends: tiny.yaml\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    """Where the relative names below lie."""
    with_scores(24).to_parquet(material.folder / "triples.parquet")
    monkeypatch.chdir(material.folder)


STUDENT = ["--student.initialise_from=base", "--student.training.max_steps=2"]
OWN = [*STUDENT, "--student.training.candidates=own"]
CROSS = ["--teacher.kind=cross-encoder", "--teacher.model=cross-encoder"]
URL = ["--teacher.kind=url", "--teacher.model=http://localhost/rerank"]
TRIPLES = "--triples.path=triples.parquet"
STORED = [TRIPLES, "--teacher.kind=stored", "--teacher.scores=scores"]


def test_a_cross_encoder_teaches_and_the_report_has_no_teacher_to_search_with(recipe: Run, tmp_path: Path) -> None:
    said = recipe(tmp_path / "out", *CROSS, "--teacher.dtype=float32", *OWN).stdout
    assert "teacher: skipped, cross-encoder is used as it is" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| student " in report and "ColBERT teacher" not in report and "its teacher" not in report


def test_stored_scores_teach_from_columns_and_files(recipe: Run, tmp_path: Path) -> None:
    stages = "--stages=[student]"
    recipe(tmp_path / "columns", *STORED, *OWN, stages)
    rows = with_scores(24)
    pairs = {
        (row["query_id"], row[f"{name}_id"]): score
        for row in rows
        for name, score in zip(("positive", "negative"), row["scores"], strict=True)
    }
    file = tmp_path / "scores.parquet"
    Dataset.from_list([{"query_id": q, "passage_id": p, "score": s} for (q, p), s in pairs.items()]).to_parquet(file)
    options = [TRIPLES, "--teacher.kind=stored", f"--teacher.scores={file}", *OWN, stages]
    recipe(tmp_path / "file", *options)
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("columns", "file")]
    assert weights[0] == weights[1]
    Dataset.from_list([{"query_id": "x", "passage_id": "y", "score": 1.0}]).to_parquet(file)
    assert "holds a run with teacher.weights = " in recipe(tmp_path / "file", *options, code=1).stderr


def test_a_colbert_mixed_with_stored_scores_teaches_the_whole_batch(recipe: Run, tmp_path: Path) -> None:
    mixed = "--teacher.mixed_with=[{kind: stored, scores: scores, weight: 2.0}]"
    options = [TRIPLES, "--teacher.model=teacher/colbert", mixed, *STUDENT, "--stages=[teacher, student]"]
    used = "teacher/colbert and the table or column of scores scores are used as they are"
    assert f"teacher: skipped, {used}" in recipe(tmp_path / "out", *options).stdout
    assert "weight: 2.0" in (tmp_path / "out" / "settings.yaml").read_text()
    log = json.loads((tmp_path / "out" / "student" / "training_log.json").read_text())
    assert any("distillation" in entry for entry in log)


def test_an_embedding_model_and_the_words_of_the_collection_teach_without_training(
    recipe: Run, tmp_path: Path
) -> None:
    options = ["--teacher.mixed_with=[{kind: bm25, weight: 0.33}]", "--teacher.kind=dense", "--teacher.model=encoder"]
    options += ["--teacher.weight=6", *STUDENT, f"--student.teacher_cache={tmp_path / 'vectors'}"]
    said = recipe(tmp_path / "out", *options, "--teacher.normalize=none", "--stages=[teacher, student]").stdout
    assert "teacher: skipped, encoder and BM25 are used as they are" in said
    assert any((tmp_path / "vectors").rglob("*.sqlite"))


@pytest.mark.slow
def test_a_run_whose_server_stops_goes_on_by_the_same_command_to_the_same_weights(
    recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RERANK_KEY", "very-secret")
    monkeypatch.setattr(URLTeacher, "first_pause", 0.01)
    training = ["--student.training.max_steps=4", "--student.training.save_steps=1", "--stages=[student]"]
    with serving() as server:
        shared = [
            f"--teacher.model={server.url}",
            "--teacher.kind=url",
            "--teacher.key_env=RERANK_KEY",
            *OWN,
            *training,
        ]

        def run(name: str, code: int = 0, **options: Any) -> Any:
            options = {"model": name, "cache_dir": str(tmp_path / "cache"), **options}
            return recipe(
                tmp_path / name, *OWN, *training, *shared, f"--teacher.options={json.dumps(options)}", code=code
            )

        run("whole")
        asked, server.answers_left = len(server.pairs), 20  # in batches of 8
        said = run("stopped", code=1, wait=0.1).stderr.splitlines()[-1]
        assert said.startswith(f"error: {server.url} has failed since ") and said.endswith("and it goes on.")
        assert {file.name for file in (tmp_path / "stopped/training/student").glob("checkpoint-*")} == {"checkpoint-2"}
        server.answers_left = 1000
        assert "goes on after step 2 of 4" in run("stopped", wait=60, requests=2).stdout
        assert len(server.pairs) == 2 * asked  # each pair once
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    written = [file for file in tmp_path.rglob("*") if file.is_file() and b"very-secret" in file.read_bytes()]
    assert not written and server.headers[0]["Authorization"] == "Bearer very-secret"


def test_a_causal_language_model_is_made_of_its_settings(tmp_path: Path) -> None:
    path = str(tiny_causal(tmp_path))
    check_part(part := OneTeacher("causal", path, options={"max_length": 64, "yes": " is"}), "teacher.")
    made = make_part(part, dtype="float32")
    assert isinstance(made, CausalRerankerTeacher) and made.model.max_seq_length == 64
    depends = TeacherSettings("causal", path, options=part.options).depends()
    assert depends["options"] == part.options and "key_env" not in depends and len(depends["weights"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher.kind=url"], "teacher.model: name the URL of a server that reranks"),
        (["--teacher.kind=url", "--teacher.model=a/b", *OWN], "teacher.model: write the address"),
        ([*URL, "--teacher.options={documents: 0}"], "teacher.options: documents must be at least 1"),
        ([*URL, "--teacher.options={pages: 1}"], "teacher.options.pages: not known here; known are cache_dir,"),
        ([*CROSS, "--teacher.options={dtype: float32}"], "teacher.options.dtype: not known here; known are max_len"),
        ([*URL, "--teacher.key_env=NOT_SET"], "teacher.key_env: the environment variable NOT_SET is not set"),
        ([*URL, *STUDENT], "student.training.candidates: a url teacher scores a query's own"),
        ([*CROSS, "--teacher.key_env=A"], "teacher.key_env is of a server"),
        (["--teacher.options={documents: 2}"], "teacher.options: a colbert teacher takes none"),
        (["--teacher.kind=cross-encoder"], "teacher.model: name the folder or Hub id of a cross-encoder"),
        (["--teacher.kind=stored"], "teacher.scores: name the stored scores"),
        ([*STORED, "--student.training.candidates=own"], "student.initialise_from: there is no encoder to take"),
        (["--teacher.mixed_with=[{kind: colbert}]"], "teacher.mixed_with[0].model: name the folder"),
        ([*CROSS, *STUDENT], "student.training.candidates: a cross-encoder teacher scores a query's own"),
        ([*STORED, *STUDENT], "student.training.candidates: a stored teacher scores a query's own"),
        ([*STORED, *OWN, "--triples.path=null"], "teacher.scores: scores are columns of triples"),
        (["--student.teacher_cache_gigabytes=0"], "student.teacher_cache_gigabytes=0"),
    ],
)
def test_wrong_settings_are_one_message_before_anything(refused: Check, options: list[str], message: str) -> None:
    refused(options, message)


@pytest.mark.parametrize(("setting", "value"), [("unlabelled", True), ("negatives", "teacher")])
def test_stored_scores_beside_a_mixture_that_searches_are_refused(setting: str, value: Any) -> None:
    teacher = TeacherSettings("mixture", mixed_with=[OneTeacher("stored", scores="s.jsonl")])
    with pytest.raises(SettingsError, match=f"data.{setting}: the stored scores of teacher.mixed_with do not cover"):
        check_together(TrainSettings(data=DataSettings(**{setting: value}), teacher=teacher))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.parquet", None, "s.parquet: no such file"),
        ("s.parquet", "nonsense", "s.parquet: not a whole parquet file"),
        ("s.csv", "query_id,passage_id,score", "s.csv: it holds no score; check the file"),
        ("s.jsonl", '{"query_id": "q0", "passage_id": "p0", "score": 1.0}', "has no score of passage 'p5'"),
    ],
)
def test_a_file_of_scores_is_read_and_looked_up_before_a_teacher_is_trained(
    refused: Check, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content + "\n")
    mixed = f"--teacher.mixed_with=[{{kind: stored, scores: {tmp_path / name}}}]"
    refused([TRIPLES, mixed], message, code=1)


def test_the_triples_of_a_collection_are_looked_up_before_a_teacher_is_trained(recipe: Run, tmp_path: Path) -> None:
    pairs = [(f"train{query}", f"p{passage}") for query in range(40) for passage in range(60)]
    lines = [json.dumps({"query_id": q, "passage_id": p, "score": len(q + p)}) + "\n" for q, p in pairs]
    file = tmp_path / "s.jsonl"
    mixed = f"--teacher.mixed_with=[{{kind: stored, scores: {file}}}]"
    file.write_text("".join(line for line in lines if '"train7"' not in line))
    said = recipe(tmp_path / "new", mixed, code=1).stderr.splitlines()[-1]
    assert re.search(rf"query 'train7', column 'positive_id': {file} has no score of passage 'p\d+': score the", said)
    assert "triples.path" in said and not (tmp_path / "new").exists()
    file.write_text("".join(lines))
    recipe(tmp_path / "new", mixed, "--teacher.model=teacher/colbert", *STUDENT, "--stages=[student]")
