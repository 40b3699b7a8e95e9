"""A teacher's token vectors from disk: the same scores, once computed, whoever wrote them and however that ended."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tct_hf import CachedTeacher, NoTeacher
from tct_hf.teachers.cached import TokenStore
from tests.train_helpers import PASSAGES, QUERIES, logged, make_models, make_trainer, score, triples

SETTINGS = {"weights": "w"}


def test_stored_texts_score_as_live_ones_and_are_not_encoded_again(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [PASSAGES[:4], PASSAGES[3:7]]  # one passage twice
    live = score(teacher, QUERIES[:4], columns)
    cached = CachedTeacher(teacher, tmp_path / "cache")
    first = score(cached, QUERIES[:4], columns)
    assert len(cached.store.keys()) == 4 + 7
    torch.testing.assert_close(first, live, atol=5e-3, rtol=0)
    again = CachedTeacher(teacher, tmp_path / "cache")
    calls: list[str] = []
    teacher.model.register_forward_pre_hook(lambda module, args: calls.append("forward"))
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "preprocess", lambda *args: pytest.fail("tokenised"))
        assert torch.equal(score(again, QUERIES[:4], columns), first)
    assert not calls
    score(again, ["a new query"], [PASSAGES[:1]])
    assert calls == ["forward"]
    assert len(pickle.loads(pickle.dumps(again.store)).keys()) == 12  # for workers that are not forked


def test_another_teacher_has_another_folder(teacher: Any, tmp_path: Path) -> None:
    for _ in range(2):
        cached = CachedTeacher(teacher, tmp_path / "cache")
        scores = score(cached, QUERIES[:2], [PASSAGES[:2]])
        live = score(teacher, QUERIES[:2], [PASSAGES[:2]])
        torch.testing.assert_close(scores, live, atol=5e-3, rtol=0)
        with torch.no_grad():
            next(teacher.model.parameters()).add_(0.5)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_training_with_a_cached_teacher_is_training_with_the_live_one(tmp_path: Path) -> None:
    losses = []
    for wrap in (False, True):
        student, used = make_models(tmp_path / str(wrap), shared_tokens=False)
        used = CachedTeacher(used, tmp_path / "cache") if wrap else used
        trainer = make_trainer(tmp_path / "run", student, used, triples(16), num_train_epochs=3)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    assert len(used.store.keys()) == 16 + 8  # 16 queries, 8 passages, once each


def store(folder: Path, *, max_bytes: int = 10**6) -> TokenStore:
    return TokenStore(folder, SETTINGS, dim=3, max_bytes=max_bytes)


def text(seed: int, tokens: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, 3)).astype(np.float16)


def test_two_writers_share_what_they_write(tmp_path: Path) -> None:
    one, two = store(tmp_path), store(tmp_path)
    one.put([1, -(2**63)], [text(1), text(2, 9)])
    two.put([3, 1], [text(3), text(4)])  # the first one stays
    for reader in (one, two, store(tmp_path)):
        found = reader.get([1, 3, -(2**63), 7])
        assert reader.keys() == found.keys() == {1, 3, -(2**63)}
        for key, seed, tokens in ((1, 1, 4), (-(2**63), 2, 9), (3, 3, 4)):
            assert np.array_equal(found[key], text(seed, tokens))


def test_on_a_full_disk_the_store_keeps_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = store(tmp_path)
    bounded.put([1], [text(1)])
    opened = bounded._open

    @contextmanager
    def no_room() -> Iterator[Any]:
        with opened() as database:
            database.execute("PRAGMA max_page_count = 1")
            yield database

    monkeypatch.setattr(bounded, "_open", no_room)
    for key in (2, 3):
        bounded.put([key], [text(key, 10_000)])
    assert caplog.text.count("database or disk is full") == 1 and str(tmp_path) in caplog.text
    assert bounded.keys() == store(tmp_path).keys() == {1}
    small = store(tmp_path / "small", max_bytes=200_000)
    for key in range(5):
        small.put([key], [text(key, 10_000)])
    assert small.keys() == {0, 1} and small.file.stat().st_size <= 200_000
    assert caplog.text.count("vectors.sqlite: full") == 1


def test_a_damaged_file_is_begun_again_once_by_all_who_open_it(tmp_path: Path) -> None:
    def fill(number: int) -> None:
        store(tmp_path).put([number], [text(number, 3)])

    store(tmp_path)
    for _ in range(10):
        (tmp_path / "vectors.sqlite").write_bytes(b"damaged" * 10_000)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fill, range(4)))
        assert store(tmp_path).keys() == {*range(4)}


def test_what_can_not_be_cached_is_refused(teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NoTeacher has none: give a ColBERTTeacher or a DenseTeacher"):
        CachedTeacher(NoTeacher(), tmp_path)  # type: ignore[arg-type]
    for size in (0, float("inf")):
        with pytest.raises(ValueError, match="max_gigabytes must be a finite number greater than 0"):
            CachedTeacher(teacher, tmp_path, max_gigabytes=size)
    store(tmp_path / "a").put([1], [text(1)])
    with pytest.raises(ValueError, match="dim"):
        TokenStore(tmp_path / "a", SETTINGS, dim=4, max_bytes=10)


def test_damage_counts_as_missing_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = store(tmp_path)
    right = {key: text(key, 400) for key in range(60)}
    whole.put(right, right.values())
    content = whole.file.read_bytes()
    for at in [*range(0, 120, 2), *range(120, len(content), len(content) // 40)]:
        whole.file.write_bytes(bytes([*content[:at], content[at] ^ 4, *content[at + 1 :]]))
        caplog.clear()
        damaged = store(tmp_path)
        found = damaged.get(right)
        assert all(np.array_equal(vectors, right[key]) for key, vectors in found.items()), at
        assert len(found) == len(right) or len(caplog.records) == 1, at
        damaged.put(right, right.values())
        if "no more can be written" not in caplog.text:  # a flag says that the file is read only
            assert damaged.get(right).keys() == right.keys(), at
    for broken in (b"", b"no database at all" * 1000, content[: len(content) // 2]):
        whole.file.write_bytes(broken)
        damaged = store(tmp_path)
        damaged.put(right, right.values())
        assert damaged.get(right).keys() == right.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tct_settings.json", "vectors.sqlite"]
