"""What tests of encoding share: texts, and a corpus that becomes a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from tct_hf import encode_corpus
from tests.encode_worker import SHARD, passages
from tests.rows import content as files_of

TEXTS = [passage["text"] for passage in passages()]


def encoded(model: Any, folder: Path, corpus: Any = None, **settings: Any) -> dict[str, Any]:
    settings = {"precision": "fp32", "shard_size": SHARD, "write": lambda line: None, **settings}
    return encode_corpus(model, passages() if corpus is None else corpus, folder, **settings)


content = partial(files_of, but=("encoding_seconds",))


def as_job(model: Any, folder: Path, index: int, jobs: int = 3, corpus: Any = None, **settings: Any) -> dict[str, Any]:
    corpus = Dataset.from_list(list(passages())) if corpus is None else corpus
    return encoded(model, folder, corpus, job=(index, jobs), **settings)
