"""The steps of a report: indexes, runs and times, each made once and read from then on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.efficiency import _processor
from tct_hf.evaluation.first_dims import first_dims_system
from tct_hf.evaluation.report_settings import ReportSettings
from tct_hf.evaluation.report_systems import (
    ANN,
    EXACT,
    LateInteraction,
    ReportSystem,
    dense_system,
    hybrid_system,
    measure_cost,
    sparse_system,
)
from tct_hf.evaluation.stores import Stored, Stores
from tct_hf.evaluation.tuning import TuningQueries, tuning_queries
from tct_hf.files import claim, write_json_atomic
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.teachers import describe_teacher

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.data.collection import Collection
    from tct_hf.retrieval.dense import DenseIndex


class Work:
    """The steps of a report and what they share: indexes and runs and times, each made or read.

    Args:
        collection: to search.
        stores: of its student.
        teacher: of one vector a token, or None.
        teacher_name: as it was given.
        output: folder of everything.
        settings: of the report.
        write: takes lines of progress.
        dims: first dimensions of the student that are searched alone too.

    Raises:
        ValueError: the folder holds runs or times of other settings.
    """

    def __init__(
        self,
        collection: Collection,
        stores: Stores,
        teacher: MultiVectorEncoder | None,
        teacher_name: str | None,
        output: Path,
        settings: ReportSettings,
        write: Callable[[str], None],
        dims: Sequence[int] = (),
    ) -> None:
        from tct_hf.teachers import has_bfloat16

        self.collection, self.stores, self.output, self.settings = collection, stores, output, settings
        self.teacher, self.teacher_name, self.write = teacher, teacher_name, write
        self.test = collection.splits["test"]
        self.tuning: TuningQueries | None = tuning_queries(collection, settings.hybrid)
        self.depends: dict[str, Any] = {**stores.depends, "teacher": None}
        self.models: dict[str, Any] = {"student": None, "teacher": None}
        self.dims = list(dims)
        self.bf16 = False
        if teacher is not None:
            self.bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bfloat16(teacher.device))
            self.depends["teacher"] = {**describe_teacher(teacher), "bf16": self.bf16}
        self.depends["settings"] = {
            "depth": settings.measures.depth,
            "relevance": settings.measures.relevance,
            "measure": settings.measures.names[0],
            "hybrid": asdict(settings.hybrid),
            "ann": asdict(settings.ann),
            "late_interaction": asdict(settings.late_interaction),
        }
        claim(output / "runs", self.depends)
        claim(output / "costs", {**self.depends, "cost": asdict(settings.cost), "machine": machine_key()})
        self.alpha: Any = settings.hybrid.alpha
        self.notes: list[str] = []

    def systems(self) -> list[ReportSystem]:
        """Make the indexes and all that searching needs, in the order of the table."""
        from tct_hf.retrieval.dense_engine import factory_for

        depth = self.settings.measures.depth
        self.stores.encode()
        sparse = sparse_system(self.stores, depth)
        exact = self.stores.dense("Flat")
        systems = [sparse, dense_system(EXACT, "dense, exact", self.stores, exact, depth)]
        # What "auto" stands for is what one would deploy: the hybrid and the reranker begin with it.
        auto = factory_for(len(self.collection.corpus))
        self.ann = ann = self._ann(auto)
        systems.append(dense_system(ANN, f"dense, ANN ({ann.index.factory})", self.stores, ann, depth))
        systems += [first_dims_system(self.stores, size, depth) for size in self.dims]
        first, first_key = (exact, EXACT) if auto == "Flat" else (ann, ANN)
        name = "dense" if auto == "Flat" else f"dense ({ann.index.factory})"
        first_system = next(system for system in systems if system.key == first_key)
        self._tune(sparse, first_system)
        systems.append(
            hybrid_system(
                self.stores,
                first,
                lambda: (self._stored(sparse, "test"), self._stored(first_system, "test")),
                title=f"{name} + BM25, alpha {self.alpha:.3g}"
                if self.alpha is not None
                else f"{name} + BM25, by rank",
                alpha=None if self.alpha is None else float(self.alpha),
                normalize=self.settings.hybrid.normalize,
                depth=depth,
            )
        )
        if self.teacher is not None:
            late = self._late_interaction(self.teacher)
            if late.tokens is not None:
                systems.append(late.exhaustive_system(depth))
            systems.append(
                late.reranking_system(
                    self.stores,
                    first,
                    lambda: self._stored(first_system, "test"),
                    depth=depth,
                    rerank=self.settings.late_interaction.rerank,
                )
            )
        return systems

    def _ann(self, auto: str) -> Stored[DenseIndex]:
        settings = self.settings.ann
        factory = settings.factory
        if factory == "auto":
            factory = "HNSW32" if auto == "Flat" else auto
            if auto == "Flat":
                self.notes.append(
                    f"At {len(self.collection.corpus):,} passages exact search is the index to take (up to 50,000); "
                    "the ANN index is there to show what it would cost and lose."
                )
        tuning = self.tuning
        stored = self.stores.dense(
            factory,
            query_vectors=self.stores.encode_queries(tuning.queries) if tuning is not None else None,
            tuned_on=f"{len(tuning.queries)} {tuning.split} queries" if tuning is not None else "passages",
            recall=settings.recall,
        )
        tuned = stored.index.tuning
        if tuned is not None:
            on = f"{tuned['slice']} {self.tuning.split} queries" if self.tuning else f"{tuned['slice']} passages"
            shown = ", ".join(f"{name} {value:g}" for name, value in stored.index.parameters.items())
            self.notes.append(
                f"{factory}: {shown}, chosen on {on} for Recall@{tuned['k']} {tuned['recall']} against exact search "
                f"({tuned['measured']:.3f} there)."
            )
        return stored

    def _tune(self, sparse: ReportSystem, dense: ReportSystem) -> None:
        hybrid, measures = self.settings.hybrid, self.settings.measures
        if self.alpha is not None:
            self.notes.append(f"Hybrid: alpha {self.alpha:g} as it was given, tuned nowhere in this report.")
            return
        if self.tuning is None:
            self.notes.append(
                "Hybrid: there is no dev or train query to tune alpha on, so that the two lists are fused by "
                "reciprocal ranks."
            )
            return
        from tct_hf.retrieval.hybrid import tune_alpha

        tuning = self.tuning
        self.alpha = tune_alpha(
            self._stored(sparse, tuning.split),
            self._stored(dense, tuning.split),
            tuning.qrels,
            measures.names[0],
            normalize=hybrid.normalize,
            relevance=measures.relevance,
        )
        left = f"; {tuning.left_out} with the text of a reported query left out" if tuning.left_out else ""
        self.notes.append(
            f"Hybrid: alpha * BM25 + dense, alpha {self.alpha:.3g} tuned for {self.alpha.measure} on "
            f"{len(tuning.queries):,} {tuning.split} queries (none of them reported{left})."
        )

    def _late_interaction(self, model: MultiVectorEncoder) -> LateInteraction:
        from tct_hf.evaluation.token_vectors import encode_tokens

        count, limit = len(self.collection.corpus), self.settings.late_interaction.max_passages
        folder = self.output / "tokens"
        claim(folder, {"corpus": self.depends["corpus"], "teacher": self.depends["teacher"]})
        if count > limit:
            self.notes.append(
                f"Teacher: only reranking, passages encoded anew for every query: {count:,} passages are more than "
                f"late_interaction.max_passages ({limit:,})."
            )
            return LateInteraction(model, None, folder, bf16=self.bf16, seconds=None)
        seconds_file, begun = folder / "seconds.json", time.perf_counter()
        fresh = not any((folder / "vectors").glob("*.npy"))
        tokens = encode_tokens(model, self.collection.corpus, folder / "vectors", bf16=self.bf16, write=self.write)
        if fresh:
            write_json_atomic(seconds_file, {"seconds": time.perf_counter() - begun})
        seconds = json.loads(seconds_file.read_text(encoding="utf-8"))["seconds"] if seconds_file.is_file() else None
        mean, dim = float(tokens.lengths.mean()), tokens.tokens.shape[1]
        self.models["teacher"] = {"dimension": int(dim), "tokens_per_passage": mean}
        self.notes.append(
            f"Teacher: {mean:.1f} token vectors a passage of {dim} dimensions in float16 on disk; exhaustive search "
            "multiplies float32 copies in memory; reranking reads the float16."
        )
        return LateInteraction(model, tokens, folder / "vectors", bf16=self.bf16, seconds=seconds)

    def _stored(self, system: ReportSystem, split: str) -> Run:
        file = self.output / "runs" / f"{system.key}.{split}.trec"
        if not file.is_file():
            tuned_on = self.tuning is not None and split == self.tuning.split
            write_run(
                system.run(self.tuning.queries if tuned_on and self.tuning else self.test.queries), file, system.key
            )
        # As read: floats and order do not depend on whether a run was there.
        return read_run(file)

    def run(self, system: ReportSystem, place: int, count: int) -> Run:
        """The system's run of the reported queries, made or read."""
        if not (self.output / "runs" / f"{system.key}.test.trec").is_file():
            self.write(f"  search {place} of {count}: {system.title}")
        return self._stored(system, "test")

    def cost(self, system: ReportSystem, place: int, count: int) -> dict[str, Any]:
        """What the system costs, measured or read."""
        file = self.output / "costs" / f"{system.key}.json"
        if not file.is_file():
            self.write(f"  time {place} of {count}: {system.title}")
            load = _load_average()
            measured = measure_cost(system, self.test.queries, len(self.collection.corpus), self.settings.cost)
            write_json_atomic(file, {**measured.to_dict(), "load_average": load})
        return json.loads(file.read_text(encoding="utf-8"))


def machine_key() -> dict[str, Any]:
    """What times depend on: those of another machine are not mixed in."""
    return {"processor": _processor(), "cpu_count": os.cpu_count(), "system": platform.system()}


def _load_average() -> float | None:
    """Processes that want to compute, a mean over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
