"""The scales of a teacher's members, against scipy and by property; what a mixture finds, against plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.optimize import minimize
from torch import Tensor

from tct_hf import BM25Teacher, TeacherEnsemble, build_student, calibrate, free_mixture, search_mixture
from tct_hf.data.collection import Collection, Split
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.teachers.base import Teacher
from tct_hf.teachers.cached import encode_together
from tct_hf.teachers.mixture import Calibration, fit_scales, members_of, read
from tests.models import tiny_bert


def lists(seed: int = 0, queries: int = 80, candidates: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Two members that know something and one that draws lots; the positive follows the first two."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(queries):
        scores = torch.randn(3, candidates, generator=draw)
        positive = torch.multinomial((2.0 * scores[0] + 0.5 * scores[1]).softmax(0), 1, generator=draw)
        made.append((scores, torch.nn.functional.one_hot(positive[0], candidates).bool()))
    return made


def test_scales_are_those_that_scipy_finds_and_a_useless_member_gets_almost_none() -> None:
    ready = [(scores.double().numpy(), positive.numpy()) for scores, positive in lists()]

    def loss(logs: np.ndarray) -> float:
        logits = [(np.exp(logs) @ scores, positive) for scores, positive in ready]
        return float(np.mean([np.logaddexp.reduce(z) - np.logaddexp.reduce(z[p]) for z, p in logits]))

    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-12, "xatol": 1e-8})
    found = fit_scales(lists(), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(found[:2], np.exp(best.x)[:2], rtol=1e-3)
    assert found[2] < 0.15 < 0.3 < found[1] < found[0]
    assert read(lists(), found).cross_entropy == pytest.approx(best.fun, abs=1e-5)


class Fixed(Teacher):
    """Scores by a table, at some scale."""

    score_kind = "table"

    def __init__(self, table: Mapping[tuple[str, str], float], scale: float) -> None:
        self.table, self.scale = table, scale

    def collate(self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Any) -> dict[str, Any]:
        scores = [[self.scale * self.table[query, column[0]] for column in columns] for query in queries]
        return {"scores": torch.tensor(scores)}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        return inputs["scores"]


@pytest.fixture(scope="module")
def collection() -> Collection:
    draw = np.random.default_rng(3)
    words = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
    texts = {f"p{row}": " ".join(draw.choice(words, 8)) for row in range(40)}
    queries = {f"q{row}": " ".join(texts[f"p{row}"].split()[:3]) for row in range(30)}
    qrels = {f"q{row}": {f"p{row}": 1} for row in range(30)}
    corpus = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    return Collection("made", corpus, {"dev": Split(queries, qrels)}, {})


def table_of(collection: Collection, lead: float) -> dict[tuple[str, str], float]:
    """Scores drawn by lot, those of positives higher."""
    split, draw = collection.splits["dev"], np.random.default_rng(0)
    return {
        (query, text): draw.normal() + lead * (passage in split.qrels[name])
        for name, query in split.queries.items()
        for passage, text in zip(collection.corpus["id"], collection.corpus["text"], strict=True)
    }


def test_a_teacher_at_another_scale_is_calibrated_to_the_same_distribution(collection: Collection) -> None:
    table, found = table_of(collection, 1.5), []
    for scale in (1.0, 40.0):
        teacher = Fixed(table, scale)
        done = calibrate(teacher, collection)
        assert teacher.training_scale == pytest.approx(done.weights["table"])
        found.append((teacher.training_scale * scale, done.after.cross_entropy))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    model = build_student(str(tiny_bert(folder / "bert")))
    model.similarity_fn_name = "cosine"
    model.save_pretrained(str(folder / "model"))
    return str(folder / "model")


def mixture_of(collection: Collection, base: str, cache: Path) -> TeacherEnsemble:
    return free_mixture(base, collection_bm25(collection), dtype="float32", cache_dir=cache)


def test_a_mixture_finds_what_scoring_every_passage_finds(collection: Collection, base: str, tmp_path: Path) -> None:
    mixture = mixture_of(collection, base, tmp_path)
    queries = dict(list(collection.splits["dev"].queries.items())[:5])
    run = search_mixture(mixture, collection, queries, depth=40, keep=6)
    model = build_student(base)
    texts, ids = collection.corpus["text"][:], collection.corpus["id"][:]
    lexical = BM25Teacher(collection_bm25(collection)).scores(list(queries.values()), texts)
    cosines = model.similarity(model.encode_query(list(queries.values())), model.encode_document(texts))

    def tokens(text: str) -> Tensor:
        with torch.no_grad():
            out = model[0].model(**model.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(out, dim=1)

    of_texts = [tokens(text) for text in texts]
    for row, (name, query) in enumerate(queries.items()):
        maxsim = torch.stack([(tokens(query) @ passage.T).amax(1).mean() for passage in of_texts])
        total = 6.0 * cosines[row] + 0.33 * lexical[row] + 12.0 * maxsim
        order = total.argsort(descending=True)[:6].tolist()
        assert list(run[name]) == [ids[place] for place in order]
        np.testing.assert_allclose(list(run[name].values()), total[order], rtol=2e-3)


def test_calibration_sets_the_weights_and_reads_each_member(collection: Collection, base: str, tmp_path: Path) -> None:
    mixture = mixture_of(collection, base, tmp_path)
    student = members_of(mixture)["cosine"]
    done: Calibration = calibrate(mixture, collection, student=student)
    assert mixture.weights == list(done.weights.values())
    assert list(done.weights) == ["cosine", "BM25", "MeanMaxSim"] == list(done.alone)
    assert done.after.cross_entropy <= done.before.cross_entropy
    assert done.after.cross_entropy <= min(one.cross_entropy for one in done.alone.values()) + 1e-6
    done.save(tmp_path)
    assert (tmp_path / "tct_calibration.json").is_file()
    assert "positive on top" in done.summary()


def test_a_weight_that_has_no_logarithm_is_refused_before_anything_is_scored(collection: Collection) -> None:
    members = [(Fixed({}, 1.0), 1.0), (Fixed({}, 1.0), 0.0)]
    with pytest.raises(ValueError, match=r"starts from weights above 0, but that of table 2 is 0\.0"):
        calibrate(TeacherEnsemble(members, normalize="none"), collection)


def test_a_teacher_worse_than_its_student_is_said_so(collection: Collection) -> None:
    student = BM25Teacher(collection_bm25(collection))
    done = calibrate(Fixed(table_of(collection, 0.0), 1.0), collection, student=student)
    assert done.lead is not None and done.lead < 0
    assert "The teacher knows no more than the student about to learn from it" in done.summary()


def test_pooled_and_token_vectors_share_a_forward_pass(collection: Collection, base: str, tmp_path: Path) -> None:
    texts = [*collection.corpus["text"], "", "word " * 200]
    apart, together = (
        [made["cosine"], made["MeanMaxSim"]]
        for made in (members_of(mixture_of(collection, base, tmp_path / name)) for name in ("apart", "together"))
    )
    encode_together(*together, texts)
    passes: list[int] = []
    for one in together:
        one.teacher.model[0].register_forward_pre_hook(lambda module, inputs: passes.append(1))
    for one, other in zip(apart, together, strict=True):
        for alone, shared in zip(one.vectors(texts, "document"), other.vectors(texts, "document"), strict=True):
            assert np.array_equal(alone, shared)
    assert not passes
    with torch.no_grad():
        next(together[1].teacher.model.parameters()).add_(0.5)
    encode_together(*together, ["another text"])  # of two encoders: nothing is kept
    assert len(together[0].store.keys()) == len(texts)


def test_a_passage_that_is_the_query_itself_is_no_candidate(collection: Collection) -> None:
    split = collection.splits["dev"]
    ids, texts = [*collection.corpus["id"], *split.queries], [*collection.corpus["text"], *split.queries.values()]
    table = {
        (query, text): 3.0 * (name in split.qrels[asked]) + 9.0 * (name == asked)
        for asked, query in split.queries.items()
        for name, text in zip(ids, texts, strict=True)
    }
    arguana = replace(collection, corpus=Dataset.from_dict({"id": ids, "text": texts}), index=None)
    assert calibrate(Fixed(table, 1.0), arguana).after.positive_on_top == 1.0
