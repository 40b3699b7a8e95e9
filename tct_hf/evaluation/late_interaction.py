"""The teacher in a report: search over every passage, and the student's passages scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.efficiency import bytes_on_disk
from tct_hf.evaluation.report_systems import RERANKED, TEACHER, ReportSystem, added, numbered, search_name
from tct_hf.evaluation.reranking import rerank_run
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.stores import Stored, Stores
    from tct_hf.evaluation.token_vectors import TokenVectors


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

        def run(queries: Mapping[str, str], split: str) -> Run:
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
        self, stores: Stores, first: Stored[Any], first_run: Callable[[str], Run], *, depth: int, rerank: int
    ) -> ReportSystem:
        """The student's passages scored again.

        Args:
            stores: of the student.
            first: the student's index.
            first_run: from the name of a split to its run.
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
            return dict(zip(numbered(texts), texts, strict=True)), stores.encode_texts(list(texts))

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
            run=lambda queries, split: again((dict(queries), first_run(split))),
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
