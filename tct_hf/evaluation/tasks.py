"""Retrieval tasks of mteb, NanoBEIR among them: models, BM25 and hybrids as mteb measures them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import SparseEncoder

from tct_hf.data.collection import load_collection
from tct_hf.data.sources import reach
from tct_hf.data.texts import joined
from tct_hf.evaluation.settings import HYBRIDS
from tct_hf.files import MADE_AGAIN, file_digest, json_digest, read_json, write_json_atomic
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.fusion import equal_spread_alpha, fuse
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# The measures of a report, and what mteb calls them.
MEASURES = {"nDCG@10": "ndcg_at_10", "RR@10": "mrr_at_10", "R@100": "recall_at_100"}


def find_tasks(names: Sequence[Any]) -> list[Any]:
    """The tasks of mteb that are named.

    Args:
        names: "nanobeir" or another benchmark, or a task, such as "SciFact", by its name in mteb, with or without
            "mteb:" before it; a BEIR folder with the split "test"; or a task object.

    Raises:
        ImportError: mteb is not installed.
        ValueError: mteb knows no such name, a task comes twice, or is not one of retrieval.
    """
    if not names:
        return []
    try:
        import mteb
    except ImportError as error:
        raise ImportError(f"tasks are measured by mteb ({error}): pip install 'tct_hf[mteb]'.") from error
    benchmarks = {benchmark.name.lower(): benchmark for benchmark in mteb.get_benchmarks()}
    tasks: dict[str, Any] = {}
    for name in names:
        short = str(name).removeprefix("mteb:").strip()
        if not isinstance(name, str):
            found = [name]
        elif short.lower() in benchmarks:
            found = benchmarks[short.lower()].tasks
        elif Path(short).is_dir():
            found = [_folder_task(Path(short))]
        else:
            try:
                found = [mteb.get_task(short)]
            except KeyError as error:
                said = error.args[0].removeprefix("KeyError: ")
                raise ValueError(f"tasks: {said} Name nanobeir, a task of mteb, or a BEIR folder.") from None
        for task in found:
            if task.metadata.type != "Retrieval":
                kind = task.metadata.type
                raise ValueError(f"tasks: {task.metadata.name} is of type {kind}; name tasks of type Retrieval")
            if tasks.setdefault(task.metadata.name, task) is not task:
                raise ValueError(f"tasks: {task.metadata.name} comes twice; name it once")
    return list(tasks.values())


def evaluate_tasks(
    tasks: Sequence[Any],
    models: Mapping[str, SentenceTransformer | SparseEncoder],
    folder: Path,
    *,
    words: Mapping[str, Any],
    write: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Measure systems on tasks: models by mteb's own wrapper, BM25 and hybrids by mteb's search protocol.

    Args:
        tasks: of mteb.
        models: models of one vector a text by the keys of their rows in a report. Each makes a hybrid with BM25, and a
            dense and a sparse one with each other; both lists have the same spread, as nothing can be tuned.
        folder: folder of the figures; what is there of the same data is used again.
        words: language and stemmer of BM25.
        write: takes lines of progress.

    Returns:
        Name of each task to what report.json holds of it.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        name, revision = task.metadata.name, task.metadata.dataset["revision"]
        file = folder / f"{name}.json"
        if not file.is_file() or read_json(file, MADE_AGAIN, needs=["revision"])["revision"] != revision:
            write_json_atomic(file, _measured(task, models, words, write))
        found[name] = read_json(file, MADE_AGAIN, needs=["systems"])
    return found


def _measured(
    task: Any, models: Mapping[str, Any], words: Mapping[str, Any], write: Callable[[str], None]
) -> dict[str, Any]:
    import mteb

    # Of mteb's own call, which nobody here can change.
    warnings.filterwarnings("ignore", message="The `get_sentence_embedding_dimension`", category=FutureWarning)
    systems: dict[str, Searched] = {"bm25": _Words(words), **{key: _Model(model) for key, model in models.items()}}
    for key, parts in HYBRIDS.items():
        if all(part in systems for part in parts):
            systems[key] = _Fused(*(systems[part] for part in parts))
    reach(task.metadata.dataset["path"], task.load_data)
    figures: dict[str, dict[str, float]] = {}
    for key, system in systems.items():
        write(f"  {task.metadata.name}: {key}")
        options: dict[str, Any] = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        (result,) = mteb.evaluate(system, task, **options).task_results
        scores = [one for split in result.scores.values() for one in split]  # of each split and language
        figures[key] = {ours: sum(one[theirs] for one in scores) / len(scores) for ours, theirs in MEASURES.items()}
    task.unload_data()
    dataset = task.metadata.dataset
    known = {"dataset": dataset["path"], "revision": dataset["revision"], "splits": list(task.eval_splits)}
    return {**known, "mteb": mteb.__version__, "systems": figures}


class Searched(ABC):
    """A system behind mteb's search protocol, which keeps what it found, by split and subset."""

    def __init__(self) -> None:
        from mteb.models import ModelMeta

        self.mteb_model_meta: Any = ModelMeta.create_empty()
        self.runs: dict[tuple[str, str], Run] = {}

    def index(self, corpus: Any, **options: Any) -> None:  # noqa: B027  # a fused system has none
        """Index a corpus, a data set with the columns id, text and perhaps title."""

    def search(self, queries: Any, **options: Any) -> Run:
        """Find the passages of queries, a data set with the columns id and text."""
        place = (options["hf_split"], options["hf_subset"])
        self.runs[place] = self.find(queries, place, options)
        return self.runs[place]

    @abstractmethod
    def find(self, queries: Any, place: tuple[str, str], options: dict[str, Any]) -> Run:
        """What `search` returns and keeps."""


