"""What all teachers share: number types, the training scale, what is no text, and no teacher at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import CachedTeacher, ColBERTTeacher, DenseTeacher, TeacherEnsemble
from tct_hf.encoding.kinds import TRAINING_FILE
from tct_hf.encoding.weights import has_bfloat16
from tct_hf.evaluation.maxsim import TokenVectors, encode_query_tokens
from tct_hf.teachers.base import read_training_scale, write_training_scale
from tests.train_helpers import logged, make_teacher, make_trainer, with_scores


def test_a_cpu_has_bfloat16_by_its_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert has_bfloat16(torch.device("cpu")) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert has_bfloat16(torch.device("cpu")) is False


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"training_scale": NaN}'])
def test_a_record_without_a_training_scale_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TRAINING_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{TRAINING_FILE}: .* Make it .* or remove the file"):
        read_training_scale(str(tmp_path))


def test_a_training_scale_that_is_none_is_not_written(tmp_path: Path) -> None:
    for scale in (0, float("inf"), True, "4"):
        with pytest.raises(ValueError, match="finite number greater than 0"):
            write_training_scale(tmp_path, scale)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bm25", "dense", "cross-encoder in-batch", "mixture"])
def test_each_kind_teaches_and_learns_nothing(models: Path, student: Any, tmp_path: Path, kind: str) -> None:
    teacher = make_teacher(models, kind)
    live = [one.model for one in getattr(teacher, "teachers", [teacher]) if hasattr(one, "model")]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in live]
    workers = int(kind == "bm25")
    settings: dict[str, Any] = {"num_train_epochs": 4, "bf16": kind == "bm25", "dataloader_num_workers": workers}
    trainer = make_trainer(tmp_path, student, teacher, with_scores(16), **settings)
    trainer.train()
    losses = logged(trainer)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for model, weights in zip(live, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert optimized.isdisjoint(id(p) for p in model.parameters())


@pytest.fixture(scope="module")
def teachers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {kind: make_teacher(models, kind) for kind in ("colbert", "dense", "bm25", "cross-encoder in-batch")}
    made["cached"] = CachedTeacher(make_teacher(models, "colbert"), tmp_path_factory.mktemp("cache"))
    made["ensemble"] = TeacherEnsemble({made["bm25"]: 1.0, made["dense"]: 1.0}, normalize="none")
    return made


@pytest.mark.parametrize(
    ("bad", "message"),
    [("\ud800", "half a surrogate pair"), (None, "no text"), (7, "holds 7 where text is needed")],
)
@pytest.mark.parametrize("kind", ["colbert", "dense", "bm25", "cross-encoder in-batch", "cached", "ensemble"])
def test_what_is_no_text_is_refused_with_its_number(
    teachers: dict[str, Any], kind: str, bad: Any, message: str
) -> None:
    teacher = teachers[kind]
    passages = ["a passage", bad, "the student"]
    with pytest.raises(ValueError, match=f"document texts, number 1: {message}"):
        teacher.collate(["a", "b", "c"], [passages], [{}] * 3)
    with pytest.raises(ValueError, match=f"query texts, number 0: {message}"):
        teacher.list_scores(bad, ["a passage"])
    if isinstance(teacher, (ColBERTTeacher, DenseTeacher, CachedTeacher)):
        with pytest.raises(ValueError, match=f"document texts, number 1: {message}"):
            teacher.vectors(passages, "document")
    if kind == "colbert":
        with pytest.raises(ValueError, match=f"query texts, number 1: {message}"):
            encode_query_tokens(teacher.model, passages)
        with pytest.raises(ValueError, match=f"document texts, number 0: {message}"):
            TokenVectors.encoded(teacher.model, {"p": bad}, bf16=False)


@pytest.mark.parametrize("kind", ["colbert", "dense", "cross-encoder", "cross-encoder in-batch", "cached"])
def test_queries_that_a_teacher_cuts_are_counted_once(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    teacher = make_teacher(models, "colbert" if kind == "cached" else kind)
    if kind == "dense":
        teacher = DenseTeacher(str(models / "student"), dtype="float32")
    if kind == "cached":
        teacher = CachedTeacher(teacher, tmp_path)
    stream = iter([{"query": "a query", "positive": "a passage"}] * 6)
    teacher.announce(stream, ["positive"], queries=2, devices=1)
    assert len([*stream]) > 1  # of a stream no thousand rows are read first
    queries = ["query " * 300, "a query", "student " * 300]
    teacher.announce([{"query": one, "positive": "a passage"} for one in queries], ["positive"], queries=2, devices=1)
    assert "and cut: 2 of 3 queries" in caplog.text
    caplog.clear()
    for query in queries:
        teacher.list_scores(query, ["a passage"])
    assert "Longer than" not in caplog.text


@pytest.mark.parametrize("kind", ["colbert", "bm25", "cross-encoder in-batch", "cached", "ensemble"])
def test_no_passages_have_no_scores(teachers: dict[str, Any], kind: str) -> None:
    assert teachers[kind].list_scores("a query", []).shape == (0,)
    assert teachers[kind].list_scores("", ["", "the student"]).isfinite().all()
