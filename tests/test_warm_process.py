"""Warm processes import this checkout's package afresh, and end as those of an interpreter."""

from __future__ import annotations

import os
import signal
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


def test_settings_that_libraries_have_read_are_not_changed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "True")  # as Gradio does
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")  # as generation on a GPU does
    assert run_warm(["-c", ""], env=os.environ).returncode == 0
    with pytest.raises(AssertionError, match='"HF_HUB_OFFLINE", "0"'):
        run_warm(["-c", ""], env={**os.environ, "HF_HUB_OFFLINE": "0"})


def test_a_killed_process_keeps_no_lock_of_progress_bars() -> None:
    code = "from tqdm.auto import tqdm; print([one.acquire(False) for one in tqdm.get_lock().locks], flush=True)"
    killed = run_warm(["-c", f"{code}; import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], env=os.environ)
    after = run_warm(["-c", code], env=os.environ)
    assert (killed.returncode, after.returncode) == (-signal.SIGKILL, 0)
    assert killed.stdout == after.stdout == "[True]\n"
