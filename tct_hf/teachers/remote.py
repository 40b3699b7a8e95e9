"""A teacher behind a URL: a reranker server, or a judge of the user's own that speaks the same protocol."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tct_hf.batches import spread_own, texts_of_all
from tct_hf.cache import default_cache_dir
from tct_hf.data.rows import checked_texts
from tct_hf.hub_client import http
from tct_hf.progress import human_duration
from tct_hf.teachers.base import Columns, Rows, Teacher, Texts, check_scale

logger = logging.getLogger(__name__)

CACHE_FILE = "url_scores.sqlite"
LONGEST_PAUSE = 60.0  # seconds between two tries
# What is said of a request that will never succeed.
_FIXES = {
    401: "name the environment variable of a valid key with key_env",
    403: "name the environment variable of a key that may use it with key_env",
    404: "check the path of the URL, such as /v1/rerank, and the model",
}

Pair = tuple[str, str]  # query, passage


class RemoteTeacherError(OSError):
    """A teacher's server has refused, stopped answering or given an answer without a use; the message says the fix."""


class URLTeacher(Teacher):
    """Scores by a server that reranks, such as vLLM, Infinity, llama.cpp, Cohere, Jina, or one of the user's own.

    It is sent `{"query": text, "documents": [texts]}`, with "model" if one is named, and answers
    `{"results": [{"index": 0, "relevance_score": 1.5}, ...]}`, one result a document in any order; or, as
    text-embeddings-inference with `field="texts"`, a list of index and score.

    Scores are cached on disk by query, passage and model, or URL without a model: name another model, or cache_dir,
    when the server scores in another way than before. A request that fails by its connection or by status 408, 429
    or 500 and above is sent again after a growing pause, or after the time in Retry-After.

    Args:
        url: http or https address that requests are posted to, without secrets.
        model: name of the model for the server.
        key_env: name of the environment variable with the key, sent as `Authorization: Bearer KEY`.
        candidates: "own", a query's own positive and negatives are scored; or "in-batch", every query with every
            passage of the batch. What a batch will take is logged before training.
        field: what a request calls the passages.
        request: more fields of every request, such as {"truncate_prompt_tokens": 512}.
        documents: most passages a request.
        requests: most requests at the same time.
        timeout: seconds to wait for one answer.
        wait: seconds of failures of one request before the run ends.
        probabilities: the scores are probabilities, of which the logits are taken.
        training_scale: see :class:`Teacher`.
        cache_dir: folder of the cache; that of `load_triples` when None.

    Attributes:
        first_pause: seconds before a request is sent a second time; they double from try to try.

    Raises:
        ValueError: an unknown setting, a URL with a secret, or an environment variable that is not set.
        RemoteTeacherError: in training, if the server refuses, stops answering for longer than `wait`, or leaves out,
            repeats or spoils a score.
    """

    score_kind = "relevance score"
    first_pause = 1.0
    _device = torch.device("cpu")
    _said = False  # that the run waits

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key_env: str | None = None,
        candidates: Literal["own", "in-batch"] = "own",
        field: Literal["documents", "texts"] = "documents",
        request: Mapping[str, Any] | None = None,
        documents: int = 32,
        requests: int = 8,
        timeout: float = 120.0,
        wait: float = 1200.0,
        probabilities: bool = False,
        training_scale: float = 1.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.split() == [url]
        except ValueError:  # no number of a port
            whole = False
        if not whole:
            raise ValueError(
                "url: write the address that requests are posted to, such as http://localhost:8000/rerank"
            )
        if "@" in parts.netloc or re.search(r"(key|token|secret|sig)[^=&]*=", parts.query, re.IGNORECASE):
            raise ValueError(
                "url: it holds a secret, which would be written beside every result; take it out, and name the "
                "environment variable that holds the key with key_env"
            )
        if candidates not in ("own", "in-batch"):
            raise ValueError(f'candidates must be "own" or "in-batch", got {candidates!r}.')
        if field not in ("documents", "texts"):
            raise ValueError(f'field must be "documents" or "texts", got {field!r}.')
        for name, number, least in (("documents", documents, 1), ("requests", requests, 1), ("wait", wait, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}.")
        self.url, self.name, self.key_env = url, f"{parts.scheme}://{parts.netloc}{parts.path}", key_env
        self.covers, self.field, self.documents, self.requests = candidates, field, documents, requests
        self.timeout, self.wait, self.probabilities = timeout, wait, probabilities
        self.training_scale = check_scale(training_scale)
        self.fields = {**({} if model is None else {"model": model}), **(request or {})}
        self.identity = json.dumps([model or url, request or {}], sort_keys=True)
        self.cache = Path(cache_dir or default_cache_dir()) / CACHE_FILE
        self._key()

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise ValueError("key_env: this is no name of an environment variable; keep keys out of settings")
        key = os.environ.get(self.key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):  # else an error of the client would show it
            wrong = "holds what no header may hold" if key else "is not set"
            raise ValueError(f"key_env: the environment variable {self.key_env} {wrong}: set it to the key")
        return key

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device) -> Teacher:
        self._device = device
        return self

    def announce(self, rows: Iterable[Mapping[str, Any]], columns: Texts, *, queries: int, devices: int) -> None:
        """Log the pairs and requests of a batch, and how long they take by a first one, unless it is in the cache."""
        batch, own = [*islice(rows, queries)], self.covers == "own"
        passages = list(dict.fromkeys(row[name] for row in batch[: 1 if own else None] for name in columns))
        job = (batch[0]["query"], passages[: self.documents])
        if len(self._known((job[0], passage) for passage in job[1])) == len(job[1]):
            return
        _certificates()  # not in the time
        begun = time.monotonic()
        self._fetch([job])
        each, of_query = time.monotonic() - begun, len(columns) * (1 if own else queries * devices)
        requests = queries * -(-of_query // self.documents)
        least, most = (human_duration(each * n) for n in (-(-requests // self.requests), requests))
        logger.warning(
            f"{self.name} scores {queries * of_query:,} pairs a batch on each device, in {requests:,} requests of "
            f"{min(of_query, self.documents)} passages. The first took {human_duration(each)}: a batch takes {most}, "
            f"or {least} if {self.requests} are answered at once. Scores in {self.cache} are not asked for again."
        )

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        columns = [checked_texts(column, "document texts") for column in columns]
        return {"queries": checked_texts(queries, "query texts"), "passages": columns}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        queries, columns = inputs["queries"], inputs["passages"]
        own = self.covers == "own"
        passages = list(zip(*columns, strict=True)) if own else [texts_of_all(columns, gather=gather)] * len(queries)
        pairs = [(query, one) for query, of_query in zip(queries, passages, strict=True) for one in of_query]
        scores = torch.tensor(self._scores(pairs), dtype=torch.float64).view(len(queries), -1)
        if self.probabilities:
            if scores.min() < 0 or scores.max() > 1:
                raise RemoteTeacherError(
                    f"{self.name} gave scores from {scores.min():g} to {scores.max():g}, which are no probabilities: "
                    "leave out probabilities."
                )
            scores = scores.logit(eps=1e-6)
        scores = scores.float().to(self._device)
        return spread_own(scores, gather=gather) if own else scores

    def _scores(self, pairs: Sequence[Pair]) -> list[float]:
        known = self._known(pairs)
        wanted: dict[str, list[str]] = {}
        for query, passage in dict.fromkeys(pair for pair in pairs if pair not in known):
            wanted.setdefault(query, []).append(passage)
        size = self.documents
        parts = [(query, at, at + size) for query, of in wanted.items() for at in range(0, len(of), size)]
        known |= self._fetch([(query, wanted[query][start:end]) for query, start, end in parts])
        return [known[pair] for pair in pairs]

    def _known(self, pairs: Iterable[Pair]) -> dict[Pair, float]:
        """Scores that are in the cache."""
        with _opened(self.cache) as scores:
            find = "SELECT score FROM scores WHERE key = ?"
            rows = ((pair, scores.execute(find, (self._digest(pair),)).fetchone()) for pair in dict.fromkeys(pairs))
            return {pair: row[0] for pair, row in rows if row is not None}

    def _digest(self, pair: Pair) -> bytes:
        return sha256(json.dumps([self.identity, *pair]).encode()).digest()[:16]

    def _fetch(self, jobs: Sequence[tuple[str, list[str]]]) -> dict[Pair, float]:
        """Scores of queries and passages by requests; each answer goes into the cache as it comes."""
        found: dict[Pair, float] = {}
        if not jobs:
            return found
        key, stop = self._key(), Event()
        failed: RemoteTeacherError | None = None
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with (
            _opened(self.cache) as kept,
            http.Client(headers=headers, timeout=self.timeout, verify=_certificates()) as client,
            ThreadPoolExecutor(min(self.requests, len(jobs))) as pool,
        ):
            try:
                asked = {pool.submit(self._ask, client, key, stop, *job): job for job in jobs}
                for done in as_completed(asked):
                    query, passages = asked[done]
                    try:
                        made = {(query, one): score for one, score in zip(passages, done.result(), strict=True)}
                    except RemoteTeacherError as error:  # what has been asked for meanwhile is still kept
                        failed = failed or error
                        stop.set()
                        continue
                    with kept:
                        rows = ((self._digest(pair), score) for pair, score in made.items())
                        kept.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
                    found |= made
            finally:  # an interrupted run does not wait for what is still to be asked
                stop.set()
        if failed is not None:
            raise failed
        return found

    def _ask(self, client: Any, key: str | None, stop: Event, query: str, passages: list[str]) -> list[float]:
        """The scores of one request, which is repeated while the server fails."""
        begun, since, failures, pause = 0.0, "", 0, self.first_pause

        def shown(answer: Any) -> str:
            said = answer.text.replace(key, "***") if key else answer.text
            return f"status {answer.status_code}: {' '.join(said.split())[:200]!r}"

        while not stop.is_set():
            asks_for = 0.0
            try:
                answer = client.post(self.url, json={"query": query, self.field: passages, **self.fields})
            except http.RequestError as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    self._said = False
                    return self._read(answer, len(passages), shown(answer))
                why, status = shown(answer), answer.status_code
                if status not in (408, 429) and status < 500:
                    fix = _FIXES.get(status, "correct what it names; fields of a request are in request")
                    raise RemoteTeacherError(f"{self.name} refuses a request ({why}): {fix}.")
                asks_for = _retry_after(answer.headers.get("Retry-After"))
            now, failures = time.monotonic(), failures + 1
            if failures == 1:
                begun, since = now, time.strftime("%H:%M:%S")
            left, pause_now = begun + self.wait - now, max(asks_for, pause)
            if left <= 0 or asks_for > left:
                asked = f" and asks to wait {human_duration(asks_for)}" if asks_for else ""
                raise RemoteTeacherError(
                    f"{self.name} has failed since {since}{asked} ({why}); the run waits {human_duration(self.wait)} "
                    f"at most (wait). Scores so far are in {self.cache}: start the run again, and it goes on."
                )
            if not self._said and (failures == 3 or pause_now >= 10):
                self._said = True
                logger.warning(
                    f"{self.name} has failed since {since} ({why}): the run waits {human_duration(self.wait)} at most."
                )
            stop.wait(min(pause_now, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise RemoteTeacherError(f"{self.name}: another request has failed.")

    def _read(self, answer: Any, count: int, shown: str) -> list[float]:
        """The scores of an answer, in the order of the passages."""
        try:
            content = answer.json()
            rows = content["results"] if isinstance(content, dict) else content
            of = {row["index"]: row["relevance_score" if "relevance_score" in row else "score"] for row in rows}
            scores = [of[number] for number in range(count)]
            if len(rows) == count and all(type(one) in (int, float) and math.isfinite(one) for one in scores):
                return [float(one) for one in scores]
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            pass
        raise RemoteTeacherError(
            f"{self.name} did not give one finite relevance_score for each index from 0 to {count - 1}, once, but "
            f"{shown}: correct the server."
        )


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait, by a number or a date; 0 where it asks for nothing."""
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        try:
            return min(max(0.0, read(value or "0")), 1e9)
        except ValueError:
            continue
    return 0.0


@cache
def _certificates() -> Any:
    """Read once a process: it takes longer than a request."""
    return http.create_ssl_context()


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """The cache of scores, which several processes may use."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=60)) as kept:
            kept.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
            yield kept
    except sqlite3.Error as error:
        raise RemoteTeacherError(
            f"{file}: the cache of scores can't be used ({error}). Delete it if it is damaged, or name another folder "
            "with cache_dir."
        ) from error
