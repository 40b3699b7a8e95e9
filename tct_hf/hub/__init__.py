"""The Hub: convert what was published, release what was trained, load either anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tct_hf.hub.access import HubError as HubError
    from tct_hf.hub.access import fetch_checkpoint as fetch_checkpoint
    from tct_hf.hub.cards import CardFacts as CardFacts
    from tct_hf.hub.convert import convert_checkpoint as convert_checkpoint
    from tct_hf.hub.convert import load_student as load_student
    from tct_hf.hub.releasing import release as release

_PUBLIC = {
    "CardFacts": "cards",
    "HubError": "access",
    "convert_checkpoint": "convert",
    "fetch_checkpoint": "access",
    "load_student": "convert",
    "release": "releasing",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf.hub' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.hub.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
