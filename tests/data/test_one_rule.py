"""One rule for ids, grades, formats, quotes and equal texts, wherever a row comes from."""

from __future__ import annotations

import gzip
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples
from tct_hf.cache import build_once
from tct_hf.data.near_duplicates import folded
from tct_hf.data.qrels import KnownPositives, read_qrels
from tct_hf.data.rows import BadRow, as_grade
from tct_hf.data.sources import DatasetSource, open_source, parts_of
from tct_hf.data.texts import open_texts
from tests.rows import jsonl, write


@pytest.mark.parametrize("value", ["1_0", "--1", "\uff11", "1e0", "1.5", "", "0x1", True, None, 0.5, "nan", [1]])
def test_a_grade_that_is_no_plain_integer_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadRow):
        as_grade(value)
    with pytest.raises(BadRow):
        as_grade(np.array(value))
    rows = Dataset.from_dict({"query-id": ["q"], "corpus-id": ["d"], "score": [value]})
    with pytest.raises(ValueError, match=r"set, row 0: score .* is not an integer"):
        read_qrels(DatasetSource(rows, "set"))
    with pytest.raises(ValueError, match=r"qrels \(a mapping\), row 0: score .* is not an integer"):
        KnownPositives({"q": {"d": value}})
    if isinstance(value, str) and value.strip():
        (tmp_path / "q.tsv").write_text(f"q1\td1\t1\nq2\td\t{value}\n")
        with pytest.raises(ValueError, match=r"q\.tsv, line 2: score .* is not an integer"):
            read_qrels(tmp_path / "q.tsv")


def test_whole_numbers_are_grades_whatever_holds_them() -> None:
    for value in (2, 2.0, "2", "2.0", "+2", " 2 ", np.int64(2), np.float32(2)):
        assert as_grade(value) == 2
    assert as_grade("-1") == -1
    grades = {"q": {"d": np.int64(1), np.int64(7): 1}}
    assert KnownPositives(grades).positives == {"q": ["d", "7"]}


@pytest.mark.parametrize("value", [None, 1.0, float("nan")])
def test_ids_of_judgements_follow_the_rule_of_all_ids(value: Any) -> None:
    rows = {"query-id": ["q", "q"], "corpus-id": [1.0, value], "score": [1, 1]}
    for given in (Dataset.from_dict(rows), Dataset.from_dict({**rows, "query-id": rows["corpus-id"]})):
        with pytest.raises(ValueError, match=r"qrels, row [01], column .*-id.: .*(no id|an id is needed)"):
            read_qrels(DatasetSource(given, "qrels"))
    whole = Dataset.from_dict({"query-id": [2**63 - 1], "corpus-id": [7], "score": [1.0]})
    assert read_qrels(DatasetSource(whole, "qrels")).qrels == {str(2**63 - 1): {"7": 1}}


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_a_format_of_a_streamed_data_set_is_put_aside(form: str) -> None:
    rows = {"query": ["a b", "c d"], "positive": ["p", "o"], "negatives": [["x", "y"], ["z", "w"]]}
    plain = Dataset.from_dict(rows)
    for streamed in (
        plain.to_iterable_dataset().with_format(form),
        plain.with_format(form).to_iterable_dataset(),
        plain.to_iterable_dataset().map(lambda row: {"negatives": np.array(row["negatives"])}),
    ):
        assert list(load_triples(streamed, streaming=True)) == list(load_triples(plain))
    judged = Dataset.from_dict({"query-id": ["q"], "corpus-id": ["d"], "score": [1]}).with_format(form)
    assert read_qrels(DatasetSource(judged, "qrels")).qrels == {"q": {"d": 1}}


def test_values_of_a_mapping_that_json_does_not_know_are_named() -> None:
    with pytest.raises(ValueError, match=r"collection \(a mapping\), row 0.*holds b'text' where text is needed"):
        open_texts({"d": b"text"}, "collection", None)  # type: ignore[dict-item]


ROWS = [f"q{n},p{n},n{n}" for n in range(6)]


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_quote_that_is_not_closed_takes_no_other_row_with_it(tmp_path: Path, at: int) -> None:
    path = tmp_path / "t.csv"
    bads = ['q,"p,n', 'q,p,"n', '"q,p,n', 'q,p,"n" x', 'q,"two\nlines","n']
    for bad, then in product(bads, ["", 'a,b,"c"', 'a,"b",c']):
        path.write_text("\n".join(["query,positive,negative", *ROWS[:at], bad, *ROWS[at:], then]) + "\n")
        with pytest.raises(ValueError, match=rf"t\.csv, line {at + 2}: not CSV"):
            load_triples(path)
        skipped = SkippedRows()
        try:
            rows = load_triples(path, skip_bad_rows=True, skipped=skipped)
        except ValueError as error:  # it ends in a later line
            assert f"t.csv, line {at + 2}: not CSV" in str(error) and bad != 'q,p,"n" x'
        else:
            assert len(rows) == 6 + bool(then) and skipped.counts == {"not CSV": 1}


