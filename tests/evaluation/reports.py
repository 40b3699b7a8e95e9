from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tct_hf import Report, build_report, read_run
from tct_hf.data.collection import load_collection
from tct_hf.evaluation.maxsim import late_interaction_run, rerank_run
from tct_hf.evaluation.settings import CostSettings, ExpansionSettings, MeasureSettings, ReportSettings
from tests.recipe import drawn
from tests.searching import Material


def tiny_settings(**changes: Any) -> ReportSettings:
    made = ReportSettings(
        measures=MeasureSettings(names=["RR@10", "nDCG@10", "R@20"], depth=20),
        cost=CostSettings(queries=4, teacher_queries=3, warm_up=1, batch_size=2),
        precision="fp32",
    )
    return replace(made, **changes)


def graded(material: Material, **changes: Any) -> dict[str, Any]:
    """Collection and settings with the further split and the generated queries."""
    also = {"graded": ["nDCG@10", "R(rel=2)@20", "R(rel=1)@20"]}
    expansion = ExpansionSettings(path=str(material.folder / "queries"), num_queries=2)
    settings = tiny_settings(**{"also_report": also, "expansion": expansion, **changes})
    return {"collection": load_collection(str(material.beir), also=["graded"]), "settings": settings}


def make(
    material: Material, output: Path, *, student: str | None = None, plots: bool = False, **options: Any
) -> Report:
    """A report with the teacher unless `options` say otherwise."""
    options = {
        "collection": material.collection(),
        "teacher": str(material.teacher),
        "settings": tiny_settings(),
        "write": lambda line: None,
        **options,
    }
    with drawn(plots):
        return build_report(options.pop("collection"), student or str(material.student), output, **options)


def run_of(output: Path, key: str, split: str = "test") -> dict[str, dict[str, float]]:
    return read_run(output / "runs" / ("graded" if split == "graded" else "") / f"{key}.{split}.trec")


def check_late_interaction(model: Any, material: Material, output: Path) -> None:
    """The report's exhaustive search and reranking are those of a model of one vector a token, but for float16."""
    collection = material.collection()
    queries, corpus = collection.splits["test"].queries, collection.corpus
    texts = dict(zip(corpus["id"], corpus["text"], strict=True))
    exhaustive = late_interaction_run(model, list(texts), list(texts.values()), queries, k=20)
    reranked = rerank_run(model, run_of(output, "hybrid"), texts, queries)
    for key, expected in (("teacher", exhaustive), ("reranked", reranked)):
        found = run_of(output, key)
        for query, hits in expected.items():
            common = [name for name in hits if name in found[query]]
            assert len(common) >= 19  # two may have exchanged places at the cut
            assert [found[query][name] for name in common] == pytest.approx([hits[name] for name in common], abs=0.02)
