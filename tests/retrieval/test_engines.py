"""Engines against exact search with Faiss, and what is left when they or we are stopped."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from tct_hf import DenseIndex, MilvusIndex, PgVectorIndex
from tct_hf.data.shards import run_shards
from tct_hf.retrieval.vectors import vector_facts, vector_table
from tests.milvus import Cpp, Lite
from tests.postgres import Server
from tests.warm_process import run_warm

COUNT, DIM, SHARD = 1200, 32, 200
MODEL = {"id": "me/model", "weights_sha256": "a" * 64, "encoding": {"pooling": "mean"}}
draw = np.random.default_rng(0)
CENTRES = draw.standard_normal((20, DIM))
VECTORS = (CENTRES[draw.integers(0, 20, COUNT)] + draw.standard_normal((COUNT, DIM))).astype(np.float32)
QUERIES = (CENTRES[draw.integers(0, 20, 100)] + draw.standard_normal((100, DIM))).astype(np.float32)
IDS = [f"p{number}" for number in range(COUNT)]
CORPUS = Dataset.from_dict(
    {"id": IDS, "text": [f"text of {name}" for name in IDS], "lang": ["de" if n % 3 else "en" for n in range(COUNT)]}
)


def write_vectors(folder: Path, vectors: np.ndarray = VECTORS, model: dict[str, Any] = MODEL) -> Path:
    rows = list(zip(IDS, vectors, strict=False))
    parts = [(str(at), rows[at : at + SHARD]) for at in range(0, len(rows), SHARD)]

    def table(items: Any) -> Any:
        return vector_table([name for name, _ in items], np.stack([vector for _, vector in items]))

    run_shards(folder, {"model": model}, parts, table, about=vector_facts)
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vectors(tmp_path_factory.mktemp("encoded") / "vectors")


@pytest.fixture(scope="module", params=[Server, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Lite, Cpp))])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    server = request.param()
    yield server
    server.end()


def push(vectors: Path, server: Any, name: str = "passages", **options: Any) -> Any:
    return server.index.push(vectors, server.url, name, write=str, **options)


WHOLE = {"passages": COUNT, "expected": COUNT, "sample": 100, "equal": 100, "k": 100, "uses_graph": True}


def whole(index: Any, vectors: Path) -> bool:
    found = index.verify(vectors)
    return found.pop("recall") > 0.9 and found == WHOLE


def test_exact_search_gives_the_run_of_a_flat_index_and_the_graph_most_of_it(server: Any, vectors: Path) -> None:
    push(vectors, server)
    push(vectors, server, corpus=CORPUS)  # adds the texts
    index, names = push(vectors, server), [f"q{row}" for row in range(100)]  # and leaves them
    assert whole(index, vectors) and len(index) == COUNT and index.dimension == DIM
    wanted = DenseIndex.build(VECTORS, IDS, "Flat").run(names, QUERIES)
    searched = [index]
    if server.index is MilvusIndex:  # which reads all vectors of a graph, and searches these itself
        searched.append(push(vectors, server, "flat", index="FLAT"))
    for one in searched:
        one.exact = True
        found = one.run(names, QUERIES)
        assert {name: [*hits] for name, hits in found.items()} == {name: [*hits] for name, hits in wanted.items()}
        for name in names:
            np.testing.assert_allclose([*found[name].values()], [*wanted[name].values()], rtol=1e-5)
    assert not index.uses_graph()
    index.exact = False
    recalls = []
    for index.ef_search in (100, 400):
        found = index.run(names, QUERIES)
        recalls.append(np.mean([len(found[name].keys() & wanted[name].keys()) / 100 for name in names]))
    assert 0.9 < recalls[0] <= recalls[1] and recalls[1] > 0.99
    index.where = server.where
    for index.exact in (True, False):
        assert all(int(name[1:]) % 3 == 0 for hits in index.search(QUERIES, 20)[0] for name in hits)
    assert server.text(index, "p7") == "text of p7"


def test_ties_go_by_id_halves_are_equal_to_float16_and_each_change_shows(
    server: Any, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = server.index is not MilvusIndex  # of which these servers have none
    index = push(vectors, server, "halves", half=half)
    assert whole(index, vectors)
    digests = [index.digest]
    index.upsert(["z", "a", "p5"], np.full((3, DIM), 100.0))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    digests.append(server.index.open(name="halves").digest)
    for index.exact in (True, False):
        assert index.search(np.ones((1, DIM)), 3)[0] == [["a", "p5", "z"]]
    index.delete(["a", "z", "not 'there\""])
    assert len(index) == COUNT
    digests.append(index.digest)
    index.upsert(["p5"], np.full((1, DIM), 50.0))  # as many passages
    assert len({*digests, index.digest}) == 4 and len(push(vectors, server, "halves", half=half)) == COUNT
    index.drop()
    with pytest.raises(ValueError, match=r"there is no \w+ halves"):
        server.index.open(server.url, "halves")


def test_what_does_not_fit_is_refused_by_name_and_a_password_is_never_shown(
    server: Any, vectors: Path, tmp_path: Path
) -> None:
    push(vectors, server, "pinned")
    other = {**MODEL, "id": "me/other", "weights_sha256": "b" * 64}
    with pytest.raises(ValueError, match=r"built by 'me/model' .* encoded by 'me/other'"):
        server.index.open(server.url, "pinned", model=other)
    with pytest.raises(ValueError, match=r"built by 'me/model' .* encoded by 'me/other'"):
        push(write_vectors(tmp_path / "other", model=other), server, "pinned")
    no_half = r"this server .* has no half precision" if server.index is MilvusIndex else "table pinned has False"
    with pytest.raises(ValueError, match=f"half: {no_half}"):
        push(vectors, server, "pinned", half=True)
    with pytest.raises(ValueError, match="m: table pinned has 16, and this would be 8"):
        push(vectors, server, "pinned", m=8)
    with pytest.raises(ValueError, match=f"lists: no option of {server.index.engine}; use m, ef_construction"):
        push(vectors, server, "pinned", lists=8)
    if type(server) is not Lite:  # which takes any
        with pytest.raises(OSError, match="out of"):
            push(vectors, server, "wild", m=10**6)
        assert len(push(vectors, server, "wild", m=8)) == COUNT
    with pytest.raises(ValueError, match=r"metadata of passage 'p0': .* not JSON"):
        push(vectors, server, "numbered", corpus=CORPUS.add_column("score", [math.nan] * COUNT))
    with pytest.raises(ValueError, match="corpus: row 200 is 'p201' where 'p200' was encoded"):
        rows = [*range(200), 201, 200, *range(202, COUNT)]
        push(vectors, server, "ordered", corpus=CORPUS.select(rows))
    index = server.index.open(server.url, "pinned")
    for what, given, said in (
        ("texts", ["one"], "texts: 1 of 2 passages"),
        ("metadata", [], "metadata: 0 of 2"),
        ("metadata", [{"a": 1}, {"a": math.nan}], "metadata of passage 'b': .* not JSON"),
    ):
        with pytest.raises(ValueError, match=said):
            index.upsert(["a", "b"], VECTORS[:2], **{what: given})
    with pytest.raises(ValueError, match="name: 'a;b'"):
        push(vectors, server, "a;b")
    for url in server.unreachable():
        with pytest.raises((OSError, ValueError), match=f"{server.index.engine}: |url: ") as refused:
            server.index.open(url)
        assert "secret" not in str(refused.value) and refused.value.__cause__ is None


def test_more_dimensions_than_the_graph_takes_are_refused_before_anything_is_stored() -> None:
    for half, most, fix in ((False, 2000, "half=True"), (True, 4000, "truncate_dim")):
        with pytest.raises(ValueError, match=f"dimension: 5000 where pgvector's graph takes {most}; .*{fix}"):
            PgVectorIndex._connected(None, "wide", {"dimension": 5000, "half": half})


def test_postgres_is_searched_without_other_rights_by_threads_and_after_a_lost_connection(
    server: Any, vectors: Path
) -> None:
    if server.index is MilvusIndex:
        pytest.skip("pymilvus's own matter")
    index = push(vectors, server, "read")
    index._ask("create role reader login; grant select on all tables in schema public to reader")
    index = server.index.open(server.url.replace("tct:secret", "reader"), "read")
    wanted = index.search(QUERIES, 10)[0]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda query: index.search(query[None], 10)[0][0], QUERIES)] == wanted
    with pytest.raises(OSError, match="PostgreSQL: terminating connection"):
        index._ask("select pg_terminate_backend(pg_backend_pid())")
    assert index.search(QUERIES, 10)[0] == wanted
    with pytest.raises(ValueError, match="corpus: passage 'p0' has a NUL"):
        push(vectors, server, "nul", corpus=CORPUS.map(lambda row: {"text": "\0"}))


def test_halves_for_milvus_are_those_that_its_client_reads_again() -> None:
    """By the client's own messages: no server of the wheels has them."""
    pytest.importorskip("pymilvus", reason="pip install pymilvus")
    from pymilvus import DataType
    from pymilvus.client import entity_helper
    from pymilvus.client.types import HybridExtraList
    from pymilvus.grpc_gen.schema_pb2 import FieldData

    index, info = MilvusIndex(None, "halves", {"half": True}), {"name": "vector", "params": {"dim": DIM}}
    cache: dict[int, list[bytes]] = {}
    field = FieldData(type=DataType.FLOAT16_VECTOR, field_name="vector")
    for vector in VECTORS[:3]:
        entity_helper.pack_field_value_to_field_data(index._value(vector), field, info, cache)
    entity_helper.flush_vector_bytes(field, cache)
    rows = HybridExtraList([field], [{}, {}, {}], extra={})
    found = [index._read(row["vector"]) for row in rows]
    np.testing.assert_array_equal(found, VECTORS[:3].astype(np.float16))


