"""A Space: the page to search, with a released student, its indexes and the passages."""

from __future__ import annotations

import copy
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import SpaceCard, SpaceCardData

import tct_hf
from tct_hf.data.collection import Collection
from tct_hf.encoding.build import build_colbert
from tct_hf.evaluation.page import RERANKED, Page, page_of, short_name
from tct_hf.evaluation.searcher import Searcher
from tct_hf.evaluation.settings import HybridSettings
from tct_hf.evaluation.workspace import OWN, Workspace, has_own_maxsim, open_student
from tct_hf.files import read_json, write_json_atomic, write_text_atomic
from tct_hf.hub_client import fetch_model
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.index import VectorIndex
from tct_hf.retrieval.sparse import SparseIndex

# The dependencies of pyproject.toml: what is installed may not say them, or say those of another version.
_NEEDED = """
    torch transformers sentence-transformers datasets filelock xxhash accelerate huggingface_hub faiss-cpu
    bm25s numba PyStemmer ir-measures pytrec_eval-terrier omegaconf pyyaml numpy psutil scipy
"""
_FACTS, _PASSAGES, _INDEXES = "space.json", "passages.parquet", "indexes"
_DAMAGED = "the Space is not as it was written; release it again"
_APP = '''"""Serves the page to search."""

from pathlib import Path

from tct_hf.evaluation.page import serve
from tct_hf.hub.space import open_space

if __name__ == "__main__":
    serve(open_space(Path(__file__).parent), "0.0.0.0", 7860, print)
'''


def write_space(folder: Path, title: str, path: Path, collection: Collection, student: str, revision: str) -> None:
    """Write the files of a Space into a new folder.

    Args:
        title: shown on the Hub.
        path: the student's checkpoint here; the corpus is encoded with it where the cache has no vectors of it.
        collection: what is searched; its passages are part of the Space.
        student: the checkpoint's Hub id, from which the Space loads it.
        revision: commit or tag of the student.
    """
    model = open_student(str(path))
    workspace = Workspace(collection, model, student)
    searcher = Searcher(workspace, depth=100, hybrid=HybridSettings())
    folder.mkdir(parents=True)
    for name, index in workspace.indexes.items():
        index = copy.copy(index)
        if isinstance(index, VectorIndex):
            index.built_by = {**(index.built_by or {}), "id": student, "revision": revision}
        index.save(folder / _INDEXES / name)
    collection.corpus.select_columns(["id", "text"]).to_parquet(str(folder / _PASSAGES))
    facts = {
        "student": student,
        "revision": revision,
        "precision": workspace.manifest["precision"],
        "alpha": searcher.alpha,
        "name": short_name(collection.name),
        "words": collection.words,
        "examples": page_of(searcher, None, 5).examples,
    }
    write_json_atomic(folder / _FACTS, facts)
    # No index of packages has this one: it goes along.
    ignored = shutil.ignore_patterns("__pycache__", "recipes", "templates")
    shutil.copytree(Path(tct_hf.__file__).parent, folder / "tct_hf", ignore=ignored)
    write_text_atomic(folder / "app.py", _APP)
    write_text_atomic(folder / "requirements.txt", "".join(f"{name}=={_version(name)}\n" for name in _NEEDED.split()))
    card = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=_version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=[student],
    )
    text = (
        f"Search {len(collection.corpus):,} passages of {facts['name']} with BM25, [{student}]"
        f"(https://huggingface.co/{student}/tree/{revision}) and both fused, side by side; `/search?q=...` answers in "
        "JSON. The passages have the licences of their sources; the code in `tct_hf` is under the Apache License 2.0."
    )
    write_text_atomic(folder / "README.md", str(SpaceCard(f"---\n{card.to_yaml()}\n---\n\n{text}\n")))


def open_space(folder: Path) -> Page:
    """The page of a Space's files; the student comes from the Hub."""
    facts: dict[str, Any] = read_json(folder / _FACTS, _DAMAGED)
    kinds: dict[str, Any] = {"bm25": BM25Index, "learned-sparse": SparseIndex}
    indexes: dict[str, Any] = {
        place.name: kinds.get(place.name, DenseIndex).load(place) for place in sorted((folder / _INDEXES).iterdir())
    }
    corpus: Any = Dataset.from_parquet(str(folder / _PASSAGES), keep_in_memory=True)
    questions = {str(number): text for number, text in enumerate(facts["examples"])}
    collection = Collection(facts["name"], corpus, {}, {"sha256": ""}, questions, words=facts["words"])
    vectors = next(index for index in indexes.values() if isinstance(index, VectorIndex))
    model = vectors.load_model()  # refused where its weights are not those of the index
    place, precision = fetch_model(facts["student"], revision=facts["revision"]), facts["precision"]
    workspace = Workspace(collection, model, facts["student"], precision=precision, in_memory=True, indexes=indexes)
    own = build_colbert(str(place), encoding="own") if has_own_maxsim(model) else None
    hybrid = HybridSettings(alpha=facts["alpha"])
    searcher = Searcher(workspace, reranker=own, depth=100, reranked=RERANKED, hybrid=hybrid)
    return page_of(searcher, OWN, 5)


def _version(name: str) -> str:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"A Space needs {name} here ({error}): pip install 'tct_hf[demo]'.") from error
