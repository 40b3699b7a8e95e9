"""Sparse students and their indexes on the Hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from sentence_transformers import SparseEncoder

from tct_hf import SparseIndex, release
from tct_hf.encoding.weights import weights_digest
from tct_hf.evaluation.report import Report
from tct_hf.retrieval.encode_corpus import describe_model
from tests.hub.models import FACTS, small_report, system
from tests.loopback_hub import LoopbackHub
from tests.splade import tiny_router, tiny_splade
from tests.train_helpers import PASSAGES, QUERIES

pytestmark = pytest.mark.usefixtures("warm_checks")


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_splade(tmp_path_factory.mktemp("splade"))


def loaded(lines: str) -> SparseEncoder:
    namespace: dict[str, Any] = {}
    exec(lines, namespace)
    return namespace["model"].to("cpu")


def test_a_sparse_student_and_its_index_come_back_with_equal_vectors(hub: LoopbackHub, splade: Path) -> None:
    done = release(splade, "tester/splade", facts=FACTS, tag="v1.0")
    assert done.family == "sparse_student"
    before, after = SparseEncoder(str(splade), device="cpu"), loaded(done.loading())
    assert torch.equal(after.encode_query(QUERIES).to_dense(), before.encode_query(QUERIES).to_dense())
    card = hub.files("tester/splade")["README.md"].decode()
    ModelCard(card).validate()
    assert "SparseIndex.build(passages" in card and "None" not in card and "## Vectors and index" not in card
    built_by = describe_model(before, "tester/splade")["model"]
    index = SparseIndex.build(
        before.encode_document(PASSAGES), [f"p{row}" for row in range(len(PASSAGES))], built_by=built_by
    )
    pushed = index.push_to_hub("tester/lists", license="mit", passages="tester/passages")
    back = SparseIndex.from_hub("tester/lists", mmap=True, model=before)
    queries = back.load_model(device="cpu").encode_query(QUERIES)
    (ids, scores), (expected, values) = back.search(queries, 5), index.search(queries, 5)
    assert ids == expected and all(np.array_equal(a, b) for a, b in zip(scores, values, strict=True))
    card = hub.files("tester/lists", kind="datasets")["README.md"].decode()
    DatasetCard(card).validate(repo_type="dataset")
    assert hub.repo("tester/splade").branches["main"] in card and "rows.npy" in pushed.sent
    assert f"| active dims a passage | {index.active_dims:.1f} |" in card and "- splade" in card


def test_a_student_whose_queries_need_no_encoder_is_released_whole_and_without_code(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    router = tiny_router(tmp_path)
    encoder = router / "document_0_Transformer" / "config.json"
    encoder.write_text(json.dumps(json.loads(encoder.read_text()) | {"_name_or_path": "/home/somebody/base"}))
    done = release(router, "tester/router", facts=FACTS)
    assert done.family == "sparse_student" and done.left_out == []
    before, after = SparseEncoder(str(router), device="cpu"), loaded(done.loading())
    for task, texts in (("query", QUERIES), ("document", PASSAGES)):
        assert torch.equal(*(model.encode(texts, task=task).to_dense() for model in (before, after)))
    files = hub.files("tester/router")
    assert b"/home/somebody" not in files["document_0_Transformer/config.json"]
    card = files["README.md"].decode()
    for said in ("no encoder runs for a query", "one 132-dimensional vector", "- splade", "Texts are cut at"):
        assert said in card
    for file, change, message in (
        (encoder, {"auto_map": {}}, "^document_0_Transformer/config.json: auto_map names"),
        (router / "router_config.json", {"types": {"x_0_Own": "mine.Own"}}, "the module mine.Own is not one of"),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            release(router, "tester/other", facts=FACTS)
    assert ("models", "tester/other") not in hub.repos


def report_of(weights: str, *, beside: bool) -> Report:
    active = {"dimension": 30522, "query_active_dims": 21.25, "document_active_dims": 110.5}
    measured = {"name": "y", "weights_sha256": weights, **active}
    report = small_report("0" * 64)
    models = {**report.models, "sparse_student": measured} if beside else {"student": measured, "teacher": None}
    hybrids = {"learned-sparse-bm25": {"alpha": 0.25, "queries": 40, "split": "dev"}}
    tuning = {**report.tuning, **({"hybrids": hybrids} if beside else {})}
    learned = system("learned-sparse", "sparse student (learned)", 0.71)
    return replace(report, models=models, systems=[*report.systems, learned], tuning=tuning)


@pytest.mark.parametrize("beside", [False, True])
def test_the_figures_of_a_report_go_into_the_card(
    hub: LoopbackHub, quick: None, splade: Path, tmp_path: Path, beside: bool
) -> None:
    report_of(weights_digest(SparseEncoder(str(splade), device="cpu")), beside=beside).save(tmp_path / "own")
    release(splade, "tester/splade", facts=FACTS, report=tmp_path / "own")
    card = hub.files("tester/splade")["README.md"].decode()
    for words in ("21.2 a query, 110.5 a passage, of 30,522", "1,536 bytes a passage", "sparse student (learned)"):
        assert words in card
    assert f"alpha {'0.25, tuned on 40' if beside else '0.895, tuned on 500'} dev queries" in card
    results = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results["RR@10"] == 0.71
    for other, name in ((report_of("0" * 64, beside=beside), "y"), (small_report("0" * 64), "x")):
        other.save(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"report: it measured the (sparse )?student '{name}', whose weights are"
        ):
            release(splade, "tester/splade", facts=FACTS, report=tmp_path / name)


def test_a_collapsed_student_is_not_released(hub: LoopbackHub, splade: Path, tmp_path: Path) -> None:
    student = SparseEncoder(str(splade), device="cpu")
    with torch.no_grad():
        student[0].model.cls.predictions.bias.fill_(-1e4)
    student.save_pretrained(str(tmp_path / "zero"))
    with pytest.raises(ValueError, match="all vectors are zero in all dimensions: the student has collapsed"):
        release(tmp_path / "zero", "tester/zero", facts=FACTS)
    assert ("models", "tester/zero") not in hub.repos
