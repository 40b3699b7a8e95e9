"""Exported graphs: equal to the checkpoint as a server runs them, and told apart from broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import build_splade, build_student, export, save_student
from tct_hf.encoding.checkpoint import GOLDEN_TEXTS, own_vectors
from tct_hf.encoding.export import Format, check_exports, graph_vectors
from tests.models import tiny_bert, tiny_mlm, tiny_modernbert

RUNTIMES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
KINDS: dict[str, dict[str, Any]] = {
    "tct": {"encoding": "tct", "scale": 20.0},
    "bert": {"prompts": {"query": "query: ", "document": "passage: "}, "query_length": 16, "pooling": "cls"},
    "modernbert": {},
}


@pytest.fixture(params=get_args(Format))
def format(request: pytest.FixtureRequest) -> Any:
    for package in RUNTIMES[request.param]:
        pytest.importorskip(package)
    return request.param


def saved(kind: str, folder: Path) -> tuple[SentenceTransformer, Path]:
    base = (tiny_modernbert if kind == "modernbert" else tiny_bert)(folder / "base")
    student = build_student(str(base), document_length=40, **KINDS[kind]).to("cpu")
    return student, save_student(student, folder / "student")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_students_vectors_and_no_others_pass(kind: str, format: Any, tmp_path: Path) -> None:
    student, path = saved(kind, tmp_path)
    file = export(student, path, format)
    texts = [*GOLDEN_TEXTS, "the"]
    np.testing.assert_allclose(graph_vectors(file, texts, "query"), student.encode_query(texts), atol=2e-5)
    np.testing.assert_allclose(graph_vectors(file, texts, "document"), student.encode_document(texts), atol=2e-5)
    rule = own_vectors(path)
    [(name, difference)] = check_exports(path, GOLDEN_TEXTS, rule).items()
    assert name == file.relative_to(path).as_posix() and difference < 2e-5
    with pytest.raises(ValueError, match=f"vectors of {name} differ by"):
        check_exports(path, GOLDEN_TEXTS, {side: vectors + 1 for side, vectors in rule.items()})


def test_int8_is_measured_by_its_lowest_cosine(format: Any, tmp_path: Path) -> None:
    if format == "openvino":
        pytest.importorskip("nncf")
    student, path = saved("tct", tmp_path)
    file = export(student, path, format, int8=True)
    assert file.stem.endswith("_int8")
    assert 0.95 < check_exports(path, GOLDEN_TEXTS, own_vectors(path))[f"{format}/{file.name}"] < 1.0


def test_what_has_no_graph_is_refused(tmp_path: Path) -> None:
    student, path = saved("bert", tmp_path)
    with pytest.raises(ValueError, match='"onnx" or "openvino"'):
        export(student, path, "tflite")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="save_student"):
        export(student, tmp_path / "base")
    with pytest.raises(ValueError, match="SparseEncoder has no graph"):
        export(build_splade(str(tiny_mlm(tmp_path / "mlm")), document_length=40), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half precision"):
        export(build_student(str(tmp_path / "base")).half(), path)
    tct = build_student(str(tmp_path / "base"), encoding="tct")
    tct.prompts["query"] = "[Q] the "
    with pytest.raises(ValueError, match="have 5 and 4 tokens"):
        export(tct, path)
