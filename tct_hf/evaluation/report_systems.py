"""The systems of a report: how each one is searched with, and the stages of one query that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.efficiency import Efficiency, bytes_on_disk, measure_efficiency
from tct_hf.evaluation.report import DENSE_LEARNED, LEARNED, LEARNED_BM25
from tct_hf.evaluation.reranking import rerank_run
from tct_hf.retrieval.hybrid import fuse, reciprocal_rank_fusion
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.report_settings import CostSettings
    from tct_hf.evaluation.stores import Stored, Stores
    from tct_hf.evaluation.token_vectors import TokenVectors

BM25, EXACT, ANN, HYBRID, TEACHER, RERANKED = "bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"
KEYS = (BM25, EXACT, ANN, HYBRID, LEARNED, LEARNED_BM25, DENSE_LEARNED, TEACHER, RERANKED)
_ONE = "query"


@dataclass(frozen=True)
class ReportSystem:
    """A system of the report.

    Args:
        key: of its run's file and in the JSON.
        title: in tables and plots.
        kind: "sparse", "learned sparse", "dense", "hybrid" or "late interaction".
        run: from queries, id to text, to a run.
        stages: of one query, for `measure_efficiency`.
        batch: answers several queries through all stages.
        disk: folders that searching needs, or their bytes.
        memory: bytes of what searching holds in memory, models aside.
        build_seconds: encoding included; None where it is not known.
        slow: the teacher takes part: fewer queries are timed.
    """

    key: str
    title: str
    kind: str
    run: Callable[[Mapping[str, str]], Run]
    stages: Mapping[str, Callable[[Any], Any]]
    batch: Callable[[Sequence[str]], Any]
    disk: int | Sequence[Path]
    memory: Callable[[], int]
    build_seconds: float | None
    slow: bool = False


def sparse_system(stores: Stores, depth: int) -> ReportSystem:
    """BM25."""
    stored = stores.bm25()
    return ReportSystem(
        key=BM25,
        title="BM25",
        kind="sparse",
        run=lambda queries: stored.index.run(queries, depth),
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
        run=lambda queries: stored.index.run(list(queries), stores.encode_queries(queries), depth),
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
                run = self.stored.index.run(dict(zip(_names(texts), texts, strict=True)), depth)
                return texts, [*runs, run]

            return {"BM25 search": words}
        stores = self.stores

        def encode(found: tuple[list[str], list[Run]]) -> tuple[list[str], list[Run], Any]:
            texts, runs = found
            return texts, runs, stores.encode_texts(texts)

        def search(encoded: tuple[list[str], list[Run], Any]) -> tuple[list[str], list[Run]]:
            texts, runs, vectors = encoded
            return texts, [*runs, self.stored.index.run(_names(texts), vectors, depth)]

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
    runs: Callable[[], tuple[Run, Run]],
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
        runs: of the reported queries, those of `weighted` and of `first`.
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
        run=lambda queries: join(runs()),
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


class LateInteraction:
    """The teacher as a searcher and as a reranker.

    Args:
        model: of one vector a token.
        tokens: of the corpus; None where there are too many: passages are then encoded anew to be reranked.
        folder: of the token vectors.
        bf16: encode in bfloat16.
        seconds: that encoding took, None where it is not known.
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        tokens: TokenVectors | None,
        folder: Path,
        *,
        bf16: bool,
        seconds: float | None,
    ) -> None:
        self.model, self.tokens, self.folder, self.bf16, self.seconds = model, tokens, folder, bf16, seconds
        self._rows = {} if tokens is None else {name: row for row, name in enumerate(tokens.ids)}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Token vectors of queries, `(tokens, dim)` float32 each."""
        import torch

        autocast = torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with torch.inference_mode(), autocast:
            encoded: Any = self.model.encode_query(list(texts), show_progress_bar=False)
        return [vectors.float() for vectors in encoded]

    def exhaustive_system(self, depth: int) -> ReportSystem:
        """MaxSim of every passage."""
        tokens = self.tokens
        assert tokens is not None

        def run(queries: Mapping[str, str]) -> Run:
            return dict(zip(queries, tokens.search(self.encode(list(queries.values())), depth), strict=True))

        return ReportSystem(
            key=TEACHER,
            title="teacher, every passage by MaxSim",
            kind="late interaction",
            run=run,
            stages={
                "teacher's query encoding": lambda text: self.encode([text]),
                "MaxSim": lambda vectors: tokens.search(vectors, depth),
            },
            batch=lambda texts: tokens.search(self.encode(texts), depth),
            disk=[self.folder],
            memory=lambda: tokens.block_bytes,
            build_seconds=self.seconds,
            slow=True,
        )

    def reranking_system(
        self, stores: Stores, first: Stored[Any], first_run: Callable[[], Run], *, depth: int, rerank: int
    ) -> ReportSystem:
        """The student's passages scored again.

        Args:
            stores: of the student.
            first: the student's index.
            first_run: its run of the reported queries.
            depth: passages a query.
            rerank: of these, how many are scored again.
        """
        corpus = stores.collection.corpus
        texts_by_id = _Texts(corpus) if self.tokens is None else {}

        def encode_again(found: tuple[dict[str, str], Run]) -> tuple[dict[str, str], Run, list[Any]]:
            texts, run = found
            return texts, run, self.encode(list(texts.values()))

        def score(encoded: tuple[dict[str, str], Run, list[Any]]) -> Run:
            texts, run, vectors = encoded
            return self._rerank(run, dict(zip(texts, vectors, strict=True)), rerank)

        def anew(found: tuple[dict[str, str], Run]) -> Run:
            texts, run = found
            return rerank_run(self.model, run, texts_by_id, texts, rerank, bf16=self.bf16)

        def again(found: tuple[dict[str, str], Run]) -> Run:
            return anew(found) if self.tokens is None else score(encode_again(found))

        last: dict[str, Callable[[Any], Any]] = {"teacher's encoding of query and passages, MaxSim": anew}
        if self.tokens is not None:
            last = {"teacher's query encoding": encode_again, f"MaxSim of {min(rerank, depth)}": score}

        def search(encoded: tuple[dict[str, str], Any]) -> tuple[dict[str, str], Run]:
            texts, vectors = encoded
            return texts, first.index.run(list(texts), vectors, depth)

        def encode(texts: Sequence[str]) -> tuple[dict[str, str], Any]:
            return dict(zip(_names(texts), texts, strict=True)), stores.encode_texts(list(texts))

        text_bytes = 0
        if self.tokens is None:
            text_bytes = sum(len(text.encode()) for batch in corpus.iter(1000) for text in batch["text"])
            disk: int | list[Path] = bytes_on_disk([first.folder]) + text_bytes
        else:
            disk = [first.folder, self.folder]
        kept = "" if self.tokens is not None else ", passages encoded anew"
        return ReportSystem(
            key=RERANKED,
            title=f"teacher over the student's top {min(rerank, depth)}{kept}",
            kind="late interaction",
            run=lambda queries: again((dict(queries), first_run())),
            stages={
                "query encoding": lambda text: encode([text]),
                search_name(stores): search,
                **last,
            },
            batch=lambda texts: again(search(encode(texts))),
            disk=disk,
            memory=lambda: first.memory_bytes + (self.tokens.nbytes if self.tokens is not None else text_bytes),
            build_seconds=added(
                stores.encoding_seconds,
                first.build_seconds,
                0.0 if self.tokens is None else self.seconds,
            ),
            slow=True,
        )

    def _rerank(self, run: Run, queries: Mapping[str, Any], rerank: int) -> Run:
        """As `rerank_run`, from the token vectors that are kept, of queries as token vectors."""
        import numpy as np

        assert self.tokens is not None
        reranked: Run = {}
        for query, vectors in queries.items():
            hits = list(run.get(query, {}))
            best = self.tokens.rerank(vectors, np.array([self._rows[name] for name in hits[:rerank]], np.int64))
            lowest = min(best.values(), default=0.0)
            reranked[query] = best | {name: lowest - place for place, name in enumerate(hits[rerank:], 1)}
        return reranked


class _Texts(Mapping[str, str]):
    """Passage id to text, each read from the corpus when it is asked for."""

    def __init__(self, corpus: Dataset) -> None:
        self._corpus = corpus
        self._rows = {name: row for row, name in enumerate(corpus["id"])}

    def __getitem__(self, name: str) -> str:
        return self._corpus[self._rows[name]]["text"]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


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

    from tct_hf.retrieval.dense_engine import faiss_threads

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


def _names(texts: Sequence[str]) -> list[str]:
    return [f"{_ONE}{number}" for number in range(len(texts))]
