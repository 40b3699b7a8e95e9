"""Files and folders of rows are read as they stand, whatever they are called and however many they are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples
from tct_hf.data.qrels import read_qrels
from tct_hf.data.scores import ScoreTable
from tct_hf.data.texts import open_texts
from tests.rows import jsonl, write

IDS = ["007", "2024-01-01", "1e5", "NA"]
TEXTS = ["null", "1984", "3.50", 'true, or\n"not"']


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


def test_files_of_a_folder_with_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-0.csv", "query,positive\na,b\n")
    write(tmp_path / "set" / "train-1.csv", "positive,query\nb,a\n")
    with pytest.raises(ValueError, match=r"train-1\.csv: there are: positive, query, but in .*train-0\.csv"):
        load_triples(tmp_path / "set")


GOOD = {"query": "q", "positive": "p", "negatives": ["a", "b"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"negatives": []}, "column 'negatives': 0 negatives where 2 are needed"),
        ({"negatives": ["a"]}, "column 'negatives': 1 negatives where 2 are needed"),
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


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", gzip.compress(b"q\tp\tn\n"))
    assert list(load_triples(path)) == [{"query": "q", "positive": "p", "negative": "n"}]
    wrong = ((b"PAR1....", r"by its content a \.parquet file.*name it so"), (b"PK\3\4..", r"\.zip file"))
    for content, message in wrong:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_triples(path)


@pytest.mark.parametrize(
    "header",
    [
        "question\tgood\tbad",
        "q_text\tpos\tneg",
        "Frage\tAntwort\tfalsch",
        "query\tpassage_1\tpassage_2",
        "query text\tpositive passage\tnegative passage",
        '"query"\t"positive"\t"negative"',
    ],
)
def test_a_header_of_triples_with_unknown_names_is_no_row(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "t.tsv", f"{header}\nwhat is it\ta thing\tno thing\n")
    with pytest.raises(ValueError, match=r"t\.tsv, line 1: .* are names of columns; read by them with columns="):
        load_triples(path)
    columns = dict(zip(("query", "positive", "negative"), header.split("\t"), strict=True))
    [row] = load_triples(path, columns=columns)
    assert row == {"query": "what is it", "positive": "a thing", "negative": "no thing"}


HEADERS = ["query_id corpus_id score", "query-id corpus-id score", "qid pid rel", "Query_ID Doc Grade"]
JUDGEMENTS = [f"{header}\nq1 d\u00a01 1".replace(" ", "\t") for header in HEADERS]


@pytest.mark.parametrize(
    "header",
    [
        "query_id\tcorpus_id\tscore",
        "query-id\tcorpus-id\tscore",
        "qid\tpid\trel",
        "qid 0 docid rel",
        "Query_ID\tDoc\tGrade",
        "question_id\tdocument_id\trelevance",
        "topic_number\titer\tdocno\trel",
        "Query ID\tDoc ID\tLabel",
        '"query-id"\t"corpus-id"\t"score"',
        "# query\tdoc\trel",
        "user_query_id\tdoc\trel",
        "Anfrage\tDokument\tRelevanz",
    ],
)
def test_a_header_of_judgements_is_known_by_its_query_id(tmp_path: Path, header: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(header + ("\nq1 0 d1 1\n" if len(header.split()) == 4 and "0" in header else "\nq1\td1\t1\n"))
    if "iter" in header:
        path.write_text(f"{header}\nq1\t0\td1\t1\n")
    assert read_qrels(path).qrels == {"q1": {"d1": 1}}


@pytest.mark.parametrize("lines", [*JUDGEMENTS, "qid 0 docid rel\nq1 0 d\u00a01  1", "q1 d\u00a01 1"])
def test_judgements_are_read_with_any_header_and_ids_with_no_break_spaces(tmp_path: Path, lines: str) -> None:
    (tmp_path / "qrels").write_text(lines + "\n")
    assert read_qrels(tmp_path / "qrels").qrels == {"q1": {"d\u00a01": 1}}


@pytest.mark.parametrize(
    "header",
    [
        *("docno\ttext", "document\tcontents", "uid\tbody", "document_number\ttext", "passage-id\tpassage text"),
        *("#id\ttext", "key\tvalue", "queryId\tqueryText", '"pid"\t"passage"', "question_id\tquestion"),
    ],
)
def test_a_header_of_texts_is_known_by_its_words(tmp_path: Path, header: str) -> None:
    path = tmp_path / "c.tsv"
    path.write_text(f"{header}\nd1\tone\n")
    assert open_texts(path, "collection", None).dataset["id"][:] == ["d1"]


@pytest.mark.parametrize(
    "line", ["passage 0\ttext 0", "Paris\tcity", "a\ttext", "query1\twhat is a key", "text\tthe title", "d\tq"]
)
def test_a_first_line_of_texts_that_names_no_columns_is_a_row(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.tsv"
    path.write_text(f"{line}\nd1\tone\n")
    assert open_texts(path, "collection", None).dataset["id"][:] == [line.split("\t")[0], "d1"]


@pytest.mark.parametrize("first", ["q0\t0\td0\t1", "q0 0 d0 1", "q0\td0"])
def test_most_judgements_say_what_a_line_is(tmp_path: Path, first: str) -> None:
    path, skipped = tmp_path / "q.tsv", SkippedRows()
    path.write_text(first + "\nq1\td1\t1\nq2\td2\t1\n")
    with pytest.raises(ValueError, match=r"q\.tsv, line 1: \d fields where 3 are needed \(query, passage, score\)"):
        read_qrels(path)
    assert read_qrels(path, skipped=skipped).qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}} and skipped.total == 1


FILES = {"a.csv": "query,positive,negative\na,b,c\n", "b.jsonl": '{"query": "x", "positive": "y", "negative": "z"}\n'}
MORE = {**FILES, "c.tsv": "a\tb\tc\n", "c.csv.bz2": "BZh9", "d.csv.xz": "\xfd7zXZ", "e.zip": "PK", "f.json": "[\n1\n]"}


@pytest.mark.parametrize(
    "names", [("a.csv", name) for name in MORE if name != "a.csv"] + [(name,) for name in list(MORE)[3:]]
)
@pytest.mark.parametrize("under", ["", "train", "data/train"])
def test_files_of_a_folder_are_read_by_our_own_readers_or_refused(
    tmp_path: Path, names: tuple[str, ...], under: str
) -> None:
    (tmp_path / under).mkdir(parents=True, exist_ok=True)
    for name in names:
        (tmp_path / under / name).write_text(MORE[name])
    with pytest.raises(ValueError, match=names[-1].replace(".", r"\.")):
        load_triples(tmp_path)


def test_settings_and_licences_beside_data_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "triples.csv").write_text(FILES["a.csv"])
    for name, text in (
        ("summary.json", '{\n  "rows": 1\n}\n'),
        ("LICENSE.txt", "free\n"),
        ("dataset_infos.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    assert load_triples(tmp_path)["query"][:] == ["a"]


def test_suffixes_of_a_folder_may_be_upper_case(tmp_path: Path) -> None:
    (tmp_path / "train.CSV").write_text(FILES["a.csv"])
    (tmp_path / "test.csv").write_text(FILES["a.csv"])
    (tmp_path / "README.md").write_text("about\n")
    assert load_triples(tmp_path)["query"][:] == ["a"]


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
