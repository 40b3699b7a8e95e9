"""Files and folders of rows are read as they stand, whatever they are called and however many they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf import SkippedRows, load_triples
from tct_hf.data.qrels import read_qrels
from tct_hf.data.scores import ScoreTable
from tct_hf.data.texts import open_texts

IDS = ["007", "2024-01-01", "1e5", "NA"]
TEXTS = ["null", "1984", "3.50", 'true, or\n"not"']


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


def folder_of(path: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """One file a row."""
    path.mkdir(parents=True)
    for at, row in enumerate(rows):
        file = path / f"train-{at:05d}-of-{len(rows):05d}{suffix}"
        if suffix == ".jsonl":
            file.write_text(json.dumps(row) + "\n")
        elif suffix == ".csv":
            quoted = ['"' + str(value).replace('"', '""') + '"' for value in row.values()]
            file.write_text(",".join(row) + "\n" + ",".join(quoted) + "\n")
        else:
            Dataset.from_list([row]).to_parquet(file)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_looks_like_a_number_a_date_or_nothing_stays_text(tmp_path: Path, suffix: str, streaming: bool) -> None:
    rows = [
        {"query": f"q {at}", "positive": text, "negative": f"n {at}", "query_id": name}
        for at, (name, text) in enumerate(zip(IDS, TEXTS, strict=True))
    ]
    folder = folder_of(tmp_path / "triples", suffix, rows)
    assert list(load_triples(folder, streaming=streaming)) == rows
    alone = load_triples(sorted(folder.iterdir())[0], streaming=streaming)
    assert list(alone) == rows[:1]
    passages = [{"id": name, "text": text} for name, text in zip(IDS, TEXTS, strict=True)]
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
        file.write(b'caf\xe9,p,n\n"a,b\n' if suffix == ".csv" else b'{"query": "caf\xe9"}\n{oops\n')
    with pytest.raises(ValueError, match=rf"{bad.name}, line {3 - (suffix != '.csv')}: not UTF-8"):
        load_triples(folder)
    skipped = SkippedRows()
    assert len(load_triples(folder, skip_bad_rows=True, skipped=skipped)) == 2
    assert skipped.counts == {"not UTF-8": 1, "not CSV" if suffix == ".csv" else "not JSON": 1}


def test_files_of_a_folder_with_other_columns_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train-0.csv").write_text("query,positive\na,b\n")
    (folder / "train-1.csv").write_text("positive,query\nb,a\n")
    with pytest.raises(ValueError, match=r"train-1\.csv: there are: positive, query, but in .*train-0\.csv"):
        load_triples(folder)


GOOD = {"query": "q", "positive": "p", "negatives": ["a", "b"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"negatives": []}, "column 'negatives': 0 negatives where 2 are needed"),
        ({"negatives": ["a"]}, "column 'negatives': 1 negatives where 2 are needed"),
        ({"negatives": "a"}, "holds 'a' where a list is needed"),
        ({"query_id": "1"}, "line 2 has no 'query_id'"),
    ],
)
def test_a_first_row_unlike_the_others_is_the_bad_one(
    tmp_path: Path, odd: dict[str, Any], message: str, streaming: bool
) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**GOOD, **odd}, *[GOOD] * 20]))
    with pytest.raises(ValueError, match=rf"lists\.jsonl, line 1.*{message}"):
        load_triples(path, streaming=streaming)
    skipped = SkippedRows()
    assert len(list(load_triples(path, skip_bad_rows=True, skipped=skipped, streaming=streaming))) == 20
    assert skipped.total == 1


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(gzip.compress(b"q\tp\tn\n"))
    assert list(load_triples(path)) == [{"query": "q", "positive": "p", "negative": "n"}]
    for content, message in (
        (b"PAR1....", r"by its content a \.parquet file.*name it so"),
        (b"PK\3\4..", r"\.zip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_triples(path)


@pytest.mark.parametrize(
    "header", ["question\tgood\tbad", "q_text\tpos\tneg", "Frage\tAntwort\tfalsch", "query\tpassage_1\tpassage_2"]
)
def test_a_header_of_triples_with_unknown_names_is_no_row(tmp_path: Path, header: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(f"{header}\nwhat is it\ta thing\tno thing\n")
    with pytest.raises(ValueError, match=r"t\.tsv, line 1: .* are names of columns; read by them with columns="):
        load_triples(path)
    columns = dict(zip(("query", "positive", "negative"), header.split("\t"), strict=True))
    assert list(load_triples(path, columns=columns)) == [
        {"query": "what is it", "positive": "a thing", "negative": "no thing"}
    ]


@pytest.mark.parametrize(
    "header",
    [
        "query_id\tcorpus_id\tscore",
        "query-id\tcorpus-id\tscore",
        "qid\tpid\trel",
        "qid 0 docid rel",
        "Query_ID\tDoc\tGrade",
    ],
)
def test_a_header_of_judgements_is_known_by_its_query_id(tmp_path: Path, header: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(header + ("\nq1 0 d1 1\n" if "0" in header else "\nq1\td1\t1\n"))
    assert read_qrels(path).qrels == {"q1": {"d1": 1}}


@pytest.mark.parametrize("line", ["q1 d\u00a01 1", "q1 0 d\u00a01  1"])
def test_an_id_of_a_judgement_may_have_a_no_break_space(tmp_path: Path, line: str) -> None:
    (tmp_path / "qrels").write_text(f"{line}\n")
    assert read_qrels(tmp_path / "qrels").qrels == {"q1": {"d\u00a01": 1}}


def test_columns_in_another_order_are_refused_or_read_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_text("corpus_id\tquery_id\tscore\nd1\tq1\t1\n")
    with pytest.raises(ValueError, match=r"line 1: columns .* the query comes first"):
        read_qrels(path)
    assert ScoreTable.open(path).get([("q1", "d1"), ("d1", "q1")]) == [1.0, None]
    path.write_text("pid\tpassage\nd1\tone\n")
    assert open_texts(path, "collection", None).get(["d1", "pid"]) == ["one", None]
    path.write_text("passage\tpid\none\td1\n")
    with pytest.raises(ValueError, match=r"line 1: .* put ids first"):
        open_texts(path, "collection", None)
