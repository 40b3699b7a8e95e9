"""A live cross-encoder: its scores are plain transformers', its candidates the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

from tct_hf import CrossEncoderTeacher, TeacherEnsemble
from tct_hf.teachers import cross_encoder as cross_encoder_teacher
from tests.models import tiny_cross_encoder
from tests.train_helpers import PASSAGES, QUERIES, make_trainer, score, triples

COLUMNS = [[*PASSAGES[:3], PASSAGES[0]], PASSAGES[4:8]]  # one passage twice


@pytest.fixture
def path(models: Path) -> Path:
    return models / "cross-encoder"


@pytest.fixture
def teacher(path: Path) -> CrossEncoderTeacher:
    return CrossEncoderTeacher(str(path), candidates="in-batch", dtype="float32")


@pytest.fixture
def whole(teacher: CrossEncoderTeacher) -> torch.Tensor:
    return score(teacher, QUERIES[:4], COLUMNS)  # type: ignore[no-any-return]


def plain(path: Path, query: str, passage: str) -> float:
    """The raw logit of one pair, alone, by plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return float(model(**tokenizer(query, passage, truncation=True, return_tensors="pt")).logits)


def test_scores_are_those_of_plain_transformers(path: Path, teacher: Any, whole: torch.Tensor) -> None:
    passages = [text for column in COLUMNS for text in column]
    expected = torch.tensor([[plain(path, query, passage) for passage in passages] for query in QUERIES[:4]])
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    own = score(CrossEncoderTeacher(CrossEncoder(str(path), device="cpu"), dtype="float32"), QUERIES[:4], COLUMNS)
    torch.testing.assert_close(own, expected * torch.eye(4).repeat(1, 2), atol=1e-5, rtol=1e-5)
    assert teacher.covers == "in-batch" and not own.requires_grad and not own.is_inference()


def test_passes_and_chunks_change_nothing(teacher: Any, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_encoder_teacher, "_PAIRS_A_CHUNK", 5)
    teacher.tokens_per_pass = 64
    passes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, args: passes.append(args[0]["input_ids"].numel()))
    torch.testing.assert_close(score(teacher, QUERIES[:4], COLUMNS), whole, atol=1e-5, rtol=1e-5)
    assert len(passes) > 8 and max(passes) <= 64


def test_long_pairs_are_cut(path: Path) -> None:
    columns = [["word " * 300, "the passage"]]
    short, longer = (
        score(CrossEncoderTeacher(str(path), dtype="float32", max_length=length), QUERIES[:2], columns)[0, 0]
        for length in (8, None)
    )
    assert short != longer
    assert float(longer) == pytest.approx(plain(path, QUERIES[0], "word " * 300), abs=1e-5)


def test_texts_that_travelled_give_the_same_scores(teacher: CrossEncoderTeacher) -> None:
    columns = [["", "Ünïcode 検索"], ["a passage", "\x00"]]
    expected = score(teacher, QUERIES[:2], columns)
    teacher._travels = True
    assert set(teacher.collate(QUERIES[:2], columns, [{}, {}])) == {"queries", "passages"}
    torch.testing.assert_close(score(teacher, QUERIES[:2], columns), expected)


def test_what_is_no_cross_encoder_of_one_score_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 labels, and a teacher gives one score"):
        CrossEncoderTeacher(str(tiny_cross_encoder(tmp_path / "three", labels=3)))
    with pytest.raises(ValueError, match="got Linear"):
        CrossEncoderTeacher(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    for setting, value, message in (
        ("candidates", "all", 'must be "own" or "in-batch"'),
        ("max_length", 0, "max_length must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossEncoderTeacher(str(path), **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("candidates", "said"), [("in-batch", True), ("own", False)])
def test_what_a_batch_costs_is_said_before_training(
    path: Path, student: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, candidates: Any, said: bool
) -> None:
    live = CrossEncoderTeacher(str(path), candidates=candidates)
    for teacher in (live, TeacherEnsemble({live: 1.0})):
        caplog.clear()
        make_trainer(tmp_path, student, teacher, triples(16), candidates=candidates)
        assert ("scores 128 pairs a batch on each device" in caplog.text) == said
        assert ("own candidates would be 16: about " in caplog.text) == said
