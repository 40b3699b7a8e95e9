"""Answer single questions with BM25, students, two of them fused and reranked, and show each one's scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.maxsim import rerank_run
from tct_hf.evaluation.settings import HYBRIDS, EngineSettings, ExpansionSettings, HybridSettings
from tct_hf.evaluation.systems import System, bm25_system, joiner, student_system
from tct_hf.evaluation.tables import weight_text
from tct_hf.evaluation.tune_alpha import tune_alpha, tuning_queries
from tct_hf.evaluation.workspace import Stored, Workspace
from tct_hf.files import MADE_AGAIN, json_digest, read_json, write_json_atomic
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

SYSTEMS = {"bm25": "BM25", "sparse": "sparse student", "dense": "dense", "fused": "fused", "maxsim": "MaxSim"}
_QUESTION = "question"


@dataclass(frozen=True)
class Hit:
    """A passage found for a question; a score is None where the passage is not among those that the system found."""

    rank: int
    id: str
    text: str
    bm25: float | None
    dense: float | None = None
    fused: float | None = None
    maxsim: float | None = None
    sparse: float | None = None


@dataclass(frozen=True)
class Answer:
    """The passages that each system finds for a question, best first, and the seconds that it takes."""

    hits: dict[str, list[Hit]]
    seconds: dict[str, float]


class Searcher:
    """BM25, one or two students, and two of these fused, over one collection.

    A student is fused with BM25; of a dense and a sparse student, the two are fused.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        reranker: MultiVectorEncoder | None = None,
        depth: int,
        reranked: int | None = None,
        hybrid: HybridSettings,
        sparse: Workspace | None = None,
        expansion: ExpansionSettings | None = None,
        dims: int | None = None,
        engine: EngineSettings | None = None,
    ) -> None:
        hybrid.check()
        self._expansion = expansion if expansion is not None and expansion.path is not None else None
        if dims is not None and workspace.is_sparse:
            raise ValueError("dims: a sparse student's first dimensions are no smaller student; leave it out")
        self._workspace, self.reranker, self.depth = workspace, reranker, depth
        self.reranked = reranked or depth  # passages of the fused list
        self._dims, self._hybrid = dims, hybrid
        self.collection = workspace.collection
        self._sparse = workspace if workspace.is_sparse else sparse
        students = {"dense": None if workspace.is_sparse else workspace, "sparse": self._sparse}
        self.names = {system: student.name for system, student in students.items() if student is not None}
        words = workspace.bm25() if self._expansion is None else workspace.expanded(self._expansion)
        title = "BM25" if self._expansion is None else "expanded BM25"
        self._found_by: dict[str, System] = {"bm25": bm25_system("bm25", title, words, depth)}
        if not workspace.is_sparse:
            index: Stored[Any]
            if engine is not None and engine.name is not None:
                index = workspace.engine(engine)
            else:
                # An approximate index is tuned for a k of its own, so that another depth finds the same index.
                factory = workspace.factory if dims is None else "Flat"
                tuning = None if factory == "Flat" else tuning_queries(workspace.collection, hybrid)
                index = workspace.dense(factory, dims, tuning=tuning)
            self._found_by["dense"] = student_system("dense", SYSTEMS["dense"], workspace, index, depth, size=dims)
        if self._sparse is not None:
            index = self._sparse.sparse()
            self._found_by["sparse"] = student_system("sparse", SYSTEMS["sparse"], self._sparse, index, depth)
        # The first is multiplied by alpha.
        self._fused = ("sparse", "dense") if len(self._found_by) > 2 else ("bm25", [*self._found_by][-1])
        there = {*self._found_by, "fused", *(["maxsim"] if reranker is not None else [])}
        self.systems = [name for name in SYSTEMS if name in there]
        self._rows = {name: row for row, name in enumerate(workspace.collection.corpus["id"])}
        self.alpha, self.fusion = self._choose_alpha()

    def ask(self, question: str, k: int, *, rank_by: str | None = None) -> list[Hit]:
        """The best k passages of a question, in the order of a system ("maxsim" with a reranker, else "fused").

        There are fewer where BM25 orders and fewer passages have a word of the question.
        """
        self._check(question, k)
        rank_by = rank_by or ("maxsim" if self.reranker is not None else "fused")
        if rank_by not in self.systems:
            raise ValueError(f"rank_by: {rank_by!r} is not one of {', '.join(map(json.dumps, self.systems))}")
        scores, _ = self._scores(question, rerank=rank_by == "maxsim")
        if rank_by != "maxsim" and self.reranker is not None:
            best = [name for name, _ in rank(scores[rank_by])[:k]]
            scores["maxsim"] = self._maxsim(question, best)[_QUESTION]
        return self._hits(rank_by, scores, k)

    def answer(self, question: str, k: int) -> Answer:
        """The best k passages of a question by every system."""
        self._check(question, k)
        scores, seconds = self._scores(question)
        return Answer({system: self._hits(system, scores, k) for system in self.systems}, seconds)

    def _check(self, question: str, k: int) -> None:
        if not question.strip():
            raise ValueError("question: it is blank; write some words")
        if k < 1:
            raise ValueError(f"k: {k} is below 1; ask for at least one passage")

    def _scores(self, question: str, *, rerank: bool = True) -> tuple[Run, dict[str, float]]:
        """System to passage id to score, and the seconds of each system."""
        scores: Run = {}
        seconds: dict[str, float] = {}

        def timed(name: str, search: Callable[..., Run], *of: Any, after: Sequence[str] = ()) -> None:
            begun = time.perf_counter()
            scores[name] = dict(search(*of).get(_QUESTION, {}))
            seconds[name] = time.perf_counter() - begun + sum(map(seconds.__getitem__, after))

        for name, system in self._found_by.items():
            timed(name, system.run, {_QUESTION: question})
        join = joiner(self.alpha, self._hybrid.normalize, None)
        timed("fused", join, *({_QUESTION: scores[name]} for name in self._fused), after=self._fused)
        if self.reranker is not None and rerank:
            best = [name for name, _ in rank(scores["fused"])[: self.reranked]]
            timed("maxsim", lambda: self._maxsim(question, best), after=["fused"])
        return scores, seconds

    def _maxsim(self, question: str, names: Sequence[str]) -> Run:
        pool = {_QUESTION: dict.fromkeys(names, 0.0)}
        assert self.reranker is not None
        return rerank_run(self.reranker, pool, self._texts(names), {_QUESTION: question}, len(names))

    def _hits(self, system: str, scores: Mapping[str, Mapping[str, float]], k: int) -> list[Hit]:
        """The best k passages of a system, with the scores of all."""
        names = [name for name, _ in rank(scores[system])[:k]]
        texts = self._texts(names)
        return [
            Hit(place, name, texts[name], **{other: found.get(name) for other, found in scores.items()})
            for place, name in enumerate(names, 1)
        ]

    def _texts(self, names: Sequence[str]) -> dict[str, str]:
        rows = self._workspace.collection.corpus[[self._rows[name] for name in names]] if names else {"text": []}
        return dict(zip(names, rows["text"], strict=True))

    def _choose_alpha(self) -> tuple[float | None, str]:
        """The weight of the first of the two, tuned once and kept, and how lists are fused, for people."""
        weighted, first = (self._found_by[name] for name in self._fused)
        bm25 = "bm25" if self._expansion is None else "bm25-expanded"
        rows = {"bm25": bm25, "dense": "dense-exact", "sparse": "learned-sparse"}
        pair = (rows[first.key], rows[weighted.key])
        given = self._hybrid.weight(next(key for key in HYBRIDS if HYBRIDS[key] == pair), alone=True)
        if given is not None:
            return given, f"{given:g} * {weighted.title} + {first.title}"
        workspace, hybrid = self._workspace, self._hybrid
        depends = {
            **workspace.depends,
            "hybrid": asdict(hybrid),
            **workspace.collection.own_rule,
            "depth": self.depth,
            "dims": self._dims,
            "sparse_student": self._sparse and self._sparse.depends["student"],
            "expansion": self._expansion and self._expansion.depends(),
        }
        file = workspace.folder / "fusion" / f"{json_digest(depends)[:16]}.json"
        if not file.is_file():
            kept: dict[str, Any] = {"alpha": None}
            if (tuning := tuning_queries(workspace.collection, hybrid)) is not None:
                lists = (weighted.run(tuning.queries), first.run(tuning.queries))
                options: dict[str, Any] = {"ignore_identical_ids": workspace.collection.skips_own}
                found = tune_alpha(*lists, tuning.qrels, normalize=hybrid.normalize, **options)
                kept = {**found.to_dict(), "split": tuning.split}
            write_json_atomic(file, kept)
        kept = read_json(file, MADE_AGAIN, needs=["alpha"])
        if kept["alpha"] is None:
            return None, "by reciprocal ranks (there is no judged dev or train query to tune a weight on)"
        tuned = f"tuned on {kept['queries']} {kept['split']} queries"
        return kept["alpha"], f"{weight_text(kept['alpha'])} * {weighted.title} + {first.title} ({tuned})"
