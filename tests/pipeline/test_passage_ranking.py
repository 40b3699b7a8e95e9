"""MS MARCO's files into a BEIR folder: whole, in part, stopped, and wrong."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from tct_hf.data.beir import load_beir
from tct_hf.pipeline import passage_ranking
from tct_hf.pipeline.passage_ranking import PassageRankingFiles, SplitFiles, prepare_passage_ranking
from tct_hf.settings import load_settings
from tests.loopback_hub import LoopbackHub
from tests.passage_files import QRELS, QUERIES, write_few
from tests.recipe import ROOT, write_beir


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("passages") / "msmarco")


def source(files: Path, **more: object) -> PassageRankingFiles:
    splits = {
        "train": SplitFiles(QUERIES["train"], QRELS["train"], expected_queries=30, expected_qrels=30),
        "tune": SplitFiles(QUERIES["dev"], QRELS["dev"], 12, 12, without="dev", most=4),
        "dev": SplitFiles(QUERIES["dev.small"], QRELS["dev.small"], 6, 6),
        "dl19": SplitFiles(QUERIES["dl19"], QRELS["dl19"], 6),
    }
    return PassageRankingFiles(**{"files": str(files), "expected_passages": 80, "splits": splits, **more})  # type: ignore[arg-type]


def prepare(files: Path, out: Path, sample: int | None = None, **more: object) -> dict:
    return prepare_passage_ranking(
        source(files, **more), out, sample=sample, cache_dir=out.parent / "cache", write=lambda line: None
    )


def contents(folder: Path) -> dict[str, bytes]:
    kept = {"corpus.jsonl", "queries.jsonl", "triples.tsv", "counts.json"}
    files = [file for file in folder.rglob("*") if file.name in kept or file.parent.name == "qrels"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def lines(path: Path) -> list[list[str]]:
    return [line.split() if path.suffix == ".txt" else line.split("\t") for line in path.read_text().splitlines()]


def test_every_text_and_judgement_arrives(files: Path, tmp_path: Path) -> None:
    counts = prepare(files, tmp_path / "out")
    assert counts["passages"] == 80 and counts["splits"]["train"] == {"queries": 30, "judgements": 30}
    passages = dict(lines(files / "collection.tsv"))
    for split, theirs in (("train", "train"), ("dev", "dev.small"), ("dl19", "dl19")):
        corpus, queries, qrels = load_beir(tmp_path / "out", split, cache_dir=tmp_path / "cache")
        assert dict(zip(corpus["id"], corpus["text"], strict=True)) == passages
        wanted: dict[str, dict[str, int]] = {}
        for query, _, passage, grade in lines(files / QRELS[theirs]):
            wanted.setdefault(query, {})[passage] = int(grade)
        assert qrels == wanted
        texts = dict(lines(files / QUERIES[theirs]))
        assert queries == {query: texts[query] for query in wanted}  # of DL, judged ones alone
    assert not (tmp_path / "out" / "triples.tsv").exists()


def test_queries_to_tune_on_are_of_no_other_split(files: Path, tmp_path: Path) -> None:
    def split(out: Path, *names: str) -> list[set[str]]:
        return [set(load_beir(out, name)[2]) for name in names]

    prepare(files, tmp_path / "of dev")
    tune, dev, train = split(tmp_path / "of dev", "tune", "dev", "train")
    assert len(tune) == 4 and not tune & (dev | train)
    names = {"queries": QUERIES["train"], "qrels": QRELS["train"]}
    splits = {"train": SplitFiles(**names, without="tune"), "tune": SplitFiles(**names, most=7)}
    counts = prepare(files, tmp_path / "of train", splits=splits)
    assert [counts["splits"][name]["queries"] for name in ("train", "tune")] == [23, 7]
    tune, train = split(tmp_path / "of train", "tune", "train")
    assert not tune & train


def test_a_sample_holds_all_that_is_relevant_and_triples_of_its_own(files: Path, tmp_path: Path) -> None:
    assert prepare(files, tmp_path / "out", 40)["passages"] == 40
    corpus, _, train = load_beir(tmp_path / "out", "train")
    kept = set(corpus["id"])
    assert len(kept) == 40
    for split, theirs in (("train", "train"), ("dev", "dev.small"), ("dl19", "dl19")):
        qrels = load_beir(tmp_path / "out", split)[2]
        assert qrels
        for query, _, passage, grade in lines(files / QRELS[theirs]):
            if query in qrels:
                assert (passage in kept) or grade == "0"
                assert qrels[query].get(passage) == (int(grade) if passage in kept else None)
    rows = lines(tmp_path / "out" / "triples.tsv")
    assert rows and all(train[q][p] == 1 and n in kept and n not in train[q] for q, p, n in rows)


def test_a_sample_is_the_same_whatever_the_order_of_the_collection(files: Path, tmp_path: Path) -> None:
    other = shutil.copytree(files, tmp_path / "other")
    rows = (files / "collection.tsv").read_text().splitlines(keepends=True)
    (other / "collection.tsv").write_text("".join(reversed(rows)))
    prepare(files, tmp_path / "a", 40)
    prepare(other, tmp_path / "b", 40)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert sorted(a.pop("corpus.jsonl").splitlines()) == sorted(b.pop("corpus.jsonl").splitlines())
    assert a == b


def test_a_stopped_call_made_again_ends_with_the_same_files(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(files, tmp_path / "whole", 40)
    aside = passage_ranking.write_aside
    left = len(contents(tmp_path / "whole")) - 1  # counts.json is written otherwise
    for stop in range(left):
        out, count = tmp_path / f"stopped{stop}", 0

        def stopping(path: Path, stop: int = stop):
            nonlocal count
            count += 1
            if count > stop:
                raise KeyboardInterrupt
            return aside(path)

        with monkeypatch.context() as patch:
            patch.setattr(passage_ranking, "write_aside", stopping)
            with pytest.raises(KeyboardInterrupt):
                prepare(files, out, 40)
        prepare(files, out, 40)
        assert contents(out) == contents(tmp_path / "whole")


def test_compressed_and_jsonl_files_and_repeated_judgements_give_the_same(files: Path, tmp_path: Path) -> None:
    other = shutil.copytree(files, tmp_path / "other")
    (other / "collection.tsv.gz").write_bytes(gzip.compress((other / "collection.tsv").read_bytes()))
    (other / "collection.tsv").unlink()  # the settings name it, and its .gz is there
    queries = [{"_id": q, "text": text} for q, text in lines(other / QUERIES["train"])]
    (other / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = (files / QRELS["train"]).read_text()
    (other / QRELS["train"]).write_text(judged + judged.splitlines(keepends=True)[0])
    named = source(other)
    named.splits["train"].queries, named.splits["train"].expected_qrels = "train.jsonl", 31
    counts = prepare_passage_ranking(named, tmp_path / "b", cache_dir=tmp_path / "cache")
    assert counts["splits"]["train"]["judgements"] == 30
    prepare(files, tmp_path / "a")
    found, expected = contents(tmp_path / "b"), contents(tmp_path / "a")
    assert found == {**expected, "counts.json": found["counts.json"]}


def last_line(name: str, new: str = "") -> Callable[[Path], None]:
    """Take the place of a file's last line, or drop it."""

    def damage(files: Path) -> None:
        rows = (files / name).read_text().splitlines(keepends=True)
        query = rows[-1].split("\t")[0]
        (files / name).write_text("".join([*rows[:-1], new.format(query=query, row=rows[-1].rpartition("\t")[0])]))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (last_line("collection.tsv"), "collection.tsv: 79 passages, but 80 are expected: download"),
        (last_line("collection.tsv", "79\t \n"), "collection.tsv, line 80: the text of '79' is empty"),
        (last_line(QUERIES["train"]), "is judged, but has no text in .*queries.train.tsv"),
        (last_line(QRELS["train"]), "qrels.train.tsv: 29 judged queries, but 30 are expected"),
        (last_line(QRELS["train"], "{row}\t1\n{row}\t0\n"), "qrels.train.tsv, line 31: .* are judged twice"),
        (last_line(QRELS["train"], "{query}\t0\telsewhere\t1\n"), "1 judged passages are not in it, such as 'elsew"),
        (lambda files: (files / "collection.tsv").unlink(), "collection: .*collection.tsv: no such file; download"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_takes_its_name(
    files: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    other = shutil.copytree(files, tmp_path / "other")
    damage(other)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(other, tmp_path / "out")
    assert not (tmp_path / "out" / "corpus.jsonl").exists()


@pytest.mark.parametrize("sample", [None, 40])
def test_triples_that_are_not_whole_are_refused_before_anything_is_written(
    files: Path, tmp_path: Path, sample: int | None
) -> None:
    other, name = shutil.copytree(files, tmp_path / "other"), "triples.train.small.tsv"
    for damage, message in (
        (last_line(name), "small.tsv: 89 triples, but 90 are .* download .* set expected_triples"),
        (lambda files: (files / name).unlink(), "triples: .*small.tsv: no such file; download"),
    ):
        damage(other)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(other, tmp_path / "out", sample, triples=name, expected_triples=90)
        assert not (tmp_path / "out" / "queries.jsonl").exists()


def test_what_can_not_be_prepared_is_refused(files: Path, tmp_path: Path) -> None:
    def refused(message: str, sample: int | None = None, **change: Any) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(files, tmp_path / "out", sample, **change)

    refused("sample: 4 passages can't hold those relevant to one query of", 4)
    refused("splits: there is none", splits={})
    refused(r"splits.train.qrels: name the file", splits={"train": SplitFiles(QUERIES["train"])})
    few = {"train": SplitFiles(QUERIES["train"], QRELS["train"], most=0)}
    refused(r"splits.train: no query is left of it", splits=few)
    prepare(files, tmp_path / "out")
    refused(r"holds a run with sample = None, but now sample = 40", 40)


def test_the_settings_for_the_hub_read_every_split_and_hold_train_queries_out(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    texts = write_beir(tmp_path / "texts", passages=700, train=600, dev=3, test=2)
    qrels = (texts / "qrels").rename(tmp_path / "qrels")
    (qrels / "dev.tsv").rename(qrels / "validation.tsv")
    files = {file.stem: [{"split": file.stem, "path": file.name}] for file in texts.iterdir()}
    configs = [{"config_name": name, "data_files": found} for name, found in files.items()]
    (texts / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    parts = [{"split": file.stem, "path": file.name} for file in qrels.iterdir()]
    configs = [{"config_name": "default", "data_files": parts}]
    (qrels / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    hub.publish(texts, "BeIR/msmarco", "datasets")
    hub.publish(qrels, "BeIR/msmarco-qrels", "datasets")
    settings = ROOT / "recipes" / "msmarco-passage" / "hub" / "data.yaml"
    text = settings.read_text().replace("output_dir: outputs/msmarco-passage/data\n", "")
    small = {"8841823": "700", "502939": "600", "532751": "600", "6980": "3", "7437": "3", ": 43": ": 2", "9260": "2"}
    for before, now in small.items():
        assert before in text
        text = text.replace(before, now)
    (tmp_path / "data.yaml").write_text(text)
    source = load_settings(PassageRankingFiles, [str(tmp_path / "data.yaml")], description="")
    counts = prepare_passage_ranking(source, tmp_path / "out", cache_dir=tmp_path / "cache", write=lambda line: None)
    assert counts["passages"] == 700
    queries = {split: set(load_beir(tmp_path / "out", split)[1]) for split in ("train", "tune", "dev", "dl19")}
    assert len(queries["tune"]) == 500 and queries["train"] | queries["tune"] == {f"train{row}" for row in range(600)}
    assert not queries["train"] & queries["tune"]
    assert (queries["dev"], queries["dl19"]) == ({"dev0", "dev1", "dev2"}, {"test0", "test1"})
    source.splits["dev"].expected_queries = 4
    with pytest.raises(ValueError, match="BeIR/msmarco-qrels::validation: 3 judged queries, but 4 are expected"):
        prepare_passage_ranking(source, tmp_path / "other", cache_dir=tmp_path / "cache")
