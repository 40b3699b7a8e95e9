"""The steps of a report: indexes, runs and times, each made once and read from then on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.efficiency import _processor
from tct_hf.evaluation.first_dims import first_dims_system, key_of
from tct_hf.evaluation.late_interaction import LateInteraction
from tct_hf.evaluation.report import DENSE_LEARNED, EXPANDED, LEARNED, LEARNED_BM25, LEARNED_EXPANDED
from tct_hf.evaluation.report_settings import ReportSettings
from tct_hf.evaluation.report_systems import (
    ANN,
    BASE,
    BASE_BM25,
    BM25,
    EXACT,
    HYBRID,
    HYBRID_EXPANDED,
    RERANKED,
    TEACHER,
    Part,
    ReportSystem,
    hybrid_system,
    measure_cost,
    sparse_system,
    student_system,
)
from tct_hf.evaluation.stores import OWN, Stored, Stores
from tct_hf.evaluation.tuning import TuningQueries, tuning_queries, weight_text
from tct_hf.files import claim, write_json_atomic
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.teachers.colbert import describe_teacher

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.data.collection import Collection, Split
    from tct_hf.retrieval.dense import DenseIndex


@dataclass(frozen=True)
class _Searched:
    """A system of one list, what a hybrid makes of it, and its name in a hybrid's title."""

    system: ReportSystem
    part: Part
    name: str


