"""Vectors pushed into an engine, and found there by the report and at the terminal."""

from __future__ import annotations

import json

import pytest

from tct_hf import Report, read_run
from tests.milvus import Lite
from tests.postgres import Server
from tests.recipe import run
from tests.searching import Material


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Server, Lite])
def test_pushed_vectors_are_reported_and_searched_as_those_of_faiss(material: Material, kind: type) -> None:
    server = kind()
    folder, engine = material.folder, [f"--engine.url={server.url}", "--engine.name=passages"]
    report_dir = folder / kind.__name__
    collection = [f"--data.source={material.beir}", f"--student={material.student}"]
    encode = [f"--model={material.student}", f"--source={material.beir}", f"--output_dir={folder / 'vectors'}"]
    run("encode", folder, *encode, "--shard_size=16")
    push = [f"--vectors={folder / 'vectors'}", f"--url={server.url}", f"--source={material.beir}", "--m=8"]
    if kind is Lite:
        push.append("--index=FLAT")
    assert "60 of 60" in run("push", folder, *push).stdout
    assert "(60 were there)" in run("push", folder, *push).stdout
    shallow = ["--teacher=null", "--measures.depth=20", "--measures.names=[RR@10]", "--cost.queries=2"]
    report = [*collection, *shallow, f"--output_dir={report_dir}", *engine]
    run("evaluate", folder, *report)
    found, exact = (read_run(report_dir / "runs" / f"dense-{key}.test.trec") for key in ("engine", "exact"))
    assert {query: [*hits] for query, hits in found.items()} == {query: [*hits] for query, hits in exact.items()}
    row = next(system for system in Report.load(report_dir).systems if system.key == "dense-engine")
    assert row.title == f"dense, {kind.index.engine}" and (row.cost or {})["disk_bytes"] > 60 * 32
    written = [file.read_text() for file in report_dir.rglob("*") if file.suffix in (".json", ".yaml", ".md")]
    assert any("127.0.0.1" in text for text in written) and not any("secret" in text for text in written)
    alone = [*engine, f"--index_dir={folder / 'alone' / kind.__name__}"]
    asked = [run("search", folder, *collection, "--json", *more, stdin="dense\n").stdout for more in ([], alone)]
    assert not (folder / "alone" / kind.__name__ / "vectors").exists()
    ours, theirs = ([hit["id"] for hit in json.loads(line)["passages"]] for line in asked)
    assert ours == theirs
    wrong = [f"--student={material.folder / 'mean'}", f"--data.source={material.beir}", *engine]
    assert "table passages: built by" in run("search", folder, *wrong, stdin="dense\n", code=1).stderr
    index = kind.index.open(server.url, "passages")
    index.upsert(ours[:1], [[0.5] * index.dimension])
    changed = run("evaluate", folder, *report, code=1).stderr
    assert "holds a run with engine.rows = 'passages' (" in changed and "but now engine.rows = 'passages' (" in changed
    server.end()
