"""Rows are read as they stand, by one rule for ids, grades, headers and equal texts, wherever they come from."""

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
from tct_hf.data.scores import ScoreTable
from tct_hf.data.sources import DatasetSource, open_source, parts_of
from tct_hf.data.texts import open_texts
from tests.rows import jsonl, write

IDS = ["007", "2024-01-01", "1e5", "NA"]
TEXTS = ["null", "1984", "3.50", 'true, or\n"not"']
GOOD = {"query": "q", "positive": "p", "negatives": ["a", "b"]}


def judged(rows: dict[str, Any]) -> dict[str, dict[str, int]]:
    return read_qrels(DatasetSource(Dataset.from_dict({"query-id": ["q"], "corpus-id": ["d"], **rows}), "set")).qrels


@pytest.mark.parametrize("value", ["1_0", "--1", "\uff11", "1e0", "1.5", "", "0x1", True, None, 0.5, "nan", [1]])
def test_a_grade_that_is_no_plain_integer_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    for one in (value, np.array(value)):
        with pytest.raises(BadRow):
            as_grade(one)
    with pytest.raises(ValueError, match=r"set, row 0: score .* is not an integer"):
        judged({"score": [value]})
    with pytest.raises(ValueError, match=r"qrels \(a mapping\), row 0: score .* is not an integer"):
        KnownPositives({"q": {"d": value}})
    if isinstance(value, str) and value.strip():
        with pytest.raises(ValueError, match=r"q\.tsv, line 2: score .* is not an integer"):
            read_qrels(write(tmp_path / "q.tsv", f"q1\td1\t1\nq2\td\t{value}\n"))


def test_whole_numbers_are_grades_and_ids_whatever_holds_them() -> None:
    assert {as_grade(value) for value in (2, 2.0, "2", "2.0", "+2", " 2 ", np.int64(2), np.float32(2))} == {2}
    assert as_grade("-1") == -1
    assert KnownPositives({"q": {"d": np.int64(1), np.int64(7): 1}}).positives == {"q": ["d", "7"]}
    whole = {"query-id": [2**63 - 1], "corpus-id": [7], "score": [1.0]}
    assert judged(whole) == {str(2**63 - 1): {"7": 1}}
    for value, column in product([None, 1.0, float("nan")], ["query-id", "corpus-id"]):
        with pytest.raises(ValueError, match=rf"set, row 0, column '{column}': .*(no id|an id is needed)"):
            judged({column: [value], "score": [1]})


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


def test_values_of_a_mapping_that_json_does_not_know_are_named() -> None:
    with pytest.raises(ValueError, match=r"collection \(a mapping\), row 0.*holds b'text' where text is needed"):
        open_texts({"d": b"text"}, "collection", None)  # type: ignore[dict-item]


SAME = [("What is it?", "what  IS it"), ("Caf\u00e9.", "cafe\u0301"), ("\uff21b", "ab"), ("stra\u00dfe!", "STRASSE")]


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
    monkeypatch.setattr("tct_hf.files._hex", lambda digest, path: fed.append(path))
    assert build_once(folder, lambda staging: None) == folder and not fed


# Files -------------------------------------------------------------------------------------------------------------

