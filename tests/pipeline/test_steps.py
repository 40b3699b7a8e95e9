"""Steps in order: which run again, and what is said of one that ended badly. No process is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tct_hf.pipeline.commands import Done, Step, run_steps, table
from tct_hf.settings import SettingsError


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.chdir(tmp_path)
    made = []
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(f"output_dir: out/{name}\nsize: 1\n")
        made.append(Step(name, tmp_path / f"{name}.py", tmp_path / f"{name}.yaml", ("--way", name), alone=name == "c"))
    return made


@pytest.fixture
def run(steps: list[Step]) -> Callable[..., list[str]]:
    """A function that runs the steps and returns the names of those that were started."""

    def call(*, status: dict[str, int] | None = None, makes: bool = True, **more: object) -> list[str]:
        started: list[str] = []

        def start(words: list[str]) -> int:
            started.append(words[-1])
            if makes:
                Path("out", words[-1]).mkdir(parents=True, exist_ok=True)
            return (status or {}).get(words[-1], 0)

        lines: list[str] = []
        run_steps(steps, "out", start=start, write=lines.append, **more)  # type: ignore[arg-type]
        return started

    return call


def test_what_is_done_is_not_done_again(run: Callable[..., list[str]]) -> None:
    assert run() == ["a", "b", "c"]
    assert run() == []


def test_a_step_that_ended_badly_is_named_and_begun_again(run: Callable[..., list[str]]) -> None:
    with pytest.raises(
        ChildProcessError, match=r"^b: `accelerate launch b.py b.yaml --way b` ended with status 3; mend"
    ):
        run(status={"b": 3})
    with pytest.raises(ChildProcessError, match=r"^b: .* was ended by signal 9"):
        run(status={"b": -9})
    assert run() == ["b", "c"]


def test_other_settings_begin_there_again(run: Callable[..., list[str]]) -> None:
    run()
    Path("base.yaml").write_text("size: 2\n")
    Path("b.yaml").write_text("extends: base.yaml\noutput_dir: out/b\n")
    assert run() == ["b", "c"]
    Path("base.yaml").write_text("size: 3\n")
    assert run() == ["b", "c"]


def test_what_was_deleted_is_made_again(run: Callable[..., list[str]]) -> None:
    run()
    Path("out/b").rmdir()
    assert run() == ["b"]


def test_a_step_that_makes_nothing_is_refused(run: Callable[..., list[str]]) -> None:
    with pytest.raises(ChildProcessError, match=r"^a: .* ended well, but out/a is not there"):
        run(makes=False)
    assert run() == ["a", "b", "c"]


def test_some_steps_alone(run: Callable[..., list[str]]) -> None:
    assert run(only=["b"]) == ["b"]
    assert run() == ["a", "c"]


def test_the_command_shown_is_the_one_that_runs(steps: list[Step]) -> None:
    ran: list[list[str]] = []
    shown: list[str] = []

    def start(words: list[str]) -> int:
        ran.append(words)
        Path("out", words[-1]).mkdir(parents=True)
        return 0

    done = run_steps(steps, "out", launcher="accelerate launch --num_processes 2", start=start, write=shown.append)
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert ran[0] == [*launched, "a.py", "a.yaml", "--way", "a"]
    assert ran[2] == [sys.executable, "c.py", "c.yaml", "--way", "c"]
    assert shown[0] == "[1/3] a: accelerate launch --num_processes 2 a.py a.yaml --way a"
    assert shown[2] == "[3/3] c: python c.py c.yaml --way c"
    record = json.loads(Path("out/steps/c.json").read_text())
    assert record["command"] == "python c.py c.yaml --way c"
    assert [one.name for one in done] == ["a", "b", "c"]


def test_a_step_in_a_process_of_its_own_gives_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("output_dir: out\n")
    Path("a.py").write_text("raise SystemExit(4)")
    with pytest.raises(ChildProcessError, match="ended with status 4"):
        run_steps([Step("a", Path("a.py"), Path("a.yaml"))], "out", launcher="python", write=lambda line: None)


def test_settings_without_a_folder_are_refused(steps: list[Step], run: Callable[..., list[str]]) -> None:
    Path("c.yaml").write_text("size: 1\n")
    with pytest.raises(SettingsError, match=r"c.yaml: output_dir is missing"):
        run()
    assert not Path("out").exists()  # nor was a step before it begun


def test_the_table_says_what_was_done_earlier() -> None:
    assert table([Done("a", 61, skipped=False), Done("b", 5, skipped=True)]).splitlines()[2:] == [
        "| a | 1 min 1 s |",
        "| b | 5 s (earlier) |",
    ]
