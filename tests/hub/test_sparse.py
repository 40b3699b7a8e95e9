"""Sparse students and their indexes on the Hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from sentence_transformers import SparseEncoder

from tct_hf import SparseIndex, release
from tct_hf.evaluation.report import Report
from tct_hf.hub.cards import CardFacts
from tct_hf.retrieval.encode import describe_model
from tests.hub.models import small_report, system
from tests.loopback_hub import LoopbackHub
from tests.splade import tiny_router, tiny_splade
from tests.train_helpers import PASSAGES, QUERIES

FACTS = CardFacts(license="mit", base_model="google-bert/bert-base-uncased", training_data="words")
IDS = [f"p{row}" for row in range(len(PASSAGES))]


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_splade(tmp_path_factory.mktemp("splade"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an interpreter of its own: for tests of what is pushed."""
    monkeypatch.setattr("tct_hf.hub.release._check", lambda staging, family, source: None)


def report_of(weights: str, *, beside: bool) -> Report:
    measured: dict[str, Any] = {
        "name": "y",
        "weights_sha256": weights,
        "dimension": 30522,
        "query_active_dims": 21.25,
        "document_active_dims": 110.5,
    }
    report = small_report("0" * 64)
    models = {**report.models, "sparse_student": measured} if beside else {"student": measured, "teacher": None}
    learned = system("learned-sparse", "sparse student (learned)", 0.71)
    tuning = dict(report.tuning)
    if beside:
        tuning["hybrids"] = {"learned-sparse-bm25": {"alpha": 0.25, "queries": 40, "split": "dev"}}
    return replace(report, models=models, systems=[*report.systems, learned], tuning=tuning)


def test_a_sparse_student_comes_back_with_equal_vectors(hub: LoopbackHub, splade: Path) -> None:
    done = release(splade, "tester/splade", facts=FACTS, tag="v1.0")
    assert done.family == "sparse_student"
    namespace: dict[str, Any] = {}
    exec(done.loading(), namespace)
    before, after = SparseEncoder(str(splade), device="cpu"), namespace["model"].to("cpu")
    assert torch.equal(after.encode_query(QUERIES).to_dense(), before.encode_query(QUERIES).to_dense())
    card = hub.files("tester/splade")["README.md"].decode()
    ModelCard(card).validate()
    assert "SparseIndex.build(passages" in card and "None" not in card and "## Vectors and index" not in card


