"""Single questions answered by BM25, a student and the two fused, with every score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tct_hf import fuse, write_expansions
from tct_hf.evaluation.maxsim import rerank_run
from tct_hf.evaluation.searcher import Searcher
from tct_hf.evaluation.settings import ExpansionSettings, HybridSettings
from tct_hf.evaluation.workspace import Workspace, open_reranker, open_student, open_teacher
from tct_hf.retrieval import faiss_tools
from tests.searching import Material


def make_searcher(material: Material, folder: Path, *, student: Any = None, sparse: Any = None, **options: Any) -> Any:
    """With `collection`, and `hybrid` as a dict, among the options."""
    collection = options.pop("collection", None) or material.collection()

    def workspace(model: Any, place: Path) -> Workspace:
        opened = open_student(model) if isinstance(model, str) else model
        return Workspace(collection, opened, str(model), place, precision="fp32", write=lambda line: None)

    options = {"depth": 20, **options, "hybrid": HybridSettings(**options.pop("hybrid", {}))}
    options["sparse"] = sparse and workspace(sparse, folder / "sparse")
    return Searcher(workspace(student or str(material.student), folder), **options)


@pytest.fixture(scope="module")
def searcher(material: Material) -> Searcher:
    return make_searcher(material, material.folder / "kept")


def check_order(searcher: Searcher, *systems: str) -> None:
    for system in systems:
        scores = [getattr(hit, system) for hit in searcher.ask("dense retrieval tokens", 5, rank_by=system)]
        assert scores == sorted(scores, reverse=True) and None not in scores


def test_passages_are_ordered_by_the_system_asked_for(searcher: Searcher) -> None:
    check_order(searcher, "fused", "dense", "bm25")
    hits = searcher.ask("dense", 60, rank_by="fused")
    both = [hit for hit in hits if hit.bm25 is not None and hit.dense is not None]
    assert both and [hit for hit in hits if hit.bm25 is None] and searcher.alpha is not None
    for hit in both:
        assert hit.fused == pytest.approx(searcher.alpha * hit.bm25 + hit.dense, rel=1e-5)  # type: ignore[operator]
    unknown = searcher.ask("检索 zzzzzz", 3)  # answered by the student alone
    assert len(unknown) == 3 and all(hit.bm25 is None and hit.dense is not None for hit in unknown)


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({"hybrid": {"alpha": -1.0}}, {}, r"hybrid\.alpha: -1\.0 must be finite"),
        ({"dims": 4000}, {}, "dims: 4000 is not between 1 and"),
        ({}, {"question": " \n"}, "question: it is blank"),
        ({}, {"k": 0}, "k: 0 is below 1"),
        ({}, {"rank_by": "splade"}, 'rank_by: \'splade\' is not one of "bm25", "dense", "fused"'),
    ],
)
def test_wrong_requests_are_refused(
    material: Material, tmp_path: Path, settings: Any, asked: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_searcher(material, tmp_path, **settings).ask(**{"question": "dense", "k": 3, **asked})


def test_a_reranker_puts_the_best_of_the_fused_list_in_the_order_of_max_sim(
    material: Material, searcher: Searcher
) -> None:
    model = open_teacher(str(material.teacher))
    reranking = make_searcher(material, material.folder / "kept", reranker=model)
    fused = searcher.ask("dense tokens", 20)
    texts = {hit.id: hit.text for hit in fused}
    expected = rerank_run(model, {"q": dict.fromkeys(texts, 0.0)}, texts, {"q": "dense tokens"})["q"]
    hits = reranking.ask("dense tokens", 4)
    assert [hit.id for hit in hits] == list(expected)[:4]
    assert [hit.maxsim for hit in hits] == pytest.approx(list(expected.values())[:4])
    assert [hit.fused for hit in hits] == [one.fused for hit in hits for one in fused if one.id == hit.id]
    assert [hit.id for hit in reranking.ask("dense tokens", 4, rank_by="fused")] == list(texts)[:4]
    tct = Workspace(material.collection(), open_student(str(material.student)), "the student", material.folder / "tct")
    with pytest.raises(ValueError, match="own: the token vectors of the student can't be compared"):
        open_reranker("own", tct)


def test_bm25_may_have_generated_queries(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    names = material.collection().corpus["id"]
    rows = [{"id": name, "queries": ["zebra"] if name == "p7" else []} for name in names]
    write_expansions(rows, tmp_path / "queries", settings={})
    expansion = ExpansionSettings(path=str(tmp_path / "queries"))
    searcher = make_searcher(material, tmp_path / "kept", expansion=expansion)
    assert "* expanded BM25 + dense" in searcher.fusion
    assert [hit.id for hit in searcher.ask("zebra", 5, rank_by="bm25")] == ["p7"]
    # The passages alone have an index of their own beside it.
    assert make_searcher(material, tmp_path / "kept").ask("zebra", 5, rank_by="bm25") == []


def test_a_weight_is_given_or_that_of_the_folders_settings_or_ranks_are_fused_where_nothing_is_judged(
    searcher: Searcher, material: Material, tmp_path: Path
) -> None:
    kept = material.folder / "kept"
    changes: list[dict[str, Any]] = [{"depth": 40}, {"hybrid": {"normalize": True}}]
    assert all(make_searcher(material, kept, **changed).alpha for changed in changes)
    assert len(list(kept.glob("fusion/*.json"))) >= 3
    assert make_searcher(material, kept).alpha == searcher.alpha
    given = make_searcher(material, tmp_path, hybrid={"alpha": 2.0})
    assert given.alpha == 2.0 and not (tmp_path / "fusion").exists()
    collection = material.collection()
    collection.splits.clear()
    unjudged = make_searcher(material, tmp_path, collection=collection)
    assert unjudged.alpha is None and "reciprocal ranks" in unjudged.fusion and unjudged.ask("dense", 2)
    student = open_student(str(material.student))
    with torch.no_grad():
        next(student.parameters()).add_(0.5)
    with pytest.raises(ValueError, match=r"student\.weights"):  # of another student
        make_searcher(material, kept, student=student)


def test_an_index_that_is_not_exact_serves_every_depth(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_tools, "EXACT_UP_TO", 10)
    for depth in (5, 20):
        assert make_searcher(material, tmp_path, depth=depth).ask("dense", 5)
    assert [folder.name for folder in tmp_path.glob("indexes/dense-*")] == ["dense-ivf16-pq16x4fsr-refine-sq8"]


def test_a_question_asked_again_is_encoded_again_unless_it_is_remembered(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    real = Workspace._encoded

    def counted(self: Workspace, texts: list[str], task: str) -> Any:
        encoded.extend(texts)
        return real(self, texts, task)

    monkeypatch.setattr(Workspace, "_encoded", counted)
    student = open_student(str(material.student))
    options: dict[str, Any] = {"precision": "fp32", "write": lambda line: None}
    for remembered, wanted in ((0, "aaba"), (1, "aba"), (2, "ab")):
        workspace = Workspace(material.collection(), student, "student", tmp_path, remembered=remembered, **options)
        searcher = Searcher(workspace, depth=20, hybrid=HybridSettings(alpha=0.5))
        encoded.clear()
        hits = [searcher.ask(question, 5) for question in "aaba"]
        assert "".join(encoded) == wanted and hits[0] == hits[1] == hits[3] != hits[2]


def test_a_nan_vector_of_a_question_is_named(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = np.full((1, 32), np.nan, np.float32)
    monkeypatch.setattr(searcher._workspace, "_encoded", lambda texts, task: spoilt)
    with pytest.raises(ValueError, match="query 'question' has a NaN or infinite vector"):
        searcher.ask("dense", 3)


def test_a_sparse_student_is_fused_with_bm25_or_with_a_dense_one(
    material: Material, splade: str, tmp_path: Path
) -> None:
    found = make_searcher(material, tmp_path, student=splade)
    assert found.systems == ["bm25", "sparse", "fused"] and "* BM25 + sparse student (tuned on" in found.fusion
    check_order(found, *found.systems)
    assert all(hit.dense is None and hit.maxsim is None for hit in found.ask("dense", 5))
    both = make_searcher(material, tmp_path / "both", sparse=splade, hybrid={"alpha": 0.5})
    assert both.fusion == "0.5 * sparse student + dense"
    runs = [
        {"q": {hit.id: getattr(hit, name) for hit in both.ask("dense retrieval tokens", 20, rank_by=name)}}
        for name in ("sparse", "dense")
    ]
    expected = fuse(*runs, 0.5)["q"]
    hits = both.ask("dense retrieval tokens", 10)
    assert [hit.id for hit in hits] == list(expected)[:10]
    np.testing.assert_allclose([hit.fused for hit in hits], list(expected.values())[:10])
    assert any(hit.bm25 is not None for hit in hits)
