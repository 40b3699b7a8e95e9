"""A teacher behind a URL: its scores and its cache, and what it does about every way a server can fail."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import RemoteTeacherError, TeacherEnsemble, URLTeacher
from tct_hf.teachers.remote import _retry_after
from tests.reranker import Reranker, relevance, serving
from tests.train_helpers import PASSAGES, QUERIES, make_trainer, score, triples

COLUMNS = [[*PASSAGES[:3], PASSAGES[0]], PASSAGES[4:8]]
EVERY = [text for column in COLUMNS for text in column]


@pytest.fixture
def server() -> Iterator[Reranker]:
    with serving() as running:
        yield running


@pytest.fixture
def make(server: Reranker, tmp_path: Path) -> Any:
    def made(**options: Any) -> URLTeacher:
        teacher = URLTeacher(server.url, **{"cache_dir": tmp_path / "cache", "wait": 0.2, **options})
        teacher.first_pause = 0.01
        return teacher

    return made


def matrix(queries: list[str]) -> torch.Tensor:
    return torch.tensor([[relevance(query, text) for text in EVERY] for query in queries])


def test_scores_are_the_servers_in_their_places_and_each_pair_is_asked_for_once(server: Reranker, make: Any) -> None:
    own = score(make(documents=1), QUERIES[:4], COLUMNS)
    torch.testing.assert_close(own, matrix(QUERIES[:4]) * torch.eye(4).repeat(1, 2))
    assert len(server.requests) == 8 and all(set(one) == {"query", "documents"} for one in server.requests)
    whole = score(make(documents=3, candidates="in-batch"), QUERIES[:4], COLUMNS)
    torch.testing.assert_close(whole, matrix(QUERIES[:4]))
    assert max(len(one["documents"]) for one in server.requests) == 3
    assert len(server.pairs) == len(set(server.pairs)) == 4 * 7  # one passage is there twice
    torch.testing.assert_close(make().list_scores(QUERIES[0], EVERY), matrix(QUERIES[:1])[0])
    assert len(server.pairs) == 28 and "0" * 5 not in server.url


def test_another_model_or_request_has_scores_of_its_own_and_probabilities_become_logits(
    server: Reranker, make: Any
) -> None:
    for options in ({}, {"model": "judge"}, {"model": "judge", "request": {"truncate": True}}, {"documents": 1}):
        make(**options).list_scores("what", ["a passage"])
    assert [set(one) - {"query", "documents"} for one in server.requests] == [set(), {"model"}, {"model", "truncate"}]
    tei = make(field="texts", request={"raw_scores": True})
    assert float(tei.list_scores("what", ["a passage"])) == pytest.approx(relevance("what", "a passage"))
    server.faults = ['{"results": [{"index": 1, "relevance_score": 1}, {"index": 0, "relevance_score": 0.25}]}']
    found = make(probabilities=True, model="p").list_scores("what", ["one", "two"])
    assert found.tolist() == pytest.approx([-1.0986123, 13.815510], abs=1e-4)
    server.faults = ['[{"index": 0, "score": 1.5}]']
    with pytest.raises(RemoteTeacherError, match="no probabilities"):
        make(probabilities=True).list_scores("where", ["one"])


def test_failures_that_pass_are_waited_for(server: Reranker, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    teacher = make(wait=30.0, requests=1)
    server.faults = [(429, {"Retry-After": "0.2"}), (500, {}), (502, {}), None, (503, {})]
    assert float(teacher.list_scores("what", ["a passage"])) == pytest.approx(relevance("what", "a passage"))
    assert len(server.times) == 6 and server.times[1] - server.times[0] >= 0.2
    [said] = [one.message for one in caplog.records if "the run waits" in one.message]
    assert said.startswith(f"{server.url} has failed since ") and "status 502: 'a fault, None'" in said
    assert (
        _retry_after("x")
        == _retry_after(None)
        == 0
        == _retry_after(format_datetime(datetime(2020, 1, 1, tzinfo=timezone.utc)))
    )
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    assert 3500 < _retry_after(format_datetime(later, usegmt=True)) <= 3600


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([(503, {})] * 1000, "has failed since .*status 503: 'a fault.*goes on"),
        ([None] * 1000, "has failed since .*Error.*start the run again"),
        ([(429, {"Retry-After": "7200"})], "and asks to wait 2 h .*status 429"),
        ([(401, {})], r"refuses a request \(status 401: 'a fault, Bearer \*\*\*'\): name .* with key_env"),
        ([(422, {})], "refuses a request .*correct what it names"),
        (["<html>"], "one finite relevance_score for each index from 0 to 1, once, but status 200: '<html>'"),
        (['{"results": [{"index": 0, "relevance_score": 1}]}'], "finite .*'{\"results"),
        (['[{"index": 0, "score": 1}, {"index": 0, "score": 1}]'], "once"),
        (['[{"index": 0, "score": 1}, {"index": 1, "score": 1}, {"index": 1, "score": 1}]'], "once"),
        (['[{"index": 0, "score": 1}, {"index": 1, "score": NaN}]'], "finite"),
        (['[{"index": 0, "score": 1}, {"index": 1, "score": "high"}]'], "finite"),
        (['[{"index": 0, "score": 1}, {"index": 1}]', "{}"], "finite"),
    ],
)
def test_others_end_in_one_error_without_the_key(
    server: Reranker, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, faults: Any, message: str
) -> None:
    monkeypatch.setenv("A_KEY", "very-secret")
    teacher = make(key_env="A_KEY")
    server.faults = faults
    with pytest.raises(RemoteTeacherError, match=message) as caught:
        teacher.list_scores("what", ["one", "two"])
    server.faults = []
    assert server.headers[0]["Authorization"] == "Bearer very-secret"
    teacher.list_scores("what", ["one", "two"])
    said = f"{caught.value!r} {caplog.text} {vars(teacher)}"
    assert "very-secret" not in said and b"very-secret" not in teacher.cache.read_bytes()


def test_what_was_answered_before_a_failure_is_kept(server: Reranker, make: Any) -> None:
    server.answers_left = 3
    with pytest.raises(RemoteTeacherError, match="status 503"):
        make(documents=1, requests=2).list_scores("what", EVERY)
    server.answers_left = 1000
    assert len(server.pairs) == 3
    make().list_scores("what", EVERY)
    assert len(server.pairs) == len(set(server.pairs)) == 7


def test_the_cost_is_announced_and_a_mixture_takes_it(
    student: Any, server: Reranker, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for teacher, said in (
        (make(), "scores 16 pairs a batch on each device, in 8 requests of 2 passages. The first took "),
        (make(candidates="in-batch", documents=3, model="m"), "scores 128 pairs .*in 48 requests of 3 passages"),
    ):
        mixed = TeacherEnsemble({teacher: 1.0})
        trainer = make_trainer(tmp_path, student, mixed, triples(16), candidates=teacher.covers)
        [line] = [one.message for one in caplog.records if "pairs a batch" in one.message]
        assert re.search(said, line)
        caplog.clear()
        assert trainer.train().global_step == 2
        make_trainer(tmp_path, student, mixed, triples(16), candidates=teacher.covers)
        assert "pairs a batch" not in caplog.text  # the scores are there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/rerank"}, "url: write the address"),
        ({"url": "http://localhost:PORT/rerank"}, "url: write the address"),
        ({"url": "http://local host/rerank"}, "url: write the address"),
        ({"url": "http://user:pass@host/rerank"}, "url: it holds a secret"),
        ({"url": "https://host/rerank?api_key=abc"}, "url: it holds a secret"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "key_env: the environment variable NOT_SET_ANYWHERE is not set"),
        ({"key_env": "BAD_KEY"}, "key_env: the environment variable BAD_KEY holds what no header may hold"),
        ({"key_env": "sk-very-secret"}, "key_env: this is no name of an environment variable"),
        ({"candidates": "all"}, 'candidates must be "own" or "in-batch"'),
        ({"documents": 0}, "documents must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused_without_their_secrets(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "very-secret\nkey")
    with pytest.raises(ValueError, match=message) as caught:
        URLTeacher(**{"url": "http://localhost/rerank", **options})
    assert not any(secret in str(caught.value) for secret in ("secret\n", "very-secret", "pass@", "abc"))


def test_a_damaged_cache_is_named(make: Any) -> None:
    teacher = make()
    teacher.list_scores("what", ["one"])
    assert sqlite3.connect(teacher.cache).execute("SELECT count(*) FROM scores").fetchone() == (1,)
    teacher.cache.write_bytes(b"no database" * 100)
    with pytest.raises(RemoteTeacherError, match="the cache of scores can't be used"):
        teacher.list_scores("what", ["one"])