ROWS = [f"q{n},p{n},n{n}" for n in range(6)]
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
    "by its content a .parquet file.tsv": b"PAR1....",
    "empty.tsv.gz": gzip.compress(b""),
    "tabs.tsv": b"q\tp\tn\t\nr\tp\tn\n",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ODD[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_triples(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.tsv", gzip.compress(b"q\tp\tn\n")), ("t.tsv.gz", b"\xef\xbb\xbfq\tp\tn\r\n")],
    ids=["packed", "plain with a mark"],  # gzip writes the time, which would name the test otherwise in each worker
)
def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(load_triples(tmp_path / name)) == [{"query": "q", "positive": "p", "negative": "n"}]


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_quote_that_is_not_closed_takes_no_other_row_with_it(tmp_path: Path, at: int) -> None:
    bads = ['q,"p,n', 'q,p,"n', '"q,p,n', 'q,p,"n" x', 'q,"two\nlines","n']
    for bad, then in product(bads, ["", 'a,b,"c"', 'a,"b",c']):
        lines = ["query,positive,negative", *ROWS[:at], bad, *ROWS[at:], then]
        path = write(tmp_path / "t.csv", "\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=rf"t\.csv, line {at + 2}: not CSV"):
            load_triples(path)
        skipped = SkippedRows()
        try:
            rows = load_triples(path, skip_bad_rows=True, skipped=skipped)
        except ValueError as error:  # it ends in a later line
            assert f"t.csv, line {at + 2}: not CSV" in str(error) and bad != 'q,p,"n" x'
        else:
            assert len(rows) == 6 + bool(then) and skipped.counts == {"not CSV": 1}


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"negatives": []}, "column 'negatives': 0 negatives where 2 are needed"),
        ({"negatives": "a"}, "holds 'a' where a list is needed"),
        ({"query_id": "1"}, "line 2 has no 'query_id'"),
        ({"positive": None, "positive_id": 7, "other": 1}, ""),
    ],
)
def test_a_first_row_unlike_the_others_is_bad(tmp_path: Path, odd: dict, message: str, streaming: bool) -> None:
    path = write(tmp_path / "lists.jsonl", jsonl([{**GOOD, **odd}, *[GOOD] * 20]))
    with pytest.raises(ValueError, match=rf"lists\.jsonl, line 1.*{message}"):
        load_triples(path, streaming=streaming)
    skipped = SkippedRows()
    assert len(list(load_triples(path, skip_bad_rows=True, skipped=skipped, streaming=streaming))) == 20
    assert skipped.total == 1


# Headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        *("question\tgood\tbad", "q_text\tpos\tneg", "Frage\tAntwort\tfalsch", "query\tpassage_1\tpassage_2"),
        *("query text\tpositive passage\tnegative passage", '"query"\t"positive"\t"negative"'),
    ],
)
def test_a_header_of_triples_with_unknown_names_is_no_row(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "t.tsv", f"{header}\nwhat is it\ta thing\tno thing\n")
    with pytest.raises(ValueError, match=r"t\.tsv, line 1: .* are names of columns; read by them with columns="):
        load_triples(path)
    columns = dict(zip(("query", "positive", "negative"), header.split("\t"), strict=True))
    [row] = load_triples(path, columns=columns)
    assert row == {"query": "what is it", "positive": "a thing", "negative": "no thing"}


@pytest.mark.parametrize(
    "header",
    [
        *("", "query_id\tcorpus_id\tscore", "query-id\tcorpus-id\tscore", "qid\tpid\trel", "qid 0 docid rel"),
        *("Query_ID\tDoc\tGrade", "question_id\tdocument_id\trelevance", "topic_number\titer\tdocno\trel"),
        *("Query ID\tDoc ID\tLabel", '"query-id"\t"corpus-id"\t"score"', "# query\tdoc\trel"),
        *("user_query_id\tdoc\trel", "Anfrage\tDokument\tRelevanz", "query_id corpus_id score"),
    ],
)
def test_judgements_are_read_with_any_header_and_ids_with_no_break_spaces(tmp_path: Path, header: str) -> None:
    between = "\t" if "\t" in header else " "
    line = between.join(["q1", *["0"] * (len(header.split(between)) == 4), "d\u00a01", "1"])
    assert read_qrels(write(tmp_path / "qrels", f"{header}\n{line}\n")).qrels == {"q1": {"d\u00a01": 1}}


