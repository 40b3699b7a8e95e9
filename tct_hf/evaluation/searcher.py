"""Answer single questions with BM25, a student and the two fused, and show what each makes of a passage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.report_settings import HybridSettings
from tct_hf.evaluation.stores import Stores
from tct_hf.evaluation.tuning import check_weight, tuning_queries
from tct_hf.files import claim, write_json_atomic
from tct_hf.retrieval.dense_engine import factory_for
from tct_hf.retrieval.hybrid import fuse, reciprocal_rank_fusion, tune_alpha
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

SYSTEMS = {"bm25": "BM25", "dense": "dense", "fused": "fused", "maxsim": "MaxSim"}
_QUESTION = "question"


@dataclass(frozen=True)
class Hit:
    """A passage found for a question; a score is None where the passage is not among those that the system found."""

    rank: int
    id: str
    text: str
    bm25: float | None
    dense: float | None
    fused: float | None
    maxsim: float | None


class Searcher:
    """BM25, a student and their fusion over one collection.

    Args:
        stores: their indexes; made now where they are not there.
        teacher: scores the passages shown, too; None leaves it out.
        depth: passages that each system finds.
        hybrid: the weight of BM25, or where it is tuned; where there is nothing to tune it on, ranks are fused.
    """

    def __init__(
        self, stores: Stores, *, teacher: MultiVectorEncoder | None, depth: int, hybrid: HybridSettings
    ) -> None:
        check_weight(hybrid)
        self._stores, self._teacher, self._depth, self._hybrid = stores, teacher, depth, hybrid
        # Tuned for a k of its own, so that another depth finds the same index.
        self._dense = stores.dense(factory_for(len(stores.collection.corpus))).index
        self._sparse = stores.bm25().index
        self._rows = {name: row for row, name in enumerate(stores.collection.corpus["id"])}
        self.alpha, self.fusion = self._choose_alpha()

    def ask(self, question: str, k: int, *, rank_by: str = "fused") -> list[Hit]:
        """Find the best passages of a question.

        Args:
            question: its text.
            k: passages, at most.
            rank_by: the system that orders them: "fused", "dense" or "bm25".

        Returns:
            Best first; fewer than k where BM25 orders and fewer passages have a word of the question.

        Raises:
            ValueError: the question is blank, k is below 1, or `rank_by` is none of the three.
        """
        if not question.strip():
            raise ValueError("question: it is blank; write some words")
        if k < 1:
            raise ValueError(f"k: {k} is below 1; ask for at least one passage")
        if rank_by not in ("fused", "dense", "bm25"):
            raise ValueError(f'rank_by: {rank_by!r} is not one of "fused", "dense", "bm25"')
        sparse, dense = self._runs({_QUESTION: question})
        found = {"bm25": sparse, "dense": dense, "fused": self._join(sparse, dense)}
        scores = {name: run.get(_QUESTION, {}) for name, run in found.items()}
        shown = [name for name, _ in rank(scores[rank_by])[:k]]
        texts = {name: self._stores.collection.corpus[self._rows[name]]["text"] for name in shown}
        scores["maxsim"] = self._maxsim(question, texts)
        return [
            Hit(place, name, texts[name], **{system: scores[system].get(name) for system in SYSTEMS})
            for place, name in enumerate(shown, 1)
        ]

    def _runs(self, queries: Mapping[str, str]) -> tuple[Run, Run]:
        vectors = self._stores.encode_queries(queries)
        return self._sparse.run(queries, self._depth), self._dense.run(list(queries), vectors, self._depth)

    def _join(self, sparse: Run, dense: Run) -> Run:
        if self.alpha is None:
            return reciprocal_rank_fusion([sparse, dense])
        return fuse(sparse, dense, self.alpha, normalize=self._hybrid.normalize)

    def _maxsim(self, question: str, texts: Mapping[str, str]) -> dict[str, float]:
        from tct_hf.evaluation.reranking import rerank_run

        if self._teacher is None or not texts:
            return {}
        run = {_QUESTION: dict.fromkeys(texts, 0.0)}
        return rerank_run(self._teacher, run, texts, {_QUESTION: question}, len(texts))[_QUESTION]

    def _choose_alpha(self) -> tuple[float | None, str]:
        """The weight of BM25, tuned once and kept, and how lists are fused, for people."""
        if self._hybrid.alpha is not None:
            return self._hybrid.alpha, f"{self._hybrid.alpha:g} * BM25 + dense"
        tuned_by = {"hybrid": asdict(self._hybrid), "depth": self._depth}
        digest = hashlib.sha256(json.dumps(tuned_by, sort_keys=True).encode()).hexdigest()
        folder = self._stores.folder / "fusion" / digest[:16]
        claim(folder, {**self._stores.depends, **tuned_by})
        file = folder / "alpha.json"
        if not file.is_file():
            write_json_atomic(file, self._tuned())
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["alpha"] is None:
            return None, "by reciprocal ranks (there is no judged dev or train query to tune a weight on)"
        return kept["alpha"], (
            f"{kept['alpha']:.3g} * BM25 + dense (tuned on {kept['queries']} {kept['split']} queries)"
        )

    def _tuned(self) -> dict[str, Any]:
        tuning = tuning_queries(self._stores.collection, self._hybrid)
        if tuning is None:
            return {"alpha": None}
        found = tune_alpha(*self._runs(tuning.queries), tuning.qrels, normalize=self._hybrid.normalize)
        return {**found.to_dict(), "split": tuning.split}
