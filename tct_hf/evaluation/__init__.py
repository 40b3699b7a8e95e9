"""Measures of what was retrieved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.evaluation.effectiveness import Evaluation as Evaluation
    from tct_hf.evaluation.effectiveness import evaluate_run as evaluate_run
    from tct_hf.evaluation.efficiency import Efficiency as Efficiency
    from tct_hf.evaluation.efficiency import measure_efficiency as measure_efficiency
    from tct_hf.evaluation.report import Report as Report
    from tct_hf.evaluation.reporting import build_report as build_report
    from tct_hf.evaluation.reranking import rerank_run as rerank_run
    from tct_hf.evaluation.significance import Comparison as Comparison
    from tct_hf.evaluation.significance import compare_runs as compare_runs

_PUBLIC = {
    "Comparison": "significance",
    "Efficiency": "efficiency",
    "Evaluation": "effectiveness",
    "Report": "report",
    "build_report": "reporting",
    "compare_runs": "significance",
    "evaluate_run": "effectiveness",
    "measure_efficiency": "efficiency",
    "rerank_run": "reranking",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.evaluation.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