def test_a_corpus_encoded_anew_replaces_what_has_changed(server: Any, vectors: Path, tmp_path: Path) -> None:
    push(vectors, server, "renewed")
    changed = VECTORS[:1000].copy()
    changed[450] += 1
    again = write_vectors(tmp_path / "again", changed)
    stored: list[int] = []

    class Watched(server.index):  # type: ignore[misc, name-defined]
        def _store(self, number: Any, *args: Any) -> None:
            stored.append(number)
            super()._store(number, *args)

    index = Watched.push(again, server.url, "renewed", write=str)
    assert stored == [2] and len(index) == 1000 and index.verify(again)["equal"] == 100


PUSH = """
import os, signal, socket, sys
from psutil import Process
from tct_hf.retrieval.engines import engine_of, milvus
from tct_hf.retrieval.engines.base import Rows

milvus._MESSAGE_BYTES = 6000  # 47 rows

class Stopped(engine_of(sys.argv[2])):
    def _store(self, number, digest, rows):
        def texts():  # read in the middle of the copy
            for at in range(len(rows.ids)):
                if (number, at) == (3, 100):
                    {stop}
                yield None
        super()._store(number, digest, Rows(rows.ids, rows.vectors, texts(), rows.metadata))

Stopped.push(sys.argv[1], sys.argv[2], sys.argv[3], write=str)
"""


