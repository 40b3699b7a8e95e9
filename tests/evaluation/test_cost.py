from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tct_hf import measure_efficiency
from tct_hf.evaluation.cost import bytes_on_disk
from tct_hf.retrieval.encode_corpus import read_seconds


class Clock:
    """Time passes only where a stage says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def stage(self, seconds: Callable[[Any], float], result: Callable[[Any], Any] = lambda value: value) -> Any:
        def run(value: Any) -> Any:
            self.now += seconds(value)
            return result(value)

        return run


def test_each_stage_is_timed_and_takes_what_the_one_before_returned() -> None:
    clock = Clock()
    seen: list[Any] = []
    stages = {
        "encode": clock.stage(lambda query: 0.001 * query, lambda query: (query, 2 * query)),
        "search": clock.stage(lambda pair: 0.010 * pair[1], lambda pair: seen.append(pair) or sum(pair)),
        "fusion": clock.stage(lambda total: 0.5),
    }
    found = measure_efficiency(stages, list(range(1, 101)), passages=10, warm_up=0, clock=clock).to_dict()["latency"]
    assert seen == [(query, 2 * query) for query in range(1, 101)]
    first = np.arange(1, 101)
    expected = {"encode": first, "search": 20 * first, "fusion": np.full(100, 500), "total": 21 * first + 500}
    assert list(found) == list(expected)
    for stage, ms in expected.items():
        figures = [*np.percentile(ms, [50, 95, 99]), ms.mean(), 100]
        assert found[stage] == pytest.approx(dict(zip(("p50", "p95", "p99", "mean", "queries"), figures, strict=True)))


def test_what_warms_up_is_not_timed_and_throughput_counts_all_queries_of_all_batches() -> None:
    clock, calls, sizes = Clock(), list[str](), list[int]()

    def slow_at_first(query: str) -> str:
        calls.append(query)
        clock.now += 9.0 if len(calls) <= 5 else 0.002
        return query

    found = measure_efficiency({"search": slow_at_first}, ["a", "b"], passages=1, warm_up=5, clock=clock)
    assert calls == ["a", "b", "a", "b", "a", "a", "b"]
    assert found.latency["search"].p99 == pytest.approx(2) and found.latency["search"].queries == 2
    assert found.queries_per_second is None and found.batch_size is None
    batches: dict[str, Any] = {"batch": clock.stage(lambda batch: sizes.append(len(batch)) or 0.1), "batch_size": 4}
    found = measure_efficiency({"search": str}, [*"abcdefghij"], passages=1, warm_up=0, clock=clock, **batches)
    assert sizes == [4, 4, 2] and found.queries_per_second == pytest.approx(10 / 0.3) and found.batch_size == 4


def test_sizes_come_from_paths_or_numbers_and_figures_are_json(tmp_path: Path) -> None:
    (tmp_path / "index" / "deep").mkdir(parents=True)
    for name, size in (("index/a.bin", 1000), ("index/deep/b.bin", 500), ("other.json", 20)):
        (tmp_path / name).write_bytes(b"x" * size)
    common: Any = {"stages": {"search": str}, "queries": ["q"], "passages": 30}
    found = measure_efficiency(**common, disk=tmp_path / "index", memory=600, build_seconds=2.5).to_dict()
    back = json.loads(json.dumps(found))
    sizes = {"disk_bytes": 1500, "disk_bytes_per_passage": 50, "memory_bytes_per_passage": 20, "build_seconds": 2.5}
    assert back == found and {key: back[key] for key in sizes} == sizes
    assert back["threads"]["torch"] == torch.get_num_threads()
    assert back["machine"]["processor"] and back["machine"]["packages"]["numpy"]
    assert measure_efficiency(**common, disk=[tmp_path / "index", str(tmp_path / "other.json")]).disk_bytes == 1520
    nothing = measure_efficiency(**common)
    assert nothing.disk_bytes_per_passage is None and nothing.memory_bytes_per_passage is None
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        bytes_on_disk(tmp_path / "absent")


def test_the_table_shows_what_is_known() -> None:
    clock = Clock()
    stages = {"encode": clock.stage(lambda _: 0.004), "search": clock.stage(lambda _: 0.001)}
    more: dict[str, Any] = {"batch": clock.stage(lambda _: 0.5), "disk": 3_072_000, "build_seconds": 12.0}
    lines = str(measure_efficiency(stages, ["a", "b"], passages=2000, clock=clock, **more)).splitlines()
    assert lines[:3:2] == ["| stage  |  p50 ms |  p95 ms |  p99 ms | mean ms |", f"| encode {'|    4.00 ' * 4}|"]
    assert lines[3:9] == [
        f"| search {'|    1.00 ' * 4}|",
        f"| total  {'|    5.00 ' * 4}|",
        "",
        "Throughput: 4.0 queries/s in batches of 2.",
        "On disk: 3,072,000 bytes, 1,536.0 a passage (2,000 passages).",
        "Build: 12.0 s.",
    ]
    assert lines[9].startswith("2 queries timed one at a time; threads: ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stages": {}}, "stages: none"),
        ({"stages": {"total": str}}, "name of the sum"),
        ({"queries": []}, "one or more queries"),
        ({"passages": 0}, "passages: 0 is below 1"),
        ({"warm_up": -1}, "warm_up: -1"),
        ({"batch": list, "clock": lambda: 1.0}, "clock: no time passed"),
    ],
)
def test_what_cannot_be_measured_is_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"stages": {"search": str}, "queries": ["q"], "passages": 1} | changed
    with pytest.raises(ValueError, match=message):
        measure_efficiency(**arguments)


@pytest.mark.parametrize("seconds", ["null", '"3"', "NaN", "-1"])
def test_a_time_that_is_no_number_is_named_with_its_file(tmp_path: Path, seconds: str) -> None:
    (tmp_path / "seconds.json").write_text(f'{{"seconds": {seconds}}}')
    with pytest.raises(ValueError, match=r"seconds\.json: .* is no number of seconds: delete it"):
        read_seconds(tmp_path / "seconds.json")
