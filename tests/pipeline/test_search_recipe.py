"""The search recipe: questions in, passages with the scores of each system out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tct_hf.data.collection import Collection
from tct_hf.evaluation.report_settings import ExpansionSettings, HybridSettings
from tct_hf.evaluation.searcher import Searcher
from tct_hf.evaluation.stores import Stores, open_student, open_teacher
from tests.recipe import ROOT
from tests.searching import Material, run_recipe, write_material

QUESTIONS = ["dense retrieval", "what is a passage"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def said(material: Material) -> dict[str, Any]:
    """What two starts one after the other printed, the first as text, the second as JSON."""
    words = [f"--student={material.student}", f"--data.source={material.beir}", "--k=3"]
    stdin = "\n".join(QUESTIONS) + "\n"
    return {
        "text": run_recipe("search", material, *words, f"--rerank={material.teacher}", "--rank_by=fused", stdin=stdin),
        "json": run_recipe("search", material, *words, "--json", stdin=stdin),
    }


@pytest.fixture
def searcher(material: Material, monkeypatch: pytest.MonkeyPatch) -> Searcher:
    monkeypatch.setenv("TCT_HF_CACHE", str(material.folder / "cache"))
    return make_searcher(material, material.collection(), material.folder / "kept")


def make_searcher(material: Material, collection: Collection, folder: Path, **options: Any) -> Searcher:
    student = open_student(str(material.student))
    stores = Stores(collection, student, "student", folder, precision="fp32", write=lambda line: None)
    return Searcher(
        stores,
        reranker=options.pop("reranker", None),
        depth=options.pop("depth", 20),
        expansion=options.pop("expansion", None),
        dims=options.pop("dims", None),
        hybrid=HybridSettings(**options),
    )


def test_each_question_of_standard_input_gets_its_passages_with_every_score(said: dict[str, Any]) -> None:
    lines = said["text"].stdout.splitlines()
    for question in QUESTIONS:
        at = lines.index(question)
        for place in (1, 2, 3):
            line = lines[at + 2 * place - 1]
            assert line.startswith(f"  {place}. p") and len(lines[at + 2 * place]) > 5
            assert all(f"   {name} " in line for name in ("BM25", "dense", "fused", "MaxSim"))


def test_json_is_one_line_a_question_with_the_figures_of_the_text(said: dict[str, Any]) -> None:
    answers = [json.loads(line) for line in said["json"].stdout.splitlines()]
    assert [answer["question"] for answer in answers] == QUESTIONS
    shown = [line for line in said["text"].stdout.splitlines() if line.startswith("  ") and ". p" in line]
    passages = [passage for answer in answers for passage in answer["passages"]]
    assert len(passages) == len(shown) == 6
    for passage, line in zip(passages, shown, strict=True):
        assert f"{passage['rank']}. {passage['id']}   " in line and f"fused {passage['fused']:.2f}" in line
        assert passage["maxsim"] is None and passage["text"]


def test_the_second_start_encodes_and_builds_nothing(said: dict[str, Any]) -> None:
    assert "60 passages in" in said["text"].stderr
    assert "60 passages in" not in said["json"].stderr and "were there" not in said["json"].stderr


def test_fused_is_the_weight_tuned_on_dev(said: dict[str, Any], material: Material) -> None:
    [line] = [line for line in said["json"].stderr.splitlines() if line.startswith("fused: ")]
    assert "* BM25 + dense (tuned on 10 dev queries)" in line


@pytest.mark.parametrize("stdin", ["", "  \t\n\n"])
def test_standard_input_without_a_question_is_refused(said: dict[str, Any], material: Material, stdin: str) -> None:
    words = [f"--student={material.student}", f"--data.source={material.beir}", "--json"]
    done = run_recipe("search", material, *words, stdin=stdin, code=2)
    assert done.stderr.splitlines()[-1].startswith("error: standard input: there is no question in it")
    assert done.stdout == ""


def test_a_blank_line_among_questions_is_left_out_and_named(said: dict[str, Any], material: Material) -> None:
    words = [f"--student={material.student}", f"--data.source={material.beir}", "--json"]
    done = run_recipe("search", material, *words, stdin="dense\n  \t\ntokens\n")
    assert "standard input, line 2: blank, left out" in done.stderr
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == ["dense", "tokens"]


def test_passages_are_ordered_by_the_system_asked_for(searcher: Searcher) -> None:
    for system in ("fused", "dense", "bm25"):
        scores = [getattr(hit, system) for hit in searcher.ask("dense retrieval tokens", 5, rank_by=system)]
        assert scores == sorted(scores, reverse=True) and None not in scores


def test_scores_are_those_of_the_systems_and_none_where_a_list_ends(searcher: Searcher, material: Material) -> None:
    hits = searcher.ask("dense", 60, rank_by="fused")
    assert {hit.id for hit in hits if hit.bm25 is None} and {hit.id for hit in hits if hit.dense is not None}
    assert searcher.alpha is not None
    for hit in hits:
        if hit.bm25 is not None and hit.dense is not None:
            assert hit.fused == pytest.approx(searcher.alpha * hit.bm25 + hit.dense, rel=1e-5)


def test_a_reranker_puts_the_best_of_the_fused_list_in_the_order_of_max_sim(
    material: Material, searcher: Searcher
) -> None:
    from tct_hf.evaluation.reranking import rerank_run

    model = open_teacher(str(material.teacher))
    reranking = make_searcher(material, material.collection(), material.folder / "kept", reranker=model)
    fused = searcher.ask("dense tokens", 20)
    texts = {hit.id: hit.text for hit in fused}
    expected = rerank_run(model, {"q": dict.fromkeys(texts, 0.0)}, texts, {"q": "dense tokens"})["q"]
    hits = reranking.ask("dense tokens", 4)
    assert [hit.id for hit in hits] == list(expected)[:4]
    assert [hit.maxsim for hit in hits] == pytest.approx(list(expected.values())[:4])
    assert [hit.fused for hit in hits] == [one.fused for hit in hits for one in fused if one.id == hit.id]
    assert [hit.id for hit in reranking.ask("dense tokens", 4, rank_by="fused")] == list(texts)[:4]


def test_own_reranking_compares_the_students_own_token_vectors(material: Material, tmp_path: Path) -> None:
    from tct_hf import build_colbert, build_student, save_student
    from tct_hf.evaluation.reranking import rerank_run
    from tct_hf.evaluation.stores import open_reranker

    folder = str(save_student(build_student(str(material.folder / "base"), encoding="own"), tmp_path / "student"))
    stores = Stores(material.collection(), open_student(folder), folder, tmp_path / "own")
    own, texts = build_colbert(folder, encoding="own"), {"a": "dense tokens", "b": "what is a passage"}
    run, asked = {"q": dict.fromkeys(texts, 0.0)}, {"q": "dense retrieval"}
    assert rerank_run(open_reranker("own", stores), run, texts, asked) == rerank_run(own, run, texts, asked)
    tct = Stores(material.collection(), open_student(str(material.student)), "the student", tmp_path / "other")
    with pytest.raises(ValueError, match="own: the token vectors of the student can't be compared"):
        open_reranker("own", tct)


def test_a_question_of_unknown_words_is_answered_by_the_student(searcher: Searcher) -> None:
    hits = searcher.ask("检索 zzzzzz", 3)
    assert len(hits) == 3 and all(hit.bm25 is None and hit.dense is not None for hit in hits)


def test_without_judgements_ranks_are_fused(material: Material, tmp_path: Path) -> None:
    collection = material.collection()
    collection.splits.clear()
    searcher = make_searcher(material, collection, tmp_path)
    assert searcher.alpha is None and "reciprocal ranks" in searcher.fusion
    assert searcher.ask("dense", 2)


def test_first_dimensions_are_searched_as_a_truncated_student_would(material: Material, tmp_path: Path) -> None:
    import numpy as np
    from sentence_transformers import SentenceTransformer

    collection = material.collection()
    searcher = make_searcher(material, collection, tmp_path, dims=8)
    student = SentenceTransformer(str(material.student), truncate_dim=8, device="cpu")
    scores = student.encode_document(list(collection.corpus["text"])) @ student.encode_query("dense tokens")
    found = [hit.dense for hit in searcher.ask("dense tokens", 20, rank_by="dense")]
    np.testing.assert_allclose(np.array(found, float), np.sort(scores)[::-1][:20], rtol=1e-4)
    with pytest.raises(ValueError, match="dims: 4000 is not between 1 and"):
        make_searcher(material, collection, tmp_path, dims=4000)


def test_bm25_may_have_generated_queries(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tct_hf import write_expansions

    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    collection = material.collection()
    rows = [{"id": name, "queries": ["zebra"] if name == "p7" else []} for name in collection.corpus["id"]]
    write_expansions(rows, tmp_path / "queries", settings={})
    expansion = ExpansionSettings(path=str(tmp_path / "queries"))
    searcher = make_searcher(material, collection, tmp_path / "kept", expansion=expansion)
    assert "* expanded BM25 + dense" in searcher.fusion
    assert [hit.id for hit in searcher.ask("zebra", 5, rank_by="bm25")] == ["p7"]
    # The passages alone have an index of their own beside it.
    assert make_searcher(material, collection, tmp_path / "kept").ask("zebra", 5, rank_by="bm25") == []


def test_a_given_weight_is_not_tuned(material: Material, tmp_path: Path) -> None:
    searcher = make_searcher(material, material.collection(), tmp_path, alpha=2.0)
    assert searcher.alpha == 2.0 and not (tmp_path / "fusion").exists()


def test_another_depth_in_the_same_folder_has_a_weight_of_its_own(searcher: Searcher, material: Material) -> None:
    kept = material.folder / "kept"
    wider = make_searcher(material, material.collection(), kept, depth=40)
    rescaled = make_searcher(material, material.collection(), kept, normalize=True)
    assert wider.alpha is not None and rescaled.alpha is not None
    assert len({file.parent for file in kept.glob("fusion/*/alpha.json")}) >= 3
    assert make_searcher(material, material.collection(), kept).alpha == searcher.alpha


def test_an_index_that_is_not_exact_serves_every_depth(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf.retrieval import faiss_tools as dense_engine

    monkeypatch.setattr(dense_engine, "EXACT_UP_TO", 10)
    for depth in (5, 20):
        assert make_searcher(material, material.collection(), tmp_path, depth=depth).ask("dense", 5)
    assert [folder.name for folder in tmp_path.glob("indexes/dense-*")] == ["dense-hnsw32"]


def test_a_weight_out_of_range_is_refused_at_once(material: Material, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hybrid\.alpha: -1\.0 must be finite"):
        make_searcher(material, material.collection(), tmp_path, alpha=-1.0)
    assert not (tmp_path / "vectors").exists()


@pytest.mark.parametrize("answers_alone", [True, False])
def test_prompts_stay_out_of_the_answers(
    answers_alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import runpy
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    questions = runpy.run_path(str(ROOT / "recipes" / "search.py"))["questions"]
    monkeypatch.setattr(sys, "stdin", Terminal("dense\ntokens\n"))
    assert list(questions(answers_alone=answers_alone)) == ["dense", "tokens"]
    said = capsys.readouterr()
    prompts = "question: question: question: \n"
    assert (said.out, said.err) == (("", prompts) if answers_alone else (prompts, ""))


def test_wrong_requests_are_refused(searcher: Searcher) -> None:
    with pytest.raises(ValueError, match="question: it is blank"):
        searcher.ask(" \n", 3)
    with pytest.raises(ValueError, match="k: 0 is below 1"):
        searcher.ask("dense", 0)
    with pytest.raises(ValueError, match="rank_by: 'splade' is not one of"):
        searcher.ask("dense", 3, rank_by="splade")


def test_the_kept_folder_of_another_student_is_refused(
    searcher: Searcher, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    student = open_student(str(material.student))
    with torch.no_grad():
        next(student.parameters()).add_(0.5)
    stores = Stores(material.collection(), student, "other", material.folder / "kept", write=lambda line: None)
    with pytest.raises(ValueError, match=r"student\.weights"):
        Searcher(stores, depth=20, hybrid=HybridSettings())


def test_a_nan_vector_of_a_question_is_named(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    stores = searcher._stores
    monkeypatch.setattr(stores, "encode_texts", lambda texts: np.full((len(texts), 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="query 'question' has a NaN or infinite vector"):
        searcher.ask("dense", 3)
