"""Runs scripts in processes of their own that have torch and the rest imported already: 10 s less for each.

A server imports everything once and forks a child for each script. All its children have one hash seed: what must not
depend on the order of a set is to be tested in processes that are started anew.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_one_at_a_time = threading.Lock()
_servers: dict[str, subprocess.Popen[str]] = {}


def _server(env: Mapping[str, str]) -> subprocess.Popen[str]:
    # Settings that libraries read when they are imported.
    early = json.dumps(
        sorted((k, v) for k, v in env.items() if k.startswith(("HF_", "OMP_", "TOKENIZERS_", "PYTHON")))
    )
    if early not in _servers or _servers[early].poll() is not None:
        _servers[early] = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=dict(env),
        )
    return _servers[early]


@atexit.register
def _stop() -> None:
    for server in _servers.values():
        server.kill()


def run_warm(
    arguments: list[str], *, env: Mapping[str, str], stdin: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments])` with its output captured.

    Args:
        arguments: a script and its arguments, or "-m", a module and its arguments.
        env: the environment.
        stdin: standard input.
        cwd: the folder it runs in.
    """
    with _one_at_a_time, tempfile.TemporaryDirectory() as folder:
        server = _server(env)
        assert server.stdin is not None and server.stdout is not None
        paths = [str(Path(folder) / name) for name in ("stdin", "stdout", "stderr")]
        Path(paths[0]).write_text(stdin)
        server.stdin.write(
            json.dumps({"arguments": arguments, "env": dict(env), "paths": paths, "cwd": str(cwd)}) + "\n"
        )
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (Path(path).read_text() for path in paths[1:])
    return subprocess.CompletedProcess([sys.executable, *arguments], code, out, err)


def _become(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, path in enumerate(request["paths"]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, "w" if number else "r", closefd=False) for number in range(3)
    )
    arguments: list[str] = request["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _serve() -> None:
    import datasets  # noqa: F401
    import sentence_transformers  # noqa: F401

    import tct_hf.evaluation.report
    import tct_hf.retrieval
    import tct_hf.training  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