class _Model(Searched):
    """A model, encoded and searched by mteb itself."""

    def __init__(self, model: SentenceTransformer | SparseEncoder) -> None:
        from mteb.models import SearchEncoderWrapper, SentenceTransformerEncoderWrapper, SparseEncoderWrapper

        super().__init__()
        wrapper = SparseEncoderWrapper if isinstance(model, SparseEncoder) else SentenceTransformerEncoderWrapper
        self.inner = SearchEncoderWrapper(wrapper(model))
        self.mteb_model_meta = self.inner.mteb_model_meta

    def index(self, corpus: Any, **options: Any) -> None:
        self.inner.index(corpus, **options)

    def find(self, queries: Any, place: tuple[str, str], options: dict[str, Any]) -> Run:
        return self.inner.search(queries, **options)


class _Words(Searched):
    """BM25."""

    def __init__(self, words: Mapping[str, Any]) -> None:
        super().__init__()
        self.words = words

    def index(self, corpus: Any, **options: Any) -> None:
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        self.built = BM25Index.build(map(joined, titles, corpus["text"]), corpus["id"], **self.words)

    def find(self, queries: Any, place: tuple[str, str], options: dict[str, Any]) -> Run:
        return self.built.run(dict(zip(queries["id"], queries["text"], strict=True)), options["top_k"])


class _Fused(Searched):
    """What two systems have found, fused."""

    def __init__(self, first: Searched, weighted: Searched) -> None:
        super().__init__()
        self.first, self.weighted = first, weighted

    def find(self, queries: Any, place: tuple[str, str], options: dict[str, Any]) -> Run:
        weighted, first = self.weighted.runs[place], self.first.runs[place]
        return fuse(weighted, first, equal_spread_alpha(weighted, first), k=options["top_k"])


def _folder_task(folder: Path) -> Any:
    """A task of mteb over the split "test" of a BEIR folder."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    files = sorted([*folder.glob("*.jsonl*"), *folder.glob("qrels/test.tsv*")])
    name, revision = folder.resolve().name, json_digest([file_digest(file) for file in files])
    known: dict[str, Any] = {"type": "Retrieval", "category": "t2t", "modalities": ["text"]}
    known |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10"}

    class FolderTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name, description=str(folder), dataset={"path": name, "revision": revision}, **known
        )

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            collection = load_collection(str(folder), dev_split=None, required=["test"])
            test = collection.splits["test"]
            asked = Dataset.from_dict({"id": list(test.queries), "text": list(test.queries.values())})
            # A title begins its text already.
            parts = {"corpus": collection.corpus.select_columns(["id", "text"]), "queries": asked}
            self.dataset = {"default": {"test": {**parts, "relevant_docs": test.qrels, "top_ranked": None}}}
            self.ignore_identical_ids, self.data_loaded = collection.skips_own, True

    return FolderTask()
