from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard, snapshot_download
from sentence_transformers import SentenceTransformer

from tct_hf import BM25Index, DenseIndex, build_student, save_student
from tct_hf.hub_client import HubError
from tct_hf.retrieval.encode_corpus import describe_model
from tests.hub.models import dual_encoder
from tests.loopback_hub import Blob, LoopbackHub
from tests.models import tiny_bert
from tests.train_helpers import PASSAGES, QUERIES

IDS = [f"p{row}" for row in range(len(PASSAGES))]


@pytest.fixture
def index(hub: LoopbackHub, student: Path) -> DenseIndex:
    """An index of a student that is on the Hub."""
    hub.publish(student, "tester/student")
    model = SentenceTransformer(str(student), device="cpu")
    built_by = describe_model(model, "tester/student")["model"]
    return DenseIndex.build(model.encode_document(PASSAGES), IDS, built_by=built_by)


def test_a_dense_index_comes_back_with_the_model_that_built_it(
    hub: LoopbackHub, index: DenseIndex, tmp_path: Path
) -> None:
    pushed = index.push_to_hub("tester/index", license="mit", tag="v1.0", passages="tester/passages")
    commit = hub.repo("tester/student").branches["main"]
    back = DenseIndex.from_hub("tester/index", revision="v1.0", trust_faiss=True)
    assert back.built_by is not None and back.built_by["revision"] == commit
    queries = back.load_model(device="cpu").encode_query(QUERIES)
    (ids, scores), (expected, values) = back.search(queries, 5), index.search(queries, 5)
    assert ids == expected and all(np.array_equal(a, b) for a, b in zip(scores, values, strict=True))
    card = hub.files("tester/index", kind="datasets")["README.md"].decode()
    DatasetCard(card).validate(repo_type="dataset")
    assert commit in card and 'DenseIndex.from_hub("tester/index", revision="v1.0", trust_faiss=True)' in card
    assert pushed.url.endswith("/datasets/tester/index") and "index.faiss" in pushed.sent
    assert index.built_by is not None and "revision" not in index.built_by  # the one in memory is as it was
    index.save(tmp_path / "own")  # a downloaded folder is loaded where its publisher is trusted
    assert len(DenseIndex.load(tmp_path / "own")) == len(index)
    get = partial(snapshot_download, "tester/index", repo_type="dataset")
    (tmp_path / "own" / ".git").mkdir()
    for folder in (get(), get(local_dir=tmp_path / "local"), tmp_path / "own"):
        with pytest.raises(ValueError, match=r"a downloaded index\. Faiss can't check .* Pass trust_faiss=True"):
            DenseIndex.load(folder)
        assert len(DenseIndex.load(folder, trust_faiss=True)) == len(index)


def test_an_index_of_first_dimensions_or_another_encoder_comes_back_with_its_model(
    hub: LoopbackHub, index: DenseIndex, tmp_path: Path
) -> None:
    student = index.load_model(device="cpu")
    student.truncate_dim = 8
    hub.publish(dual_encoder(tmp_path / "dual"), "tester/dual")
    dual = SentenceTransformer("tester/dual", device="cpu")
    for name, model in (("tester/student", student), ("tester/dual", dual)):
        vectors = model.encode_document(PASSAGES)
        made = DenseIndex.build(vectors, IDS, built_by=describe_model(model, name)["model"])
        made.push_to_hub("tester/other", license="mit")
        back = DenseIndex.from_hub("tester/other", trust_faiss=True).load_model(device="cpu")
        assert np.array_equal(back.encode_document(PASSAGES), vectors)


def test_the_model_is_pinned_where_it_moves_on(hub: LoopbackHub, index: DenseIndex, tmp_path: Path) -> None:
    index.push_to_hub("tester/index", license="mit")
    other = build_student(str(tiny_bert(tmp_path / "other", seed=8)), encoding="tct", document_length=64)
    hub.publish(save_student(other, tmp_path / "next"), "tester/student")
    model = DenseIndex.from_hub("tester/index", trust_faiss=True).load_model(device="cpu")
    assert describe_model(model)["model"]["weights_sha256"] == (index.built_by or {})["weights_sha256"]
    with pytest.raises(ValueError, match=r"model_revision .* their vectors don't compare"):
        index.push_to_hub("tester/index", license="mit")
    with pytest.raises(ValueError, match="their vectors don't compare"):
        DenseIndex.from_hub("tester/index", trust_faiss=True, model=other)


def test_an_index_nobody_could_search_is_refused(hub: LoopbackHub, index: DenseIndex) -> None:
    built_by = index.built_by or {}
    another = {**built_by, "encoding": {**built_by["encoding"], "prompt": "another"}}
    elsewhere = {"id": "/tmp/student", "weights_sha256": "0" * 64}
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        (another, {}, r"model_revision .*: the index: built by 'tester/student' with another prompt"),
        (elsewhere, {}, "push that model first"),
        (elsewhere, {"model_id": "tester/none"}, "no such repository"),
        ({"id": "tester/student"}, {}, r"built_by: the index does not record .* build it again with built_by="),
        (built_by, {"license": ""}, "license: an index on the Hub needs that of its passages"),
    ]
    for index.built_by, options, message in cases:
        with pytest.raises((ValueError, HubError), match=message):
            index.push_to_hub("tester/index", **{"license": "mit", **options})
    index.built_by = None
    with pytest.raises(ValueError, match="does not say which model built it"):
        index.load_model()
    assert ("datasets", "tester/index") not in hub.repos


def test_a_bm25_index_comes_back_with_its_expansion_on_the_card_and_unaltered(hub: LoopbackHub) -> None:
    expansion = {"model": "a/writer", "num_queries": 40, "drop_repeats": False, "scores_sha256": None}
    index = BM25Index.build(PASSAGES, IDS, k1=1.2, expansion=expansion)
    index.push_to_hub("tester/words", license="mit", private=True)
    back = BM25Index.from_hub("tester/words", mmap=True)
    assert back.settings["k1"] == 1.2 and back.settings["expansion"] == expansion
    assert back.run({"q": QUERIES[0]}, 5) == index.run({"q": QUERIES[0]}, 5)
    repo = hub.repo("tester/words", "datasets")
    card = hub.files("tester/words", kind="datasets")["README.md"].decode()
    assert "each with queries that were generated for it" in card and "expansion: model" in card
    assert "expansion: num_queries" in card and "drop_repeats" not in card and "{" not in card.split("expansion:")[1]
    with pytest.raises(FileNotFoundError, match="no dense index here"):
        DenseIndex.from_hub("tester/words", trust_faiss=True)
    assert repo.private
    files, name = repo.commits[repo.branches["main"]].files, "vocab.index.json"
    repo.commit("main", "altered", {**files, name: Blob(files[name].content.swapcase(), False)})
    with pytest.raises(ValueError, match=r"the checksum differs of vocab\.index\.json"):
        BM25Index.from_hub("tester/words")
