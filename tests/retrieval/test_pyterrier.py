"""PyTerrier pipelines of the transformers, none of which starts Java."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, SparseEncoder

from tct_hf import (
    BM25Index,
    DenseIndex,
    SparseIndex,
    build_student,
    evaluate_run,
    pyterrier_index,
    pyterrier_student,
)
from tct_hf.retrieval.encode import encode_texts
from tests.models import tiny_bert
from tests.splade import tiny_splade

PASSAGES = {
    "p1": "the teacher of a student",
    "p2": "dense retrieval of a passage",
    "p3": "distillation tokens of the teacher",
    "p4": "representations of a query",
    "p5": "passage tokens and query tokens",
}
QUERIES = {"q1": "a dense student", "q2": "query tokens", "q3": "xyzzy"}
QRELS = {"q1": {"p2": 1}, "q2": {"p5": 1}}


@pytest.fixture
def pt() -> Any:
    return pytest.importorskip("pyterrier", reason="PyTerrier is not installed: pip install 'tct_hf[pyterrier]'")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["tct", "own", "sparse"])
def student(request: pytest.FixtureRequest, base: Path) -> SentenceTransformer | SparseEncoder:
    """Dot product and different encodings of queries and passages; cosine; sparse."""
    if request.param == "sparse":
        return SparseEncoder(str(tiny_splade(base.parent / "splade")), device="cpu")
    return build_student(str(base), encoding=request.param, query_length=16, document_length=48)


def frame(**more: Any) -> Any:
    import pandas as pd

    return pd.DataFrame({"qid": list(QUERIES), "query": list(QUERIES.values()), **more})


def run_of(found: Any) -> dict[str, dict[str, float]]:
    run: dict[str, dict[str, float]] = {query: {} for query in QUERIES}
    for row in found.sort_values("rank").itertuples():
        run[row.qid][row.docno] = row.score
    return run


def test_pipelines_of_indexes_and_a_student_give_the_runs_of_the_library(pt: Any, student: Any) -> None:
    sparse = isinstance(student, SparseEncoder)
    ids, texts = list(PASSAGES), list(PASSAGES.values())
    words, vectors = BM25Index.build(texts, ids), encode_texts(student, texts, task="document")
    queries = encode_texts(student, list(QUERIES.values()), task="query")
    index = (SparseIndex if sparse else DenseIndex).build(vectors, ids)
    bm25, searched = pyterrier_index(words), pyterrier_index(index, student, k=5)
    runs = {"bm25": words.run(QUERIES), "student": index.run(list(QUERIES), queries, 5)}
    assert run_of(bm25(frame())) == runs["bm25"] and not runs["bm25"]["q3"]
    found = searched(frame(mark=["x", "y", "z"]))
    assert run_of(found) == runs["student"] and list(run_of(found)["q1"]) == list(runs["student"]["q1"])
    assert list(found["rank"][:3]) == [0, 1, 2] and set(found.columns) >= {"qid", "query", "docno", "score", "rank"}
    assert run_of((bm25 % 1)(frame())) == {query: dict(list(run.items())[:1]) for query, run in runs["bm25"].items()}

    reranked = bm25 >> pt.apply.text(lambda row: PASSAGES[row["docno"]]) >> pyterrier_student(student)
    for query, hits in run_of(reranked(frame())).items():
        assert hits.keys() == runs["bm25"][query].keys()
        expected = student.similarity(student.encode_query(QUERIES[query]), student.encode_document(texts))
        expected = dict(zip(ids, (expected.to_dense() if sparse else expected)[0].tolist(), strict=True))
        assert hits == pytest.approx({name: expected[name] for name in hits}, abs=1e-4)
        assert list(hits.values()) == sorted(hits.values(), reverse=True)
    fused = run_of((0.5 * bm25 + searched)(frame(mark=["", "", ""])))
    for query, hits in runs["bm25"].items():
        added = {p: 0.5 * hits.get(p, 0) + runs["student"][query].get(p, 0) for p in fused[query]}
        assert fused[query] == pytest.approx(added)
    table = pt.Experiment([bm25, searched], frame()[:2], judgements(), ["recip_rank"], names=["bm25", "student"])
    for row in table.itertuples():
        run = {query: hits for query, hits in runs[row.name].items() if query in QRELS}
        assert row.recip_rank == pytest.approx(evaluate_run(run, QRELS, ["RR"]).mean["RR"])
    assert not pt.java.started()


def judgements() -> Any:
    import pandas as pd

    rows = [(query, passage, grade) for query, grades in QRELS.items() for passage, grade in grades.items()]
    return pd.DataFrame(rows, columns=["qid", "docno", "label"])


def test_a_dense_student_encodes_queries_and_passages_each_in_its_way(pt: Any, student: Any) -> None:
    transformer = pyterrier_student(student)
    passages = frame()[["qid"]].rename(columns={"qid": "docno"}).assign(text=list(PASSAGES.values())[:3])
    if isinstance(student, SparseEncoder):
        with pytest.raises(pt.validate.InputValidationError, match="score"):
            transformer(frame())
        return
    for column, encode, given in (
        ("query_vec", student.encode_query, frame()),
        ("doc_vec", student.encode_document, passages),
    ):
        expected = encode(given.iloc[:, 1].tolist())
        if student.similarity_fn_name == "cosine":
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(np.stack(transformer(given)[column].tolist()), expected, atol=1e-5)
        assert list(transformer(given[:0]).columns) == [*given.columns, column]


def test_what_can_not_work_is_refused(pt: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = BM25Index.build(PASSAGES.values(), PASSAGES)
    empty = pyterrier_index(index)(frame()[:0])
    assert len(empty) == 0 and set(empty.columns) >= {"qid", "query", "docno", "score", "rank"}
    with pytest.raises(ValueError, match="student: give the model that built an index of vectors, and none for BM25"):
        pyterrier_index(index, build_student(str(base)))
    with pytest.raises(ValueError, match="student: give the model"):
        pyterrier_index(DenseIndex.build(np.eye(5, dtype=np.float32), PASSAGES))
    monkeypatch.setitem(sys.modules, "pyterrier", None)
    with pytest.raises(ImportError, match=r"pip install 'tct_hf\[pyterrier\]'"):
        pyterrier_index(index)
