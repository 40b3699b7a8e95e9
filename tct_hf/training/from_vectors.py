"""How a query tower begins: it learns the vectors that its passages' model has for many texts, without labels."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from transformers.trainer_pt_utils import LengthGroupedSampler

from tct_hf.data.near_duplicates import UNSPACED
from tct_hf.encoding.routes import prompt_of
from tct_hf.encoding.weights import set_dropout
from tct_hf.training.run import StockTrainer
from tct_hf.training.stages import Stage

DROPOUT = 0.0  # a text has one vector: noise only slows learning down
_WORDS = (4, 16)  # of a part of a passage, at least and at most
_WORD = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)")  # a character of a script without spaces
# Training arguments where nothing else is said, of a tower with an encoder and of a static one.
_WITH_ENCODER = {"per_device_train_batch_size": 32, "learning_rate": 7e-4, "warmup_steps": 50}
_STATIC = {"per_device_train_batch_size": 256, "learning_rate": 0.03, "warmup_steps": 50}


def vector_arguments(given: Mapping[str, Any], *, static: bool) -> dict[str, Any]:
    """Training arguments of a tower, static or with an encoder, that learns from vectors: those given, and the rest.

    Raises:
        ValueError: arguments that make it learn nothing, or ask for dev rows, which there are none of.
    """
    for name in ("max_steps", "num_train_epochs", "per_device_train_batch_size"):
        if given.get(name) == 0:
            raise ValueError(f"{name}=0 makes no step: set it higher, or leave it out.")
    if given.get("eval_strategy", "no") != "no":
        raise ValueError(f"eval_strategy={given['eval_strategy']}: there is no dev set of vectors; leave it out.")
    steps = {} if "num_train_epochs" in given else {"max_steps": 1000}
    return {**(_STATIC if static else _WITH_ENCODER), **steps, **given}


def parts_of_passages(passages: Any, count: int, *, seed: int = 0) -> list[str]:
    """Some words in a row, as many as a question has, of `count` random passages (a data set's column); none twice."""
    rng, found = random.Random(seed), dict[str, None]()
    for passage in passages[rng.choices(range(len(passages)), k=count)]:  # all at once: one by one is slow
        words = _WORD.findall(passage)
        length = rng.randint(*_WORDS)
        start = rng.randint(0, max(0, len(words) - length))
        if words:
            found[" ".join("".join(words[start : start + length]).split())] = None
    return list(found)


class _OfSimilarLength(DefaultBatchSampler):
    """Batches of texts of similar length in random order, the same in an epoch that is resumed."""

    generator: Any

    def __init__(self, dataset: Dataset, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        lengths = [len(text) for text in dataset["text"]]
        self.sampler = LengthGroupedSampler(self.batch_size, lengths=lengths, generator=self.generator)

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        batches = [*super().__iter__()]
        return iter([batches[at] for at in torch.randperm(len(batches), generator=self.generator)])


def train_from_vectors(
    stage: Stage, make: Callable[[], tuple[SentenceTransformer, Sequence[str], Sequence[str], np.ndarray]]
) -> Path:
    """Bring the vectors of a tower's queries near to those of another model.

    Args:
        make: gives the tower, questions, other texts, and the vectors `(questions + texts, dim)` to learn. Fewer
            questions than other texts are repeated, up to half of the rows.

    Source: Vujanic and Rueckstiess, arXiv 2509.12539 (LEAF).
    """

    def made() -> StockTrainer:
        tower, questions, others, vectors = make()
        set_dropout(tower, DROPOUT)
        texts = pa.array([*questions, *others])
        label = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        times = max(1, len(others) // max(1, len(questions)))
        rows = [*range(len(questions))] * times + [*range(len(questions), len(texts))]
        args = stage.args(
            SentenceTransformerTrainingArguments,
            batch_sampler=_OfSimilarLength,
            router_mapping={"text": "query"},
            prompts={"text": prompt_of(tower, "query") or ""},
        )
        lengths_count = tower.similarity_fn_name != "cosine"
        return StockTrainer(
            tower,
            args,
            train_dataset=Dataset(pa.table({"text": texts, "label": label})).select(rows),
            loss=EmbedDistillLoss(tower, distance_metric="mse" if lengths_count else "cosine"),
        )

    return stage.train(made)
