"""The settings of a report, shared by the recipe and the function, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter
from typing import Any, Literal

from tct_hf.evaluation.measures import check_measures, named_measures
from tct_hf.settings import setting

# The fused rows of a report, by key: what each adds `alpha * weighted` to, and what is weighted.
HYBRIDS = {
    "hybrid": ("dense-exact", "bm25"),
    "hybrid-expanded": ("dense-exact", "bm25-expanded"),
    "learned-sparse-bm25": ("learned-sparse", "bm25"),
    "learned-sparse-bm25-expanded": ("learned-sparse", "bm25-expanded"),
    "dense-learned-sparse": ("dense-exact", "learned-sparse"),
    "base-bm25": ("base", "bm25"),
}
# The least that a number of a report's settings may be.
_LEAST = {
    "measures.depth": 1,
    "late_interaction.rerank": 1,
    "late_interaction.max_passages": 0,
    "engine.ef_search": 1,
    "cost.queries": 1,
    "cost.teacher_queries": 1,
    "cost.batch_size": 1,
    "cost.threads": 1,
    "cost.warm_up": 0,
    "build_threads": 1,
}


@dataclass
class MeasureSettings:
    """What is measured, how deep, and against which system."""

    names: list[str] = setting(
        ["RR@10", "nDCG@10", "R@100"],
        "ir-measures names, or msmarco-dev or trec-dl for these tracks' measures; the first is plotted and tuned for",
    )
    relevance: int = setting(1, "grade from which a passage is relevant, except in nDCG (TREC Deep Learning: 2)")
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
        "weight of BM25 in alpha * BM25 + student, or several weights by the keys of their rows, such as {hybrid: "
        "0.1, hybrid-expanded: 0.2}; tuned when null",
    )
    tune_on: Literal["auto", "dev", "train"] = setting("auto", "split to tune alpha on; auto: dev, otherwise train")
    tune_queries: int = setting(500, "maximum number of its queries")
    normalize: bool = setting(False, "bring both lists to the same range of scores first")

    def weight(self, key: str, *, alone: bool) -> float | None:
        """The weight given for the pair of a report's row, a single number being that of `alone`; None to tune it."""
        if isinstance(self.alpha, dict):
            return self.alpha.get(key)
        return self.alpha if alone else None

    def check(self) -> None:
        """Refuse a weight that no fusion can take, or of a pair that there is none of."""
        given: Mapping[str, float | None] = self.alpha if isinstance(self.alpha, dict) else {"": self.alpha}
        for key, weight in given.items():
            name = f"hybrid.alpha.{key}".rstrip(".")
            if key and key not in HYBRIDS:
                raise ValueError(f"{name}: there is no such pair; there are {', '.join(HYBRIDS)}")
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"{name}: {weight} must be finite and 0 or more; leave it out to have it tuned")


@dataclass
class ExpansionSettings:
    """Generated queries that a second BM25 index has beside the passages."""

    path: str | None = setting(None, "output folder of the command expand; no expanded BM25 when null")
    num_queries: int | None = setting(None, "number of queries of each passage to use; all when null")
    drop_repeats: bool = setting(False, "leave out repeated queries of a passage")
    drop_share: float = setting(0.0, "share of the scored queries to leave out, lowest scores first")
    k1: float = setting(2.18, "BM25 parameter for expanded passages")
    b: float = setting(0.86, "BM25 parameter for expanded passages")

    def kept(self) -> dict[str, Any]:
        """The arguments of `expanded_bm25` that choose queries."""
        return {"num_queries": self.num_queries, "drop_repeats": self.drop_repeats, "drop_share": self.drop_share}

    def depends(self) -> dict[str, Any]:
        """All that an index depends on besides the corpus, JSON-ready; refuses a folder without expansions."""
        from tct_hf.retrieval.bm25 import describe_expansion

        assert self.path is not None
        return {"expansion": describe_expansion(self.path, **self.kept()), "k1": self.k1, "b": self.b}


