"""A retriever is a list of named stages, from which its runs, its batches and its times follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.cost import Efficiency, Footprint, compute_threads, measure_efficiency
from tct_hf.evaluation.maxsim import TokenVectors, above, encode_query_tokens, rerank_run
from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.settings import CostSettings
    from tct_hf.evaluation.workspace import Stored, Workspace

_ENCODING, _TOKEN_ENCODING = "query encoding", "query encoding by token"


@dataclass(frozen=True)
class Batch:
    """Queries on their way through the stages of a system."""

    queries: Mapping[str, str]
    runs: tuple[Run, ...] = ()
    vectors: Any = None

    def found(self, run: Run) -> Batch:
        """With one more list."""
        return Batch(self.queries, (*self.runs, run))

    def joined(self, run: Run) -> Batch:
        """With one list made of all."""
        return Batch(self.queries, (run,))


Stage = Callable[[Batch], Batch]


@dataclass(frozen=True)
class System:
    """A retriever, with its name and its costs.

    Args:
        key: name of its run's file and in the metrics.
        title: name in tables.
        search: named stages in order, or one function from queries, id to text, and the runs of `of`, to a run.
        of: keys of the systems whose runs the last stages put in another order.
        own: number of last stages that take the runs of `of` up; all when None.
        kind: "sparse", "learned sparse", "dense", "hybrid", "late interaction" or "other".
        footprint: what searching needs besides models.
    """

    key: str
    title: str
    search: Mapping[str, Stage] | Callable[..., Run]
    of: tuple[str, ...] = ()
    own: int | None = None
    kind: str = "other"
    footprint: Footprint = field(default_factory=Footprint)

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The stages by name."""
        if isinstance(self.search, Mapping):
            return self.search
        search = self.search
        return {"search": lambda batch: batch.joined(search(batch.queries, *batch.runs))}

    def run(self, queries: Mapping[str, str], *runs: Run) -> Run:
        """Search, or go on from the runs of the systems in `of`."""
        stages = list(self.stages.values())
        batch = Batch(queries, runs)
        for stage in stages[-self.own :] if runs and self.own else stages:
            batch = stage(batch)
        return batch.runs[-1]


