"""What tests of reports share: small settings, and a report of the small collection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tct_hf import Report, build_report
from tct_hf.data.collection import load_collection
from tct_hf.evaluation.settings import CostSettings, ExpansionSettings, MeasureSettings, ReportSettings
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


def make(material: Material, output: Path, *, student: str | None = None, **options: Any) -> Report:
    """A report with the teacher unless `options` say otherwise."""
    options = {
        "collection": material.collection(),
        "teacher": str(material.teacher),
        "settings": tiny_settings(),
        "write": lambda line: None,
        **options,
    }
    return build_report(options.pop("collection"), student or str(material.student), output, **options)
