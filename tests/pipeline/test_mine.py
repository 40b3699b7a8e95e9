"""Sources of candidates, and the ColBERT that judges by the margin."""

from __future__ import annotations

from pathlib import Path

import pytest

from tct_hf import read_run, write_run
from tct_hf.data.collection import load_collection
from tct_hf.evaluation.stores import Stores, open_student
from tct_hf.pipeline.mine import bm25_source, mine, pair_scorer, run_source, student_source
from tct_hf.pipeline.settings import MiningSettings
from tct_hf.retrieval.negatives import collection_bm25, collection_triples
from tct_hf.retrieval.runs import read_tag
from tests.models import load_colbert, tiny_bert, tiny_colbert
from tests.recipe import write_beir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tct_hf import build_student, save_student

    folder = tmp_path_factory.mktemp("rounds")
    write_beir(folder / "collection", train=20)
    tiny_colbert(folder / "teacher")
    base = tiny_bert(folder / "encoder")
    save_student(build_student(str(base), encoding="tct", query_length=16, document_length=48), folder / "student")
    return folder


@pytest.fixture
def collection(folder: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TCT_HF_CACHE", str(folder / "cache"))
    return load_collection(str(folder / "collection"))


def test_pairs_are_scored_as_the_model_scores_them_one_by_one(folder: Path) -> None:
    model = load_colbert(folder / "teacher" / "colbert")
    pairs = [("dense retrieval", "a passage of tokens"), ("query", "a passage of tokens"), ("query", "the teacher")]
    expected = [
        float(model.similarity_pairwise([model.encode_query(query)], [model.encode_document(passage)])[0])
        for query, passage in pairs
    ]
    assert pair_scorer(model)(pairs) == pytest.approx(expected, abs=1e-5)


def test_a_student_gives_the_run_of_exact_search(folder: Path, collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from tct_hf.evaluation.references import dense_run

    student = open_student(str(folder / "student"), "cpu")
    stores = Stores(collection, student, "student", tmp_path, precision="fp32", write=lambda line: None)
    source = student_source(stores, "student base", depth=7)
    queries = collection.splits["train"].queries
    assert callable(source.run)
    found = source.run(queries)
    expected = dense_run(student, collection.corpus["id"], collection.corpus["text"], queries, k=7)
    assert {query: list(hits) for query, hits in found.items()} == {q: list(hits) for q, hits in expected.items()}
    other = Stores(collection, open_student(str(folder / "encoder"), "cpu"), "x", tmp_path / "x", precision="fp32")
    assert student_source(other, "x", depth=7).depends != source.depends


def test_a_run_file_gives_its_tag_as_origin(collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = collection_bm25(collection).run(collection.splits["train"].queries, 10)
    write_run(run, tmp_path / "run.trec.gz", "their-system")
    assert read_tag(tmp_path / "run.trec.gz") == "their-system"
    source = run_source(tmp_path / "run.trec.gz")
    assert (source.origin, source.run) == ("their-system", read_run(tmp_path / "run.trec.gz"))
    assert run_source(tmp_path / "run.trec.gz", "mine").origin == "mine"


def test_a_margin_refuses_what_the_teacher_prefers_to_the_positive(folder: Path, collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import pyarrow.parquet as pq

    source = bm25_source(collection, depth=10)
    with pytest.raises(ValueError, match=r"margin is 0\.0, but there is no teacher"):
        mine(collection, source, MiningSettings(depth=10, margin=0.0), tmp_path / "x", seed=1)
    counts = mine(
        collection,
        source,
        MiningSettings(depth=10, margin=0.0),
        tmp_path / "mined",
        seed=1,
        teacher=str(folder / "teacher" / "colbert"),
    )
    assert counts.above_margin > 0 and counts.rows == 20
    model = load_colbert(folder / "teacher" / "colbert")
    for row in pq.read_table(tmp_path / "mined" / "triples.parquet").to_pylist():
        assert row["origin"] == "bm25"
        if row["negative_teacher_score"] is not None:
            own, other = pair_scorer(model)([(row["query"], row["positive"]), (row["query"], row["negative"])])
            assert other <= own + 1e-5
            assert (own, other) == pytest.approx(
                (row["positive_teacher_score"], row["negative_teacher_score"]), abs=1e-5
            )


def test_only_the_labels_that_are_used_are_mined_for(collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = bm25_source(collection, depth=10)
    counts = mine(collection, source, MiningSettings(depth=10), tmp_path / "half", seed=1, labels=0.5)
    assert counts.queries == 10 and len(collection.labelled(0.5)) == 10
    rows = collection_triples(collection, num_negatives=1, depth=10, seed=1, labels=0.5)
    assert set(rows["query_id"]) == set(collection.labelled(0.5))
