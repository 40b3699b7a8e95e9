"""Students of teachers, and ColBERTs, against the rules of their encodings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tct_hf import ColBERTTeacher, build_colbert, build_student, save_student, student_from_teacher
from tests.encoding.rules import LENGTH, OWN, PROMPTS, TEXTS, Rule, close, load
from tests.models import load_colbert, pylate_colbert, stanford_colbert, tiny_colbert


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {
        "ours": tiny_colbert(root / "ours", layers=3),
        "stanford": stanford_colbert(root / "stanford"),
        "pylate": pylate_colbert(root / "pylate"),
    }


MARKED = [*TEXTS, "[unused0] and [unused1] in a text", "[Q] [D] [Q]"]
CLS: dict[str, Any] = {"pooling": "cls", "scale": 9.0, "query_augmentation": False}
PROMPTED: dict[str, Any] = OWN | {"prompts": PROMPTS}
FROM_TEACHERS = [
    *((name, {}, {}) for name in ("ours", "stanford", "pylate")),
    *((name, CLS, {"pooling": "cls", "norm": 3.0, "augmented": False}) for name in ("ours", "stanford", "pylate")),
    *((name, PROMPTED, {"prompts": PROMPTS, "query_length": LENGTH}) for name in ("stanford", "pylate")),
]


@pytest.mark.parametrize(("name", "settings", "options"), FROM_TEACHERS)
def test_a_teachers_student_encodes_by_the_rule_with_the_teachers_encoder(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path, name: str, settings: Any, options: Any
) -> None:
    teacher = load_colbert(teachers[name])
    # All the tiny models have one vocabulary; this tokenizer is untouched by the teacher's markers.
    rule = Rule(teacher[0].model, bases["bert"], **options)
    student = student_from_teacher(teacher, document_length=LENGTH, **settings)
    for model in (student, load(save_student(student, tmp_path / "student"))):
        close(model.encode_query(MARKED), rule.vectors(MARKED, "query"))
        close(model.encode(MARKED), rule.vectors(MARKED, "document"))


def test_a_student_leaves_its_teacher_as_it_was(teachers: dict[str, Path]) -> None:
    teacher = load_colbert(teachers["pylate"])
    before = copy.deepcopy(teacher)
    student = student_from_teacher(teacher, layers=[1], document_length=LENGTH)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(0.5)
    student.tokenizer.add_tokens(["new"])
    assert teacher.tokenizer.backend_tokenizer.to_str() == before.tokenizer.backend_tokenizer.to_str()
    assert teacher[0].model.config.num_hidden_layers == len(teacher[0].model.encoder.layer) > 1
    vectors, wanted = (model.encode_query(["the [unused0] teacher"])[0] for model in (teacher, before))
    assert np.array_equal(vectors, wanted)


def test_a_teacher_is_a_path_or_a_frozen_half_precision_colbert_too(teachers: dict[str, Path]) -> None:
    path = teachers["stanford"]
    wanted = student_from_teacher(load_colbert(path), document_length=LENGTH).encode_query(TEXTS)
    for teacher in (str(path), path, ColBERTTeacher(str(path), dtype="float32")):
        close(student_from_teacher(teacher, document_length=LENGTH).encode_query(TEXTS), wanted)
    student = student_from_teacher(load_colbert(path).to(torch.bfloat16).requires_grad_(False))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())


def test_an_own_colbert_shares_tokens_with_its_student(bases: dict[str, Path], tmp_path: Path) -> None:
    base = str(bases["modernbert"])
    lengths: dict[str, Any] = {"query_length": 16, "document_length": LENGTH}
    build_colbert(base, prompts=PROMPTS, **lengths).save_pretrained(str(tmp_path / "colbert"))
    teacher = ColBERTTeacher(str(tmp_path / "colbert"), dtype="float32")
    for student, shared in (
        (student_from_teacher(teacher, encoding="own"), True),  # prompts and lengths are the teacher's
        (build_student(base, prompts=PROMPTS, **lengths), True),
        (student_from_teacher(teacher, encoding="own", prompts={"query": "other: "}), False),
    ):
        teacher.attach(student)
        assert teacher.shares_tokens is shared


# --- layers ---


def test_layers_named_are_kept_in_that_order(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    teacher = load_colbert(teachers["ours"])
    student = student_from_teacher(teacher, layers=[2, 0], document_length=LENGTH)
    for model in (student, load(save_student(student, tmp_path / "student"))):
        layers = model[0].model.encoder.layer
        assert model[0].model.config.num_hidden_layers == len(layers) == 2
        for kept, of in enumerate([2, 0]):
            theirs = teacher[0].model.encoder.layer[of].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in layers[kept].state_dict().items())
        close(model.encode_query(TEXTS), student.encode_query(TEXTS))
    for wrong in ([], [3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="distinct layers of the encoder, 0 to 2"):
            student_from_teacher(teacher, layers=wrong)
    # The first layer lacks a norm that the others have.
    with pytest.raises(ValueError, match=r"at its new place layers\.0\.attn_norm\.weight would be lost"):
        build_student(str(bases["modernbert"]), layers=[1, 2], query_length=16, document_length=32)


# --- ColBERT ---


def test_a_colbert_reads_the_tokens_of_its_students_and_gives_unit_vectors(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    colbert = build_colbert(str(bases["bert"]), encoding="tct", dim=16, document_length=LENGTH)
    student = student_from_teacher(colbert, document_length=LENGTH)
    for side, prompt in (("query", "[Q] "), ("document", "[D] ")):
        mine, theirs = (model.preprocess(TEXTS, prompt=prompt, task=side) for model in (student, colbert))
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(mine[key], theirs[key])
    [vectors] = colbert.encode_query(["the teacher"])
    assert vectors.shape == (36, 16)
    assert np.linalg.norm(np.asarray(vectors), axis=1) == pytest.approx(np.ones(36), abs=1e-5)
    with pytest.raises(ValueError, match="SentenceTransformer is not a multi-vector model"):
        student_from_teacher(student)
    student.save_pretrained(str(tmp_path / "student"))
    with pytest.raises(ValueError, match=r"student is no ColBERT \(student\).* use build_student"):
        student_from_teacher(tmp_path / "student")
    with pytest.raises(ValueError, match=r"adds '\[CLS\]' and no more, which is the TCT encoding's input"):
        student_from_teacher(colbert, **PROMPTED)
    with pytest.raises(ValueError, match="dim=16"):
        build_colbert(str(bases["bert"]), dim=16)


def test_an_own_colbert_scores_the_mean_of_the_best_cosines_before_any_training(bases: dict[str, Path]) -> None:
    colbert = build_colbert(str(bases["prompted"]), document_length=LENGTH, prompts=PROMPTS)
    queries, passages = ["what is the teacher", "query"], TEXTS
    model, tokenizer = AutoModel.from_pretrained(bases["bert"]).eval(), AutoTokenizer.from_pretrained(bases["bert"])

    def tokens(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
        with torch.no_grad():
            return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0], dim=1)

    wanted = torch.tensor(
        [[(tokens(f"query: {q}") @ tokens(f"passage: {p}").T).amax(1).mean() for p in passages] for q in queries]
    )
    found = colbert.similarity(colbert.encode_query(queries), colbert.encode_document(passages))
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)
