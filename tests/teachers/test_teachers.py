"""What all teachers share: the type of numbers, the record of the training scale, and no teacher at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import NoTeacher
from tct_hf.encoding.kinds import TRAINING_FILE
from tct_hf.encoding.precision import has_bfloat16
from tct_hf.teachers.base import read_training_scale, write_training_scale
from tests.train_helpers import PASSAGES, QUERIES


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_a_cpu_has_bfloat16_by_its_capabilities(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(torch.device("cpu")) is expected


def test_an_older_torch_that_tells_no_capabilities_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bfloat16(torch.device("cpu")) is False


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"training_scale": true}', b'{"training_scale": NaN}']
)
def test_a_record_of_the_training_scale_that_says_none_is_refused_with_the_file(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / TRAINING_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{TRAINING_FILE}: .* Make it .* or remove the file"):
        read_training_scale(str(tmp_path))


@pytest.mark.parametrize("scale", [0, float("nan"), float("inf"), True, "4"])
def test_a_training_scale_that_is_none_is_not_written(tmp_path: Path, scale: Any) -> None:
    with pytest.raises(ValueError, match="finite number greater than 0"):
        write_training_scale(tmp_path, scale)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3)])
def test_no_teacher_gives_zeros_of_the_shape_of_the_batch(rows: int, columns: int) -> None:
    teacher = NoTeacher()
    inputs = teacher.collate(QUERIES[:rows], [PASSAGES[:rows]] * columns, [{}] * rows)
    scores = teacher.score_matrix(inputs, gather=True)
    assert scores.dtype == torch.float32 and scores.shape == (rows, rows * columns) and not scores.any()
    assert teacher.training_scale == 1.0 and teacher.to(torch.device("cpu")) is teacher