@pytest.mark.parametrize(
    "header",
    [
        *("docno\ttext", "document\tcontents", "uid\tbody", "document_number\ttext", "passage-id\tpassage text"),
        *("#id\ttext", "key\tvalue", "queryId\tqueryText", '"pid"\t"passage"', "question_id\tquestion"),
    ],
)
def test_a_header_of_texts_is_known_by_its_words(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "c.tsv", f"{header}\nd1\tone\n")
    assert open_texts(path, "collection", None).dataset["id"][:] == ["d1"]


@pytest.mark.parametrize(
    "line", ["passage 0\ttext 0", "Paris\tcity", "a\ttext", "query1\twhat is a key", "text\tthe title", "d\tq"]
)
def test_a_first_line_of_texts_that_names_no_columns_is_a_row(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "c.tsv", f"{line}\nd1\tone\n")
    assert open_texts(path, "collection", None).dataset["id"][:] == [line.split("\t")[0], "d1"]


@pytest.mark.parametrize("first", ["q0\t0\td0\t1", "q0 0 d0 1", "q0\td0"])
def test_most_judgements_say_what_a_line_is(tmp_path: Path, first: str) -> None:
    path, skipped = write(tmp_path / "q.tsv", first + "\nq1\td1\t1\nq2\td2\t1\n"), SkippedRows()
    with pytest.raises(ValueError, match=r"q\.tsv, line 1: \d fields where 3 are needed \(query, passage, score\)"):
        read_qrels(path)
    assert read_qrels(path, skipped=skipped).qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}} and skipped.total == 1


def test_columns_in_another_order_are_refused_or_read_by_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", "corpus_id\tquery_id\tscore\nd1\tq1\t1\n")
    with pytest.raises(ValueError, match=r"line 1: columns .* the query comes first"):
        read_qrels(path)
    assert ScoreTable.open(path).get([("q1", "d1"), ("d1", "q1")]) == [1.0, None]
    path.write_text("pid\tpassage\nd1\tone\n")
    assert open_texts(path, "collection", None).get(["d1", "pid"]) == ["one", None]
    path.write_text("passage\tpid\none\td1\n")
    with pytest.raises(ValueError, match=r"line 1: .* put ids first"):
        open_texts(path, "collection", None)


# Folders and the Hub -----------------------------------------------------------------------------------------------


