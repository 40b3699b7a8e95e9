"""Streamed triples shared out by rows: none lost or repeated, only one's own read, resumed without reading it all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader

from tct_hf import load_triples
from tct_hf.data.file_sources import LineSource
from tct_hf.data.streamed import StreamedTriples
from tct_hf.training import streaming
from tct_hf.training.streaming import StreamedBatches
from tests.rows import jsonl, write

ROWS = 36


def row(number: int) -> dict[str, Any]:
    return {"query": f"query {number}", "positive": f"positive {number}", "negative": f"negative {number}"}


def tsv(path: Path, rows: int = ROWS) -> Path:
    path.write_text("".join("\t".join(row(number).values()) + "\n" for number in range(rows)))
    return path


def of_tsv(path: Path) -> Any:
    return load_triples(tsv(path / "t.tsv"), streaming=True)


def several_files(path: Path) -> Path:
    (path / "set").mkdir()
    for part, rows in enumerate((range(5), range(5, 25), range(25, ROWS))):  # of different lengths
        Dataset.from_list([row(number) for number in rows]).to_parquet(path / "set" / f"train-{part}.parquet")
    return path / "set"


def of_folder(path: Path) -> Any:
    return load_triples(several_files(path), streaming=True)


def of_stream(path: Path) -> Any:
    files = sorted(map(str, several_files(path).iterdir()))
    return load_triples(load_dataset("parquet", data_files=files, split="train", streaming=True), streaming=True)


def of_ids(path: Path) -> Any:
    (path / "i.tsv").write_text("".join(f"{number}\tp{number}\tn{number}\n" for number in range(ROWS)))
    passages = {f"{kind[0]}{n}": f"{kind} {n}" for n in range(ROWS) for kind in ("positive", "negative")}
    queries = {str(number): f"query {number}" for number in range(ROWS)}
    return load_triples(path / "i.tsv", collection=passages, queries=queries, streaming=True)


def of_bad_rows(path: Path) -> Any:
    text = tsv(path / "t.tsv").read_text().splitlines()
    (path / "t.tsv").write_text("\n".join([*text[:7], "bad", *text[7:20], "bad", "bad", *text[20:]]) + "\n")
    return load_triples(path / "t.tsv", streaming=True, skip_bad_rows=True)


def of_lists(path: Path) -> Any:
    """Twelve rows of three positives each."""
    rows = [{**row(at), "positives": [row(at + k)["positive"] for k in range(3)]} for at in range(0, ROWS, 3)]
    for one in rows:
        del one["positive"]
    return load_triples(write(path / "t.jsonl.gz", jsonl(rows)), streaming=True)


SOURCES = [of_tsv, of_folder, of_stream, of_ids, of_bad_rows, of_lists]


def numbers(batch: Any) -> list[int]:
    return [int(one["positive"].split()[1]) for one in batch]


def of_process(rows: Any, batch_size: int, process: int, processes: int, workers: int, trained: int = 0) -> Any:
    batches = StreamedBatches(rows, batch_size, process=process, processes=processes)
    batches.trained = trained
    return iter(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_every_row_once_a_pass_whatever_the_source(tmp_path: Path, source: Callable, shuffled: bool) -> None:
    rows, seen = source(tmp_path), []
    rows = rows.shuffle(seed=3, buffer_size=10) if shuffled else rows
    for processes, workers in ((3, 0), (2, 2)):
        size = 12 // processes
        loaders = [of_process(rows, size, process, processes, workers) for process in range(processes)]
        steps = [[number for loader in loaders for number in numbers(next(loader))] for _ in range(6)]
        once, again = [*chain(*steps[:3])], [*chain(*steps[3:])]
        assert sorted(once) == sorted(again) == list(range(ROWS))
        assert (once == list(range(ROWS))) == (not shuffled)
        assert (once == again) == (not shuffled)  # each pass has its own order
        seen.append([sorted(step) for step in steps])
    assert seen[0] == seen[1]


def test_a_process_parses_its_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_triples(tsv(tmp_path / "t.tsv"), streaming=True).shuffle(seed=0, buffer_size=10)
    parsed: list[bytes] = []
    parse = LineSource.parse
    monkeypatch.setattr(LineSource, "parse", lambda self, line: parsed.append(line) or parse(self, line))
    given = [numbers(batch) for batch in islice(of_process(rows, 4, 1, 3, 0), 3)]
    assert [int(line.split(b"\t")[0].split()[1]) for line in parsed] == [*chain(*given)]


@pytest.mark.parametrize("rows", [36, 31])  # 31: batches run over the ends of passes
@pytest.mark.parametrize(("trained", "workers"), [(0, 0), (4, 0), (9, 2), (21, 0)])
def test_a_restart_gives_the_rows_that_follow(tmp_path: Path, rows: int, trained: int, workers: int) -> None:
    stream = load_triples(tsv(tmp_path / "t.tsv", rows), streaming=True).shuffle(seed=1, buffer_size=10)
    for process in (0, 1):
        whole = [numbers(batch) for batch in islice(of_process(stream, 6, process, 2, 0), 24)]
        again = list(islice(of_process(stream, 6, process, 2, workers, trained), 24))
        assert again[:trained] == [[]] * trained
        assert [numbers(batch) for batch in again[trained:]] == whole[trained:]


@pytest.mark.parametrize("trained", [7, 10, 12, 18])
def test_passes_that_are_done_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: int) -> None:
    rows = load_triples(tsv(tmp_path / "t.tsv", 10), streaming=True).shuffle(seed=3, buffer_size=4)
    whole = [numbers(batch) for batch in islice(of_process(rows, 4, 0, 1, 0), 22)]
    begun: list[int] = []
    one_pass = streaming._one_pass
    monkeypatch.setattr(streaming, "_one_pass", lambda rows, n: begun.append(n) or one_pass(rows, n))
    again = [numbers(batch) for batch in islice(of_process(rows, 4, 0, 1, 0, trained), 22)]
    assert again == [*([[]] * trained), *whole[trained:]]
    assert begun == [0, *range(trained * 4 // 10, 10)]  # one step ahead


@pytest.mark.parametrize(
    ("size", "processes", "expected"),
    [
        (4, 1, [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]),
        (2, 2, [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]),
        (3, 3, [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]),  # the row that is left is no batch for each of them
        (20, 1, [[[*range(10)]]]),  # alone, a small batch
    ],
)
def test_one_pass_ends_with_what_is_left(tmp_path: Path, size: int, processes: int, expected: Any) -> None:
    rows = load_triples(tsv(tmp_path / "t.tsv", 10), streaming=True)
    parts = [StreamedBatches(rows, size, process=p, processes=processes, passes=1) for p in range(processes)]
    assert [[*map(numbers, part)] for part in parts] == expected


@pytest.mark.parametrize(("size", "processes"), [(3, 2), (1, 2), (1, 1)])
def test_rows_that_teach_nothing_leave_no_process_with_fewer(tmp_path: Path, size: int, processes: int) -> None:
    path, bad = tsv(tmp_path / "t.tsv"), (0, 1, 2, 8, 9, 20, 35)
    lines = path.read_text().splitlines()
    lines = [line.replace("negative", "positive") if at in bad else line for at, line in enumerate(lines)]
    path.write_text("\n".join(lines) + "\n")
    rows = load_triples(path, streaming=True)
    steps = ROWS // size // processes
    for process in range(processes):
        given = [numbers(batch) for batch in islice(of_process(rows, size, process, processes, 0), steps)]
        assert [len({*batch}) for batch in given] == [size] * steps and not {*chain(*given)} & {*bad}
        again = islice(of_process(rows, size, process, processes, 0, 4), 4, steps)
        assert [numbers(batch) for batch in again] == given[4:]


def test_shuffling_without_a_seed_is_the_same_in_every_process_and_another_epoch_another_order(tmp_path: Path) -> None:
    orders = [numbers(of_tsv(tmp_path).shuffle(buffer_size=10)) for _ in range(2)]
    assert orders[0] == orders[1] != sorted(orders[0])
    rows = of_tsv(tmp_path).shuffle(seed=5, buffer_size=10)
    epochs = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        epochs.append(numbers(rows))
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_in_mid_stream_is_named_and_too_few_rows_are_refused(tmp_path: Path, workers: int) -> None:
    path = tsv(tmp_path / "t.tsv", 3000)
    path.write_text(path.read_text().replace("\tpositive 2000\t", "\t \t"))
    rows = load_triples(path, streaming=True)
    loader = of_process(rows, 100, 0, 1, workers)
    assert sum(len(next(loader)) for _ in range(20)) == 2000
    with pytest.raises(ValueError, match=r"t\.tsv, line 2001, column 'positive': the text is empty; fill it in"):
        next(loader)
    rows = load_triples(tsv(tmp_path / "t.tsv", 5), streaming=True)
    small = of_process(rows, 2, 0, 3, workers)
    with pytest.raises(ValueError, match="has 5 rows, fewer than one batch of 2 rows on each of 3 processes"):
        next(small)
    for ended in (loader, small) if workers else ():
        ended._shutdown_workers()  # the errors keep them alive, and collected as garbage they are waited for 5 s each


def test_columns_and_checks_leave_rows_unread(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        if text == "query 7":
            raise ValueError("seven")

    rows = of_tsv(tmp_path).checked(refuse, "query").select_columns(["positive", "query"])
    assert isinstance(rows, StreamedTriples) and rows.column_names == ["positive", "query"]
    taken: list[Any] = []
    with pytest.raises(ValueError, match="seven"):
        taken.extend(batch for batch in of_process(rows, 2, 0, 1, 0) if taken.append(batch))  # type: ignore[func-returns-value]
    assert taken[0] == [{"positive": f"positive {n}", "query": f"query {n}"} for n in range(2)]
    assert len(taken) == 3
    with pytest.raises(ValueError, match="no column 'title'; there are positive, query"):
        rows.select_columns("title")
