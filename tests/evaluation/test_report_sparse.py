"""Reports of sparse students: alone, and beside a dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SparseEncoder

from tct_hf import Report, build_report, fuse, read_run
from tct_hf.evaluation.report_settings import CostSettings, HybridSettings, MeasureSettings, ReportSettings
from tct_hf.evaluation.stores import Stores, open_student
from tests.hub.models import TEXTS, published_tct, pyserini_vectors
from tests.searching import Material, write_material
from tests.splade import tiny_splade

ALONE = ["bm25", "learned-sparse", "learned-sparse-bm25"]
BOTH = ["bm25", "dense-exact", "dense-ann", "hybrid", *ALONE[1:], "dense-learned-sparse"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def splade(material: Material) -> Path:
    return tiny_splade(material.folder / "splade")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(material.folder / "cache"))


def make(material: Material, student: Path, output: str, **options: Any) -> Report:
    settings = ReportSettings(
        measures=MeasureSettings(names=["RR@10", "R@20"], depth=20),
        cost=CostSettings(queries=4, teacher_queries=3, warm_up=1, batch_size=2),
        precision="fp32",
    )
    options = {"settings": replace(settings, **options.pop("changes", {})), "write": lambda line: None, **options}
    return build_report(material.collection(), str(student), material.folder / output, **options)


@pytest.fixture(scope="module")
def both(material: Material, splade: Path) -> Report:
    return make(material, material.student, "both", sparse_student=str(splade))


@pytest.fixture(scope="module")
def alone(material: Material, splade: Path) -> Report:
    return make(material, splade, "alone", teacher=str(material.teacher))


def test_a_sparse_student_alone_is_searched_fused_and_reranked(alone: Report, both: Report) -> None:
    assert [system.key for system in alone.systems] == [*ALONE, "teacher", "reranked"]
    assert alone.baseline == "learned-sparse" and alone.tuning["ann"] is None
    assert alone.system("learned-sparse").title == "sparse student (learned)"
    assert alone.system("learned-sparse-bm25").title.startswith("sparse student + BM25, alpha ")
    assert list(alone.system("learned-sparse").cost["latency"]) == [  # type: ignore[index]
        "query encoding",
        "sparse search",
        "total",
    ]
    for key in ALONE:
        assert alone.system(key).effectiveness == both.system(key).effectiveness


def test_both_students_are_reported_and_each_pair_is_tuned(both: Report, material: Material) -> None:
    assert [system.key for system in both.systems] == BOTH and both.baseline == "dense-exact"
    stages = list(both.system("dense-learned-sparse").cost["latency"])  # type: ignore[index]
    assert stages == [
        "dense query encoding",
        "dense search",
        "sparse query encoding",
        "sparse search",
        "fusion",
        "total",
    ]
    hybrids = both.tuning["hybrids"]
    assert list(hybrids) == ["hybrid", "learned-sparse-bm25", "dense-learned-sparse"]
    assert both.tuning["hybrid"] == hybrids["hybrid"] and hybrids["hybrid"]["split"] == "dev"
    runs = {key: read_run(material.folder / "both" / "runs" / f"{key}.test.trec") for key in BOTH}
    for key, weighted, first in (
        ("hybrid", "bm25", "dense-exact"),
        ("learned-sparse-bm25", "bm25", "learned-sparse"),
        ("dense-learned-sparse", "learned-sparse", "dense-exact"),
    ):
        assert runs[key] == fuse(runs[weighted], runs[first], hybrids[key]["alpha"], k=20)


def test_the_run_is_that_of_the_whole_product(both: Report, material: Material, splade: Path) -> None:
    model = SparseEncoder(str(splade), device="cpu")
    collection = material.collection()
    run = read_run(material.folder / "both" / "runs" / "learned-sparse.test.trec")
    queries = collection.splits["test"].queries
    passages = model.encode_document(list(collection.corpus["text"])).to_dense().numpy()
    vectors = model.encode_query(list(queries.values())).to_dense().numpy()
    for scores, found in zip(vectors @ passages.T, run.values(), strict=True):
        np.testing.assert_allclose(list(found.values()), np.sort(scores)[::-1][: len(found)], rtol=1e-4)


def test_active_dims_and_bytes_are_told(both: Report, alone: Report, material: Material, splade: Path) -> None:
    model = SparseEncoder(str(splade), device="cpu")
    collection = material.collection()
    passages = model.encode_document(list(collection.corpus["text"])).to_dense()
    queries = model.encode_query(list(collection.splits["test"].queries.values())).to_dense()
    for report, role in ((both, "sparse_student"), (alone, "student")):
        measured = report.models[role]
        assert measured["document_active_dims"] == pytest.approx((passages > 0).sum(1).float().mean().item())
        assert measured["query_active_dims"] == pytest.approx((queries > 0).sum(1).float().mean().item())
        assert measured["name"] == str(splade) and measured["dimension"] == passages.shape[1]
        cost = report.system("learned-sparse").cost
        assert cost is not None
        assert cost["disk_bytes_per_passage"] > 8 * measured["document_active_dims"]
        assert cost["memory_bytes_per_passage"] > 8 * measured["document_active_dims"]
        text = report.markdown()
        assert f"{measured['document_active_dims']:.1f} a passage" in text and "query active dims" in text
    assert "query_active_dims" not in both.models["student"]
    assert any("alpha * BM25 + sparse student, alpha" in note for note in both.notes)
    assert any("alpha * sparse student + dense, alpha" in note for note in both.notes)


def test_a_second_call_makes_nothing_anew(both: Report, material: Material, splade: Path) -> None:
    said: list[str] = []
    again = make(material, material.student, "both", sparse_student=str(splade), write=said.append)
    assert again == both and not [line for line in said if "search " in line or "time " in line]
    assert Report.load(material.folder / "both") == both
    with pytest.raises(ValueError, match="sparse_student"):
        make(material, material.student, "both")


def test_a_given_alpha_is_that_of_the_first_student_and_bm25(material: Material, splade: Path) -> None:
    changes = {"hybrid": HybridSettings(alpha=0.5)}
    report = make(material, material.student, "given", sparse_student=str(splade), changes=changes)
    assert report.tuning["hybrid"]["alpha"] == 0.5 and report.tuning["hybrid"]["split"] is None
    assert report.tuning["hybrids"]["dense-learned-sparse"]["split"] == "dev"


def test_students_in_the_wrong_place_are_refused(material: Material, splade: Path) -> None:
    with pytest.raises(ValueError, match="which is sparse itself"):
        make(material, splade, "wrong", sparse_student=str(splade))
    with pytest.raises(ValueError, match="is no SparseEncoder"):
        make(material, material.student, "wrong", sparse_student=str(material.student))
    for student, baseline in ((splade, "dense-exact"), (material.student, "learned-sparse")):
        changes = {"measures": MeasureSettings(names=["RR@10"], depth=20, baseline=baseline)}
        with pytest.raises(ValueError, match=rf"measures\.baseline: there is no row '{baseline}'; there are bm25, "):
            make(material, student, "wrong", changes=changes)


def test_a_sparse_student_that_compares_by_cosine_is_refused(material: Material, splade: Path, tmp_path: Path) -> None:
    student = open_student(str(splade), "cpu")
    student.similarity_fn_name = "cosine"
    with pytest.raises(ValueError, match="of a sparse student only dot can be searched"):
        Stores(material.collection(), student, "student", tmp_path)


def test_a_bare_tct_checkpoint_is_searched_with_its_own_vectors(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    published = published_tct(tmp_path / "tct_colbert-msmarco")
    student = open_student(str(published), "cpu")
    np.testing.assert_allclose(
        student.encode_query(TEXTS[:3]), pyserini_vectors(published, TEXTS[:3], "query"), atol=1e-5
    )
