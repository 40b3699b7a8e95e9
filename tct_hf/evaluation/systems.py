"""A retriever is a list of named stages, from which its runs, its batches and its times follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tct_hf.evaluation.cost import Efficiency, compute_threads, measure_efficiency
from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from tct_hf.evaluation.settings import CostSettings
    from tct_hf.evaluation.stores import Stored, Stores

_ENCODING = "query encoding"


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
        disk: folders that searching needs, or their bytes.
        memory: bytes of what searching holds in memory, models aside.
        build_seconds: encoding included; None where it is not known.
    """

    key: str
    title: str
    search: Mapping[str, Stage] | Callable[..., Run]
    of: tuple[str, ...] = ()
    own: int | None = None
    kind: str = "other"
    disk: int | Sequence[Path] = ()
    memory: Callable[[], int] = int
    build_seconds: float | None = None

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
            disk=system.disk,
            memory=system.memory(),
            build_seconds=system.build_seconds,
            warm_up=settings.warm_up,
        )


def added(*seconds: float | None) -> float | None:
    """The sum, None where a part is not known."""
    return None if any(part is None for part in seconds) else sum(part or 0.0 for part in seconds)


def bm25_system(key: str, title: str, stored: Stored[Any], depth: int) -> System:
    """BM25, of passages as they are or expanded."""
    return System(
        key,
        title,
        {"BM25 search": lambda batch: batch.found(stored.index.run(batch.queries, depth))},
        kind="sparse",
        disk=stored.disk,
        memory=lambda: stored.memory_bytes,
        build_seconds=stored.build_seconds,
    )


def student_system(
    key: str, title: str, stores: Stores, stored: Stored[Any], depth: int, *, size: int | None = None
) -> System:
    """A student's vectors, or their first `size` dimensions, in one index of Faiss or of inverted lists."""
    kind = "learned sparse" if stores.is_sparse else "dense"

    def search(batch: Batch) -> Batch:
        return batch.found(stored.index.run(list(batch.queries), batch.vectors, depth))

    return System(
        key,
        title,
        {
            _ENCODING: lambda batch: replace(batch, vectors=stores.encode_queries(batch.queries, size)),
            f"{kind.split()[-1]} search": search,
        },
        kind=kind,
        disk=stored.disk,
        memory=lambda: stored.memory_bytes,
        build_seconds=added(stores.encoding_seconds, stored.build_seconds),
    )


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
    disk = [*cast("Sequence[Path]", weighted.disk), *cast("Sequence[Path]", first.disk)]
    return System(
        key,
        title,
        {**parts[0], **parts[1], **fusion},
        of=(first.key, weighted.key),
        own=1,
        kind="hybrid",
        disk=disk,
        memory=lambda: weighted.memory() + first.memory(),
        build_seconds=added(first.build_seconds, weighted.build_seconds),
    )


def joiner(alpha: float | None, normalize: bool, depth: int | None) -> Callable[[Run, Run], Run]:
    """The fusion of a weighted list and another one, by ranks where alpha is None."""
    if alpha is None:
        return lambda weighted, first: reciprocal_rank_fusion([weighted, first], depth=depth)
    return partial(fuse, alpha=alpha, normalize=normalize, k=depth)