class Work:
    """The steps of a report and what they share: indexes and runs and times, each made or read.

    Args:
        collection: to search.
        stores: of its student, dense or sparse.
        teacher: of one vector a token, or None.
        teacher_name: as it was given; OWN of the student's own token vectors.
        output: folder of everything.
        settings: of the report.
        write: takes lines of progress.
        sparse_stores: of a sparse student beside a dense one.
        dims: first dimensions of the student that are searched alone too.
        base_stores: of the base as it is.

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
        sparse_stores: Stores | None = None,
        dims: Sequence[int] = (),
        base_stores: Stores | None = None,
    ) -> None:
        from tct_hf.encoding.precision import has_bfloat16

        self.collection, self.stores, self.output, self.settings = collection, stores, output, settings
        self.teacher, self.teacher_name, self.write = teacher, teacher_name, write
        self.sparse_stores = stores if stores.is_sparse else sparse_stores
        self.base_stores = base_stores
        self.baseline = settings.measures.baseline or (LEARNED if stores.is_sparse else EXACT)
        self.test = collection.splits["test"]
        self.tuning: TuningQueries | None = tuning_queries(collection, settings.hybrid)
        self.depends: dict[str, Any] = {**stores.depends, "teacher": None}
        if settings.expansion.path is not None:
            self.depends["expansion"] = settings.expansion.depends()
        if sparse_stores is not None:
            self.depends["sparse_student"] = sparse_stores.depends["student"]
        if base_stores is not None:
            self.depends["base"] = base_stores.depends["student"]
        if self.tuning != tuning_queries(replace(collection, also={}), settings.hybrid):
            # Runs of the tuning queries are of those that are left: with other further splits they would be others.
            self.depends["also_report"] = {name: queries_digest(split) for name, split in collection.also.items()}
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
        for name, split in collection.also.items():
            claim(output / "runs" / name, {**self.depends, "queries": queries_digest(split)})
        claim(output / "costs", {**self.depends, "cost": asdict(settings.cost), "machine": machine_key()})
        # Of each hybrid, by its key: the weight, or None where ranks are fused.
        self.alphas: dict[str, Any] = {}
        self.ann: Stored[DenseIndex] | None = None
        self.notes: list[str] = []

    def systems(self) -> list[ReportSystem]:
        """Make the indexes and all that searching needs, in the order of the table."""
        depth = self.settings.measures.depth
        self.stores.encode()
        bm25 = self._words(BM25, "BM25", self.stores.bm25())
        words = [bm25]
        if self.settings.expansion.path is not None:
            words.append(self._words(EXPANDED, "expanded BM25", self.stores.expanded(self.settings.expansion)))
            self.notes.append(expansion_note(words[-1].part.stored.index.settings))
        systems = [one.system for one in words]
        if self.stores.is_sparse:
            student = self._sparse_student(self.stores)
            systems.append(student.system)
        else:
            found, student = self._dense_student()
            systems += found
        of_learned, of_dense = (LEARNED_BM25, LEARNED_EXPANDED), (HYBRID, HYBRID_EXPANDED)
        keys = of_learned if self.stores.is_sparse else of_dense
        # A single weight that is given is that of BM25; every other pair has its own.
        for key, one in zip(keys, words, strict=False):
            systems.append(self._hybrid(key, student, one, alone=one is bm25))
        if self.sparse_stores is not None and self.sparse_stores is not self.stores:
            learned = self._sparse_student(self.sparse_stores)
            systems.append(learned.system)
            systems += [self._hybrid(key, learned, one) for key, one in zip(of_learned, words, strict=False)]
            systems.append(self._hybrid(DENSE_LEARNED, student, learned))
        if (base := self.base_stores) is not None:
            base.encode()
            exact = base.exact()
            system = student_system(BASE, "base as it is", base, exact, depth)
            systems += [system, self._hybrid(BASE_BM25, _Searched(system, Part(exact, base), "base"), bm25)]
        if self.teacher is not None:
            late = self._late_interaction(self.teacher)
            if late.tokens is not None:
                systems.append(late.exhaustive_system(depth))
            hybrid = next(system for system in systems if system.key == keys[0])
            systems.append(
                late.reranking_system(
                    hybrid,
                    lambda split: self._stored(hybrid, split),
                    self.collection.corpus,
                    depth=depth,
                    rerank=self.settings.late_interaction.rerank,
                )
            )
        return systems

    def _words(self, key: str, title: str, stored: Stored[Any]) -> _Searched:
        return _Searched(sparse_system(key, title, stored, self.settings.measures.depth), Part(stored), title)

    def _dense_student(self) -> tuple[list[ReportSystem], _Searched]:
        """Exact and approximate search, and which of them "auto" stands for: the one that would be deployed."""
        from tct_hf.retrieval.faiss_tools import factory_for

        depth = self.settings.measures.depth
        exact = self.stores.dense("Flat")
        auto = factory_for(len(self.collection.corpus))
        self.ann = ann = self._ann(auto)
        systems = [
            student_system(EXACT, "dense, exact", self.stores, exact, depth),
            student_system(ANN, f"dense, ANN ({ann.index.factory})", self.stores, ann, depth),
            *(first_dims_system(self.stores, size, depth) for size in self.dims),
        ]
        if auto == "Flat":
            return systems, _Searched(systems[0], Part(exact, self.stores), "dense")
        return systems, _Searched(systems[1], Part(ann, self.stores), f"dense ({ann.index.factory})")

    def _sparse_student(self, stores: Stores) -> _Searched:
        if stores is not self.stores:
            stores.encode()
        stored = stores.sparse()
        index = stored.index
        queries = stores.encode_queries(self.test.queries)
        active = queries.nnz / queries.shape[0]
        self.active_dims = {"query_active_dims": active, "document_active_dims": index.active_dims}
        self.notes.append(
            f"Sparse student: {active:.1f} active dims a query, {index.active_dims:.1f} a passage, of "
            f"{index.dimension:,}; exact search of inverted lists, 8 bytes an active dim of a passage."
        )
        title, depth = "sparse student (learned)", self.settings.measures.depth
        system = student_system(LEARNED, title, stores, stored, depth, kind="learned sparse")
        return _Searched(system, Part(stored, stores), "sparse student")

    def _hybrid(self, key: str, first: _Searched, weighted: _Searched, *, alone: bool = False) -> ReportSystem:
        """`alpha * weighted + first`, alpha tuned where it is not given."""
        title = f"{first.name} + {weighted.name}"
        given = self.settings.hybrid.weight(key, alone=alone)
        self.alphas[key] = alpha = self._tuned(title, weighted, first, given)
        return hybrid_system(
            key,
            f"{title}, alpha {weight_text(alpha)}" if alpha is not None else f"{title}, by rank",
            first.part,
            weighted.part,
            lambda split: (self._stored(weighted.system, split), self._stored(first.system, split)),
            alpha=None if alpha is None else float(alpha),
            normalize=self.settings.hybrid.normalize,
            depth=self.settings.measures.depth,
        )

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

    def _tuned(self, title: str, weighted: _Searched, first: _Searched, alpha: float | None) -> Any:
        """The weight of a hybrid, as it was given or tuned; None where there is nothing to tune it on."""
        from tct_hf.evaluation.tune_alpha import tune_alpha

        hybrid, measures, tuning = self.settings.hybrid, self.settings.measures, self.tuning
        # With one hybrid there is nothing to tell apart.
        several = self.settings.expansion.path is not None or self.base_stores is not None
        alone = not several and self.sparse_stores in (None, self.stores)
        which = "Hybrid" if alone else f"Hybrid {title}"
        if alpha is not None:
            self.notes.append(f"{which}: alpha {alpha:g} as it was given, tuned nowhere in this report.")
            return alpha
        if tuning is None:
            self.notes.append(
                f"{which}: there is no dev or train query to tune alpha on, so that the two lists are fused by "
                "reciprocal ranks."
            )
            return None
        found = tune_alpha(
            self._stored(weighted.system, tuning.split),
            self._stored(first.system, tuning.split),
            tuning.qrels,
            measures.names[0],
            normalize=hybrid.normalize,
            relevance=measures.relevance,
        )
        left = f"; {tuning.left_out} with the text of a reported query left out" if tuning.left_out else ""
        kind = "dense" if first.name.startswith("dense") else first.name
        self.notes.append(
            f"{which}: alpha * {weighted.name} + {kind}, alpha {weight_text(found)} tuned for {found.measure} on "
            f"{len(tuning.queries):,} {tuning.split} queries (none of them reported{left})."
        )
        return found

    def _late_interaction(self, model: MultiVectorEncoder) -> LateInteraction:
        from tct_hf.evaluation.token_vectors import encode_tokens

        name, title = ("own MaxSim", "Own MaxSim") if self.teacher_name == OWN else ("teacher", "Teacher")
        count, limit = len(self.collection.corpus), self.settings.late_interaction.max_passages
        folder = self.output / "tokens"
        claim(folder, {"corpus": self.depends["corpus"], "teacher": self.depends["teacher"]})
        if count > limit:
            self.notes.append(
                f"{title}: only reranking, passages encoded anew for every query: {count:,} passages are more than "
                f"late_interaction.max_passages ({limit:,})."
            )
            return LateInteraction(model, name, None, folder, bf16=self.bf16, seconds=None)
        seconds_file, begun = folder / "seconds.json", time.perf_counter()
        fresh = not any((folder / "vectors").glob("*.npy"))
        tokens = encode_tokens(model, self.collection.corpus, folder / "vectors", bf16=self.bf16, write=self.write)
        if fresh:
            write_json_atomic(seconds_file, {"seconds": time.perf_counter() - begun})
        seconds = json.loads(seconds_file.read_text(encoding="utf-8"))["seconds"] if seconds_file.is_file() else None
        mean, dim = float(tokens.lengths.mean()), tokens.tokens.shape[1]
        self.models["teacher"] = {"dimension": int(dim), "tokens_per_passage": mean}
        self.notes.append(
            f"{title}: {mean:.1f} token vectors a passage of {dim} dimensions in float16 on disk; exhaustive search "
            "multiplies float32 copies in memory; reranking reads the float16."
        )
        return LateInteraction(model, name, tokens, folder / "vectors", bf16=self.bf16, seconds=seconds)

    def run_file(self, key: str, split: str) -> Path:
        """Of the run of a system on a split."""
        runs = self.output / "runs"
        return (runs / split if split in self.collection.also else runs) / f"{key}.{split}.trec"

    def _queries(self, split: str) -> Mapping[str, str]:
        if split in self.collection.also:
            return self.collection.also[split].queries
        return self.tuning.queries if self.tuning is not None and split == self.tuning.split else self.test.queries

    def _stored(self, system: ReportSystem, split: str) -> Run:
        file = self.run_file(system.key, split)
        if not file.is_file():
            write_run(system.run(self._queries(split), split), file, system.key)
        # As read: floats and order do not depend on whether a run was there.
        return read_run(file)

    def run(self, system: ReportSystem, place: int, count: int, split: str = "test") -> Run:
        """The system's run of a reported split, made or read."""
        if not self.run_file(system.key, split).is_file():
            also = "" if split == "test" else f"{split}, "
            self.write(f"  search {also}{place} of {count}: {system.title}")
        return self._stored(system, split)

    def cost(self, system: ReportSystem, place: int, count: int) -> dict[str, Any]:
        """What the system costs, measured or read."""
        file = self.output / "costs" / f"{system.key}.json"
        if not file.is_file():
            self.write(f"  time {place} of {count}: {system.title}")
            load = _load_average()
            measured = measure_cost(system, self.test.queries, len(self.collection.corpus), self.settings.cost)
            write_json_atomic(file, {**measured.to_dict(), "load_average": load})
        return json.loads(file.read_text(encoding="utf-8"))


