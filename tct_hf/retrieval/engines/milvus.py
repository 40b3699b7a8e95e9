"""Milvus as an index: rows kept by id, searched through its graph or exactly, and a ledger of the shards stored."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np

from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.engines.base import EngineIndex, Rows, check_name
from tct_hf.retrieval.index import best_first
from tct_hf.settings import hide_passwords

_Field = tuple[str, Any, dict[str, Any]]  # name, type, and the type's parameters
_KINDS = ("HNSW", "AUTOINDEX", "FLAT")
_MESSAGE_BYTES = 2**24  # Milvus takes 64 MB
_AT_ONCE = 2**18  # passages that one answer names, at most
_MOST_LOOKED_AT = 32_768  # Milvus's limit of ef
_LONGEST = 65_535  # bytes of a string in Milvus
_LITE = "milvus_lite"
_HAS_NO_HALF = re.compile(rf"{_LITE}|v?2\.[0-3]\b")
# Numbers of the ledger's entries that say what is stored of the collection, and identify the last change of other rows
# than of shards.
_ABOUT, _CHANGED = -1, -2


class MilvusIndex(EngineIndex):
    """Passage vectors in a Milvus collection (fields id, shard, vector, text, metadata), found by inner product.

    Options of `push`, for a new collection: index ("HNSW", "AUTOINDEX", or "FLAT", which is exact), and of HNSW m (16)
    and ef_construction (64). Half precision needs Milvus 2.4. Equal scores are ordered by id among those found. The
    server's user and password or token are taken from the URL or from MILVUS_TOKEN ("user:password", or a token), the
    URL itself from MILVUS_URI.

    Attributes:
        exact: search every passage; with a graph, by reading all vectors over the wire, which is for checks only.
        ef_search: candidates that the graph looks at, up to 32,768; the more, the better and slower.
        where: an expression of Milvus's on the fields, such as 'metadata["lang"] == "de"', that every passage found
            meets.
    """

    engine = "Milvus"
    options: ClassVar[Mapping[str, Any]] = {**EngineIndex.options, "index": "HNSW"}

    def __init__(self, client: Any, name: str, about: Mapping[str, Any]) -> None:
        super().__init__(name, about)
        self._client, self._ledger = client, _ledger(name)
        self._is_new = False

    @classmethod
    def _connected(cls, url: str | None, name: str, about: Mapping[str, Any] | None) -> MilvusIndex:
        check_name(name)
        if about is not None and about["index"] not in _KINDS:
            raise ValueError(f"index: {about['index']!r}; use {', '.join(_KINDS)}")
        try:
            from pymilvus import DataType, MilvusClient
        except ImportError as error:
            raise ImportError(f"{cls.__name__} needs pymilvus ({error}): pip install 'tct_hf[milvus]'.") from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints all that it raises, with tracebacks
        with _plainly():
            address = url or os.environ.get("MILVUS_URI") or "http://localhost:19530"
            try:
                # A server may hang up on a client that pings it without a call, as this one does when left to itself.
                quiet = {"grpc.keepalive_permit_without_calls": False}
                client = MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""), grpc_options=quiet)
            except ValueError:  # may repeat a part of the password
                raise ValueError(
                    "url: can't be read; write http://user:password@host:port, with special characters as in %2F"
                ) from None
            ledger, is_new = _ledger(name), not client.has_collection(name)
            if is_new and about is None:
                raise ValueError(f"name: there is no collection {name} in this database; push one first")
            version = client.get_server_version()
            if about is not None and about["half"] and _HAS_NO_HALF.match(version):  # 2.3 takes it, and breaks down
                raise ValueError(f"half: this server ({version}) has no half precision, Milvus 2.4 has; push without")
            if is_new:  # a ledger left without its rows would say that they are there
                client.drop_collection(ledger)
            elif not client.has_collection(ledger):
                raise ValueError(f"name: collection {name} was not made by tct_hf; name another")
            fields: list[_Field] = [
                ("number", DataType.INT64, {"is_primary": True}),
                ("digest", DataType.VARCHAR, {"max_length": _LONGEST}),
                ("vector", DataType.FLOAT_VECTOR, {"dim": 2}),  # which every collection has
            ]
            _ensure(client, ledger, fields, {"index": "FLAT"})
            if is_new:
                about = dict(about or {})
                client.upsert(ledger, [_entry(_ABOUT, json.dumps(about))])
            else:
                where = f"number == {_ABOUT}"
                found = client.query(ledger, where, output_fields=["digest"], consistency_level="Strong")
                about = dict(json.loads(found[0]["digest"]))
            vector = DataType.FLOAT16_VECTOR if about["half"] else DataType.FLOAT_VECTOR
            fields = [
                ("id", DataType.VARCHAR, {"is_primary": True, "max_length": _LONGEST}),
                ("shard", DataType.INT64, {}),
                ("vector", vector, {"dim": about["dimension"]}),
                ("text", DataType.VARCHAR, {"max_length": _LONGEST}),
                ("metadata", DataType.JSON, {}),
            ]
            _ensure(client, name, fields, about)
        index = cls(client, name, about)
        index._is_new = is_new
        return index

    def __len__(self) -> int:
        return int(self._ask(self.name, "", "count(*)")[0]["count(*)"])

    def _ask(self, name: str, where: str, *fields: str) -> list[Any]:
        with _plainly():
            # Strong, so that it sees what any client has written before.
            return list(self._client.query(name, where, output_fields=list(fields), consistency_level="Strong"))

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors and links, by calculation: Milvus does not say."""
        links = 8 * self.about["m"] if self._has_graph else 0
        return len(self) * (self.dimension * (2 if self.about["half"] else 4) + links)

    @property
    def _has_graph(self) -> bool:
        return bool(self.about["index"] != "FLAT")

    def _digests(self) -> dict[int, str]:
        rows = self._ask(self._ledger, f"number != {_ABOUT}", "number", "digest")
        return {row["number"]: row["digest"] for row in rows}

    def _store(self, number: int | None, digest: str, rows: Rows) -> None:
        # Milvus has no transactions: a shard is in the ledger only while its rows are whole, and can be stored again.
        if number is not None and not self._is_new:
            self._forget([number])
        with _plainly():
            if number is None:  # first, so that what is stopped has been noted
                self._client.upsert(self._ledger, [_entry(_CHANGED, digest)])
            for batch in self._batches(-1 if number is None else number, rows):
                self._client.upsert(self.name, batch)
            if number is not None:
                self._client.upsert(self._ledger, [_entry(number, digest)])

    def _batches(self, number: int, rows: Rows) -> Iterator[list[dict[str, Any]]]:
        batch: list[dict[str, Any]] = []
        size = 0
        for passage_id, vector, text, more in zip(*rows, strict=True):
            text, more = text or "", more or {}
            if len(text.encode()) > _LONGEST:
                raise ValueError(f"text: passage {passage_id!r} has over {_LONGEST:,} bytes, Milvus's limit; cut it")
            size += vector.nbytes + len(text) + len(json.dumps(more))
            batch.append(
                {"id": passage_id, "shard": number, "vector": self._value(vector), "text": text, "metadata": more}
            )
            if size > _MESSAGE_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _forget(self, numbers: Iterable[int]) -> None:
        if gone := list(numbers):
            with _plainly():
                self._client.delete(self._ledger, filter=f"number in {gone}")
                self._client.delete(self.name, filter=f"shard in {gone}")

    def _finish(self) -> None:
        with _plainly():
            self._client.flush(self.name)
            while (state := self._client.describe_index(self.name, "vector"))["pending_index_rows"]:
                if state["state"] == "Failed":
                    raise OSError(f"Milvus: the index of {self.name} failed; see the server's log")
                time.sleep(0.5)
            if not self._client.get_server_version().startswith(_LITE):  # which has nothing to load, and never says so
                self._client.refresh_load(self.name)  # otherwise searched without the index for ten seconds
                time.sleep(2)  # until its nodes follow, which nothing tells

    def delete(self, ids: Sequence[str]) -> None:
        with _plainly():
            self._client.upsert(self._ledger, [_entry(_CHANGED, uuid4().hex)])
            self._client.delete(self.name, filter=_named(ids))

    def drop(self) -> None:
        with _plainly():  # rows without their ledger are stored again
            self._client.drop_collection(self._ledger)
            self._client.drop_collection(self.name)

    def vectors(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self._ask(self.name, _named(ids), "id", "vector")
        return {row["id"]: self._read(row["vector"]) for row in rows}

    def _value(self, vector: np.ndarray) -> np.ndarray:
        return vector.astype(np.float16) if self.about["half"] else vector

    def _read(self, stored: Any) -> np.ndarray:
        if self.about["half"]:
            stored = np.frombuffer(b"".join(stored), np.float16)
        return np.asarray(stored, np.float32)

    def _search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        if self.exact and self._has_graph:
            return self._read_through(queries, k)
        looked_at = {"ef": min(max(self.ef_search, k), _MOST_LOOKED_AT)} if self._has_graph else {}
        at_once = max(1, min(_AT_ONCE // max(k, 1), _MESSAGE_BYTES // (4 * self.dimension)))
        ids, scores = [], []
        for start in range(0, len(queries), at_once):
            with _plainly():
                answers = self._client.search(
                    self.name,
                    list(map(self._value, queries[start : start + at_once])),
                    self.where,
                    limit=k,
                    output_fields=["id"],
                    search_params={"metric_type": "IP", "params": looked_at},
                )
            for hits in answers:
                values = np.array([hit["distance"] for hit in hits], np.float32)
                found, values = best_first([hit["id"] for hit in hits], values, k)
                ids.append(found)
                scores.append(values)
        return ids, scores

    def _read_through(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        """Search all passages on this machine, a page of vectors at a time."""
        best: list[tuple[list[str], np.ndarray]] = [([], np.empty(0, np.float32)) for _ in queries]
        with _plainly():
            size = max(1, min(16_384, _MESSAGE_BYTES // (4 * self.dimension)))
            pages = self._client.query_iterator(
                self.name, size, filter=self.where, output_fields=["id", "vector"], consistency_level="Strong"
            )
            while rows := pages.next():
                vectors = np.stack([self._read(row["vector"]) for row in rows])
                found = DenseIndex.build(vectors, [row["id"] for row in rows], "Flat").search(queries, k)
                best = [
                    best_first(ids + more, np.concatenate([scores, values]), k)
                    for (ids, scores), more, values in zip(best, *found, strict=True)
                ]
            pages.close()
        return [ids for ids, _ in best], [scores for _, scores in best]

    def uses_graph(self) -> bool:
        with _plainly():
            state = self._client.describe_index(self.name, "vector")
        return bool(
            not self.exact
            and state["index_type"] != "FLAT"
            and state["state"] == "Finished"
            and not state["pending_index_rows"]
        )


def _ledger(name: str) -> str:
    return f"tct_hf_shards_of_{name}"


def _named(ids: Sequence[str]) -> str:
    return f"id in {json.dumps(list(ids), ensure_ascii=False)}"


def _entry(number: int, digest: str) -> dict[str, Any]:
    return {"number": number, "digest": digest, "vector": [0.0, 0.0]}


def _ensure(client: Any, name: str, fields: Iterable[_Field], about: Mapping[str, Any]) -> None:
    """Make a collection with its index and load it, or as much of that as is missing."""
    if made := not client.has_collection(name):
        schema = client.create_schema()
        for field, kind, more in fields:
            schema.add_field(field, kind, **more)
        # A client sees what it has written itself, without waiting for others.
        client.create_collection(name, schema=schema, consistency_level="Session")
    if not client.list_indexes(name):
        index = client.prepare_index_params()
        hnsw = about["index"] == "HNSW"
        params = {"M": about["m"], "efConstruction": about["ef_construction"]} if hnsw else {}
        index.add_index("vector", index_type=about["index"], metric_type="IP", params=params)
        try:
            client.create_index(name, index)
        except Exception:  # options that Milvus refuses would stay
            if made:
                client.drop_collection(name)
            raise
    client.load_collection(name)


@contextmanager
def _plainly() -> Iterator[None]:
    """What the server says, without the password or token of its URL."""
    import grpc
    from pymilvus import MilvusException

    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        said = getattr(error, "message", None) or str(error)
        raise OSError(hide_passwords(f"Milvus: {' '.join(said.split())}")) from None
