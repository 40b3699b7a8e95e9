"""Late interaction in a report: search over every passage, and the hybrid's passages scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tct_hf.evaluation.efficiency import bytes_on_disk
from tct_hf.evaluation.report_systems import RERANKED, TEACHER, ReportSystem, added, numbered
from tct_hf.evaluation.reranking import above, rerank_run
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.token_vectors import TokenVectors


_ENCODING = "query encoding by token"


class LateInteraction:
    """A model of one vector a token as a searcher and as a reranker.

    Args:
        model: a teacher, or the student's own token vectors.
        name: in titles.
        tokens: of the corpus; None where there are too many: passages are then encoded anew to be reranked.
        folder: of the token vectors.
        bf16: encode in bfloat16.
        seconds: that encoding took, None where it is not known.
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        name: str,
        tokens: TokenVectors | None,
        folder: Path,
        *,
        bf16: bool,
        seconds: float | None,
    ) -> None:
        self.model, self.name, self.tokens = model, name, tokens
        self.folder, self.bf16, self.seconds = folder, bf16, seconds
        self._rows = {} if tokens is None else {name: row for row, name in enumerate(tokens.ids)}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Token vectors of queries, `(tokens, dim)` float32 each; divided by their number where scores are means."""
        import torch

        autocast = torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with torch.inference_mode(), autocast:
            encoded: Any = self.model.encode_query(list(texts), show_progress_bar=False)
        mean = self.model.similarity_fn_name == "meanmaxsim"
        return [vectors.float() / (len(vectors) if mean else 1) for vectors in encoded]

    def exhaustive_system(self, depth: int) -> ReportSystem:
        """MaxSim of every passage."""
        tokens = self.tokens
        assert tokens is not None

        def run(queries: Mapping[str, str], split: str) -> Run:
            return dict(zip(queries, tokens.search(self.encode(list(queries.values())), depth), strict=True))

        return ReportSystem(
            key=TEACHER,
            title=f"{self.name}, every passage by MaxSim",
            kind="late interaction",
            run=run,
            stages={
                _ENCODING: lambda text: self.encode([text]),
                "MaxSim": lambda vectors: tokens.search(vectors, depth),
            },
            batch=lambda texts: tokens.search(self.encode(texts), depth),
            disk=[self.folder],
            memory=lambda: tokens.block_bytes,
            build_seconds=self.seconds,
            slow=True,
        )

    def reranking_system(
        self, first: ReportSystem, first_run: Callable[[str], Run], corpus: Dataset, *, depth: int, rerank: int
    ) -> ReportSystem:
        """The best passages of a hybrid scored again.

        Args:
            first: the hybrid.
            first_run: from the name of a split to its run.
            corpus: columns id and text.
            depth: passages a query.
            rerank: of these, how many are scored again.
        """
        texts_by_id = _Texts(corpus) if self.tokens is None else {}

        def encode_again(found: tuple[dict[str, str], Run]) -> tuple[dict[str, Any], Run]:
            texts, run = found
            return dict(zip(texts, self.encode(list(texts.values())), strict=True)), run

        def score(encoded: tuple[dict[str, Any], Run]) -> Run:
            vectors, run = encoded
            return self._rerank(run, vectors, rerank)

        def anew(found: tuple[dict[str, str], Run]) -> Run:
            texts, run = found
            return rerank_run(self.model, run, texts_by_id, texts, rerank, bf16=self.bf16)

        def again(found: tuple[dict[str, str], Run]) -> Run:
            return anew(found) if self.tokens is None else score(encode_again(found))

        def beside(stage: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda found: (found[0], stage(found[1]))

        begin, *others = first.stages
        stages: dict[str, Callable[[Any], Any]] = {
            begin: lambda text: (dict(zip(numbered([text]), [text], strict=True)), first.stages[begin](text)),
            **{name: beside(first.stages[name]) for name in others},
        }
        if self.tokens is None:
            kept = ", passages encoded anew"
            stages["encoding of query and passages by token, MaxSim"] = anew
            text_bytes = sum(len(text.encode()) for batch in corpus.iter(1000) for text in batch["text"])
            disk: int | list[Path] = bytes_on_disk(cast("Sequence[Path]", first.disk)) + text_bytes
            memory = text_bytes
        else:
            kept, memory = "", self.tokens.nbytes
            stages |= {_ENCODING: encode_again, f"MaxSim of {min(rerank, depth)}": score}
            disk = [*cast("Sequence[Path]", first.disk), self.folder]
        return ReportSystem(
            key=RERANKED,
            title=f"{self.name} over the hybrid's top {min(rerank, depth)}{kept}",
            kind="late interaction",
            run=lambda queries, split: again((dict(queries), first_run(split))),
            stages=stages,
            batch=lambda texts: again((dict(zip(numbered(texts), texts, strict=True)), first.batch(texts))),
            disk=disk,
            memory=lambda: first.memory() + memory,
            build_seconds=added(first.build_seconds, 0.0 if self.tokens is None else self.seconds),
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
            reranked[query] = above(best, hits[rerank:])
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
