from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tct_hf import SkippedRows, load_beir, load_collection, load_triples
from tct_hf.data.beir import BeirOnHub, MissingSplitError, open_beir
from tests.rows import jsonl, write

TITLED = [{"_id": "d1", "title": "Title", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
CORPUS = [*TITLED, {"_id": 3, "text": "three"}]
QUERIES = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}, {"_id": "q3", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td1\t1\nq1\td2\t2\nq1\t3\t0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "qrels" / "test.tsv", QRELS)
    write(tmp_path / "set" / "corpus.jsonl", jsonl(CORPUS))
    return write(tmp_path / "set" / "queries.jsonl", jsonl(QUERIES)).parent


def load(folder: Path, split: str = "test", **options: Any) -> tuple:
    return load_beir(folder, split, **options)


def check(loaded: tuple) -> None:
    corpus, queries, qrels = loaded
    texts = {"d1": "Title one", "d2": "two", "3": "three"}
    assert list(corpus.select_columns(["id", "text"])) == [{"id": name, "text": text} for name, text in texts.items()]
    assert queries == {"q2": "second", "q1": "first"}
    assert qrels == {"q2": {"d1": 1}, "q1": {"d2": 2, "3": 0}}


@pytest.mark.parametrize(
    "qrels",
    [QRELS.encode(), b"\xef\xbb\xbf" + QRELS.replace("\n", "\r\n").encode(), QRELS.split("\n", 1)[1].encode()],
    ids=["plain", "windows", "no header"],
)
def test_a_folder_is_read_compressed_or_not(folder: Path, qrels: bytes) -> None:
    (folder / "qrels" / "test.tsv").write_bytes(qrels)
    loaded = load(folder)
    check(loaded)
    assert loaded[0].cache_files and loaded[0].column_names == ["id", "text"]
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"):
        write(path.with_name(path.name + ".gz"), path.read_bytes())
        path.unlink()
    check(load(folder))


def test_changed_corpus_is_converted_again(folder: Path) -> None:
    check(load(folder))
    (folder / "corpus.jsonl").write_text(jsonl([*CORPUS, {"_id": "d4", "text": "four"}]))
    assert load(folder)[0]["id"][:] == ["d1", "d2", "3", "d4"]


BAD_FILES = [
    ("corpus.jsonl", jsonl(CORPUS) + "{oops\n", r"corpus\.jsonl, line 4: not JSON"),
    ("corpus.jsonl", '{"_id": "d1", "text": "x", "text": "y"}\n', "line 1: the key 'text' comes twice"),
    ("corpus.jsonl", '{"_id": "d1", "title": 0, "text": "x"}\n', "line 1, column 'title': holds 0 where text is"),
    ("corpus.jsonl", '{"_id": "d1", "body": "x"}\n', "line 1: column 'text' is missing.*_id, body"),
    ("corpus.jsonl", '{"_id": "d1", "text": "\\ud800"}\n', "line 1, column 'text': half a surrogate pair"),
    ("corpus.jsonl", "\n", r"corpus\.jsonl: no passage in it"),
    ("corpus.jsonl", jsonl([*CORPUS, CORPUS[1]]), r"line 4: passage id 'd2'.*corpus\.jsonl, line 2"),
    ("queries.jsonl", '{"_id": "q1", "text": ""}\n', r"queries\.jsonl, line 1: the text of 'q1'"),
    ("queries.jsonl", "\udcff\n", r"queries\.jsonl, line 1: not UTF-8"),
    ("qrels/test.tsv", "q1\td1\t1\nq9\td1\t1\n", r"test\.tsv, line 2: query 'q9' is not in .*queries"),
    ("qrels/test.tsv", "q1\td1\t1\nq1\td9\t1\n", r"test\.tsv, line 1 and after: .*'d9'.*corpus"),
    ("qrels/test.tsv", "q1\td1\t1\nq1 d1 1\n", r"test\.tsv, line 2: 1 fields where 3 are needed"),
    ("qrels/test.tsv", "q1\td1\t0.5\n", r"test\.tsv, line 1: score '0\.5' is not an integer"),
    ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t0\n", r"test\.tsv, line 2: .*judged twice"),
    ("qrels/test.tsv", "\td1\t1\n", r"test\.tsv, line 1, column 'query-id': the id is empty"),
    ("qrels/test.tsv", "q1\td1\t0\n", r"test\.tsv: no judgement with a score of 1"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_malformed_file_is_named_with_its_line(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        load(folder)
    assert not list((folder.parent).glob("cache/*.tmp"))


def test_what_is_missing_is_named_with_what_is_there(folder: Path) -> None:
    write(folder / "qrels" / "dev.tsv.gz", QRELS)
    (folder / "queries.jsonl").unlink()
    source: Any
    for source, split, error, message in (
        (folder, "train", MissingSplitError, "splits there: dev, test"),
        (folder, "test", FileNotFoundError, r"queries\.jsonl\.gz is there \(there is: "),
        (folder / "nothing", "test", FileNotFoundError, "no such folder"),
        (folder / "corpus.jsonl", "test", ValueError, "is a file"),
        ("nobody/nothing", "test", OSError, "nobody/nothing: not a folder here"),
    ):
        with pytest.raises(error, match=message) as caught:
            load(source, split)
        assert isinstance(caught.value, MissingSplitError) is (split == "train")


def test_passages_load_alone_and_are_checked_the_same(folder: Path, cache: Path) -> None:
    def alone(folder: Path, **options: Any) -> tuple:
        return (open_beir(folder, cache).corpus(**options),)

    whole, _, _ = load(folder)
    (folder / "queries.jsonl").rename(folder / "notes")
    [corpus] = alone(folder)
    assert list(corpus.select_columns(["id", "text"])) == list(whole) and corpus.cache_files
    (folder / "notes").rename(folder / "queries.jsonl")
    (folder / "corpus.jsonl").write_text(jsonl([*CORPUS, {"_id": "d4", "title": "", "text": " "}]))
    for read in (load, alone):
        with pytest.raises(ValueError, match=r"corpus\.jsonl, line 4: the text of 'd4' is empty.*skip_bad_rows"):
            read(folder)
        assert read(folder, allow_empty=True)[0]["text"][3] == ""
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl"):
        alone(folder)
    with pytest.raises(ValueError, match=r"queries\.jsonl is a file; give the folder that holds corpus\.jsonl"):
        alone(folder / "queries.jsonl")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set in the Hub's layout on disk: `load_dataset` reads a local folder like a repository."""
    write(tmp_path / "set" / "corpus.jsonl", jsonl([{"title": "", **row, "_id": str(row["_id"])} for row in CORPUS]))
    return write(tmp_path / "set" / "queries.jsonl", jsonl([{"title": "", **row} for row in QUERIES])).parent


CONFIGS = """---
configs:
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
"""


def test_hub_layout_with_a_repository_of_judgements(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingSplitError):
        BeirOnHub(repository, tmp_path / "cache").load("test")
    write(tmp_path / "set-qrels" / "test.tsv", QRELS)
    (repository / "README.md").write_text(CONFIGS + "---\n")
    check(BeirOnHub(repository, tmp_path / "cache").load("test"))
    with pytest.raises(FileNotFoundError, match="set-qrels: no split 'dev'; splits there: test"):
        BeirOnHub(repository, tmp_path / "cache").load("dev")
    with pytest.raises(FileNotFoundError) as caught:
        BeirOnHub(tmp_path / "gone", tmp_path / "cache").load("test")
    assert not isinstance(caught.value, MissingSplitError)


def test_hub_layout_with_judgements_of_its_own(repository: Path, tmp_path: Path) -> None:
    names = ("query-id", "corpus-id", "score")
    # Some published judgements hold their scores as floats.
    rows = [("q2", "d1", 1.0), ("q1", "d2", 2.0), ("q1", "3", 0.0)]
    (repository / "qrels.jsonl").write_text(jsonl([dict(zip(names, row, strict=True)) for row in rows]))
    own = "- config_name: default\n  data_files: [{split: test, path: qrels.jsonl}]\n---\n"
    (repository / "README.md").write_text(CONFIGS + own)
    check(BeirOnHub(repository, tmp_path / "cache").load("test"))
    with pytest.raises(MissingSplitError, match="no split 'dev'"):
        BeirOnHub(repository, tmp_path / "cache").load("dev")
    (repository / "qrels.jsonl").unlink()
    with pytest.raises(FileNotFoundError) as broken:
        BeirOnHub(repository, tmp_path / "other").load("test")
    assert not isinstance(broken.value, MissingSplitError)


def with_flaws(folder: Path) -> None:
    """What published collections have: empty, repeated and broken passages, judgements of nothing."""
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(jsonl([{"_id": "d4", "text": " "}, {"_id": "d1", "text": "again"}]) + "{oops\n")
    with (folder / "queries.jsonl").open("a") as file:
        file.write(jsonl([{"_id": "q1", "text": "again"}, {"_id": "q4", "text": ""}]))
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\td9\t1\nq9\td1\t1\nq3\td4\t1\nq1\td1\tyes\nq1\td2\t1\n")


def test_a_flawed_collection_is_refused_or_its_bad_rows_are_left_out_and_counted(folder: Path) -> None:
    with_flaws(folder)
    with pytest.raises(ValueError, match=r"test\.tsv, line 8: score 'yes'"):
        load(folder)
    for _ in range(2):  # read, and from the cache
        skipped = SkippedRows()
        check(load(folder, skip_bad_rows=True, skipped=skipped))
        assert skipped.counts == {
            **{"bad score": 1, "judged twice": 1, "repeated id": 2, "empty text": 2, "not JSON": 1},
            **{"judged query that is missing": 1, "judged passage that is missing": 2},
        }
        assert "corpus.jsonl, line 6" in skipped.examples["not JSON"]
    collection = load_collection(str(folder), required=["test"], skip_bad_rows=True)
    assert collection.skipped == skipped and "bad rows left out: 1 bad score, 1 judged twice" in collection.summary()
    assert "2 empty text" in collection.part(queries=1).summary()
    skipped = SkippedRows()
    rows = load_triples(folder, split="test", skip_bad_rows=True, skipped=skipped)
    assert skipped == collection.skipped and rows["positive_id"][:] == ["d1", "d2"]
    assert rows.info.description.startswith("10 bad rows were left out")


@pytest.mark.parametrize("flaw", [{"_id": "d4", "text": " "}, {"_id": "d1", "text": "again"}])
def test_advice_about_a_flaw_names_a_setting_that_is_there(folder: Path, flaw: dict) -> None:
    (folder / "corpus.jsonl").write_text(jsonl([*CORPUS, flaw]))
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "train.tsv")
    for read in (load_triples, load_collection, partial(load_beir, split="train")):
        options = {"required": ["train"]} if read is load_collection else {}
        with pytest.raises(ValueError, match=r"corpus\.jsonl, line 4.*skip_bad_rows"):
            read(str(folder), **options)
        read(str(folder), skip_bad_rows=True, **options)


def test_judgements_of_nothing_that_is_there_are_named_themselves(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text("q1\td9\t1\n")
    with pytest.raises(ValueError, match=r"test\.tsv, without judgements of missing queries and passages: no"):
        load(folder, skip_bad_rows=True)
