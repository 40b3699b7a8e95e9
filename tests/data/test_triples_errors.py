from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples
from tests.rows import jsonl, write

GOOD = {"query": "q", "positive": "p", "negative": "n"}
LISTS = {"query": "q", "positive": "p", "negatives": ["a", "b"]}
IDS = {"query_id": "1", "positive_id": "d1", "negative_id": "d2"}
TEXTS: dict[str, Any] = {"collection": {"d1": "one", "d2": "two", "d3": " "}, "queries": {"1": "question"}}


def check_bad_row(
    path: Path, content: str | bytes, options: dict[str, Any], kind: str, message: str, left: int = 1
) -> None:
    write(path, content)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"{path.name}, line \d{message}"):
            load_triples(path, streaming=streaming, **options)
    skipped = SkippedRows()
    assert len(load_triples(path, skip_bad_rows=True, skipped=skipped, **options)) == left
    assert skipped.counts == {kind: 1}


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b"q\tp", "wrong number of fields", r": 2 fields where 3 separated by tabs are needed \(query, positive, n"),
        (b"\nq\t \tn", "empty text", r", column 'positive': the text is empty; fill it in"),
        (b"q\tcaf\xe9\tn", "not UTF-8", r": not UTF-8 \(.* at byte 5\); convert"),
        (b"1\td1\td9", "unknown id", ", column 'negative_id': 'd9' is not in collection"),
        (b"7\td1\td2", "unknown id", ", column 'query_id': '7' is not in queries"),
        (b"1\t[d1]\td2", "unknown id", r", column 'positive_id': '\[d1\]' is not in"),
        (b"1\td1\0\td2", "empty id", ", column 'positive_id'.*NUL"),
        (b"1\td1\td3", "empty text", ", column 'negative_id': 'd3' has no text in"),
    ],
)
def test_bad_line_of_tsv_is_refused_with_its_place_or_skipped_and_counted(
    tmp_path: Path, line: bytes, kind: str, message: str
) -> None:
    good, options = (b"q\tp\tn\n", {}) if b"q" in line else (b"1\td1\td2\n", TEXTS)
    check_bad_row(tmp_path / "t.tsv", good + line + b"\n", options, kind, message)


