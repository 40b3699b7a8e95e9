"""The systems of a report: how each one is searched with, and the stages of one query that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.efficiency import Efficiency, measure_efficiency
from tct_hf.evaluation.report import DENSE_LEARNED, EXPANDED, LEARNED, LEARNED_BM25, LEARNED_EXPANDED
from tct_hf.retrieval.fusion import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from tct_hf.evaluation.report_settings import CostSettings
    from tct_hf.evaluation.stores import Stored, Stores

BM25, EXACT, ANN, HYBRID, TEACHER, RERANKED = "bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"
HYBRID_EXPANDED = "hybrid-expanded"
# The base as it is, alone and fused with BM25.
BASE, BASE_BM25 = "base", "base-bm25"
KEYS = (
    *(BM25, EXPANDED, EXACT, ANN, HYBRID, HYBRID_EXPANDED),
    *(LEARNED, LEARNED_BM25, LEARNED_EXPANDED, DENSE_LEARNED, BASE, BASE_BM25, TEACHER, RERANKED),
)
HYBRIDS = (HYBRID, HYBRID_EXPANDED, LEARNED_BM25, LEARNED_EXPANDED, DENSE_LEARNED, BASE_BM25)
_ONE = "query"


@dataclass(frozen=True)
class ReportSystem:
    """A system of the report.

    Args:
        key: of its run's file and in the JSON.
        title: in tables and plots.
        kind: "sparse", "learned sparse", "dense", "hybrid" or "late interaction".
        run: from queries, id to text, and the name of their split, to a run.
        stages: of one query, for `measure_efficiency`.
        batch: answers several queries through all stages.
        disk: folders that searching needs, or their bytes.
        memory: bytes of what searching holds in memory, models aside.
        build_seconds: encoding included; None where it is not known.
        slow: token vectors take part: fewer queries are timed.
    """

    key: str
    title: str
    kind: str
    run: Callable[[Mapping[str, str], str], Run]
    stages: Mapping[str, Callable[[Any], Any]]
    batch: Callable[[Sequence[str]], Any]
    disk: int | Sequence[Path]
    memory: Callable[[], int]
    build_seconds: float | None
    slow: bool = False


def sparse_system(key: str, title: str, stored: Stored[Any], depth: int) -> ReportSystem:
    """BM25, of passages as they are or expanded."""
    return ReportSystem(
        key=key,
        title=title,
        kind="sparse",
        run=lambda queries, split: stored.index.run(queries, depth),
        stages={"BM25 search": lambda text: stored.index.search([text], depth)},
        batch=lambda texts: stored.index.search(texts, depth),
        disk=[stored.folder],
        memory=lambda: stored.memory_bytes,
        build_seconds=stored.build_seconds,
    )


def student_system(
    key: str, title: str, stores: Stores, stored: Stored[Any], depth: int, *, kind: str = "dense"
) -> ReportSystem:
    """A student's vectors in one index, of Faiss or of inverted lists."""
    return ReportSystem(
        key=key,
        title=title,
        kind=kind,
        run=lambda queries, split: stored.index.run(list(queries), stores.encode_queries(queries), depth),
        stages={
            "query encoding": lambda text: stores.encode_texts([text]),
            search_name(stores): lambda vector: stored.index.search(vector, depth),
        },
        batch=lambda texts: stored.index.search(stores.encode_texts(texts), depth),
        disk=[stored.folder],
        memory=lambda: stored.memory_bytes,
        build_seconds=added(stores.encoding_seconds, stored.build_seconds),
    )


def search_name(stores: Stores) -> str:
    """The stage of searching with a student's vectors."""
    return "sparse search" if stores.is_sparse else "dense search"


