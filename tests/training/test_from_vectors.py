"""A query tower that learns the vectors of texts: its texts, its batches, and a run that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tct_hf import build_static, build_student
from tct_hf.encoding.routes import joined
from tct_hf.training.from_vectors import parts_of_passages, train_from_vectors, vector_arguments
from tct_hf.training.run import StockTrainer
from tct_hf.training.stages import Stage
from tests.models import WORDS, tiny_bert

QUESTIONS = [" ".join(WORDS[at : at + 3]) for at in range(4, 9)]
OTHERS = [" ".join(WORDS[at : at + 2 + at % 7]) for at in range(4, 17)]


def test_parts_are_words_in_a_row_of_passages() -> None:
    passages = [" ".join(f"{row}-{at}" for at in range(length)) for row, length in enumerate([3, 12, 60, 0])]
    column = Dataset.from_dict({"text": passages})["text"]
    parts = parts_of_passages(column, 200)
    assert parts == parts_of_passages(column, 200) and len(set(parts)) == len(parts)
    assert all(any(part in passage for passage in passages) and 3 <= len(part.split()) <= 16 for part in parts)
    assert passages[0] in parts and "" not in parts
    unspaced = "密集检索用向量表示查询和段落并比较它们"
    parts = parts_of_passages(Dataset.from_dict({"text": [unspaced]})["text"], 20)
    assert len(parts) > 5 and all(part in unspaced and 4 <= len(part) <= 16 for part in parts)


@pytest.mark.parametrize(("asked", "steps"), [({}, 1000), ({"num_train_epochs": 2}, None), ({"max_steps": 7}, 7)])
def test_epochs_that_are_asked_for_count(asked: dict[str, Any], steps: int | None) -> None:
    made = vector_arguments({**asked, "learning_rate": 1.0}, static=False)
    assert made.get("max_steps") == steps and made["learning_rate"] == 1.0


@pytest.mark.parametrize("kind", ["encoder", "static"])
def test_queries_come_nearer_and_a_stopped_run_ends_as_a_whole_one(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = build_student(str(tiny_bert(tmp_path / "bare", dropout=0.1)))
    vectors, batches = of.encode_query([*QUESTIONS, *OTHERS]), list[int]()

    def make() -> Any:
        own = build_static(of, texts=OTHERS) if kind == "static" else build_student(str(tmp_path / "bare"), layers=[0])
        return joined([*own], [*of], of, ""), QUESTIONS, OTHERS, vectors

    def trained(name: str) -> np.ndarray:
        how = {"max_steps": 8, "per_device_train_batch_size": 8, "save_steps": 4, "learning_rate": 0.01}
        arguments = {**how, "report_to": "none", "use_cpu": True, "warmup_steps": 0}
        stage = Stage(tmp_path / name, tmp_path / f"{name}-work", settings={}, arguments=arguments, write=said.append)
        return SentenceTransformer(str(train_from_vectors(stage, make))).encode_query([*QUESTIONS, *OTHERS])

    step, said = StockTrainer.training_step, list[str]()

    def stopping(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        batches.append(len(inputs["label"]))
        texts = self.collect_features(dict(inputs))[0][0]
        once, again = (model.train()(dict(texts))["sentence_embedding"] for _ in range(2))
        assert torch.equal(once, again)  # without dropout
        if len(batches) == 14:
            raise KeyboardInterrupt
        return step(self, model, inputs, *args)

    monkeypatch.setattr(StockTrainer, "training_step", stopping)
    whole = trained("whole")
    assert sum(batches[:3]) == 23  # 5 questions twice, and 13 other texts
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    assert np.allclose(trained("stopped"), whole, atol=1e-6) and "  goes on after step 4 of 8" in said

    def distance(found: np.ndarray) -> float:
        return float(np.square(found - vectors).mean())

    assert distance(whole) < distance(make()[0].encode_query([*QUESTIONS, *OTHERS]))
