"""The recipes that search, with a sparse student: alone and beside a dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tct_hf import Report, fuse, load_vectors
from tct_hf.evaluation.searcher import Searcher
from tct_hf.evaluation.settings import HybridSettings
from tct_hf.evaluation.stores import SPARSE_FOLDER, Stores, open_student
from tests.searching import Material, run_recipe, write_material
from tests.splade import tiny_splade


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def splade(material: Material) -> Path:
    return tiny_splade(material.folder / "splade")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(material.folder / "cache"))


def searcher(material: Material, student: Path, sparse: Path | None = None, **options: Any) -> Searcher:
    def stores(path: Path) -> Stores:
        student = open_student(str(path), "cpu")
        place = material.folder / "kept" / path.parent.name / path.name
        return Stores(material.collection(), student, path.name, place, precision="fp32", write=lambda line: None)

    beside = None if sparse is None else stores(sparse)
    return Searcher(stores(student), depth=20, hybrid=HybridSettings(**options), sparse_stores=beside)


def test_the_encoding_recipe_takes_a_sparse_student(material: Material, splade: Path) -> None:
    output = material.folder / "encoded"
    words = [f"--model={splade}", f"--source={material.beir}", f"--output_dir={output}", "--shard_size=16"]
    done = run_recipe("encode", material, *words, "--precision=fp32")
    ids, vectors, manifest = load_vectors(output)
    assert done.stderr == "" and len(ids) == vectors.shape[0] == 60 and len(manifest["shards"]) == 4
    [names, _, figures] = done.stdout.splitlines()[-3:]
    cells = dict(zip(*([cell.strip() for cell in row.split("|")[1:-1]] for row in (names, figures)), strict=True))
    assert cells["active dims"] == f"{vectors.nnz / 60:.1f}"
    refused = run_recipe("encode", material, *words, "--dtype=float16", code=1)
    assert "the weights of sparse vectors are stored as they are" in refused.stderr.splitlines()[-1]


def test_questions_are_answered_with_both_students(material: Material, splade: Path) -> None:
    words = [f"--student={material.student}", f"--sparse_student={splade}", f"--data.source={material.beir}", "--k=3"]
    place = material.folder / "search"
    done = run_recipe("search", material, *words, f"--index_dir={place}", stdin="dense retrieval\n")
    assert "sparse student + dense (tuned on 10 dev queries)" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ") and ". p" in line]
    assert len(lines) == 3
    assert all(f"   {name} " in line for line in lines for name in ("BM25", "sparse student", "dense", "fused"))
    assert (place / SPARSE_FOLDER / "indexes" / "learned-sparse").is_dir()
    refused = run_recipe("search", material, f"--student={splade}", *words[2:], "--rank_by=dense", code=2)
    assert "rank_by: there is no dense student to order by" in refused.stderr


def test_one_command_reports_both_students(material: Material, splade: Path) -> None:
    output = material.folder / "report"
    options = ["--measures.names=[RR@10]", "--measures.depth=20", "--cost.queries=3", "--cost.warm_up=1"]
    words = [f"--student={material.student}", f"--sparse_student={splade}", f"--data.source={material.beir}"]
    done = run_recipe("evaluate", material, *words, f"--output_dir={output}", *options)
    report = Report.load(output)
    assert "dense-learned-sparse" in [system.key for system in report.systems]
    assert report.table() in done.stdout and report.settings["sparse_student"] == str(splade)
    assert "sparse student (learned)" in done.stdout and "active dims a query" in done.stdout
    assert json.loads((output / "report.json").read_text())["models"]["sparse_student"]["query_active_dims"] > 0


def test_a_sparse_student_alone_is_fused_with_bm25(material: Material, splade: Path) -> None:
    found = searcher(material, splade)
    assert found.systems == ["bm25", "sparse", "fused"] and "* BM25 + sparse student (tuned on" in found.fusion
    for system in ("fused", "sparse", "bm25"):
        scores = [getattr(hit, system) for hit in found.ask("dense retrieval tokens", 5, rank_by=system)]
        assert scores == sorted(scores, reverse=True) and None not in scores
    assert all(hit.dense is None and hit.maxsim is None for hit in found.ask("dense", 5))
    with pytest.raises(ValueError, match='rank_by: \'dense\' is not one of "bm25", "sparse", "fused"'):
        found.ask("dense", 5, rank_by="dense")


def test_two_students_are_fused_with_each_other(material: Material, splade: Path) -> None:
    both = searcher(material, material.student, splade, alpha=0.5)
    assert both.fusion == "0.5 * sparse student + dense"
    question = {"question": "dense retrieval tokens"}
    runs = [both._found_by[name].run(question) for name in ("sparse", "dense")]
    expected = fuse(*runs, 0.5)["question"]
    hits = both.ask(question["question"], 10)
    assert [hit.id for hit in hits] == list(expected)[:10]
    np.testing.assert_allclose([hit.fused for hit in hits], list(expected.values())[:10])  # type: ignore[arg-type]
    assert any(hit.bm25 is not None for hit in hits)