def measure_cost(system: System, queries: Mapping[str, str], passages: int, settings: CostSettings) -> Efficiency:
    """Time a system on some of the reported queries, evenly spaced, one at a time and in batches."""
    texts = list(queries.values())
    wanted = min(len(texts), settings.teacher_queries if system.kind == "late interaction" else settings.queries)
    with compute_threads(settings.threads):
        return measure_efficiency(
            system.stages,
            [Batch({"query": texts[at * len(texts) // wanted]}) for at in range(wanted)],
            passages=passages,
            batch=lambda part: system.run({f"query{at}": one.queries["query"] for at, one in enumerate(part)}),
            batch_size=settings.batch_size,
            disk=system.footprint.disk,
            memory=system.footprint.memory,
            build_seconds=system.footprint.build_seconds,
            warm_up=settings.warm_up,
        )


def bm25_system(key: str, title: str, stored: Stored[Any], depth: int) -> System:
    """BM25, of passages as they are or expanded."""
    stages = {"BM25 search": lambda batch: batch.found(stored.index.run(batch.queries, depth))}
    return System(key, title, stages, kind="sparse", footprint=stored.footprint)


def student_system(
    key: str, title: str, workspace: Workspace, stored: Stored[Any], depth: int, *, size: int | None = None
) -> System:
    """A student's vectors, or their first `size` dimensions, in one index of Faiss or of inverted lists."""
    kind = "learned sparse" if workspace.is_sparse else "dense"
    stages: dict[str, Stage] = {
        _ENCODING: lambda batch: replace(batch, vectors=workspace.encode_queries(batch.queries, size)),
        f"{kind.split()[-1]} search": lambda batch: batch.found(
            stored.index.run(list(batch.queries), batch.vectors, depth)
        ),
    }
    return System(key, title, stages, kind=kind, footprint=workspace.footprint(stored))


def hybrid_system(
    key: str, title: str, first: System, weighted: System, *, alpha: float | None, normalize: bool, depth: int
) -> System:
    """Two lists of `depth` passages fused: `alpha * weighted + first`, or by ranks where alpha is None."""
    join = joiner(alpha, normalize, depth)
    parts = [first.stages, weighted.stages]
    if all(_ENCODING in stages for stages in parts):
        for at, (stages, word) in enumerate(zip(parts, ("dense", "sparse"), strict=True)):
            parts[at] = {name.replace(_ENCODING, f"{word} {_ENCODING}"): stage for name, stage in stages.items()}
    fusion = {"fusion": lambda batch: batch.joined(join(batch.runs[-1], batch.runs[-2]))}
    stages = {**parts[0], **parts[1], **fusion}
    footprint = weighted.footprint + first.footprint
    return System(key, title, stages, of=(first.key, weighted.key), own=1, kind="hybrid", footprint=footprint)


def joiner(alpha: float | None, normalize: bool, depth: int | None) -> Callable[[Run, Run], Run]:
    """The fusion of a weighted list and another one, by ranks where alpha is None."""
    if alpha is None:
        return lambda weighted, first: reciprocal_rank_fusion([weighted, first], depth=depth)
    return partial(fuse, alpha=alpha, normalize=normalize, k=depth)


def _by_token(model: MultiVectorEncoder, bf16: bool) -> dict[str, Stage]:
    def encode(batch: Batch) -> Batch:
        return replace(batch, vectors=encode_query_tokens(model, list(batch.queries.values()), bf16=bf16))

    return {_TOKEN_ENCODING: encode}


def maxsim_system(
    key: str, title: str, model: MultiVectorEncoder, tokens: TokenVectors, depth: int, *, bf16: bool, made: Footprint
) -> System:
    """MaxSim of every passage; `made` is what the token vectors cost on disk, and to encode."""

    def find(batch: Batch) -> Batch:
        return batch.found(dict(zip(batch.queries, tokens.search(batch.vectors, depth), strict=True)))

    footprint = made + Footprint(memory=tokens.block_bytes)
    return System(key, title, {**_by_token(model, bf16), "MaxSim": find}, kind="late interaction", footprint=footprint)


def reranked_system(
    key: str,
    title: str,
    first: System,
    model: MultiVectorEncoder,
    passages: Any,
    top: int,
    *,
    bf16: bool,
    made: Footprint,
) -> System:
    """The best `top` passages of a system in the order of MaxSim.

    `passages` are TokenVectors, or the corpus, of which passages are encoded anew for every query.
    """

    def kept(batch: Batch) -> Batch:
        reranked = {}
        for query, vectors in zip(batch.queries, batch.vectors, strict=True):
            hits = list(batch.runs[-1].get(query, {}))
            reranked[query] = above(passages.rerank(vectors, hits[:top]), hits[top:])
        return batch.joined(reranked)

    def anew(batch: Batch) -> Batch:
        pool = {name for hits in batch.runs[-1].values() for name, _ in rank(hits)[:top]}
        texts = dict(zip(pool, passages[[rows[name] for name in pool]]["text"], strict=True)) if pool else {}
        return batch.joined(rerank_run(model, batch.runs[-1], texts, batch.queries, top, bf16=bf16))

    if isinstance(passages, TokenVectors):
        own = {**_by_token(model, bf16), f"MaxSim of {top}": kept}
    else:
        rows = {name: row for row, name in enumerate(passages["id"])}
        own = {"encoding of query and passages by token, MaxSim": anew}
    return System(
        key,
        title,
        {**first.stages, **own},
        of=(first.key,),
        own=len(own),
        kind="late interaction",
        footprint=first.footprint + made,
    )