@pytest.mark.parametrize(
    ("good", "change", "kind", "message"),
    [
        ({}, {"negative": ...}, "missing column", r": column 'negative' is missing \(there are: query, positive\)"),
        ({}, {"query_id": 1}, "other columns", ": the first row has no 'query_id'"),
        ({}, {"positive": 3}, "mixed types", ", column 'positive': holds 3 where text is needed"),
        ({}, {"query": None}, "empty text", r", column 'query': no text \(null\)"),
        ({}, {"query": "\ud800"}, "not UTF-8", ", column 'query': half a surrogate"),
        ({"query_id": 1}, {"query_id": 2.0}, "mixed types", "holds 2.0 where an id"),
        ({"query_id": 1}, {"query_id": None}, "empty id", r"no id \(null\)"),
        ({"labelled": True}, {"labelled": 0}, "mixed types", r"holds 0 where true .*columns=\{'labelled': None\}"),
        ({}, {"negative": " Q"}, "query itself", "column 'negative': this passage is the query itself; take another"),
        (IDS, {"negative_id": "1", "negative": "title: q"}, "query itself", "'negative': this passage is the query"),
        (LISTS, {"negatives": "n"}, "mixed types", "holds 'n' where a list is needed"),
        (LISTS, {"negatives": ["a"]}, "too few negatives", "'negatives': 1 negatives where 2 are needed; lower num_n"),
        (LISTS, {"negatives": list("abc")}, "too many negatives", "3 negatives where .* has 2; pass num_negatives=2"),
        (LISTS, {"negatives": ["a", ""]}, "empty text", r"column 'negatives\[1\]'"),
        ({"positive": ["p"]}, {"positive": []}, "no positive", ", column 'positive': the list is empty"),
    ],
)
def test_bad_object_is_refused_with_its_place_or_skipped_and_counted(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], kind: str, message: str
) -> None:
    first = good if good is LISTS else {**GOOD, **good}
    second = {name: value for name, value in {**first, **change}.items() if value is not ...}
    options = {"num_negatives": 2} if kind == "too few negatives" else {}
    check_bad_row(tmp_path / "t.jsonl", jsonl([first, second]), options, kind, f".*{message}")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("good", "change", "kind"),
    [
        ({}, {"positive": "Q!"}, "positive is the query"),
        ({}, {"negative": "P."}, "positive as negative"),
        (IDS, {"negative_id": "d1", "negative": "a copy"}, "positive as negative"),
        (IDS, {"positive_id": "1", "positive": "title: q"}, "positive is the query"),
    ],
)
def test_rows_that_teach_nothing_are_left_out_and_counted(
    tmp_path: Path, good: dict, change: dict, kind: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, skipped = {**GOOD, **good}, SkippedRows()
    path = write(tmp_path / "t.jsonl", jsonl([first, {**first, **change}, *[first] * 1000, {**first, **change}]))
    loaded = load_triples(path, streaming=streaming, skipped=skipped)
    for _ in range(2):
        assert len([*loaded]) == 1001 and skipped.counts == {kind: 2} and kind in caplog.text


def test_bad_json_and_lists_that_do_not_match_are_refused_or_skipped(tmp_path: Path) -> None:
    oops = jsonl([GOOD]) + "{oops\n"
    check_bad_row(tmp_path / "t.jsonl", oops, {}, "not JSON", r": not JSON \(.*one JSON object")
    lists = {"query": "q", "positive": ["p", "o"], "negative": "n", "negative_id": "d"}
    rows = jsonl([{**lists, "positive_id": ["a", "b"]}, {**lists, "positive_id": ["a"]}])
    check_bad_row(tmp_path / "u.jsonl", rows, {}, "different lengths", ": 2 positives but 1 positive ids", left=2)
    rows = jsonl({"query": "1", "positive": name, "negative": "d2"} for name in ("d1", "d9"))
    check_bad_row(tmp_path / "v.jsonl", rows, TEXTS, "unknown id", ", column 'positive_id': 'd9' is not in")
    rows = jsonl({"query": "1", "positive": names, "negative": "d2"} for names in (["d1"], ["d9", "d1"]))
    check_bad_row(tmp_path / "w.jsonl", rows, TEXTS, "unknown id", ", column 'positive_id': 'd9' is not in", left=2)


# What is wrong with the whole file or a setting, and skip_bad_rows does not pass over
ID_LINE = b"1\td1\td2\n"
WITH_IDS = jsonl([{**GOOD, **IDS}]).encode()
OF_ONE = {"1": {"d1": 1}}
BAD_FILES: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("t.jsonl.gz", gzip.compress(WITH_IDS * 999)[:-9], {}, r"t\.jsonl\.gz, after line \d+: broken \.gz .*download"),
    ("t.jsonl", b"\n\n", {}, r"t\.jsonl: no row to train on; it is empty"),
    ("t.tsv", b"query\tpositive\tnegative\n", {}, "no row to train on"),
    ("t.parquet", b"PAR1", {}, r"t\.parquet: not a whole parquet file .*copy or download"),
    ("t.tar.gz", b"", {}, r"t\.tar\.gz: ends in \.tar; known are \.tsv.*Unpack archives"),
    # Ids without texts, and texts without ids.
    ("t.tsv", b"1\t2\t3\n", {}, r"line 1: \['1', '2', '3'\] look like ids, not texts; pass queries= and collection="),
    ("t.tsv", b"1\t2\t3\n", {"collection": {"2": "a", "3": "b"}}, "look like ids, not texts; pass queries= with"),
    ("t.tsv", b"qid\tpid+\tpid-\n1\tp\tn\n", {}, r"line 1: .*'pid-'\] are names of ids, .*pass queries= and coll"),
    ("t.jsonl", jsonl([{"query": "1", "positive": "2", "negatives": ["3"]}]), {}, "'3'\\] look like ids, not texts"),
    ("t.jsonl", jsonl([GOOD]), {"queries": {"1": "q"}}, "queries= has nothing to look up: this holds texts, such as"),
    ("t.jsonl", WITH_IDS, {"collection": {"d1": "one"}}, r"collection= has nothing .*columns=\{'positive': None\}"),
    (
        "t.jsonl",
        jsonl([{"query": "q", "positive": ["a", "b"], "negative": ["m", "B"]}]),
        {},
        "no row to train on.*'negative_2': .* a positive",
    ),
    # Collections and judgements.
    ("t.tsv", ID_LINE, {**TEXTS, "collection": b"d1\ta\nd1\tc\n"}, r"texts\.tsv, line 2: passage id 'd1' was used"),
    ("t.tsv", ID_LINE, {**TEXTS, "collection": b"d1\ta\nd2\tb\tc\n"}, r"texts\.tsv, line 2: 3 fields where 2 "),
    ("t.tsv", ID_LINE, {**TEXTS, "collection": Dataset.from_dict({"a": ["x"], "b": ["y"]})}, "name them id and text"),
    ("t.jsonl", WITH_IDS, {"qrels": b"9\td1\t1\n"}, r"none of its queries is judged in .*texts\.tsv"),
    ("t.jsonl", jsonl([GOOD]), {"qrels": OF_ONE}, "qrels= needs query_id, which"),
    ("t.jsonl", WITH_IDS, {"qrels": {"1": {"d\ud800": 1}}}, "mapping.(, row 0, column 'corpus-id': half|: no judg)"),
    ("t.jsonl", jsonl([{**GOOD, "query_id": 1}]), {"qrels": OF_ONE}, "qrels= needs passage ids"),
    # Settings.
    ("t.jsonl", jsonl([{"query": "q"}]) * 2, {}, "line 1: column 'positive'"),
    ("t.jsonl", jsonl([GOOD]), {"columns": {"anchor": "query"}}, r"columns: 'anchor' is no"),
    ("t.jsonl", jsonl([GOOD]), {"num_negatives": -1}, "num_negatives=-1: it must be 0"),
    ("t.tsv", b"a\ta\tb\n", {"columns": {"query": "a"}}, r"line 1: columns= needs a header"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file_or_setting_is_refused_with_the_fix(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for setting, value in options.items():
        if isinstance(value, bytes):
            (tmp_path / "texts.tsv").write_bytes(value)
            options = {**options, setting: tmp_path / "texts.tsv"}
    for skip in (False, True):
        with pytest.raises(ValueError, match=message):
            load_triples(tmp_path / name, **{**options, "skip_bad_rows": skip})


# Columns of a data set are known before a row is read: what is missing is missing everywhere
BAD_COLUMNS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"asked": "a", "positive": "p"}, {}, r"column 'query' is missing \(there are: asked, positive\); name it with"),
    (GOOD, {"columns": {"query": "anchor"}}, "column 'anchor', which columns= maps to 'query', is"),
    (IDS, {}, "column 'query' is missing, though its ids are there .*pass queries= with the texts"),
    ({**GOOD, "positive_id": "d"}, {}, "ids of the positives but none of the negatives.*'positive_id': N"),
    ({**GOOD, "known_positive_ids": ["d"]}, {}, "known_positive_ids but no positive_id"),
    ({**GOOD, "negative_2": "n"}, {"columns": {"negative": None}}, "negative_1 is missing before 2"),
    ({**GOOD, "negative_1": "n"}, {}, "both 'negative' and 'negative_1'.*leave one out"),
    ({"query": "q", "positive": "p"}, {"num_negatives": 1}, "'negative' is missing"),
    (IDS, {"collection": Dataset.from_list([GOOD]).to_iterable_dataset()}, "IterableDataset can't be looked"),
]


