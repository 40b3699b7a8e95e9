"""A query tower: passages whose vectors are there, and the checkpoint of two routes that comes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from torch import nn

from tct_hf import (
    DenseIndex,
    DenseTeacher,
    TCTTrainer,
    TCTTrainingArguments,
    build_static,
    build_student,
    encode_corpus,
    save_student,
    validate_checkpoint,
)
from tct_hf.encoding.checkpoint import GOLDEN_TEXTS, fresh_vectors, vectors_of
from tct_hf.encoding.convert import load_encoder
from tct_hf.encoding.kinds import kind_of
from tct_hf.encoding.routes import route_of
from tct_hf.evaluation.workspace import Workspace
from tct_hf.retrieval.cut_queries import query_slots
from tct_hf.retrieval.encode_corpus import describe_model
from tct_hf.retrieval.towers import PassageVectors, _folded, _parted, query_tower
from tests.models import WORDS, tiny_bert

CORPUS = Dataset.from_list(
    [{"id": f"p{row}", "text": " ".join(np.random.default_rng(row).choice(WORDS, 12))} for row in range(60)]
)
ROWS = Dataset.from_list(
    [
        {
            "query": " ".join(CORPUS[row]["text"].split()[:4]),
            "positive": CORPUS[row]["text"],
            "negative": CORPUS[row + 1]["text"],
        }
        for row in range(0, 58)
    ]
)
PROMPTS = {"query": "query ", "document": "passage "}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its passage vectors (`vectors`), its index (`index`), and another base (`other`)."""
    folder = tmp_path_factory.mktemp("towers")
    model = build_student(str(tiny_bert(folder / "bare")), prompts=PROMPTS, query_length=24, document_length=48)
    save_student(model, folder / "model")
    tiny_bert(folder / "other", hidden=16, seed=5)
    manifest = encode_corpus(model, CORPUS, folder / "vectors", precision="fp32")
    index = DenseIndex.build(model.encode_document(CORPUS["text"]), CORPUS["id"], built_by=manifest["model"])
    index.save(folder / "index")
    return folder


def tower_of(made: Path, vectors: str = "vectors", base: str = "model", **options: Any) -> SentenceTransformer:
    tower = build_student(
        str(made / base), **({"layers": [0]} if base == "model" else {"prompts": {"query": "what "}})
    )
    return query_tower(tower, str(made / "model"), str(made / vectors), CORPUS, **options)


def train(tower: SentenceTransformer, made: Path, out: Path, steps: int = 4, **options: Any) -> TCTTrainer:
    args = TCTTrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, report_to="none", use_cpu=True,
        save_steps=2, **options,
    )  # fmt: skip
    trainer = TCTTrainer(tower, DenseTeacher(str(made / "model"), dtype="float32"), args, train_dataset=ROWS)
    return trainer


@pytest.mark.parametrize("vectors", ["vectors", "index"])
def test_passages_are_looked_up_and_not_encoded(made: Path, vectors: str) -> None:
    tower = tower_of(made, vectors)
    model = SentenceTransformer(str(made / "model"))
    texts = [CORPUS[row]["text"] for row in (7, 3, 7, 59)]
    assert np.allclose(tower.encode_document(texts), model.encode_document(texts), atol=1e-6)
    with pytest.raises(ValueError, match="'never seen' has no stored vector"):
        tower.encode_document(["never seen"])
    assert all("query" in name for name, _ in tower.named_parameters())


def test_the_fit_is_least_squares_and_a_whole_tower_begins_where_the_model_is(made: Path) -> None:
    model = SentenceTransformer(str(made / "model"))
    begun = query_tower(build_student(str(made / "model")), model, str(made / "vectors"), CORPUS, fit=False)
    assert np.array_equal(begun.encode_query(ROWS["query"]), model.encode_query(ROWS["query"]))
    other = tower_of(made, base="other")
    assert isinstance(other[0].sub_modules["query"][-1], Dense)
    assert other.encode_query(["what is"]).shape == (1, 32)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}], ids=["whole batch", "gradient cache"])