SAME = [
    ("What is it?", "what  IS it"),
    ("Caf\u00e9.", "cafe\u0301"),
    ("\uff21b", "ab"),
    ("stra\u00dfe!", "STRASSE"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_texts_that_count_as_the_same_do_so_everywhere(one: str, other: str) -> None:
    assert folded(one) == folded(other)
    with pytest.raises(ValueError, match="the query itself"):
        load_triples(Dataset.from_dict({"query": [one], "positive": ["p"], "negative": [other]}))
    rows = Dataset.from_dict({"query": [one, other, "x"], "positive": [other + " p", "q", "p"], "negative": ["n"] * 3})
    known = load_triples(rows)["known_positives"][:]
    assert known[0] == known[1] and len(known[0]) == 2
    twice = Dataset.from_dict({"query": ["a", "a"], "positive": [one, other], "negative": ["n", "m"]})
    assert "known_positives" not in load_triples(twice).column_names  # one text, so one positive


def test_prepared_data_are_compared_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_once(tmp_path / "done", lambda staging: (staging / "a").write_text("abc") and None)
    build_once(folder, lambda staging: None)
    fed: list[Any] = []
    monkeypatch.setattr("tct_hf.files._feed", lambda digest, path: fed.append(path))
    assert build_once(folder, lambda staging: None) == folder and not fed


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz", ".tsv"])
def test_hub_text_files_are_read_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    rows = [{"_id": "007", "text": "null"}, {"_id": "2024-01-01", "text": "1984"}]
    lines = "_id,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    separated = lines.replace(",", "\t") if suffix == ".tsv" else lines
    write(tmp_path / f"train{suffix}", jsonl(rows) if "json" in suffix else separated)
    files = {"train": [f"hf://datasets/tester/set@main/train{suffix}"]}
    config = SimpleNamespace(data_files=files, **({"sep": "\t"} if suffix == ".tsv" else {}))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *given, **options: SimpleNamespace(config=config))
    monkeypatch.setattr("datasets.utils.file_utils.cached_path", lambda url: str(tmp_path / url.rpartition("/")[2]))
    source = parts_of("tester/set", None)["train"]()
    assert [dict(row) for _, row in source.read(dict)] == rows
    assert open_texts("tester/set", "collection", None).get(["007", "2024-01-01"]) == ["null", "1984"]
    with pytest.raises(FileNotFoundError, match="no split 'test'; splits there: train"):
        open_source("tester/set", "data", lambda path: None, split="test")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("name", "options", "streaming"),
    [
        ("a.json", {}, False),
        *((f"a.csv{suffix}", {}, False) for suffix in (".zst", ".xz", ".bz2", ".zip")),
        ("a.csv", {"sep": ";"}, False),
        ("a.csv", {"sep": "\t"}, False),
        ("a.jsonl", {"field": "data"}, False),
        ("a.jsonl", {}, True),
    ],
)
def test_hub_files_that_our_readers_do_not_read_go_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, streaming: bool
) -> None:
    (tmp_path / name).write_text('[\n{"query": "q"}]\n')
    config = SimpleNamespace(data_files={"train": [f"hf://datasets/tester/set@main/{name}"]}, **options)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *given, **options: SimpleNamespace(config=config))
    monkeypatch.setattr("datasets.utils.file_utils.cached_path", lambda url: str(tmp_path / url.rpartition("/")[2]))
    asked: list[Any] = []
    loaded = {"train": Dataset.from_dict({"query": ["q"]})}
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **options: asked.append((given, options)) or loaded)
    source = parts_of("tester/set", None, streaming=streaming)["train"]()
    assert [dict(row) for _, row in source.read(dict)] == [{"query": "q"}]
    assert asked == [(("tester/set", None), {"streaming": True} if streaming else {})]


def test_files_fetched_before_are_no_whole_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **options: str(tmp_path))
    write(tmp_path / "train-0.jsonl", jsonl([{"query": "q"}]))
    with pytest.raises(OSError, match="the Hub can't be reached"):
        parts_of("tester/set", None)


ODD = {
    "utf16.csv": "query,positive\na,b\n".encode("utf-16"),
    "train.csv.bz2": b"BZh9...",
    "array.json": b'[{"query": "q"}]\n',
    "utf16.jsonl": '{"query": "q"}\n'.encode("utf-16"),
    "list.jsonl": b"[1]\n",
    "nan.jsonl": b'{"query": NaN}\n',
    "header.csv": b"query,positive,negative\n",
    "twice.csv": b"query,query\na,b\n",
    "zst.tsv": b"(\xb5/\xfd....",
    "bz.tsv": b"BZh9...",
    "empty.tsv.gz": gzip.compress(b""),
    "empty.jsonl": b"",
    "tabs.tsv": b"q\tp\tn\t\nr\tp\tn\n",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(ODD[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_triples(path)


def test_files_without_gzip_named_gz_and_marks_and_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(b"\xef\xbb\xbfq\tp\tn\r\nr\to\tm\r\n")
    assert load_triples(path)["query"][:] == ["q", "r"]


def test_columns_of_parquet_of_any_text_type_are_text(tmp_path: Path) -> None:
    texts = pa.array(["a b", "c d"]).dictionary_encode(), pa.array(["p", "o"], pa.large_string()), ["x", "y"]
    table = dict(zip(("query", "positive", "negative"), texts, strict=True))
    table["query_id"] = pa.array([2**64 - 1, 1], pa.uint64())
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(table), path)
    assert load_triples(path)["query_id"][:] == [str(2**64 - 1), "1"]
    times = pa.array([0, 1], pa.timestamp("s"))
    for name, odd in (("query", [b"a", b"b"]), ("query_id", times), ("query", [[1], [2]])):
        pq.write_table(pa.table({**table, name: odd}), path)
        with pytest.raises(ValueError, match=rf"t\.parquet, row 0, column '{name}': holds"):
            load_triples(path)


def test_folders_with_the_names_of_files_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"t\.jsonl"):
        load_triples(tmp_path / "t.jsonl")
    (tmp_path / "loop.tsv").symlink_to(tmp_path / "loop.tsv")
    with pytest.raises(OSError, match=r"loop\.tsv"):
        load_triples(tmp_path / "loop.tsv")
