from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tct_hf import load_beir, load_collection, load_triples
from tct_hf.data.beir import MissingSplitError
from tct_hf.data.scores import ScoreTable
from tct_hf.data.texts import open_texts
from tests.rows import jsonl, write

ir_datasets = pytest.importorskip("ir_datasets", reason="needs the extra irds")

TEXTS = [f"river number {row} in the far north" for row in range(12)]


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A set with titles and three below it: train, with triples and scores, dev and dl/judged; each has queries."""
    from ir_datasets import formats
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.datasets.beir import BeirTitleDoc

    name = tmp_path.name
    rows = [{"doc_id": f"d{row}", "title": f"T{row}" * (row % 2), "text": text} for row, text in enumerate(TEXTS)]
    file = ir_datasets.util.LocalDownload
    docs = formats.JsonlDocs(file(write(tmp_path / "docs.jsonl", jsonl(rows))), BeirTitleDoc)
    ir_datasets.registry.register(name, Dataset(docs))
    for split in ("train", "dev", "dl/judged"):
        part = write(tmp_path / f"{split}.tsv", f"{split}1\triver five\n{split}2\triver seven\n")
        lines = [f"{split}1 0 d5 1", f"{split}1 0 d5 1", f"{split}2 0 d7 2", f"{split}2 0 d1 0", ""]
        grades = write(tmp_path / f"{split}.qrels", "\n".join(lines))
        more = []
        if split == "train":
            pairs = file(write(tmp_path / "pairs.tsv", "train1\td5\td4\ntrain1\td5\td5\ntrain2\td7\td1\n"))
            scored = file(write(tmp_path / "scored.tsv", "train1 Q0 d5 1 9.5 bm25\ntrain1 Q0 d4 2 3.5 bm25\n"))
            more = [formats.TsvDocPairs(pairs), formats.TrecScoredDocs(scored)]
        judged = [formats.TsvQueries(file(part)), formats.TrecQrels(file(grades), {})]
        ir_datasets.registry.register(f"{name}/{split}", Dataset(docs, *judged, *more))
    return f"irds:{name}"


def test_sets_below_an_id_are_its_splits(name: str) -> None:
    collection = load_collection(name, test_split="dl/judged", also=[])
    assert collection.corpus["text"][:2] == [TEXTS[0], f"T1 {TEXTS[1]}"] and collection.corpus["title"][1] == "T1"
    splits = {use: (list(split.queries), split.qrels) for use, split in collection.splits.items()}
    assert splits["train"] == (["train1", "train2"], {"train1": {"d5": 1}, "train2": {"d7": 2, "d1": 0}})
    assert list(splits) == ["train", "dev", "test"] and splits["test"][0] == ["dl/judged1", "dl/judged2"]
    with pytest.raises(MissingSplitError, match="no split 'test'; splits there: train, dev, dl/judged"):
        load_beir(name, "test")


def test_own_judgements_are_test_or_train_by_the_id(name: str) -> None:
    assert load_beir(f"{name}/dev", "test")[1] == load_beir(name, "dev")[1]
    assert load_beir(f"{name}/train", "train")[2] == load_beir(name, "train")[2]
    with pytest.raises(MissingSplitError, match="splits there: train"):
        load_beir(f"{name}/train", "test")


def test_docpairs_are_triples_with_texts_and_judgements_of_their_set(name: str) -> None:
    loaded = load_triples(f"{name}/train")
    assert [(row["query_id"], row["positive_id"], row["negative_id"]) for row in loaded] == [
        ("train1", "d5", "d4"),
        ("train2", "d7", "d1"),
    ]  # the row whose negative is its positive is left out
    assert loaded[1]["positive"] == f"T7 {TEXTS[7]}" and loaded[1]["known_positive_ids"] == ["d7"]
    assert list(load_triples(f"{name}/train", streaming=True)) == list(loaded)
    sampled = load_triples(f"{name}/dev", split="test", num_negatives=2)
    assert sampled.column_names[:4] == ["query", "positive", "negative_1", "negative_2"]


def test_each_setting_reads_its_part(name: str, tmp_path: Path) -> None:
    ids = write(tmp_path / "ids.tsv", "dev1\td5\td3\ndev2\td7\td2\n")
    dev = f"{name}/dev"
    loaded = load_triples(ids, collection=name, queries=dev, qrels=dev)
    assert loaded["query"][:] == ["river five", "river seven"] and loaded["known_positive_ids"][:] == [["d5"], ["d7"]]
    assert ScoreTable.open(f"{name}/train").get([("train1", "d4"), ("train1", "d1")]) == [3.5, None]


def test_passages_are_prepared_once_and_anew_when_they_change(name: str, tmp_path: Path) -> None:
    before, below = open_texts(name, "collection", None), open_texts(f"{name}/dev", "collection", None)
    assert before.dataset.cache_files == below.dataset.cache_files
    file = tmp_path / "docs.jsonl"
    file.write_text(file.read_text().replace("far north", "deep south"))
    assert open_texts(name, "collection", None).get(["d0"]) == ["river number 0 in the deep south"]


def test_faults_say_the_fix(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no such data set; did you mean msmarco-passage/dev/small"):
        load_beir("irds:msmarco-pasage/dev/small", "test")
    with pytest.raises(FileNotFoundError, match="has no queries"):
        open_texts(name, "queries", None)
    (tmp_path / "docs.jsonl").unlink()
    with pytest.raises(OSError, match=r"ir_datasets can't read its docs .*docs.jsonl"):
        open_texts(name, "collection", None)
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'tct_hf\[irds\]'"):
        load_collection(name)