def rows_of(
    settings: ReportSettings,
    passages: int,
    *,
    sparse: bool,
    beside: bool,
    teacher: bool,
    dims: Sequence[int],
    base: bool = False,
) -> list[str]:
    """The keys of a report's systems, in the order of the table, before any of them is made.

    Args:
        settings: of the report.
        passages: of the collection.
        sparse: its student is a sparse one.
        beside: a sparse student is reported beside a dense one.
        teacher: there is one, or the student's own token vectors are.
        dims: first dimensions of the student that are searched alone too.
        base: the base as it is has rows.
    """
    expanded = settings.expansion.path is not None
    learned = [LEARNED_BM25, *[LEARNED_EXPANDED] * expanded]
    rows = [BM25, *[EXPANDED] * expanded]
    if sparse:
        rows += [LEARNED, *learned]
    else:
        rows += [EXACT, ANN, *map(key_of, dims), HYBRID, *[HYBRID_EXPANDED] * expanded]
        rows += [LEARNED, *learned, DENSE_LEARNED] * beside
    rows += [BASE, BASE_BM25] * base
    if teacher:
        rows += [*[TEACHER] * (passages <= settings.late_interaction.max_passages), RERANKED]
    return rows


def expansion_note(settings: Mapping[str, Any]) -> str:
    """What an expanded index was built over, in a line.

    Args:
        settings: of the index.
    """
    expansion = settings["expansion"]
    count = expansion["num_queries"]
    left_out = ["repeats"] * expansion["drop_repeats"]
    if expansion["drop_share"]:
        left_out.append(f"the {expansion['drop_share']:.0%} with the lowest scores")
    return (
        f"Expanded BM25: passages with {'all their' if count is None else f'{count:,}'} generated queries"
        + (f" of {expansion['model']}" if expansion["model"] else "")
        + (f", without {' and '.join(left_out)}" if left_out else "")
        + f"; k1 {settings['k1']:g}, b {settings['b']:g}. Generating them takes no part in its build time."
    )


def queries_digest(split: Split) -> str:
    """Of the texts of a split's queries, which its runs depend on."""
    return sha256(json.dumps(sorted(split.queries.items())).encode()).hexdigest()


def machine_key() -> dict[str, Any]:
    """What times depend on: those of another machine are not mixed in."""
    return {"processor": _processor(), "cpu_count": os.cpu_count(), "system": platform.system()}


def _load_average() -> float | None:
    """Processes that want to compute, a mean over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