@pytest.mark.parametrize(("row", "options", "message"), BAD_COLUMNS, ids=range(len(BAD_COLUMNS)))
def test_columns_that_do_not_fit_are_refused_with_the_fix(row: dict, options: dict, message: str) -> None:
    for skip in (False, True):
        with pytest.raises(ValueError, match=message):
            load_triples(Dataset.from_list([row]), skip_bad_rows=skip, **options)


def test_lists_and_streams_are_refused_with_the_fix() -> None:
    rows: Any
    for rows, message in (
        ([GOOD], "a list can't be loaded; give a path"),
        (Dataset.from_list([GOOD]).to_iterable_dataset(), "pass streaming=True"),
    ):
        with pytest.raises(ValueError, match=message):
            load_triples(rows)


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "a.bin", b"x")
    write(tmp_path / "t.tsv", ID_LINE)
    for source, options, message in (
        ("gone.jsonl", {}, r"gone\.jsonl: no such file"),
        ("empty", {}, "no data files that can be read"),
        ("other", {}, "no data files that can be read"),
        ("t.tsv", {**TEXTS, "collection": tmp_path / "c.tsv"}, r"collection: .*c\.tsv: no such file"),
        ("t.tsv", {**TEXTS, "qrels": tmp_path / "q.tsv"}, r"qrels: .*q\.tsv: no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_triples(tmp_path / source, **options)


def test_bad_bytes_in_parquet_are_refused_with_the_file(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"q", b"\xff"]).buffers())
    fine = pa.array(["p", "p"])
    pq.write_table(pa.table({"query": broken, "positive": fine, "negative": fine}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet, after row 0"):
        load_triples(tmp_path / "t.parquet")