@pytest.mark.parametrize("stopped", ["push", "connection", "server"])
def test_a_push_that_is_stopped_in_a_shard_goes_on_with_it(server: Any, vectors: Path, stopped: str) -> None:
    if isinstance(server, Cpp) and stopped == "connection":
        pytest.skip("its door is no network")
    stops = {
        "push": "os.kill(os.getpid(), signal.SIGKILL)",
        "connection": "for one in Process().net_connections(): socket.socket(fileno=os.dup(one.fd)).shutdown(2)",
        # With its children, which would go on for a while.
        "server": "for one in [Process(int(sys.argv[4])), *Process(int(sys.argv[4])).children(True)]: one.kill()",
    }
    words = [vectors, server.url, f"stopped_{stopped}", str(server.pid)]
    program = ["-c", PUSH.format(stop=stops[stopped]), *map(str, words)]
    done = run_warm(program, env=os.environ)
    connects_again = server.index is MilvusIndex and stopped == "connection"
    code = -signal.SIGKILL if stopped == "push" else 0 if connects_again else 1
    assert done.returncode == code, done.stderr
    assert "secret" not in done.stderr
    if stopped == "server":
        server.end()
        server.start()
    begun = server.index.open(server.url, f"stopped_{stopped}")
    shards = len(begun._digests())
    if connects_again:
        assert (len(begun), shards) == (COUNT, COUNT // SHARD)
    elif server.index is MilvusIndex:  # which has what it was sent of the fourth shard
        assert (len(begun), shards) == (694, 3)
    else:
        assert (len(begun), shards) == (SHARD * 3, 3)
    assert whole(push(vectors, server, f"stopped_{stopped}"), vectors)