def folder_of(path: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """One file a row."""
    path.mkdir(parents=True)
    for at, row in enumerate(rows):
        one = Dataset.from_list([row])
        save = {".csv": one.to_csv, ".jsonl": one.to_json, ".parquet": one.to_parquet}[suffix]
        save(path / f"train-{at:05d}-of-{len(rows):05d}{suffix}")
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_looks_like_a_number_a_date_or_nothing_stays_text(tmp_path: Path, suffix: str, streaming: bool) -> None:
    passages = [{"id": name, "text": text} for name, text in zip(IDS, TEXTS, strict=True)]
    rows = [{"query": "q", "positive": row["text"], "negative": "n", "query_id": row["id"]} for row in passages]
    folder = folder_of(tmp_path / "triples", suffix, rows)
    assert list(load_triples(folder, streaming=streaming)) == rows
    assert list(load_triples(sorted(folder.iterdir())[0], streaming=streaming)) == rows[:1]
    texts = open_texts(folder_of(tmp_path / "texts", suffix, passages), "collection", None)
    assert texts.get(IDS) == TEXTS
    scores = [{"query_id": name, "passage_id": "d", "score": 0.5} for name in IDS]
    table = ScoreTable.open(folder_of(tmp_path / "scores", suffix, scores))
    assert table.get([(name, "d") for name in IDS]) == [0.5] * 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_bad_row_of_a_folder_is_named_by_file_and_line_or_left_out(tmp_path: Path, suffix: str) -> None:
    row = {"query": "q", "positive": "p", "negative": "n"}
    folder = folder_of(tmp_path / "set", suffix, [row, row])
    bad = sorted(folder.iterdir())[1]
    with bad.open("ab") as file:
        file.write(b'caf\xe9,p,n\na,b,"n"c\n' if suffix == ".csv" else b'{"query": "caf\xe9"}\n{oops\n')
    with pytest.raises(ValueError, match=rf"{bad.name}, line {3 - (suffix != '.csv')}: not UTF-8"):
        load_triples(folder)
    skipped = SkippedRows()
    assert len(load_triples(folder, skip_bad_rows=True, skipped=skipped)) == 2
    assert skipped.counts == {"not UTF-8": 1, "not CSV" if suffix == ".csv" else "not JSON": 1}


CSV = "query,positive,negative\na,b,c\n"
MORE = {"a.csv": CSV, "b.jsonl": '{"query": "x", "positive": "y", "negative": "z"}\n', "c.tsv": "a\tb\tc\n"}
MORE |= {"c.csv.bz2": "BZh9", "d.csv.xz": "\xfd7zXZ", "e.zip": "PK", "f.json": "[\n1\n]"}
BESIDE = [("a.csv", name) for name in ("g.csv", *list(MORE)[1:])]


@pytest.mark.parametrize("names", [*BESIDE, *((name,) for name in list(MORE)[3:])])
@pytest.mark.parametrize("under", ["", "data/train"])
def test_files_of_a_folder_are_read_by_our_own_readers_or_refused(
    tmp_path: Path, names: tuple[str, ...], under: str
) -> None:
    for name in names:
        write(tmp_path / under / name, MORE.get(name, "positive,query\nb,a\n"))
    with pytest.raises(ValueError, match=names[-1].replace(".", r"\.")):
        load_triples(tmp_path)


def test_settings_and_licences_beside_data_are_no_data_and_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    beside = {"summary.json": '{\n  "rows": 1\n}\n', "LICENSE.txt": "free\n", "dataset_infos.json": "{}"}
    for name, text in {**beside, "train.CSV": CSV, "test.csv": CSV, "README.md": "about\n"}.items():
        write(tmp_path / name, text)
    assert load_triples(tmp_path)["query"][:] == ["a"]


@pytest.fixture
def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a file into the data set tester/set on the Hub, whose card has options for reading it."""

    def put(name: str, content: str, **options: Any) -> None:
        write(tmp_path / name, content)
        config = SimpleNamespace(data_files={"train": [f"hf://datasets/tester/set@main/{name}"]}, **options)
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *given, **options: SimpleNamespace(config=config))

    monkeypatch.setattr("datasets.utils.file_utils.cached_path", lambda url: str(tmp_path / url.rpartition("/")[2]))
    return put


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz", ".tsv"])
def test_hub_text_files_are_read_as_they_stand(hub_file: Any, suffix: str) -> None:
    rows = [{"_id": "007", "text": "null"}, {"_id": "2024-01-01", "text": "1984"}]
    lines = "_id,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    lines = {".csv": lines, ".tsv": lines.replace(",", "\t")}.get(suffix, jsonl(rows))
    hub_file(f"train{suffix}", lines, **({"sep": "\t"} if suffix == ".tsv" else {}))
    source = parts_of("tester/set", None)["train"]()
    assert [dict(row) for _, row in source.read(dict)] == rows
    assert open_texts("tester/set", "collection", None).get(["007", "2024-01-01"]) == ["null", "1984"]
    with pytest.raises(FileNotFoundError, match="no split 'test'; splits there: train"):
        open_source("tester/set", "data", lambda path: None, split="test")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("name", "options", "streaming"),
    [
        *((f"a.{suffix}", {}, False) for suffix in ("json", "csv.zst", "csv.xz", "csv.bz2", "csv.zip")),
        *(("a.csv", {"sep": mark}, False) for mark in ";\t"),
        *(("a.jsonl", {"field": "data"}, False), ("a.jsonl", {}, True)),
    ],
)
def test_hub_files_that_our_readers_do_not_read_go_through_datasets(
    hub_file: Any, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, streaming: bool
) -> None:
    hub_file(name, '[\n{"query": "q"}]\n', **options)
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