def check_factory(name: str, factory: str, dimension: int, passages: int, fix: str) -> None:
    """Refuse an index that Faiss does not know, or of too many lists for the passages."""
    from tct_hf.retrieval.faiss_tools import make_engine, parts

    try:
        _, lists, _ = parts(make_engine(dimension, factory))
    except RuntimeError as error:
        known = f"Faiss knows no index {factory!r} for inner products of {dimension} dimensions"
        raise ValueError(f"{name}: {known}; {fix}") from error
    if lists is not None and lists.nlist > passages:
        raise ValueError(f"{name}: {factory!r} has {lists.nlist:,} lists for {passages:,} passages")


def check_codes(codes: Sequence[str], sizes: Sequence[int], passages: int) -> None:
    """Refuse codes that Faiss can't make of vectors of one of the sizes."""
    for size, code in product(sizes, codes):
        check_factory("codes", code, size, passages, "use SQ8, RaBitQfs or RaBitQfs,Refine(SQ8)")


@dataclass
class AnnSettings:
    """The approximate index that is measured beside exact search."""

    factory: str = setting("auto", "Faiss factory string; auto: by size, and HNSW32 where that would be exact search")
    recall: float = setting(0.97, "Recall@100 against exact search to tune its parameters for")

    def check(self, dimension: int | None, passages: int) -> None:
        """Refuse an index that Faiss does not know, or of too many lists for the passages."""
        if self.factory != "auto" and dimension is not None:
            check_factory("ann.factory", self.factory, dimension, passages, 'use "auto", "HNSW32" or "IVF256,Flat"')


@dataclass
class EngineSettings:
    """A table of the command push, searched over the wire."""

    url: str | None = setting(None, "of the engine; that of its environment variables when null")
    name: str | None = setting(None, "table to search; no engine when null")
    ef_search: int = setting(100, "candidates that its graph looks at")


@dataclass
class LateInteractionSettings:
    """Reranking by MaxSim, and search over all token vectors where they fit."""

    rerank: int = setting(100, "number of the hybrid's passages to rerank")
    max_passages: int = setting(
        50_000, "largest corpus whose token vectors are kept and searched; in a larger one passages are only reranked"
    )


@dataclass
class CostSettings:
    """How latency and throughput are timed."""

    queries: int = setting(100, "queries timed, one at a time")
    teacher_queries: int = setting(30, "queries timed for systems with token vectors")
    warm_up: int = setting(10, "queries to warm up with")
    batch_size: int = setting(32, "queries a batch for the throughput")
    threads: int | None = setting(1, "CPU threads while timing; unchanged when null")


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
    codes: list[str] | None = setting(
        None,
        "Faiss factories, such as [SQ8, RaBitQfs], to measure the vectors with as well, at each of their sizes; those "
        "of the training's passage_bits when null",
    )
    engine: EngineSettings = field(default_factory=EngineSettings)
    late_interaction: LateInteractionSettings = field(default_factory=LateInteractionSettings)
    cost: CostSettings = field(default_factory=CostSettings)
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of encoding; auto: bf16 where it is as good"
    )
    build_threads: int = setting(1, "CPU threads for building indexes; with one thread the index is always the same")

    def check(self) -> None:
        """Refuse what would stop a report after hours: a number, a measure, generated queries that are not there."""
        depth, relevance = self.measures.depth, self.measures.relevance
        also = {f"also_report.{split}": names for split, names in self.also_report.items()}
        for name, names in {"measures.names": self.measures.names, **also}.items():
            if not names:
                raise ValueError(f"{name} is empty; name at least one, for instance RR@10")
            check_measures(named_measures(names), depth, setting="measures.depth", relevance=relevance)
        for name, least in _LEAST.items():
            number = attrgetter(name)(self)
            if number is not None and number < least:
                raise ValueError(f"{name}: {number} is below {least}")
        if not 0 < self.ann.recall < 1:
            raise ValueError(f"ann.recall: {self.ann.recall} is not between 0 and 1, where exact search is")
        self.hybrid.check()
        if self.expansion.path is not None:
            self.expansion.depends()
