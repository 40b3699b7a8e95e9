"""A reranker server on the loopback interface, which fails on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def relevance(query: str, text: str) -> float:
    """What the server says of a pair."""
    return len({*query.split()} & {*text.split()}) - len(text) / 100


class Reranker(ThreadingHTTPServer):
    """Attributes: what was asked (`requests`, `headers`), faults to come, and whether it has stopped for good."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/rerank"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        # A status with headers, a body to send, or None to cut the connection; one is used up by each request.
        self.faults: list[Any] = []
        self.answers_left = 1_000_000
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(one["query"], text) for one in self.requests for text in one.get("documents", one.get("texts"))]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the tests' business."""


@contextmanager
def serving() -> Iterator[Reranker]:
    """A server that ends with the block."""
    server = Reranker()
    yield server
    server.shutdown()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Reranker

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            self.server.times.append(time.monotonic())
            fault = self.server.faults.pop(0) if self.server.faults else ()
            stopped = self.server.answers_left == 0
            if fault == () and not stopped:
                self.server.answers_left -= 1
                self.server.requests.append(asked)
        if fault is None:
            self.connection.close()
        elif isinstance(fault, str):
            self._send(200, fault.encode())
        elif fault or stopped:
            status, headers = fault or (503, {})
            self._send(status, f"a fault, {self.headers.get('Authorization')}".encode(), headers)
        elif "texts" in asked:
            rows = [{"index": n, "score": relevance(asked["query"], text)} for n, text in enumerate(asked["texts"])]
            self._send(200, json.dumps(rows[::-1]).encode())
        else:
            scores = [relevance(asked["query"], text) for text in asked["documents"]]
            rows = [{"index": n, "relevance_score": score} for n, score in enumerate(scores)]
            self._send(200, json.dumps({"results": sorted(rows, key=lambda row: -row["relevance_score"])}).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