def test_training_moves_queries_alone_and_resumes_from_whole_checkpoints(
    made: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tower = tower_of(made)
    before = tower.encode_query(["what is a student"])
    train(tower, made, tmp_path / "run", **options).train()
    after = tower.encode_query(["what is a student"])
    assert not np.allclose(before, after)
    checkpoint = SentenceTransformer(str(tmp_path / "run" / "checkpoint-4"))
    assert np.allclose(checkpoint.encode_query(["what is a student"]), after, atol=1e-6)
    again = tower_of(made)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(again, made, tmp_path / "run", **options).train(resume_from_checkpoint=True)
    assert np.allclose(again.encode_query(["what is a student"]), after, atol=1e-6)


@pytest.mark.parametrize("base", ["model", "other"])
def test_the_checkpoint_is_right_in_a_fresh_interpreter(
    made: Path, tmp_path: Path, base: str, warm_checks: None
) -> None:
    tower, model = tower_of(made, base=base), SentenceTransformer(str(made / "model"))
    queries = tower.encode_query(list(GOLDEN_TEXTS))
    save_student(tower, tmp_path / "tower")
    assert tower.encode_document([CORPUS[0]["text"]]).shape == (1, 32)  # vectors again
    validate_checkpoint(tmp_path / "tower")
    found, rule = fresh_vectors(tmp_path / "tower", GOLDEN_TEXTS), vectors_of(model, GOLDEN_TEXTS)
    assert np.array_equal(found["document"], rule["document"]) and np.array_equal(found["plain"], rule["plain"])
    assert np.allclose(found["query"], queries, atol=1e-6)
    assert kind_of(str(tmp_path / "tower")) == "router"
    assert query_slots(load_encoder(str(tmp_path / "tower"))) == (24 if base == "model" else 192)


def test_the_index_takes_the_tower_that_was_made_for_it_and_no_other(made: Path, tmp_path: Path) -> None:
    tower = tower_of(made)
    model = SentenceTransformer(str(made / "model"))
    assert describe_model(tower)["model"] == describe_model(model)["model"]
    save_student(tower, tmp_path / "tower")
    loaded = SentenceTransformer(str(tmp_path / "tower"))
    index = DenseIndex.load(made / "index", model=loaded)
    assert len(index.search(loaded.encode_query(["what is"]), 3)[0][0]) == 3
    assert (
        encode_corpus(loaded, CORPUS, made / "vectors", precision="fp32")["count"] == 60
    )  # the same vectors: nothing to encode
    other = build_student(str(made / "other"))
    with pytest.raises(ValueError, match="their vectors don't compare"):
        query_tower(other, other, str(made / "vectors"), CORPUS)
    with pytest.raises(ValueError, match="their vectors don't compare"):
        DenseIndex.load(made / "index", model=other)


def test_runs_of_towers_of_one_model_are_told_apart(made: Path, tmp_path: Path) -> None:
    save_student(tower_of(made), tmp_path / "tower")
    of_one: Any = SimpleNamespace(fingerprint={"sha256": "one"})
    spaces = [Workspace(of_one, load_encoder(str(at)), "it", tmp_path) for at in (made / "model", tmp_path / "tower")]
    assert spaces[0].built_by["weights_sha256"] == spaces[1].built_by["weights_sha256"]
    assert spaces[0].depends["student"]["weights"] != spaces[1].depends["student"]["weights"]


def test_what_has_no_vector_or_no_whole_vectors_is_refused(made: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(made / "model"))
    more = Dataset.from_list([*CORPUS, {"id": "new", "text": "the new passage"}])
    with pytest.raises(ValueError, match="passage 'new' has none"):
        PassageVectors(str(made / "vectors"), more, model)
    built_by = describe_model(model)["model"]
    codes = DenseIndex.build(model.encode_document(CORPUS["text"]), CORPUS["id"], "SQ8", built_by=built_by)
    with pytest.raises(ValueError, match="keeps codes of its vectors"):
        PassageVectors(codes, CORPUS, model)
    with pytest.raises(ValueError, match="vectors: a ndarray does not say which model made it"):
        PassageVectors(model.encode_document(CORPUS["text"]), CORPUS, model)
    with pytest.raises(FileNotFoundError, match="no folder of encoded passages"):
        PassageVectors(str(tmp_path / "typo"), CORPUS, model)
    save_student(tower_of(made), tmp_path / "tower")
    options: dict[str, Any] = {"layers": [0], "document_length": 24}
    for name, value in options.items():
        with pytest.raises(ValueError, match=rf"{name}=.* begins with a Router takes none; leave it out"):
            build_student(str(tmp_path / "tower"), **{name: value})


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_static_tower_has_its_linear_end_in_its_table(made: Path, similarity: str) -> None:
    model = SentenceTransformer(str(made / "model"))
    static = build_static(model, dim=16, texts=CORPUS["text"])
    linear, ends = Dense(16, 32, activation_function=nn.Identity()), [Normalize()] * (similarity == "cosine")
    texts = [*ROWS["query"], "passage"]
    apart = SentenceTransformer(modules=[static[0], linear, *ends]).encode(texts)
    folded = _folded([static[0], linear], rescale=bool(ends))
    assert np.allclose(SentenceTransformer(modules=[*folded, *ends]).encode(texts), apart, atol=1e-5)
    lengths = [table.embedding.weight.norm(dim=1).median().item() for table in (static[0], folded[0])]
    assert not ends or lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    tower = query_tower(static, model, str(made / "vectors"), CORPUS)
    assert [type(one) for one in route_of(tower, "query")] == [StaticEmbedding, *map(type, _parted([*model])[1])]
