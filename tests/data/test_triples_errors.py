from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples

GOOD = {"query": "q", "positive": "p", "negative": "n"}
LISTS = {"query": "q", "positive": "p", "negatives": ["a", "b"]}
IDS = {"query_id": "1", "positive_id": "d1", "negative_id": "d2"}
TEXTS: dict[str, Any] = {"collection": {"d1": "one", "d2": "two", "d3": " "}, "queries": {"1": "question"}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# name of the file, its bytes, options, kind under which it is skipped, message
BAD_ROWS: dict[str, tuple[str, bytes, dict[str, Any], str, str]] = {
    "tsv of two fields": (
        "t.tsv",
        b"q\tp\tn\nq\tp\n",
        {},
        "wrong number of fields",
        r"t\.tsv, line 2: 2 fields where 3 separated by tabs are needed \(query, positive, negative\)",
    ),
    "tsv with a stray tab": (
        "t.tsv",
        b"q\tp\tn\nq\tp\tn\tm\n",
        {},
        "wrong number of fields",
        "line 2: 4 fields where 3",
    ),
    "tsv with an empty text": (
        "t.tsv",
        b"q\tp\tn\n\nq\t \tn\n",
        {},
        "empty text",
        r"t\.tsv, line 3, column 'positive': the text is empty; fill it in",
    ),
    "tsv not UTF-8": (
        "t.tsv",
        b"q\tp\tn\nq\tcaf\xe9\tn\n",
        {},
        "not UTF-8",
        r"t\.tsv, line 2: not UTF-8 \(.* at byte 5\); convert",
    ),
    "id that is not in the collection": (
        "t.tsv",
        b"1\td1\td2\n1\td1\td9\n",
        TEXTS,
        "unknown id",
        r"t\.tsv, line 2, column 'negative_id': 'd9' is not in collection",
    ),
    "id that is not among the queries": (
        "t.tsv",
        b"1\td1\td2\n7\td1\td2\n",
        TEXTS,
        "unknown id",
        r"t\.tsv, line 2, column 'query_id': '7' is not in queries",
    ),
    "id that looks like a list": (
        "t.tsv",
        b"1\td1\td2\n1\t[d1]\td2\n",
        TEXTS,
        "unknown id",
        r"line 2, column 'positive_id': '\[d1\]' is not in",
    ),
    "id with a NUL": ("t.tsv", b"1\td1\td2\n1\td1\0\td2\n", TEXTS, "empty id", "line 2, column 'positive_id'.*NUL"),
    "passage without text": (
        "t.tsv",
        b"1\td1\td2\n1\td1\td3\n",
        TEXTS,
        "empty text",
        "line 2, column 'negative_id': 'd3' has no text in",
    ),
    "not JSON": (
        "t.jsonl",
        jsonl(GOOD) + b"{oops\n",
        {},
        "not JSON",
        r"t\.jsonl, line 2: not JSON \(.*one JSON object",
    ),
    "JSON list": (
        "t.jsonl",
        jsonl(GOOD, [1]),
        {},
        "not a JSON object",
        r"line 2: a JSON list where an object is needed",
    ),
    "key twice": (
        "t.jsonl",
        jsonl(GOOD) + b'{"query": "a", "query": "b"}\n',
        {},
        "repeated key",
        "line 2: the key 'query' comes",
    ),
    "missing column": (
        "t.jsonl",
        jsonl(GOOD, {"query": "q", "positive": "p"}),
        {},
        "missing column",
        r"t\.jsonl, line 2: column 'negative' is missing \(there are: query, positive\)",
    ),
    "column that the first row lacks": (
        "t.jsonl",
        jsonl(GOOD, {**GOOD, "query_id": 1}),
        {},
        "other columns",
        "line 2: the first row has no 'query_id'",
    ),
    "number where text was": (
        "t.jsonl",
        jsonl(GOOD, {**GOOD, "positive": 3}),
        {},
        "mixed types",
        r"line 2, column 'positive': holds 3 where text is needed",
    ),
    "list where text was": (
        "t.jsonl",
        jsonl(GOOD, {**GOOD, "negative": ["n"]}),
        {},
        "mixed types",
        r"column 'negative': holds \['n'\] where",
    ),
    "text where a list was": (
        "t.jsonl",
        jsonl(LISTS, {**LISTS, "negatives": "n"}),
        {},
        "mixed types",
        "holds 'n' where a list is needed",
    ),
    "no text": (
        "t.jsonl",
        jsonl(GOOD, {**GOOD, "query": None}),
        {},
        "empty text",
        r"column 'query': no text \(null\)",
    ),
    "half a surrogate pair": (
        "t.jsonl",
        jsonl(GOOD, {**GOOD, "query": "\ud800"}),
        {},
        "not UTF-8",
        "line 2, column 'query': half a surrogate",
    ),
    "ids of numbers and text": (
        "t.jsonl",
        jsonl({**GOOD, "query_id": 1}, {**GOOD, "query_id": "2"}),
        {},
        "mixed types",
        r"line 2, column 'query_id': holds '2', text, but a number in .*line 1; write all ids of a column as one type",
    ),
    "id a fraction": (
        "t.jsonl",
        jsonl({**GOOD, "query_id": 1}, {**GOOD, "query_id": 2.0}),
        {},
        "mixed types",
        "holds 2.0 where an id",
    ),
    "no id": (
        "t.jsonl",
        jsonl({**GOOD, "query_id": 1}, {**GOOD, "query_id": None}),
        {},
        "empty id",
        r"no id \(null\)",
    ),
    "label as text": (
        "t.jsonl",
        jsonl({**GOOD, "labelled": True}, {**GOOD, "labelled": "false"}),
        {},
        "mixed types",
        r"t\.jsonl, line 2, column 'labelled': holds 'false' where true is needed, or false for a row that is not.*"
        r"columns=\{'labelled': None\}",
    ),
    "label a number": (
        "t.jsonl",
        jsonl({**GOOD, "labelled": True}, {**GOOD, "labelled": 0}),
        {},
        "mixed types",
        "line 2, column 'labelled': holds 0",
    ),
    "label left out": (
        "t.jsonl",
        jsonl({**GOOD, "labelled": True}, GOOD),
        {},
        "missing column",
        "line 2: column 'labelled' is missing",
    ),
    "too few negatives": (
        "t.jsonl",
        jsonl(LISTS, {**LISTS, "negatives": ["a"]}),
        {"num_negatives": 2},
        "too few negatives",
        r"line 2, column 'negatives': 1 negatives where 2 are needed; lower num_negatives",
    ),
    "more negatives than before": (
        "t.jsonl",
        jsonl(LISTS, {**LISTS, "negatives": ["a", "b", "c"]}),
        {},
        "too many negatives",
        r"3 negatives where the first row has 2; pass num_negatives=2",
    ),
    "empty text in a list": (
        "t.jsonl",
        jsonl(LISTS, {**LISTS, "negatives": ["a", ""]}),
        {},
        "empty text",
        r"column 'negatives\[1\]'",
    ),
    "no positive in a list": (
        "t.jsonl",
        jsonl({**LISTS, "positive": ["p"]}, {**LISTS, "positive": []}),
        {},
        "no positive",
        "line 2, column 'positive': the list is empty",
    ),
    "positives and ids that do not match": (
        "t.jsonl",
        jsonl(
            *(
                {"query": "q", "positive": ["p", "o"], "positive_id": ids, "negative": "n", "negative_id": "d"}
                for ids in (["a", "b"], ["a"])
            )
        ),
        {},
        "different lengths",
        "2 positives but 1 positive ids",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_refused_with_its_place_or_skipped_and_counted(tmp_path: Path, case: str) -> None:
    name, content, options, kind, message = BAD_ROWS[case]
    path = tmp_path / name
    path.write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_triples(path, streaming=streaming, **options)
    skipped = SkippedRows()
    loaded = load_triples(path, skip_bad_rows=True, skipped=skipped, **options)
    assert len(loaded) == (2 if case.startswith("positives and ids") else 1)
    assert skipped.counts == {kind: 1}


# What no row is to blame for, and skip_bad_rows does not pass over
BAD_FILES: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "truncated .gz": (
        "t.jsonl.gz",
        gzip.compress(jsonl(*[{**GOOD, "query": str(at)} for at in range(999)]))[:-400],
        {},
        r"t\.jsonl\.gz, after line \d+: broken \.gz .*download the file again",
    ),
    "no .gz": ("t.tsv.gz", b"q\tp\tn\n", {}, r"t\.tsv\.gz, after line 0: broken \.gz"),
    "empty tsv": ("t.tsv", b"", {}, r"t\.tsv: no row to train on; it is empty"),
    "empty jsonl": ("t.jsonl", b"\n\n", {}, r"t\.jsonl: no row to train on; it is empty"),
    "header only": ("t.tsv", b"query\tpositive\tnegative\n", {}, "no row to train on"),
    "no parquet": ("t.parquet", b"PAR1", {}, r"t\.parquet: not a whole parquet file .*copy or download"),
    "unknown kind of file": ("t.tar.gz", b"", {}, r"t\.tar\.gz: ends in \.tar; known are \.tsv.*Unpack archives"),
    "ids without texts": (
        "t.tsv",
        b"1\t2\t3\n",
        {},
        r"line 1: \['1', '2', '3'\] look like ids, not texts; pass queries= and collection=",
    ),
    "ids without queries": (
        "t.tsv",
        b"1\t2\t3\n",
        {"collection": {"2": "a", "3": "b"}},
        r"look like ids, not texts; pass queries= with",
    ),
    "ids without texts under a header": (
        "t.tsv",
        b"query\tpositive\tnegative\n1\t2\t3\n",
        {},
        r"line 2: \['1', '2', '3'\] look like ids, not texts; pass queries= and collection=",
    ),
    "header of ids without texts": (
        "t.tsv",
        b"qid\tpid+\tpid-\nq\tp\tn\n",
        {},
        r"line 1: \['qid', 'pid\+', 'pid-'\] are names of ids, not texts; pass queries= and collection= with their",
    ),
    "header of ids without queries": (
        "t.tsv",
        b"query_id\tpositive_id\tnegative_1_id\tnegative_2_id\nq\td1\td2\td3\n",
        {"collection": TEXTS["collection"], "num_negatives": 2},
        r"line 1: .* are names of ids, not texts; pass queries= with their texts",
    ),
    "ids without texts in columns of texts": (
        "t.jsonl",
        jsonl({"query": "1", "positive": "2", "negatives": ["3", "4"]}),
        {},
        r"\['1', '2', '3', '4'\] look like ids, not texts; pass queries= and collection= with their texts",
    ),
    "texts and superfluous queries": (
        "t.jsonl",
        jsonl(GOOD),
        {"queries": TEXTS["queries"]},
        r"t\.jsonl, column 'query': queries= has nothing to look up: this holds texts, such as 'q', and no id of "
        r"queries \(a mapping\); leave queries= out, or look ids up with columns=\{'query_id': ...\}",
    ),
    "texts and a superfluous collection": (
        "t.jsonl",
        jsonl({**GOOD, "query": "1"}),
        TEXTS,
        r"t\.jsonl, column 'positive': collection= has nothing to look up: .*columns=\{'positive_id': ...\}",
    ),
    "texts beside ids and a superfluous collection": (
        "t.jsonl",
        jsonl({**GOOD, **IDS}),
        {"collection": TEXTS["collection"]},
        r"collection= has nothing to look up: .*leave collection= out, or look ids up with "
        r"columns=\{'positive': None\}",
    ),
    "id twice in the collection": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "collection": b"d1\ta\nd2\tb\nd1\tc\n"},
        r"texts\.tsv, line 3: passage id 'd1' was used before, in .*texts\.tsv, line 1",
    ),
    "id twice among the queries": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "queries": b"1\ta\n1\tb\n"},
        r"texts\.tsv, line 2: query id '1' was used",
    ),
    "collection of three fields": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "collection": b"d1\ta\nd2\tb\tc\n"},
        r"texts\.tsv, line 2: 3 fields where 2 separated by tabs are needed \(id, text\)",
    ),
    "collection not UTF-8": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "collection": b"d1\ta\nd2\t\xe9\n"},
        r"texts\.tsv, line 2: not UTF-8",
    ),
    "collection with a NUL in an id": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "collection": b"d1\ta\nd2\0\tb\n"},
        r"texts\.tsv, line 2: _id is 'd2.x00'; it must be a string that is not empty and has no NUL",
    ),
    "collection without ids": (
        "t.tsv",
        b"1\td1\td2\n",
        {**TEXTS, "collection": Dataset.from_dict({"a": ["x"], "b": ["y"]})},
        r"collection: .*has other columns \(there are: a, b\); name them id and text",
    ),
    "qrels without positives": (
        "t.jsonl",
        jsonl({**GOOD, **IDS}),
        {"qrels": b"1\td1\t0\n"},
        r"texts\.tsv: no judgement with a score of 1",
    ),
    "qrels of other queries": (
        "t.jsonl",
        jsonl({**GOOD, **IDS}),
        {"qrels": b"9\td1\t1\n"},
        r"none of its queries is judged in .*texts\.tsv",
    ),
    "qrels of two fields": ("t.jsonl", jsonl({**GOOD, **IDS}), {"qrels": b"1\td1\n"}, r"texts\.tsv, line 1: 2 fields"),
    "qrels without query ids": ("t.jsonl", jsonl(GOOD), {"qrels": {"1": {"d1": 1}}}, "qrels= needs query_id, which"),
    "qrels without passage ids": (
        "t.jsonl",
        jsonl({**GOOD, "query_id": 1}),
        {"qrels": {"1": {"d1": 1}}},
        r"qrels= needs passage ids",
    ),
    "nothing but bad rows": (
        "t.jsonl",
        jsonl({"query": "q"}, {"query": "r"}),
        {"skip_bad_rows": True},
        r"no row to train on; the first of 2 bad ones: .*line 1: column 'positive' is missing",
    ),
    "unknown column asked for": ("t.jsonl", jsonl(GOOD), {"columns": {"anchor": "query"}}, r"columns: 'anchor' is no"),
    "negative number of negatives": ("t.jsonl", jsonl(GOOD), {"num_negatives": -1}, "num_negatives=-1: it must be 0"),
    "header with equal names": (
        "t.tsv",
        b"a\ta\tb\n",
        {"columns": {"query": "a"}},
        r"line 1: columns= needs a header",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_or_setting_is_refused_with_the_mend(tmp_path: Path, case: str) -> None:
    name, content, options, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    for setting, value in options.items():
        if isinstance(value, bytes):
            (tmp_path / "texts.tsv").write_bytes(value)
            options = {**options, setting: tmp_path / "texts.tsv"}
    for skip in {True, options.get("skip_bad_rows", False)}:
        with pytest.raises(ValueError, match=message):
            load_triples(path, **{**options, "skip_bad_rows": skip})


# Columns of a data set are known before a row is read: what is missing is missing everywhere
BAD_COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no query": (
        {"anchor": "a", "positive": "p", "negative": "n"},
        {},
        r"the data set: column 'query' is missing \(there are: anchor, negative, positive\); name it with columns=",
    ),
    "mapped to nothing": (
        GOOD,
        {"columns": {"query": "anchor"}},
        r"column 'anchor', which columns= maps to 'query', is",
    ),
    "ids without texts": (
        IDS,
        {},
        r"column 'query' is missing, though its ids are there .*pass queries= with the texts",
    ),
    "ids of some": (
        {**GOOD, "positive_id": "d"},
        {},
        r"ids of the positives but none of the negatives.*'positive_id': N",
    ),
    "known positives without ids": (
        {**GOOD, "known_positive_ids": ["d"]},
        {},
        r"known_positive_ids but no positive_id",
    ),
    "gap in the numbers": (
        {**GOOD, "negative_2": "n"},
        {"columns": {"negative": None}},
        "negative_1 is missing before 2",
    ),
    "two forms of negatives": ({**GOOD, "negative_1": "n"}, {}, r"both 'negative' and 'negative_1'.*leave one out"),
    "too few numbered negatives": (
        {**GOOD},
        {"num_negatives": 2},
        r"row 0, column 'negative': 1 negatives where 2 are needed",
    ),
    "negatives asked for, none there": (
        {"query": "q", "positive": "p"},
        {"num_negatives": 1},
        "'negative' is missing",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_columns_that_do_not_fit_are_refused_with_the_mend(case: str) -> None:
    row, options, message = BAD_COLUMNS[case]
    with pytest.raises(ValueError, match=message):
        load_triples(Dataset.from_list([row]), **options)


def test_missing_column_of_a_data_set_is_not_skipped() -> None:
    with pytest.raises(ValueError, match="column 'query' is missing"):
        load_triples(Dataset.from_list([{"positive": "p", "negative": "n"}]), skip_bad_rows=True)


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.bin").write_bytes(b"x")
    (tmp_path / "t.tsv").write_bytes(b"1\td1\td2\n")
    for source, options, message in (
        (tmp_path / "gone.jsonl", {}, r"gone\.jsonl: no such file"),
        ("gone.tsv.gz", {}, r"gone\.tsv\.gz: no such file"),
        (tmp_path / "empty", {}, "an empty folder"),
        (tmp_path / "other", {}, "no data files that can be read"),
        (tmp_path / "t.tsv", {**TEXTS, "collection": tmp_path / "c.tsv"}, r"collection: .*c\.tsv: no such file"),
        (tmp_path / "t.tsv", {**TEXTS, "qrels": tmp_path / "q.tsv"}, r"qrels: .*q\.tsv: no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_triples(source, **options)


def test_other_types_are_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match="a list can't be loaded; give a path"):
        load_triples([GOOD])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass streaming=True"):
        load_triples(Dataset.from_list([GOOD]).to_iterable_dataset())
    with pytest.raises(ValueError, match="IterableDataset, which can't be looked up"):
        load_triples(Dataset.from_list([IDS]), collection=Dataset.from_list([GOOD]).to_iterable_dataset())


def test_bad_bytes_in_parquet_are_refused_with_the_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"q", b"\xff"]).buffers())
    fine = pa.array(["p", "p"])
    pq.write_table(pa.table({"query": broken, "positive": fine, "negative": fine}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet, after row 0"):
        load_triples(tmp_path / "t.parquet")
