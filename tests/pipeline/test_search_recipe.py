"""The search recipe: questions in, passages with the scores of each system out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tct_hf.evaluation.workspace import SPARSE_FOLDER
from tests.recipe import ROOT, load_recipe, run
from tests.searching import Material
from tests.splade import tiny_splade

QUESTIONS = ["dense retrieval", "what is a passage"]


def test_each_question_of_standard_input_gets_its_passages_with_every_score(material: Material) -> None:
    words = [f"--student={material.student}", f"--data.source={material.beir}", "--k=3"]
    stdin = "\n  \t\n".join(QUESTIONS) + "\n"
    text = run("search", material.folder, *words, f"--rerank={material.teacher}", "--rank_by=fused", stdin=stdin)
    lines = text.stdout.splitlines()
    for question in QUESTIONS:
        at = lines.index(question)
        for place in (1, 2, 3):
            line = lines[at + 2 * place - 1]
            assert line.startswith(f"  {place}. p") and len(lines[at + 2 * place]) > 5
            assert all(f"   {name} " in line for name in ("BM25", "dense", "fused", "MaxSim"))
    assert "60 passages in" in text.stderr and "standard input, line 2: blank, left out" in text.stderr
    # The second start encodes and builds nothing, and says the same in JSON.
    done = run("search", material.folder, *words, "--json", stdin=stdin)
    assert "60 passages in" not in done.stderr and "were there" not in done.stderr
    assert "* BM25 + dense (tuned on 10 dev queries)" in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == QUESTIONS
    shown = [line for line in lines if line.startswith("  ") and ". p" in line]
    passages = [passage for answer in answers for passage in answer["passages"]]
    for passage, line in zip(passages, shown, strict=True):
        assert f"{passage['rank']}. {passage['id']}   " in line and f"fused {passage['fused']:.2f}" in line
        assert passage["maxsim"] is None and passage["text"]


def test_questions_are_answered_with_both_students(material: Material) -> None:
    splade, place = tiny_splade(material.folder / "sparse-student"), material.folder / "search"
    words = [
        f"--sparse_student={splade}",
        f"--data.source={material.beir}",
        "--k=3",
        "--backend=torch",
        f"--index_dir={place}",
    ]
    done = run("search", material.folder, f"--student={material.student}", *words, stdin="dense retrieval\n")
    assert "sparse student + dense (tuned on 10 dev queries)" in done.stderr
    assert all(done.stdout.count(f"   {name} ") == 3 for name in ("BM25", "sparse student", "dense", "fused"))
    assert (place / SPARSE_FOLDER / "indexes" / "learned-sparse").is_dir()
    refused = run("search", material.folder, f"--student={splade}", *words[1:3], "--rank_by=dense", code=2)
    assert "rank_by: there is no dense student to order by" in refused.stderr


def test_standard_input_without_a_question_is_refused(material: Material, tmp_path: Path) -> None:
    words = [f"--student={material.student}", f"--data.source={material.beir}", "--backend=torch", "--json"]
    done = run("search", material.folder, *words, stdin="  \t\n\n", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: standard input: there is no question in it")
    assert done.stdout == ""


@pytest.mark.parametrize("answers_alone", [True, False])
def test_prompts_stay_out_of_the_answers(
    answers_alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions: Any = load_recipe(ROOT / "recipes" / "search.py").questions
    terminal = io.StringIO("dense\ntokens\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert list(questions(answers_alone=answers_alone)) == ["dense", "tokens"]
    said = capsys.readouterr()
    prompts = "question: question: question: \n"
    assert (said.out, said.err) == (("", prompts) if answers_alone else (prompts, ""))


def test_a_question_that_is_not_utf8_is_left_out_and_the_others_are_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions: Any = load_recipe(ROOT / "recipes" / "search.py").questions
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\n\xed\xa0\x80\ntwo\n")))
    assert list(questions(answers_alone=True)) == ["one", "two"]
    assert "standard input, line 2: not UTF-8, left out\n" in capsys.readouterr().err
