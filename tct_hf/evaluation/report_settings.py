"""What a report can be asked for: the sections of its settings, shared by the recipe and the function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tct_hf.settings import setting


@dataclass
class MeasureSettings:
    """What is measured, how deep, and against which system."""

    names: list[str] = setting(
        ["RR@10", "nDCG@10", "R@100"],
        "ir-measures names, or msmarco-dev or trec-dl for those of their sources; the first is plotted and tuned for",
    )
    relevance: int = setting(1, "grade from which a passage is relevant, but for nDCG (TREC Deep Learning: 2)")
    depth: int = setting(100, "passages a query in the runs, and of each list that is fused")
    baseline: str | None = setting(
        None,
        "key of the row that the others are tested against (bm25, dense-exact, hybrid ..., or a name in runs); the "
        "student's exact search when none",
    )


@dataclass
class HybridSettings:
    """How BM25 and the student's lists are fused, and what the weight is tuned on."""

    alpha: float | dict[str, float] | None = setting(
        None,
        "weight of BM25 in alpha * BM25 + student, or of several pairs by the keys of their rows, such as {hybrid: "
        "0.1, hybrid-expanded: 0.2}; tuned where none is given",
    )
    tune_on: Literal["auto", "dev", "train"] = setting("auto", "split alpha is tuned on; auto: dev, else train")
    tune_queries: int = setting(500, "at most so many queries of it")
    normalize: bool = setting(False, "bring the scores of both lists to one range first")

    def weight(self, key: str, *, alone: bool) -> float | None:
        """The weight that is given for a pair; None: it is tuned.

        Args:
            key: of the pair's row in a report.
            alone: a single number is this pair's.
        """
        if isinstance(self.alpha, dict):
            return self.alpha.get(key)
        return self.alpha if alone else None


@dataclass
class ExpansionSettings:
    """Generated queries that a second BM25 index has beside the passages."""

    path: str | None = setting(None, "folder of recipes/expand.py; no expanded BM25 when none")
    num_queries: int | None = setting(None, "of each passage, the first so many; all when none")
    drop_repeats: bool = setting(False, "leave out what equals an earlier query of its passage")
    drop_share: float = setting(0.0, "share of the scored queries that is left out, lowest scores first")
    k1: float = setting(2.18, "of BM25 over expanded passages")
    b: float = setting(0.86, "likewise")

    def kept(self) -> dict[str, Any]:
        """Which queries an index takes, as `expanded_bm25` is told."""
        return {
            "num_queries": self.num_queries,
            "drop_repeats": self.drop_repeats,
            "drop_share": self.drop_share,
        }

    def depends(self) -> dict[str, Any]:
        """All that an index depends on besides the corpus, JSON-ready; as `describe_expansion` raises."""
        from tct_hf.retrieval.expanded import describe_expansion

        assert self.path is not None
        return {"expansion": describe_expansion(self.path, **self.kept()), "k1": self.k1, "b": self.b}


@dataclass
class AnnSettings:
    """The approximate index that is measured beside exact search."""

    factory: str = setting("auto", "Faiss factory; auto: by size, and HNSW32 where that would be exact search")
    recall: float = setting(0.97, "Recall@100 against exact search that its parameters are tuned for")


@dataclass
class LateInteractionSettings:
    """The part of a ColBERT or of own MaxSim: reranking, and search over all token vectors where they fit."""

    rerank: int = setting(100, "passages of the hybrid that are scored again")
    max_passages: int = setting(
        50_000, "up to here token vectors are kept and searched; beyond, passages are only reranked, encoded anew"
    )


@dataclass
class CostSettings:
    """How latency and throughput are timed."""

    queries: int = setting(100, "queries timed, one at a time")
    teacher_queries: int = setting(30, "queries timed where token vectors take part")
    warm_up: int = setting(10, "queries put through before")
    batch_size: int = setting(32, "queries a batch, for throughput")
    threads: int | None = setting(1, "CPU threads while timing, as they are when none")


@dataclass
class ReportSettings:
    """All sections of a report."""

    measures: MeasureSettings = field(default_factory=MeasureSettings)
    also_report: dict[str, list[str]] = setting(
        {}, "more test splits, each with its measures, such as {dl19: [trec-dl], dl20: [trec-dl]}"
    )
    hybrid: HybridSettings = field(default_factory=HybridSettings)
    expansion: ExpansionSettings = field(default_factory=ExpansionSettings)
    ann: AnnSettings = field(default_factory=AnnSettings)
    late_interaction: LateInteractionSettings = field(default_factory=LateInteractionSettings)
    cost: CostSettings = field(default_factory=CostSettings)
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "of encoding; auto: bf16 where it is as good")
    build_threads: int = setting(1, "CPU threads of building indexes; one makes the same index every time")
