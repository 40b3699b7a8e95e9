"""Answer single questions with BM25, students, two of them fused and reranked, and show each one's scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.report import DENSE_LEARNED, LEARNED_BM25, LEARNED_EXPANDED
from tct_hf.evaluation.report_checks import check_expansion
from tct_hf.evaluation.report_settings import ExpansionSettings, HybridSettings
from tct_hf.evaluation.report_systems import HYBRID, HYBRID_EXPANDED
from tct_hf.evaluation.stores import Stores
from tct_hf.evaluation.systems import check_dims
from tct_hf.evaluation.tune_alpha import tune_alpha
from tct_hf.evaluation.tuning import check_weight, tuning_queries, weight_text
from tct_hf.files import claim, write_json_atomic
from tct_hf.retrieval.faiss_tools import factory_for
from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
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


class Searcher:
    """BM25, one or two students, and two of these fused, over one collection.

    A student is fused with BM25; of a dense and a sparse student, the two are fused.

    Args:
        stores: indexes of BM25 and of the student, dense or sparse; made now where they are not there.
        reranker: of one vector a token; puts the best `depth` fused passages in order. None leaves it out.
        depth: passages that each system finds.
        hybrid: the weight of BM25 (of the sparse student, where there are two), or where it is tuned; where there is
            nothing to tune it on, ranks are fused.
        sparse_stores: of a sparse student beside a dense one.
        expansion: of the passages in BM25; None, or one without a path, takes the passages alone.
        dims: first dimensions that a dense student is searched with, exactly; all when None.

    Raises:
        ValueError: a weight out of range, or dimensions that the student does not have; and as `Stores`.

    Attributes:
        systems: what there is to show, keys of SYSTEMS.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        reranker: MultiVectorEncoder | None = None,
        depth: int,
        hybrid: HybridSettings,
        sparse_stores: Stores | None = None,
        expansion: ExpansionSettings | None = None,
        dims: int | None = None,
    ) -> None:
        check_weight(hybrid)
        if expansion is None or expansion.path is None:
            expansion = None
        else:
            check_expansion(expansion)
        if dims is not None and stores.is_sparse:
            raise ValueError("dims: a sparse student's first dimensions are no smaller student; leave it out")
        check_dims([dims], stores.student.get_embedding_dimension())
        self._expansion, self._dims = expansion, dims
        self._stores, self._reranker, self._depth, self._hybrid = stores, reranker, depth, hybrid
        self._students: dict[str, tuple[Stores, Any]] = {}
        if not stores.is_sparse:
            if dims is not None:
                dense = stores.first_dims(dims).index
            else:
                # Tuned for a k of its own, so that another depth finds the same index.
                dense = stores.dense(factory_for(len(stores.collection.corpus))).index
            self._students["dense"] = (stores, dense)
        else:
            sparse_stores = stores
        if sparse_stores is not None:
            self._students["sparse"] = (sparse_stores, sparse_stores.sparse().index)
        self._bm25 = (stores.bm25() if expansion is None else stores.expanded(expansion)).index
        # The first is multiplied by alpha.
        self._fused = ("sparse", "dense") if len(self._students) > 1 else ("bm25", next(iter(self._students)))
        self.systems = [
            name
            for name in SYSTEMS
            if name in (*self._students, "bm25", "fused") or (name == "maxsim" and reranker is not None)
        ]
        self._rows = {name: row for row, name in enumerate(stores.collection.corpus["id"])}
        self.alpha, self.fusion = self._choose_alpha()

    def ask(self, question: str, k: int, *, rank_by: str | None = None) -> list[Hit]:
        """Find the best passages of a question.

        Args:
            question: its text.
            k: passages, at most.
            rank_by: the system that orders them: "maxsim", "fused", "dense", "sparse" or "bm25"; None: the reranker's
                "maxsim" where there is one, else "fused".

        Returns:
            Best first; fewer than k where BM25 orders and fewer passages have a word of the question.

        Raises:
            ValueError: the question is blank, k is below 1, or `rank_by` is no system of this searcher.
        """
        if not question.strip():
            raise ValueError("question: it is blank; write some words")
        if k < 1:
            raise ValueError(f"k: {k} is below 1; ask for at least one passage")
        if rank_by is None:
            rank_by = "maxsim" if self._reranker is not None else "fused"
        if rank_by not in self.systems:
            raise ValueError(f"rank_by: {rank_by!r} is not one of {', '.join(map(json.dumps, self.systems))}")
        asked = {_QUESTION: question}
        found = {name: self._run(name, asked) for name in ("bm25", *self._students)}
        found["fused"] = self._join(*(found[name] for name in self._fused))
        scores = {name: run.get(_QUESTION, {}) for name, run in found.items()}
        first, count = ("fused", self._depth) if rank_by == "maxsim" else (rank_by, k)
        texts = self._texts([name for name, _ in rank(scores[first])[:count]])
        scores["maxsim"] = self._maxsim(question, texts)
        shown = [name for name, _ in rank(scores["maxsim"])[:k]] if rank_by == "maxsim" else list(texts)
        return [
            Hit(place, name, texts[name], **{system: found_by.get(name) for system, found_by in scores.items()})
            for place, name in enumerate(shown, 1)
        ]

    def _texts(self, names: Sequence[str]) -> dict[str, str]:
        rows = self._stores.collection.corpus[[self._rows[name] for name in names]] if names else {"text": []}
        return dict(zip(names, rows["text"], strict=True))

    def _run(self, system: str, queries: Mapping[str, str]) -> Run:
        if system == "bm25":
            return self._bm25.run(queries, self._depth)
        stores, index = self._students[system]
        vectors = stores.encode_queries(queries)
        if system == "dense" and self._dims is not None:
            vectors = stores.sliced(vectors, self._dims)[:]
        run: Run = index.run(list(queries), vectors, self._depth)
        return run

    def _join(self, weighted: Run, first: Run) -> Run:
        if self.alpha is None:
            return reciprocal_rank_fusion([weighted, first])
        return fuse(weighted, first, self.alpha, normalize=self._hybrid.normalize)

    def _maxsim(self, question: str, texts: Mapping[str, str]) -> dict[str, float]:
        from tct_hf.evaluation.reranking import rerank_run

        if self._reranker is None or not texts:
            return {}
        run = {_QUESTION: dict.fromkeys(texts, 0.0)}
        return rerank_run(self._reranker, run, texts, {_QUESTION: question}, len(texts))[_QUESTION]

    def _choose_alpha(self) -> tuple[float | None, str]:
        """The weight of the first of the two, tuned once and kept, and how lists are fused, for people."""
        weighted, first = (SYSTEMS[name] for name in self._fused)
        if self._expansion is not None and self._fused[0] == "bm25":
            weighted = f"expanded {weighted}"
        given = self._hybrid.weight(self._pair(), alone=True)
        if given is not None:
            return given, f"{given:g} * {weighted} + {first}"
        tuned_by: dict[str, Any] = {"hybrid": asdict(self._hybrid), "depth": self._depth}
        if len(self._students) > 1:
            tuned_by["sparse_student"] = self._students["sparse"][0].depends["student"]
        if self._dims is not None:
            tuned_by["dims"] = self._dims
        if self._expansion is not None and self._fused[0] == "bm25":
            tuned_by["expansion"] = self._expansion.depends()
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
            f"{weight_text(kept['alpha'])} * {weighted} + {first} (tuned on {kept['queries']} {kept['split']} queries)"
        )

    def _pair(self) -> str:
        """The key that the fused pair has in a report."""
        expanded = self._expansion is not None
        return {
            ("sparse", "dense"): DENSE_LEARNED,
            ("bm25", "dense"): HYBRID_EXPANDED if expanded else HYBRID,
            ("bm25", "sparse"): LEARNED_EXPANDED if expanded else LEARNED_BM25,
        }[self._fused]

    def _tuned(self) -> dict[str, Any]:
        tuning = tuning_queries(self._stores.collection, self._hybrid)
        if tuning is None:
            return {"alpha": None}
        weighted, first = (self._run(name, tuning.queries) for name in self._fused)
        found = tune_alpha(weighted, first, tuning.qrels, normalize=self._hybrid.normalize)
        return {**found.to_dict(), "split": tuning.split}
