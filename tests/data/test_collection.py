from __future__ import annotations

import json
from pathlib import Path

import pytest

from tct_hf.data.collection import load_collection
from tct_hf.retrieval.sparse import BM25Index
from tests.recipe import write_beir


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "beir", passages=20, train=6, dev=3, test=4)


def test_splits_go_by_their_use(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").rename(beir / "qrels" / "validation.tsv")
    found = load_collection(str(beir), dev_split="validation")
    assert {name: len(split.queries) for name, split in found.splits.items()} == {"train": 6, "dev": 3, "test": 4}
    assert found.splits["dev"].qrels.keys() == found.splits["dev"].queries.keys()
    assert found.summary() == f"{beir}: 20 passages; queries: 6 train, 3 dev, 4 test"
    assert "dev" not in load_collection(str(beir), dev_split=None).splits


def test_choosing_models_on_the_reported_split_is_refused(beir: Path) -> None:
    with pytest.raises(ValueError, match="must not be chosen on the queries that are reported"):
        load_collection(str(beir), dev_split="test")


def test_the_index_is_built_once_and_triples_use_it(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_collection(str(beir))
    index = found.bm25()
    monkeypatch.setattr(BM25Index, "build", None)
    assert found.bm25() is index
    rows = found.triples(num_negatives=2, depth=10, seed=1)
    assert len(rows) == 6 and {"negative_1", "negative_2_id", "known_positive_ids"} <= set(rows.column_names)
    assert set(rows["query_id"]) == set(found.splits["train"].queries)


def test_the_fingerprint_depends_on_texts_and_judgements_alone(beir: Path, tmp_path: Path) -> None:
    first = load_collection(str(beir)).fingerprint
    same = write_beir(tmp_path / "same", passages=20, train=6, dev=3, test=4)
    assert load_collection(str(same)).fingerprint == first
    assert first["passages"] == 20 and first["queries"] == {"train": 6, "dev": 3, "test": 4}

    lines = (same / "qrels" / "test.tsv").read_text().splitlines()
    (same / "qrels" / "test.tsv").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "2"]) + "\n")
    regraded = load_collection(str(same)).fingerprint
    with (same / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "more", "title": "", "text": "one more"}) + "\n")
    longer = load_collection(str(same)).fingerprint
    assert len({print_["sha256"] for print_ in (first, regraded, longer)}) == 3


def test_the_built_in_corpus_comes_with_its_own_fingerprint() -> None:
    found = load_collection("builtin", packages=["bm25s", "huggingface_hub"])
    assert found.name == "built-in API docs" and list(found.splits) == ["train", "dev", "test"]
    assert "sha256" in found.fingerprint and "huggingface_hub" in json.dumps(found.fingerprint)
