"""A teacher's scores of generated queries: its own, once a query, in any split of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import ColBERTTeacher, CrossEncoderTeacher, NoTeacher, load_expansions, score_expansions, write_expansions
from tct_hf.teachers import scoring
from tests.encode_worker import passages
from tests.models import WORDS, tiny_colbert, tiny_cross_encoder
from tests.rows import content

COUNT = 9


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> ColBERTTeacher:
    return ColBERTTeacher(str(tiny_colbert(tmp_path_factory.mktemp("teacher") / "colbert")), dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = [[f"what is {WORDS[(row + n * n) % 14]}" for n in range(row % 4)] for row in range(COUNT)]
    rows = [{"id": f"p{row}", "queries": found * (1 + row % 2)} for row, found in enumerate(texts)]
    write_expansions(rows, tmp_path / "out", settings={}, shard_size=4)
    return tmp_path / "out"


CORPUS = list(passages(COUNT))


def score(teacher: Any, folder: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"depends": {"teacher": "tiny"}, "batch_size": 5, "write": lambda line: None}
    return score_expansions(teacher, more.pop("corpus", CORPUS), folder, **{**settings, **more})


def test_scores_are_those_of_a_colbert(colbert: ColBERTTeacher, folder: Path) -> None:
    manifest = score(colbert, folder)
    assert manifest["count"] == COUNT and manifest["teacher"] == "tiny"
    for passage, found in zip(CORPUS, load_expansions(folder), strict=True):
        assert len(found["scores"]) == len(found["queries"])
        for query, value in zip(found["queries"], found["scores"], strict=True):
            model = colbert.model
            expected = model.similarity(model.encode_query([query]), model.encode_document([passage["text"]]))
            assert value == pytest.approx(float(expected), abs=1e-4)


def test_scores_are_those_of_a_cross_encoder(folder: Path, tmp_path: Path) -> None:
    teacher = CrossEncoderTeacher(str(tiny_cross_encoder(tmp_path / "cross-encoder")), dtype="float32")
    score(teacher, folder)
    row = load_expansions(folder)[7]
    expected = teacher.score_matrix(teacher.collate([row["queries"][1]], [[CORPUS[7]["text"]]], [{}]), gather=False)
    assert row["scores"][1] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match='load it with candidates="own"'):
        score(CrossEncoderTeacher(teacher.model, candidates="in-batch"), folder)


def test_a_stopped_run_goes_on_and_others_are_refused(
    colbert: ColBERTTeacher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(colbert, folder)
    whole = content(folder / "scores")
    for name in ("00002.arrow", "manifest.json"):
        (folder / "scores" / name).unlink()
    assert load_expansions(folder).column_names == ["id", "queries"]
    computed: list[int] = []
    real = scoring._query_scores
    monkeypatch.setattr(scoring, "_query_scores", lambda *args: computed.append(1) or real(*args))
    score(colbert, folder)
    assert computed == [1]  # the one passage of the last shard
    assert content(folder / "scores") == whole
    for more, message in (
        ({"depends": {"teacher": "other"}}, "teacher = 'tiny', but now teacher = 'other'"),
        ({"corpus": CORPUS[1:]}, "passage 'p0', but the corpus has 'p1' there"),
        ({"corpus": CORPUS[:5]}, "passage 'p5', but the corpus ends before it"),
        ({"corpus": list(passages(COUNT + 1))}, "it has more passages than the 9 that were expanded"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score(colbert, folder, **more)
    with pytest.raises(ValueError, match="can't be scored by a NoTeacher"):
        score(NoTeacher(), folder)


def test_texts_go_to_the_device_of_the_teacher_and_a_score_that_is_not_finite_is_named(
    colbert: ColBERTTeacher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(scoring, "send_to_device", lambda inputs, device: seen.append(str(device)) or inputs)
    monkeypatch.setattr(type(colbert.model), "device", torch.device("cuda:3"))
    monkeypatch.setattr(colbert, "score_matrix", lambda inputs, gather: torch.full((99, 99), torch.nan))
    with pytest.raises(ValueError, match=r"not finite for the query 'what is \w+' of passage 'p1'"):
        score(colbert, folder)
    assert set(seen) == {"cuda:3"}
