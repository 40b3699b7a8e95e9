"""Teachers of vectors against their models' own encoding and similarity, whatever the passes and chunks."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from torch import Tensor

from tct_hf import ColBERTTeacher, CrossEncoderTeacher, DenseTeacher, student_from_teacher
from tct_hf.batches import passes as cut_into_passes
from tct_hf.encoding.kinds import TRAINING_FILE
from tct_hf.teachers.base import write_training_scale
from tests.hub.models import dual_encoder
from tests.models import load_colbert, pylate_colbert, stanford_colbert, tiny_bert, tiny_colbert, tiny_cross_encoder
from tests.train_helpers import score

TEXTS = [
    "what is a dense representation",
    "",
    "Tokens, of the passage: a query! (and) - words ",
    "retrieval",
    "Ünïcode 検索 中文",
    "the student is distilled from the teacher " * 30,
    "a literal [MASK] and [SEP]",
    "passage " * 25,
    "?",
    "the teacher of tokens " * 4,
    "query",
    "distillation of dense representations " * 2,
    "of what, of whom and of which " * 8,
]


def columns_of(rows: int, columns: int) -> list[list[str]]:
    """Candidate columns of different widths, with the longest and the empty text in different places."""
    return [[TEXTS[(5 * i + 3 * column + 1) % 13] for i in range(rows)] for column in range(columns)]


COLUMNS = columns_of(13, 2)
Encoders = dict[str, MultiVectorEncoder]
Own = dict[str, Tensor]
KINDS = ["tct", "stanford", "pylate", "mean", "passage prompt", "corpus prompt"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("teachers")
    makers = {"tct": tiny_colbert, "stanford": stanford_colbert, "pylate": pylate_colbert}
    return {name: make(path / name) for name, make in makers.items()}


@pytest.fixture(scope="session")
def encoders(checkpoints: dict[str, Path]) -> Encoders:
    found = {name: load_colbert(path) for name, path in checkpoints.items()}
    found["mean"] = copy.deepcopy(found["pylate"])
    found["mean"].similarity_fn_name = "meanmaxsim"
    for name, prompts in (
        ("passage prompt", {"query": "", "passage": "the "}),
        ("corpus prompt", {"query": "a ", "corpus": "of "}),
    ):
        found[name] = copy.deepcopy(found["stanford"])
        found[name].prompts = prompts
    return found


@pytest.fixture(scope="session")
def own(encoders: Encoders) -> Own:
    """Scores of TEXTS with COLUMNS."""
    return {name: own_scores(model, TEXTS, COLUMNS) for name, model in encoders.items()}


exact = partial(ColBERTTeacher, dtype="float32")
close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)


def own_scores(model: MultiVectorEncoder, queries: Sequence[str], columns: Sequence[Sequence[str]]) -> Tensor:
    """One text at a time, no padding, no mask: what the model's users get."""
    passages = [text for column in columns for text in column]
    of_queries = [model.encode_query([text])[0] for text in queries]
    of_passages = [model.encode_document([text])[0] for text in passages]
    return torch.tensor([[float(model.similarity([q], [p])) for p in of_passages] for q in of_queries])


