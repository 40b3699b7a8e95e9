"""Runs scripts in processes of their own that have torch and the rest imported already: 10 s less for each.

A server is forked from the tests' process, which has imported everything by then, before the first test; it forks a
child for each script, or several that meet as those of a launcher do. All have one hash seed: what must not depend on
the order of a set is to be tested in processes started anew.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NoReturn

from tqdm.std import TqdmDefaultWriteLock

TqdmDefaultWriteLock.mp_lock = None  # all forks would share it, and one that is killed may keep it
ROOT = Path(__file__).parent.parent
# Where the tests' process lacks one, it is imported with the first script.
IMPORTED = [
    "bm25s",
    "datasets",
    "faiss",
    "ir_measures",
    "omegaconf",
    "pyarrow.parquet",
    "sentence_transformers",
    "sentence_transformers.multi_vector_encoder.losses",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
]
_one_at_a_time = threading.Lock()
# Where requests go, where answers come from, its environment.
_server: tuple[IO[str], IO[str], set[tuple[str, str]]] | None = None


def _early(env: Mapping[str, str]) -> set[tuple[str, str]]:
    """The settings that libraries read when they are imported; some write True and false for 1 and 0."""
    read, same = ("HF_", "OMP_", "TOKENIZERS_", "PYTHON"), {"true": "1", "false": "0"}
    return {(name, same.get(value.lower(), value)) for name, value in env.items() if name.startswith(read)}


def start_server() -> None:
    """Fork the server of this process, which ends with it."""
    global _server
    requests, answers = os.pipe(), os.pipe()
    if (server := os.fork()) == 0:
        try:
            _forget_the_tests(keep=(requests[0], answers[1]))
            _serve(os.fdopen(requests[0]), os.fdopen(answers[1], "w"))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever happens, no test runs here
    atexit.register(_end, server)
    os.close(requests[0])
    os.close(answers[1])
    _server = os.fdopen(requests[1], "w"), os.fdopen(answers[0]), _early(os.environ)


def _end(server: int) -> None:
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)  # so that its time is counted as the tests'


def _forget_the_tests(keep: tuple[int, int]) -> None:
    """As if libraries alone had been imported and two files opened, but for what conftest.py spares: time."""
    for first, last in pairwise((2, *sorted(keep), os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first + 1, last)
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("tct_hf", "tests"):
            del sys.modules[name]
    sys.path.insert(0, str(ROOT))  # as of `python -m`; that of a script takes its place
    logging.root.handlers.clear()
    faulthandler.disable()
    threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__


def spare_the_collector() -> None:
    """Garbage is no longer looked for in what has been imported: 0.3 s less for each training, which looks for it."""
    gc.collect()
    gc.freeze()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_warm(
    arguments: list[str], *, env: Mapping[str, str], stdin: str = "", processes: int = 1, cwd: str | Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments])`, with its output captured.

    Args:
        arguments: a script and its arguments, or "-m", a module and its arguments, or "-c", code and its arguments.
        env: the environment.
        stdin: standard input.
        processes: more than one find each other as under `accelerate launch --multi_gpu`; the first that fails ends
            the others, and its exit status is that of all.
        cwd: the folder it runs in.
    """
    ranks: list[dict[str, str]] = [{}]
    if processes > 1:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_MIXED_PRECISION": "no"}
        meet |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        ranks = [{**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with _one_at_a_time, tempfile.TemporaryDirectory() as folder:
        assert _server is not None
        others = sorted({name for name, _ in _early(env) ^ _server[2]})
        assert not others, f"libraries have read others: {others}"
        paths = [str(Path(folder) / name) for name in ("stdin", "stdout", "stderr")]
        for path, content in zip(paths, (stdin, "", ""), strict=True):
            Path(path).write_text(content)
        environments = [{**env, **rank} for rank in ranks]
        request = {"arguments": arguments, "environments": environments, "paths": paths, "cwd": str(cwd)}
        print(json.dumps(request), file=_server[0], flush=True)
        code = _server[1].readline()
        assert code, "the server has ended"
        out, err = (Path(path).read_text() for path in paths[1:])
    return subprocess.CompletedProcess([sys.executable, *arguments], int(code), out, err)


def _become(arguments: list[str], env: dict[str, str], paths: list[str], cwd: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(paths):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)  # which several may share
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", closefd=False) for n in range(3))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _run(*request: Any) -> NoReturn:
    """As an interpreter ends, but for the 0.4 s in which it would take apart all that has been imported."""
    code: Any = 0
    try:
        _become(*request)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _wait(children: set[int]) -> int:
    """The exit status of all: that of the first to fail, which ends the others."""
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if (code := os.waitstatus_to_exitcode(status)) and not failed:
            failed = code
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        for name in IMPORTED:
            importlib.import_module(name)
        request: dict[str, Any] = json.loads(line)
        children: set[int] = set()
        for env in request["environments"]:
            child = os.fork()
            if child == 0:
                _run(request["arguments"], env, request["paths"], request["cwd"])
            children.add(child)
        print(_wait(children), file=answers, flush=True)
