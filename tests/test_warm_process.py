"""Warm processes import this checkout's package afresh, and end as those of an interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.warm_process import ROOT, run_warm


def test_a_script_imports_the_package_of_this_checkout_and_nothing_of_the_tests(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('tct_hf' in sys.modules, 'tests' in sys.modules, sys.path[0])\n")
    with script.open("a") as file:
        file.write("import tct_hf\nprint(tct_hf.__file__)\n")
    done = run_warm([str(script)], env=os.environ, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"False False {tmp_path}", str(ROOT / "tct_hf" / "__init__.py")], done.stderr


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('yes')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("sys.exit(1.5)", 1, "1.5\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
)
def test_how_a_process_ends(code: str, status: int, said: str) -> None:
    done = run_warm(["-c", f"import sys; {code}"], env=os.environ)
    assert done.returncode == status and done.stderr.endswith(said)


def test_another_value_of_what_libraries_have_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "True")  # the same in other words, as Gradio writes it
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")  # as generation on a GPU does
    assert run_warm(["-c", ""], env=os.environ).returncode == 0
    with pytest.raises(AssertionError, match=r"\['HF_HUB_OFFLINE'\]"):
        run_warm(["-c", ""], env={**os.environ, "HF_HUB_OFFLINE": "0"})


def test_the_lock_of_progress_bars_is_no_lock_between_processes() -> None:
    done = run_warm(["-c", "from tqdm.auto import tqdm; print(len(tqdm.get_lock().locks))"], env=os.environ)
    assert done.stdout == "1\n", done.stderr  # that of threads