def record_forwards(teacher: ColBERTTeacher, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """`(rows, tokens)` of every input the encoder is given from now on."""
    seen: list[tuple[int, int]] = []
    encoder = teacher.model[0]
    original = encoder.forward

    def forward(features: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(features["input_ids"].shape))
        return original(features, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", forward)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_models_own_of_single_texts(encoders: Encoders, own: Own, kind: str) -> None:
    teacher = exact(encoders[kind])
    assert teacher.score_kind == ("MeanMaxSim" if kind == "mean" else "MaxSim")
    found = score(teacher, TEXTS, COLUMNS)
    assert found.dtype == torch.float32 and found.shape == (13, 26)
    close(found, own[kind])
    assert kind == "mean" or own[kind].std() > 0.1  # scores that tell the candidates apart


@pytest.mark.parametrize(("tokens_per_pass", "chunk_elements"), [(1, 5_000), (200, 1)])
def test_passes_hold_so_many_tokens_and_neither_they_nor_chunks_change_scores(
    encoders: Encoders,
    own: Own,
    tokens_per_pass: int,
    chunk_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = exact(encoders["stanford"])
    parts.tokens_per_pass, parts.chunk_elements = tokens_per_pass, chunk_elements
    seen = record_forwards(parts, monkeypatch)
    close(score(parts, TEXTS, COLUMNS), own["stanford"])
    assert sum(rows for rows, _ in seen) == 13 + 26
    assert all(rows * tokens <= tokens_per_pass or rows == 1 for rows, tokens in seen)


def test_the_mean_does_not_know_how_a_query_is_padded(encoders: Encoders, own: Own) -> None:
    inputs: Any = exact(encoders["mean"]).collate(TEXTS, COLUMNS, [{}] * 13)
    for key, value in inputs["query"].items():
        if isinstance(value, Tensor) and value.ndim == 2:
            inputs["query"][key] = torch.nn.functional.pad(value, (0, 7))
    close(exact(encoders["mean"]).score_matrix(inputs, gather=False), own["mean"])


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_an_embedding_models_scores_are_its_own_similarity(tmp_path: Path, similarity: Any) -> None:
    prompts, path = {"query": "what is ", "document": "the passage "}, str(dual_encoder(tmp_path / "base"))
    settings: dict[str, Any] = {"prompts": prompts, "similarity_fn_name": similarity, "truncate_dim": 24}
    model = SentenceTransformer(path, device="cpu", **settings)
    expected = model.similarity(model.encode_query(TEXTS), model.encode_document(COLUMNS[0] + COLUMNS[1]))
    model.save_pretrained(str(tmp_path / "saved"))
    for source in (model, tmp_path / "saved"):
        teacher = DenseTeacher(source, dtype="float32")
        teacher.tokens_per_pass = 100
        assert teacher.score_kind == similarity and teacher.training_scale == 1.0
        torch.testing.assert_close(score(teacher, TEXTS, COLUMNS), expected, atol=1e-5, rtol=1e-5)


# For our own format, only the length of passages differs at 63: no short text would show it.
@pytest.mark.parametrize(
    ("format", "length", "shared"), [("tct", 64, True), ("tct", 63, False), ("pylate", 59, False)]
)
def test_only_a_student_of_the_same_tokens_is_not_tokenised_twice_and_scores_are_right(
    encoders: Encoders, own: Own, format: str, length: int, shared: bool
) -> None:
    teacher = exact(encoders[format])
    student = student_from_teacher(teacher, document_length=length)
    teacher.attach(student)
    inputs: Any = teacher.collate(TEXTS, COLUMNS, [{}] * 13)
    assert (inputs is None) is teacher.shares_tokens is shared
    if shared:
        of_query, *of_columns = (
            student.preprocess(list(texts), prompt=student.prompts[side], task=side)
            for texts, side in ((TEXTS, "query"), *((column, "document") for column in COLUMNS))
        )
        inputs = {"query": of_query, "columns": of_columns}
    close(teacher.score_matrix(inputs, gather=False), own[format])


def test_attaching_to_another_student_is_decided_anew(encoders: Encoders) -> None:
    teacher = ColBERTTeacher(encoders["tct"])
    for settings, shared in (({"query_augmentation": False}, False), ({"query_length": 35}, False), ({}, True)):
        student = student_from_teacher(teacher, document_length=64, **settings)
        teacher.attach(student)
        assert teacher.shares_tokens is shared, settings
    student.tokenizer.add_tokens(["zyxw"])  # one more word, so that some texts are read differently
    teacher.attach(student)
    assert not teacher.shares_tokens


def test_input_that_is_no_padded_text_goes_through_column_by_column_and_stays_as_it_was(
    encoders: Encoders, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = exact(encoders["stanford"])
    inputs: Any = teacher.collate(TEXTS, COLUMNS, [{}] * 13)
    features = [inputs["query"], *inputs["columns"]]
    for column in features:
        column["other"] = torch.zeros(2, 2, 2)  # no (rows, tokens): rows cannot be picked out of it
    before = [dict(column) for column in features]
    seen = record_forwards(teacher, monkeypatch)
    close(teacher.score_matrix(inputs, gather=False), own["stanford"])
    assert [rows for rows, _ in seen][:3] == [13, 13, 13]
    for column, same in zip(features, before, strict=True):
        assert column.keys() == same.keys() and all(column[key] is value for key, value in same.items())


def test_passages_padded_on_the_left_keep_their_positions(encoders: Encoders) -> None:
    model = copy.deepcopy(encoders["tct"])
    model.tokenizer.padding_side = "left"
    inputs: Any = exact(model).collate(TEXTS[:5], [TEXTS[:5]], [{}] * 5)
    [column] = inputs["columns"]
    assert (column["attention_mask"][:, 0] == 0).any()
    queries, whole = model(dict(inputs["query"]), task="query"), model(dict(column), task="document")
    masks = {"a_mask": queries["attention_mask"], "b_mask": whole["attention_mask"]}
    expected = model.similarity(queries["token_embeddings"], whole["token_embeddings"], **masks)
    close(exact(model).score_matrix(inputs, gather=False), expected)


def test_scoring_is_in_evaluation_mode_and_makes_no_graph(tmp_path: Path) -> None:
    model = load_colbert(tiny_colbert(tmp_path, dropout=0.5))
    teacher = exact(model)
    expected = score(teacher, TEXTS, COLUMNS)
    model.train()
    found = score(teacher, TEXTS, COLUMNS)
    assert torch.equal(found, expected) and not found.requires_grad
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())  # the caller's model is left as it was


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_teacher_of_any_precision_scores_on_a_cpu(tmp_path: Path, half: torch.dtype, dtype: Any) -> None:
    model = load_colbert(tiny_colbert(tmp_path)).to(half)
    model.save_pretrained(str(tmp_path / "half"))
    expected = score(exact(copy.deepcopy(model).float()), TEXTS, COLUMNS)  # of rounded weights
    for source in (model, str(tmp_path / "half")):
        teacher = ColBERTTeacher(source, dtype=dtype)
        if dtype == "float32":
            assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
        found = score(teacher, TEXTS, COLUMNS)
        assert found.dtype == torch.float32 and (dtype != "bfloat16" or not torch.equal(found, expected))
        torch.testing.assert_close(found, expected, atol=0.3 if dtype != "float32" else 1e-5, rtol=0)


def test_settings_that_make_no_sense_are_refused(encoders: Encoders) -> None:
    for settings, message in (
        ({"dtype": "float16"}, "dtype='float16' is not known"),
        ({"training_scale": 0.0}, "training_scale is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ColBERTTeacher(encoders["tct"], **settings)


def test_training_scale_is_written_and_read_back(encoders: Encoders, tmp_path: Path) -> None:
    path = tmp_path / "colbert"
    encoders["tct"].save_pretrained(str(path))
    assert ColBERTTeacher(path).training_scale == 1.0
    write_training_scale(path, 384)
    assert ColBERTTeacher(path).training_scale == 384.0
    assert ColBERTTeacher(path, training_scale=2.0).training_scale == 2.0
    assert json.loads((path / TRAINING_FILE).read_text()) == {"training_scale": 384.0}


@given(
    lengths=st.lists(st.integers(1, 155), min_size=1, max_size=60),
    budget=st.integers(1, 1000),
    padding=st.sampled_from([0, 64, 10_000]),
)
def test_passes_hold_every_row_once_within_both_limits(lengths: list[int], budget: int, padding: int) -> None:
    passes = cut_into_passes(lengths, budget, padding)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        tokens = len(rows) * max(lengths[row] for row in rows)
        assert tokens <= budget or len(rows) == 1
        assert tokens - sum(lengths[row] for row in rows) <= padding


def test_a_model_of_another_kind_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    cross_encoder = tiny_cross_encoder(tmp_path / "cross-encoder")
    CrossEncoder(str(cross_encoder), device="cpu").save_pretrained(str(tmp_path / "saved"))
    embedding = dual_encoder(tmp_path / "dual")
    (embedding / "config_sentence_transformers.json").write_text("{}")  # an older one
    teachers: list[tuple[Any, Any, str]] = [
        (ColBERTTeacher, embedding, "is a BertModel and no ColBERT: its projection would be random"),
        (CrossEncoderTeacher, embedding, "is a BertModel and no cross-encoder: the head that scores a pair would be"),
        (ColBERTTeacher, tiny_bert(tmp_path / "b"), "BertModel and no ColBERT: its projection would be random"),
        (ColBERTTeacher, cross_encoder, "is a BertForSequenceClassification and no ColBERT"),
        (ColBERTTeacher, tmp_path / "saved", "is a CrossEncoder and no ColBERT"),
        (DenseTeacher, load_colbert(checkpoints["tct"]), "needs a SentenceTransformer, got MultiVectorEncoder"),
        (DenseTeacher, checkpoints["tct"], "is a MultiVectorEncoder and no embedding model"),
    ]
    for kind, model, message in teachers:
        with pytest.raises(ValueError, match=message):
            kind(model)
    CrossEncoderTeacher(tmp_path / "saved")
