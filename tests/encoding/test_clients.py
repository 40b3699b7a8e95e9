"""The lines of a card for other libraries, run with sentence-transformers as these libraries call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from tct_hf import build_student, finalise_checkpoint, save_student
from tct_hf.encoding.clients import Client, client_table, clients
from tests.models import tiny_bert

TEXTS = ["the student of a query", "a dense teacher"]
LONG = [*TEXTS, "retrieval " * 30]
TCT: dict[str, Any] = {"encoding": "tct"}
SERVERS = {"LlamaIndex", "fastembed", "text-embeddings-inference"}
STUDENTS: dict[str, tuple[dict[str, Any], set[str]]] = {  # settings, and what can't serve it
    "own": ({}, set()),
    "prompts": ({"prompts": {"query": "query: ", "document": "passage | "}}, set()),
    "passage prompt": ({"prompts": {"document": "passage: "}}, set()),
    "query length": ({"query_length": 12}, set()),
    "tct": (TCT, SERVERS),
    "no masks": ({**TCT, "query_augmentation": False}, {"text-embeddings-inference"}),
    "no masks, cls": ({**TCT, "query_augmentation": False, "pooling": "cls"}, set()),
    "scale": ({**TCT, "query_augmentation": False, "pooling": "cls", "scale": 20.0}, {"text-embeddings-inference"}),
}


def called(row: Client, folder: Path) -> tuple[Any, Any]:
    """Vectors as LangChain and Haystack get them, by their lines' arguments of `encode`."""

    def given(encode_kwargs: Any = None, query_encode_kwargs: Any = None, **rest: Any) -> tuple[Any, Any]:
        return query_encode_kwargs or encode_kwargs or {}, encode_kwargs or {}

    names = dict.fromkeys(
        ["HuggingFaceEmbeddings", "SentenceTransformersTextEmbedder", "SentenceTransformersDocumentEmbedder"], given
    )
    model = SentenceTransformer(str(folder), device="cpu")
    query, passage = (eval(line, {**names, "MODEL": ""}) for line in (row.questions, row.passages))
    return model.encode(LONG, **query[0]), model.encode(LONG, **passage[1])


def check(folder: Path, unable: set[str]) -> None:
    rows = {row.name: row for row in clients(folder)}
    assert {name for name, row in rows.items() if row.note.startswith("not servable")} == unable
    assert {name for name, row in rows.items() if not row.questions} == unable
    model = SentenceTransformer(str(folder), device="cpu")
    wanted = model.encode_query(LONG), model.encode_document(LONG)
    for name in ("LangChain", "Haystack"):
        for found, right in zip(called(rows[name], folder), wanted, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-5)
    if row := rows["LlamaIndex"] if "LlamaIndex" not in unable else None:
        index = eval(row.questions, {"HuggingFaceEmbedding": lambda model, **given: given, "MODEL": ""})
        prompts = {"query": index.get("query_instruction", ""), "text": index.get("text_instruction", "")}
        theirs = SentenceTransformer(str(folder), device="cpu", prompts=prompts)
        for side, right in zip(prompts, wanted, strict=True):
            found = theirs.encode(TEXTS, prompt_name=side, normalize_embeddings=index.get("normalize", True))
            np.testing.assert_allclose(found, right[: len(TEXTS)], atol=1e-5)


def test_a_question_is_cut_where_the_plain_call_cuts_it(tmp_path: Path) -> None:
    student = build_student(str(tiny_bert(tmp_path / "base")), query_length=30, document_length=12)
    rows = {row.name: row for row in clients(save_student(student, tmp_path / "student"))}
    assert rows["LlamaIndex"].note == "questions of at most 12 tokens"


@pytest.mark.parametrize("settings, unable", STUDENTS.values(), ids=STUDENTS)
def test_the_lines_of_a_card_give_the_students_vectors(
    settings: dict[str, Any], unable: set[str], tmp_path: Path
) -> None:
    student = build_student(str(tiny_bert(tmp_path / "base")), **settings)
    check(save_student(student, tmp_path / "student"), unable)


def test_questions_that_go_through_modules_of_their_own_are_asked_for_as_such(tmp_path: Path) -> None:
    query, document = (list(build_student(str(tiny_bert(tmp_path / side, seed=len(side))))) for side in ("a", "ab"))
    routed = SentenceTransformer(modules=[Router.for_query_document(query, document)], similarity_fn_name="dot")
    routed.save_pretrained(str(tmp_path / "student"))
    check(tmp_path / "student", SERVERS)


def test_the_readme_has_the_table_once_whoever_wrote_the_rest(tmp_path: Path) -> None:
    student = build_student(str(tiny_bert(tmp_path / "base")), encoding="tct")
    folder = save_student(student, tmp_path / "student")
    readme, table = folder / "README.md", client_table(folder)
    stock = readme.read_text(encoding="utf-8")
    assert table + "\n## Training Details\n" in stock and "without an error" in table
    for text in ("# Mine", "# Mine\n\n## In other libraries\n\nold\n\n## More\n\nwords\n", stock):
        readme.write_text(text, encoding="utf-8")
        finalise_checkpoint(folder)
        once = readme.read_text(encoding="utf-8")
        finalise_checkpoint(folder)
        assert once == readme.read_text(encoding="utf-8") and once.count("## In other libraries") == 1
        assert table in once and "old" not in once.split() and once.startswith(text.split("\n")[0])
    assert once == stock
    own = client_table(save_student(build_student(str(tmp_path / "base")), tmp_path / "own"))
    assert "without an error" not in own and "HuggingFaceEmbeddings(model_name=MODEL)" in own
