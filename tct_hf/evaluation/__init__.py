"""Measures of what was retrieved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.evaluation.effectiveness import Evaluation as Evaluation
    from tct_hf.evaluation.effectiveness import evaluate_run as evaluate_run

_PUBLIC = {"Evaluation": "effectiveness", "evaluate_run": "effectiveness"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.evaluation.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
