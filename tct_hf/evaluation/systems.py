"""A retriever is a list of named stages, from which its runs, its batches and its times follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.cost import Efficiency, Footprint, compute_threads, measure_efficiency
from tct_hf.evaluation.maxsim import encode_query_tokens
from tct_hf.retrieval.encode_corpus import encoding_seconds
from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import Run

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
        """With this list instead of all."""
        return Batch(self.queries, (run,))


Stage = Callable[[Batch], Batch]


@dataclass(frozen=True)
class System:
    """A retriever, with its name and its costs.

    Args:
        search: named stages in order, or one function from queries, id to text, and the runs of `of`, to a run.
        of: keys of the systems whose runs the last stages put in another order.
        own: number of last stages that take the runs of `of` up; all when None.
        kind: "sparse", "learned sparse", "dense", "hybrid", "late interaction" or "other".
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
            warm_up=settings.warm_up,
            **vars(system.footprint),
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
    encoded = Footprint(0, 0, encoding_seconds(workspace.folder / "vectors"))  # scaled up from what was timed
    stages: dict[str, Stage] = {
        _ENCODING: lambda batch: replace(batch, vectors=workspace.encode_queries(batch.queries, size)),
        f"{kind.split()[-1]} search": lambda batch: batch.found(
            stored.index.run(list(batch.queries), batch.vectors, depth)
        ),
    }
    return System(key, title, stages, kind=kind, footprint=stored.footprint + encoded)


def hybrid_system(
    key: str, title: str, weighted: System, first: System, *, alpha: float | None, normalize: bool, depth: int
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


def by_token(model: MultiVectorEncoder, bf16: bool) -> dict[str, Stage]:
    """The stage that encodes queries with one vector a token."""

    def encode(batch: Batch) -> Batch:
        return replace(batch, vectors=encode_query_tokens(model, list(batch.queries.values()), bf16=bf16))

    return {_TOKEN_ENCODING: encode}
