"""A teacher's token vectors from disk: the same scores, once computed, whoever wrote them and however that ended."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tct_hf import CachedTeacher, ColBERTTeacher, NoTeacher
from tct_hf.teachers import token_store
from tct_hf.teachers.token_store import TokenStore
from tests.train_helpers import PASSAGES, QUERIES, logged, make_models, make_teacher, make_trainer, triples

SETTINGS = {"weights": "w"}


def inputs(teacher: Any, queries: list[str], columns: list[list[str]]) -> dict[str, Any]:
    return dict(teacher.collate(queries, columns, [{} for _ in queries]))


@pytest.fixture
def colbert(models: Path) -> ColBERTTeacher:
    return make_teacher(models, "colbert")


def test_scores_are_the_live_ones_in_half_precision_and_a_stored_text_is_neither_tokenised_nor_encoded(
    colbert: ColBERTTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [PASSAGES[:4], PASSAGES[3:7]]  # one passage twice
    live = colbert.score_matrix(inputs(colbert, QUERIES[:4], columns), gather=False)
    cached = CachedTeacher(colbert, tmp_path / "cache")
    first = cached.score_matrix(inputs(cached, QUERIES[:4], columns), gather=False)
    assert (cached.hits, cached.misses) == (0, 4 + 7)
    torch.testing.assert_close(first, live, atol=5e-3, rtol=0)
    again = CachedTeacher(colbert, tmp_path / "cache")
    calls: list[str] = []
    colbert.model.register_forward_pre_hook(lambda module, args: calls.append("forward"))
    with monkeypatch.context() as patch:
        patch.setattr(colbert, "preprocess", lambda *args: pytest.fail("tokenised"))
        assert torch.equal(again.score_matrix(inputs(again, QUERIES[:4], columns), gather=False), first)
    assert not calls and (again.hits, again.misses) == (11, 0)
    again.score_matrix(inputs(again, ["a new query"], [PASSAGES[:1]]), gather=False)
    assert calls == ["forward"] and again.misses == 1
    assert len(pickle.loads(pickle.dumps(again.store))) == 12  # for workers that are not forked


def test_another_teacher_has_another_folder(colbert: ColBERTTeacher, tmp_path: Path) -> None:
    for _ in range(2):
        cached = CachedTeacher(colbert, tmp_path / "cache")
        scores = cached.score_matrix(inputs(cached, QUERIES[:2], [PASSAGES[:2]]), gather=False)
        live = colbert.score_matrix(inputs(colbert, QUERIES[:2], [PASSAGES[:2]]), gather=False)
        torch.testing.assert_close(scores, live, atol=5e-3, rtol=0)
        with torch.no_grad():
            next(colbert.model.parameters()).add_(0.5)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_training_with_a_cached_teacher_is_training_with_the_live_one(tmp_path: Path) -> None:
    losses = []
    for wrap in (False, True):
        student, teacher = make_models(tmp_path / str(wrap), shared_tokens=False)
        used = CachedTeacher(teacher, tmp_path / "cache") if wrap else teacher
        trainer = make_trainer(tmp_path / "run", student, used, triples(16), num_train_epochs=3)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    assert used.misses == 16 + 8 and used.hits > used.misses  # 16 queries, 8 passages, once each


def store(folder: Path, *, max_bytes: int = 10**6) -> TokenStore:
    return TokenStore(folder, SETTINGS, dim=3, max_bytes=max_bytes)


def text(seed: int, tokens: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, 3)).astype(np.float16)


def test_two_writers_share_what_they_write(tmp_path: Path) -> None:
    one, two = store(tmp_path), store(tmp_path)
    one.put([1, 2**63 + 5], [text(1), text(2, 9)])
    two.put([3], [text(3)])
    assert two.get(1) is None
    two.refresh()
    one.refresh()
    for reader in (one, two, store(tmp_path)):
        for key, seed, tokens in ((1, 1, 4), (2**63 + 5, 2, 9), (3, 3, 4)):
            found = reader.get(key)
            assert found is not None and np.array_equal(found, text(seed, tokens))
    two.put([1], [text(1)])
    assert len(list(tmp_path.glob("*.f16"))) == 2 and two.bytes == one.bytes


@pytest.mark.parametrize("suffix", ["index", "f16"])
def test_a_file_that_a_kill_cut_off_loses_its_last_texts_alone(tmp_path: Path, suffix: str) -> None:
    store(tmp_path).put([1, 2], [text(1), text(2)])
    [file] = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-5])
    after = store(tmp_path)
    assert np.array_equal(after.get(1), text(1)) and after.get(2) is None
    after.put([2], [text(2)])
    assert np.array_equal(store(tmp_path).get(1), text(1))


def test_a_damaged_vector_counts_as_missing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path).put([1, 2], [text(1), text(2)])
    [file] = tmp_path.glob("*.f16")
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    after = store(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert after.get(1) is None and after.get(2) is not None
    assert "damaged at byte 0" in caplog.text
    after.put([1], [text(1)])
    assert np.array_equal(after.get(1), text(1))


def test_a_full_store_keeps_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = text(1).nbytes + 24
    bounded = store(tmp_path, max_bytes=2 * size)
    with caplog.at_level(logging.WARNING):
        for key in range(5):
            bounded.put([key], [text(key)])
    assert len(bounded) == 2 and bounded.bytes <= 2 * size
    assert bounded.get(0) is not None and bounded.get(4) is None
    assert caplog.text.count("full at") == 1


def test_where_the_disk_is_full_training_goes_on_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = store(tmp_path)
    bounded.put([1], [text(1)])

    def no_room(file: Any, content: bytes) -> None:
        file.write(content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store, "_write", no_room)
    with caplog.at_level(logging.WARNING):
        bounded.put([2], [text(2)])
        bounded.put([3], [text(3)])
    assert caplog.text.count("No space left on device") == 1 and str(tmp_path) in caplog.text
    for reader in (bounded, store(tmp_path)):
        assert np.array_equal(reader.get(1), text(1)) and reader.get(2) is None and reader.get(3) is None


def test_what_can_not_be_cached_is_refused(colbert: ColBERTTeacher, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NoTeacher has none: give a ColBERTTeacher or a DenseTeacher"):
        CachedTeacher(NoTeacher(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_gigabytes must be a finite number greater than 0"):
        CachedTeacher(colbert, tmp_path, max_gigabytes=0)
    with pytest.raises(ValueError, match="max_gigabytes must be a finite number"):
        CachedTeacher(colbert, tmp_path, max_gigabytes=float("inf"))
    store(tmp_path / "a").put([1], [text(1)])
    with pytest.raises(ValueError, match="dim"):
        TokenStore(tmp_path / "a", SETTINGS, dim=4, max_bytes=10)