def test_a_student_whose_queries_need_no_encoder_is_released_whole(hub: LoopbackHub, tmp_path: Path) -> None:
    router = tiny_router(tmp_path)
    named = router / "document_0_Transformer" / "config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"_name_or_path": "/home/somebody/base"}))
    done = release(router, "tester/router", facts=FACTS)
    assert done.family == "sparse_student" and done.left_out == []
    namespace: dict[str, Any] = {}
    exec(done.loading(), namespace)
    before, after = SparseEncoder(str(router), device="cpu"), namespace["model"].to("cpu")
    for task, texts in (("query", QUERIES), ("document", PASSAGES)):
        assert torch.equal(*(model.encode(texts, task=task).to_dense() for model in (before, after)))
    files = hub.files("tester/router")
    assert b"/home/somebody" not in files["document_0_Transformer/config.json"]
    card = files["README.md"].decode()
    assert "no encoder runs for a query" in card and "one 132-dimensional vector" in card and "- splade" in card
    assert "Texts are cut at" in card and "None" not in card


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "router_config.json",
            {"types": {"document_0_Transformer": "mine.Own"}, "structure": {}},
            "the module mine.Own is not one of",
        ),
        (
            "document_0_Transformer/config.json",
            {"auto_map": {}},
            "^document_0_Transformer/config.json: auto_map names",
        ),
    ],
)
def test_code_within_a_router_is_not_released(
    hub: LoopbackHub, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    router = tiny_router(tmp_path)
    (router / file).write_text(json.dumps(json.loads((router / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        release(router, "tester/router", facts=FACTS)
    assert ("models", "tester/router") not in hub.repos


@pytest.mark.parametrize("beside", [False, True])
def test_the_figures_of_a_report_go_into_the_card(
    hub: LoopbackHub, quick: None, splade: Path, tmp_path: Path, beside: bool
) -> None:
    weights = describe_model(SparseEncoder(str(splade), device="cpu"))["model"]["weights_sha256"]
    report_of(weights, beside=beside).save(tmp_path / "own")
    release(splade, "tester/splade", facts=FACTS, report=tmp_path / "own")
    card = hub.files("tester/splade")["README.md"].decode()
    for words in ("21.2 a query, 110.5 a passage, of 30,522", "1,536 bytes a passage", "sparse student (learned)"):
        assert words in card
    assert f"alpha {'0.25, tuned on 40' if beside else '0.895, tuned on 500'} dev queries" in card
    results = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results["RR@10"] == 0.71
    report_of("0" * 64, beside=beside).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"report: it measured the (sparse )?student 'y', whose weights are not"):
        release(splade, "tester/splade", facts=FACTS, report=tmp_path / "other")
    small_report("0" * 64).save(tmp_path / "none")
    with pytest.raises(ValueError, match="report: it measured the student 'x', whose weights are not"):
        release(splade, "tester/splade", facts=FACTS, report=tmp_path / "none")


def test_a_collapsed_student_is_not_released(hub: LoopbackHub, splade: Path, tmp_path: Path) -> None:
    student = SparseEncoder(str(splade), device="cpu")
    with torch.no_grad():
        student[0].model.cls.predictions.bias.fill_(-1e4)
    student.save_pretrained(str(tmp_path / "zero"))
    with pytest.raises(ValueError, match="is zero in all dimensions: the student has collapsed"):
        release(tmp_path / "zero", "tester/zero", facts=FACTS)
    assert ("models", "tester/zero") not in hub.repos


def test_a_student_that_is_another_in_a_fresh_interpreter_is_not_released(
    hub: LoopbackHub, splade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf.hub import release as releasing

    shutil.copytree(splade, tmp_path / "model")

    def other(command: list[str], **options: Any) -> Any:
        for number, count in enumerate((1, 1)):
            np.save(Path(command[-1]) / f"{number}.npy", np.ones((count, 132), np.float32))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(releasing.subprocess, "run", other)
    with pytest.raises(ValueError, match="the query vector of 'a question' is another in a fresh interpreter"):
        release(tmp_path / "model", "tester/splade", facts=FACTS)


def test_a_sparse_index_comes_back_with_the_model_that_built_it(hub: LoopbackHub, quick: None, splade: Path) -> None:
    release(splade, "tester/splade", facts=FACTS)
    model = SparseEncoder(str(splade), device="cpu")
    built_by = describe_model(model, "tester/splade")["model"]
    index = SparseIndex.build(model.encode_document(PASSAGES), IDS, built_by=built_by)
    pushed = index.push_to_hub("tester/lists", license="mit", tag="v1.0", passages="tester/passages")
    commit = hub.repo("tester/splade").branches["main"]
    back = SparseIndex.from_hub("tester/lists", revision="v1.0", mmap=True, model=model)
    assert back.built_by is not None and back.built_by["revision"] == commit
    queries = back.load_model(device="cpu").encode_query(QUERIES)
    (ids, scores), (expected, values) = back.search(queries, 5), index.search(queries, 5)
    assert ids == expected and all(np.array_equal(a, b) for a, b in zip(scores, values, strict=True))
    card = hub.files("tester/lists", kind="datasets")["README.md"].decode()
    DatasetCard(card).validate(repo_type="dataset")
    assert commit in card and 'SparseIndex.from_hub("tester/lists", revision="v1.0")' in card
    assert f"| active dims a passage | {index.active_dims:.1f} |" in card and "- splade" in card
    assert "rows.npy" in pushed.sent and "revision" not in (index.built_by or {})

    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    with pytest.raises(ValueError, match="their vectors don't compare"):
        SparseIndex.from_hub("tester/lists", model=model)
    index.built_by = None
    with pytest.raises(ValueError, match="is no Hub id"):
        index.push_to_hub("tester/lists", license="mit")
