"""Milvus servers on loopback: milvus-lite, and the C++ server 2.3.5 of the old wheel milvus."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import psutil
import pytest

from tct_hf import MilvusIndex
from tests.warm_process import free_port

LITE = "import sys; from milvus_lite.cmdline import main; sys.exit(main(sys.argv[1:]))"
# It listens on all interfaces, so it gets a network of its own, whose only door is a socket in its folder.
CPP = """
import asyncio, fcntl, socket, struct, sys
from milvus import MilvusServer

fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 0x49))  # loopback, up
server = MilvusServer()
server.set_base_dir(sys.argv[1])
server.start()

async def copy(source, target):
    while data := await source.read(65536):
        target.write(data)
        await target.drain()
    target.close()

async def meet(source, target):
    try:
        there, back = await asyncio.open_connection("127.0.0.1", server.listen_port)
        await asyncio.gather(copy(source, back), copy(there, target))
    finally:
        target.close()

async def listen():
    async with await asyncio.start_unix_server(meet, sys.argv[2]) as door:
        await door.serve_forever()

try:
    asyncio.run(listen())
finally:
    server.stop()
"""


class Lite:
    """A server of a folder of its own; killed and started again, it has what it has answered for."""

    index = MilvusIndex
    where = 'metadata["lang"] == "en"'

    def __init__(self) -> None:
        for package in ("pymilvus", "milvus_lite"):
            pytest.importorskip(package, reason="pip install pymilvus milvus-lite")
        folder, port = self._made_folder(), free_port()
        self.url = f"http://tct:secret@127.0.0.1:{port}"
        words = ["server", "--data-dir", str(folder / "data"), "--host", "127.0.0.1", "--port", str(port)]
        self._command = [sys.executable, "-c", LITE, *words]
        self.start()

    def _made_folder(self) -> Path:
        self._folder = Path(tempfile.mkdtemp(prefix="milvus-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def start(self) -> None:
        from pymilvus import MilvusClient, MilvusException

        log = (self._folder / "milvus.log").open("a")
        self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        for _ in range(600):
            assert self._process.poll() is None, Path(log.name).read_text()
            try:
                MilvusClient(self.url, dedicated=True).list_collections()
                return
            except MilvusException:
                time.sleep(0.1)
        raise AssertionError("Milvus did not start")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        return {"MILVUS_URI": self.url.replace("tct:secret@", ""), "MILVUS_TOKEN": "tct:secret"}

    def unreachable(self) -> list[str]:
        """URLs with a secret where nothing can be opened."""
        users = ("http://tct:secret", "http://secret", "ftp://tct:secret")
        return [*(f"{user}@127.0.0.1:1" for user in users), "http://tct:secret@[::1", "http://tct:secret/@127.0.0.1"]

    def text(self, index: MilvusIndex, name: str) -> str:
        return str(index._ask(index.name, f'id == "{name}"', "text")[0]["text"])

    def end(self, number: int = signal.SIGINT) -> None:
        self._process.send_signal(number)
        self._process.wait(30)


class Cpp(Lite):
    """The C++ server, without half precision, which needs root."""

    def __init__(self) -> None:
        for package in ("pymilvus", "milvus"):
            pytest.importorskip(package, reason="pip install pymilvus milvus")
        if os.geteuid() or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
            pytest.skip("needs root, and may have no network of its own")
        folder = self._made_folder()
        door = folder / "door"
        self.url = f"unix:{door}"
        self._command = ["unshare", "--net", sys.executable, "-c", CPP, str(folder / "data"), str(door)]
        self.start()

    @property
    def pid(self) -> int:
        return psutil.Process(self._process.pid).children()[0].pid