@dataclass(frozen=True)
class Part:
    """One of the two lists of a hybrid.

    Args:
        stored: its index.
        stores: of the student that searches it; None of BM25, which searches with the texts.
    """

    stored: Stored[Any]
    stores: Stores | None = None

    def stages(self, depth: int, *, alone: bool) -> dict[str, Callable[[Any], Any]]:
        """Of texts and the runs so far, with which the run of this part is put."""
        if self.stores is None:

            def words(found: tuple[list[str], list[Run]]) -> tuple[list[str], list[Run]]:
                texts, runs = found
                run = self.stored.index.run(dict(zip(numbered(texts), texts, strict=True)), depth)
                return texts, [*runs, run]

            return {"BM25 search": words}
        stores = self.stores

        def encode(found: tuple[list[str], list[Run]]) -> tuple[list[str], list[Run], Any]:
            texts, runs = found
            return texts, runs, stores.encode_texts(texts)

        def search(encoded: tuple[list[str], list[Run], Any]) -> tuple[list[str], list[Run]]:
            texts, runs, vectors = encoded
            return texts, [*runs, self.stored.index.run(numbered(texts), vectors, depth)]

        encoding = "query encoding" if alone else f"{'sparse' if stores.is_sparse else 'dense'} query encoding"
        return {encoding: encode, search_name(stores): search}

    def build_seconds(self) -> float | None:
        """Of index and vectors; None where a part is not known."""
        encoding = 0.0 if self.stores is None else self.stores.encoding_seconds
        return added(encoding, self.stored.build_seconds)


def hybrid_system(
    key: str,
    title: str,
    first: Part,
    weighted: Part,
    runs: Callable[[str], tuple[Run, Run]],
    *,
    alpha: float | None,
    normalize: bool,
    depth: int,
) -> ReportSystem:
    """Two lists fused: `alpha * weighted + first`.

    Args:
        key: of the system.
        title: in tables.
        first: a student.
        weighted: BM25 or a sparse student, whose scores alpha multiplies.
        runs: from the name of a split to the runs of `weighted` and of `first`.
        alpha: None fuses by ranks.
        normalize: as in `fuse`.
        depth: passages a query of each list, and of the result.
    """

    def join(both: tuple[Run, Run]) -> Run:
        if alpha is None:
            return reciprocal_rank_fusion(list(both), depth=depth)
        return fuse(*both, alpha, normalize=normalize, k=depth)

    alone = weighted.stores is None
    stages = {**first.stages(depth, alone=alone), **weighted.stages(depth, alone=alone)}

    def batch(texts: Sequence[str]) -> Run:
        found: Any = (list(texts), [])
        for stage in stages.values():
            found = stage(found)
        return last(found)

    def last(found: tuple[list[str], list[Run]]) -> Run:
        _, (of_first, of_weighted) = found
        return join((of_weighted, of_first))

    begin, search = list(stages)[:2]
    return ReportSystem(
        key=key,
        title=title,
        kind="hybrid",
        run=lambda queries, split: join(runs(split)),
        stages={
            begin: lambda text: stages[begin](([text], [])),
            search: stages[search],
            **{name: stage for name, stage in stages.items() if name not in (begin, search)},
            "fusion": last,
        },
        batch=batch,
        disk=[weighted.stored.folder, first.stored.folder],
        memory=lambda: weighted.stored.memory_bytes + first.stored.memory_bytes,
        build_seconds=added(first.build_seconds(), weighted.build_seconds()),
    )


def measure_cost(
    system: ReportSystem, queries: Mapping[str, str], passages: int, settings: CostSettings
) -> Efficiency:
    """Time a system on some of the reported queries, evenly spaced, one at a time and in batches.

    Args:
        system: to time.
        queries: all reported ones, id to text.
        passages: searched.
        settings: how many queries, how many threads.
    """
    texts = list(queries.values())
    wanted = min(len(texts), settings.teacher_queries if system.slow else settings.queries)
    timed = [texts[at * len(texts) // wanted] for at in range(wanted)]
    with compute_threads(settings.threads):
        return measure_efficiency(
            system.stages,
            timed,
            passages=passages,
            batch=system.batch,
            batch_size=settings.batch_size,
            disk=system.disk,
            memory=system.memory(),
            build_seconds=system.build_seconds,
            warm_up=settings.warm_up,
        )


@contextmanager
def compute_threads(threads: int | None) -> Iterator[None]:
    """Give torch and Faiss a number of CPU threads for a while; None leaves their own settings."""
    import torch

    from tct_hf.retrieval.faiss_tools import faiss_threads

    before = torch.get_num_threads()
    with faiss_threads(threads):
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def added(*seconds: float | None) -> float | None:
    """The sum, None where a part is not known."""
    return None if any(part is None for part in seconds) else sum(part or 0.0 for part in seconds)


def numbered(texts: Sequence[str]) -> list[str]:
    """Names for the queries of a batch."""
    return [f"{_ONE}{number}" for number in range(len(texts))]
