"""PostgreSQL with pgvector as an index: shards stored in transactions, searched exactly or through an HNSW graph."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np

from tct_hf.retrieval.engines.base import EngineIndex, Rows, check_name
from tct_hf.retrieval.index import best_first
from tct_hf.settings import hide_passwords

# What is stored of all tables, and of their shards.
_TABLES = """
create extension if not exists vector;
create table if not exists tct_hf_indexes (name text primary key, about jsonb not null);
create table if not exists tct_hf_shards (
    name text references tct_hf_indexes on delete cascade, number int, digest text not null,
    primary key (name, number)
);
"""
# Of a shard, or of the last change of rows of none.
_NOTE = """
insert into tct_hf_shards values (%s, coalesce(%s, -1), %s)
on conflict (name, number) do update set digest = excluded.digest
"""
_MOST_SEARCHED = 1000  # pgvector's limit of ef_search
_ROWS = "id text primary key, shard int, vector {}({}) not null, text text, metadata jsonb"


class PgVectorIndex(EngineIndex):
    """Passage vectors in a PostgreSQL table (columns id, vector, text, metadata), found by inner product.

    Options of `push`, for a new table: m (16) and ef_construction (64) of the graph. Threads may share an index, which
    they search in turn; a connection that the server has ended is made again by the call after the one that fails.
    Equal scores are ordered by id: among all passages in exact search, otherwise among those found.

    Attributes:
        exact: search every passage instead of the HNSW graph.
        ef_search: candidates that the graph looks at, 1 to 1000; the more, the better and slower.
        where: an SQL condition on the columns, such as "metadata->>'lang' = 'de'", that every passage found meets.
    """

    engine = "PostgreSQL"

    def __init__(self, url: str, connection: Any, name: str, about: Mapping[str, Any]) -> None:
        super().__init__(name, about)
        self._url, self._connection, self._alone = url, connection, threading.RLock()

    @classmethod
    def _connected(cls, url: str | None, name: str, about: Mapping[str, Any] | None) -> PgVectorIndex:
        check_name(name)
        if about is not None and about["dimension"] > (most := 4000 if about["half"] else 2000):
            fix = "encode fewer with truncate_dim" if about["half"] else "push with half=True, or encode fewer"
            raise ValueError(f"dimension: {about['dimension']} where pgvector's graph takes {most}; {fix}")
        connection = _connect(url or "", make=about is not None)
        with _plainly():
            if about is not None:
                with connection.transaction():
                    new = connection.execute(
                        "insert into tct_hf_indexes values (%s, %s) on conflict do nothing returning name",
                        (name, json.dumps(about)),
                    ).fetchone()
                    if new:
                        connection.execute(f"create table {name} ({_ROWS.format(_kind(about), about['dimension'])})")
                        # Options that pgvector refuses are refused before anything is stored.
                        connection.execute(_graph(name, about))
                        connection.execute(f"drop index {name}_graph")
            there = connection.execute("select to_regclass('tct_hf_indexes')").fetchone()[0]
            query = "select about from tct_hf_indexes where name = %s"
            found = there and connection.execute(query, (name,)).fetchone()
        if not found:
            raise ValueError(f"name: there is no table {name} of tct_hf in this database; push one first")
        return cls(url or "", connection, name, found[0])

    @contextmanager
    def _using(self) -> Iterator[Any]:
        """The connection, for one thread at a time."""
        with self._alone, _plainly():
            if self._connection.closed:
                self._connection = _connect(self._url)
            yield self._connection

    def __len__(self) -> int:
        return int(self._ask(f"select count(*) from {self.name}")[0][0])

    def _ask(self, query: str, values: Any = None) -> list[Any]:
        with self._using() as connection:
            cursor = connection.execute(query, values)
            return list(cursor.fetchall()) if cursor.description else []

    @property
    def nbytes(self) -> int:
        return int(self._ask("select pg_total_relation_size(%s::regclass)", (self.name,))[0][0])

    def _digests(self) -> dict[int, str]:
        return dict(self._ask("select number, digest from tct_hf_shards where name = %s", (self.name,)))

    def _store(self, number: int | None, digest: str, rows: Rows) -> None:
        from psycopg.types.json import Jsonb

        with self._using() as connection, connection.transaction(), connection.cursor() as cursor:
            # Not in one statement, which would compare every row with every id.
            stored = "exists (select from tct_hf_shards where name = %s and number = %s)"
            cursor.execute(f"delete from {self.name} where shard = %s and {stored}", (number, self.name, number))
            cursor.execute(f"delete from {self.name} where id = any(%s)", (list(rows.ids),))
            columns = "(id, shard, vector, text, metadata)"
            with cursor.copy(f"copy {self.name} {columns} from stdin with (format binary)") as copy:
                copy.set_types(["text", "int4", _kind(self.about), "text", "jsonb"])
                for passage_id, vector, text, more in zip(*rows, strict=True):
                    if any("\0" in one for one in (passage_id, text, *(more or {}).values()) if isinstance(one, str)):
                        raise ValueError(f"corpus: passage {passage_id!r} has a NUL, which PostgreSQL has not; cut it")
                    value = None if more is None else Jsonb(more)
                    copy.write_row((passage_id, number, self._value(vector), text, value))
            cursor.execute(_NOTE, (self.name, number, digest))

    def _forget(self, numbers: Iterable[int]) -> None:
        gone = list(numbers)
        with self._using() as connection, connection.transaction():
            self._ask(f"delete from {self.name} where shard = any(%s)", (gone,))
            self._ask("delete from tct_hf_shards where name = %s and number = any(%s)", (self.name, gone))

    def _finish(self) -> None:
        self._ask(_graph(self.name, self.about))
        self._ask(f"analyze {self.name}")

    def delete(self, ids: Sequence[str]) -> None:
        with self._using() as connection, connection.transaction():
            self._ask(f"delete from {self.name} where id = any(%s)", (list(ids),))
            self._ask(_NOTE, (self.name, None, uuid4().hex))

    def drop(self) -> None:
        with self._using() as connection, connection.transaction():
            self._ask(f"drop table {self.name}")
            self._ask("delete from tct_hf_indexes where name = %s", (self.name,))

    def vectors(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self._ask(f"select id, vector from {self.name} where id = any(%s)", (list(ids),))
        return {
            name: np.asarray(getattr(vector, "to_numpy", lambda v=vector: v)(), np.float32) for name, vector in rows
        }

    @contextmanager
    def _searching(self, k: int) -> Iterator[str]:
        """A transaction with the settings of a search, and its statement: the vector twice, and k."""
        # The planner would rather sort the whole table than look at many candidates of the graph.
        settings: dict[str, Any] = {"jit": "off", "enable_indexscan" if self.exact else "enable_seqscan": "off"}
        if not self.exact:
            looked_at = min(max(self.ef_search, k), _MOST_SEARCHED)
            settings |= {"hnsw.ef_search": looked_at, "hnsw.iterative_scan": "strict_order"}
        where = f" where {self.where}".replace("%", "%%") if self.where else ""  # % is psycopg's sign of a value
        distance = f"vector <#> %s::{_kind(self.about)}"
        with self._using() as connection, connection.transaction():
            connection.execute("; ".join(f"set local {key} = {value}" for key, value in settings.items()))
            yield (
                f"select id, -({distance}) from {self.name}{where} order by {distance}{', id' if self.exact else ''} "
                "limit %s"
            )

    def _search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        ids, scores = [], []
        with self._searching(k) as statement:
            with self._connection.pipeline():
                answers = [
                    self._connection.execute(statement, (query, query, k), prepare=True, binary=True)
                    for query in map(self._value, queries)
                ]
            for answer in answers:
                rows = answer.fetchall()
                found, values = [row[0] for row in rows], np.array([row[1] for row in rows], np.float32)
                found, values = best_first(found, values, k)
                ids.append(found)
                scores.append(values)
        return ids, scores

    def _value(self, vector: np.ndarray) -> Any:
        from pgvector import HalfVector

        return HalfVector(vector) if self.about["half"] else vector

    def uses_graph(self) -> bool:
        query = self._value(np.ones(self.dimension, np.float32))
        with self._searching(10) as statement:
            plan = self._ask(f"explain {statement}", (query, query, 10))
        return any(f"using {self.name}_graph" in line for (line,) in plan)


def _kind(about: Mapping[str, Any]) -> str:
    return "halfvec" if about["half"] else "vector"


def _graph(name: str, about: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} = {int(about[key])}" for key in PgVectorIndex.options)
    return (
        f"create index if not exists {name}_graph on {name} using hnsw (vector {_kind(about)}_ip_ops) with ({options})"
    )


def _connect(url: str, make: bool = False) -> Any:
    try:
        import psycopg
        from pgvector.psycopg import register_vector
    except ImportError as error:
        fix = "pip install 'tct_hf[postgres]'"
        raise ImportError(f"PgVectorIndex needs psycopg and pgvector ({error}): {fix}.") from error
    try:
        host = str(psycopg.conninfo.conninfo_to_dict(url).get("host"))
    except psycopg.ProgrammingError:
        host = "@"
    if "@" in host:  # what libpq says has a part of the password
        raise ValueError(
            "url: can't be read; write postgresql://user:password@host:port/database, special characters as in %2F"
        )
    with _plainly():
        connection = psycopg.connect(url, autocommit=True)
        if make:  # whoever only searches may have no right to
            with connection.transaction():
                connection.execute("select pg_advisory_xact_lock(7262831)")  # several pushes may begin together
                connection.execute(_TABLES)
        register_vector(connection)
        return connection


@contextmanager
def _plainly() -> Iterator[None]:
    """What the server says, without the password that libpq repeats."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise OSError(hide_passwords(f"PostgreSQL: {' '.join(str(error).split())}")) from None
