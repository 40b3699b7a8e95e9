"""The systems of a report, made one by one, with their runs and times, each made once and read from then on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.encoding.precision import has_bfloat16
from tct_hf.evaluation import settings as keys
from tct_hf.evaluation.comparison import run_systems
from tct_hf.evaluation.cost import bytes_on_disk, load_average, machine_key
from tct_hf.evaluation.maxsim import TokenVectors, above, encode_query_tokens, encode_tokens, rerank_run
from tct_hf.evaluation.references import check_dims
from tct_hf.evaluation.settings import BM25, EXACT, HYBRID, ReportSettings
from tct_hf.evaluation.stores import (
    BASE_FOLDER,
    OWN,
    SPARSE_FOLDER,
    Stored,
    Stores,
    has_own_maxsim,
    open_beside,
    open_reranker,
    open_student,
)
from tct_hf.evaluation.systems import (
    Batch,
    Stage,
    System,
    added,
    bm25_system,
    hybrid_system,
    measure_cost,
    student_system,
)
from tct_hf.evaluation.tables import weight_text
from tct_hf.evaluation.tune_alpha import tune_alpha, tuning_queries
from tct_hf.files import CLAIM_FILE, claim, write_json_atomic
from tct_hf.retrieval.faiss_tools import factory_for
from tct_hf.retrieval.runs import Run, rank
from tct_hf.teachers.colbert import describe_teacher

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

_TOKEN_ENCODING = "query encoding by token"


class Work:
    """What the steps of a report share: models, indexes, runs and times, each made or read.

    Models are loaded, and what can't be reported of them is refused, before anything is encoded.
    """

    def __init__(
        self,
        collection: Collection,
        student: str,
        output: Path,
        settings: ReportSettings,
        write: Callable[[str], None],
        *,
        teacher: str | None,
        sparse_student: str | None,
        base: str | None,
        dims: Sequence[int] | None,
        runs: Mapping[str, str],
        device: str | None = None,
    ) -> None:
        self.collection, self.settings, self.output, self.write = collection, settings, output, write
        self.depth, self.test = settings.measures.depth, collection.splits["test"]
        self.tuning = tuning_queries(collection, settings.hybrid)
        self.alphas: dict[str, float | None] = {}  # of each hybrid; None where ranks are fused
        self.ann: Stored[Any] | None = None
        self.notes: list[str] = []
        self.made: dict[str, System] = {}
        self.names: dict[str, str] = {}  # of a system in a hybrid's title
        self.deployed = EXACT  # the system of the dense student that hybrids take
        self.teacher: Any = None  # of one vector a token
        self.tokens: TokenVectors | None = None
        self.bf16, self.tokens_folder = False, output / "tokens" / "vectors"
        self.seconds: float | None = None  # to encode the corpus by token
        self.measured: dict[str, Any] = {"dimension": None, "tokens_per_passage": None}  # of the teacher
        make = partial(self._stores, device)
        self.sparse = self.base = None
        self.stores: Stores = make(student, output)
        if self.stores.is_sparse and dims:
            raise ValueError(
                "dims: a sparse student's dimensions are words, its first are no smaller student; leave it out."
            )
        if sparse_student is not None:
            self.sparse = make(sparse_student, output / SPARSE_FOLDER, beside=True)
        self.teacher_name = None if teacher == OWN and not has_own_maxsim(self.stores.student) else teacher
        self.late_name = "own MaxSim" if teacher == OWN else "teacher"
        self.plan = self._plan(self._sizes(dims), with_base=base is not None)
        rows = [*self.plan, *runs]
        self.baseline = settings.measures.baseline or (keys.LEARNED if self.stores.is_sparse else EXACT)
        if self.baseline not in rows:
            raise ValueError(f"measures.baseline: there is no row {self.baseline!r}; there are {', '.join(rows)}")
        if isinstance(settings.hybrid.alpha, dict) and (absent := settings.hybrid.alpha.keys() - set(self.plan)):
            raise ValueError(f"hybrid.alpha.{min(absent)}: this report has no such pair; leave it out")
        if taken := [name for name in runs if name in self.plan]:
            raise ValueError(f"runs.{taken[0]}: the report has a system of that name; give the run another.")
        if base is not None:
            self.base = make(base, output / BASE_FOLDER)

    def _stores(self, device: str | None, name: str, folder: Path, beside: bool = False) -> Stores:
        model = open_beside(self.stores, name, device) if beside else open_student(name, device)
        precision, threads = self.settings.precision, self.settings.build_threads
        return Stores(self.collection, model, name, folder, precision=precision, threads=threads, write=self.write)

    def _sizes(self, dims: Sequence[int] | None) -> list[int]:
        """First dimensions to measure alone, the largest first: those asked for, or those the training recorded."""
        dimension = self.stores.student.get_embedding_dimension()
        if self.stores.is_sparse:
            return []
        if dims is None:
            file = Path(self.stores.name) / CLAIM_FILE
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            own = found.get("student") or found.get("arm") or {}
            training = {**(found.get("training") or {}), **(own.get("training") or {})}
            trained = training.get("matryoshka_dims") or []
            # Of a student that was cut after its training, those that are left.
            dims = [one for one in trained if isinstance(one, int) and (dimension is None or one < dimension)]
        check_dims(dims, dimension)
        return sorted({size for size in dims if size != dimension}, reverse=True)

    def _plan(self, sizes: Sequence[int], *, with_base: bool) -> dict[str, Callable[[], System]]:
        """The systems by key, in the order of the table, each made when it is called."""
        words = [BM25, *[keys.EXPANDED] * (self.settings.expansion.path is not None)]
        plan: dict[str, Callable[[], System]] = {one: partial(self._words, one) for one in words}

        def hybrid(key: str, first: str, weighted: str) -> None:
            plan[key] = partial(self._hybrid, key, first, weighted)

        if not self.stores.is_sparse:
            plan |= {EXACT: self._exact, keys.ANN: self._approximate}
            plan |= {f"dense-first-{size}": partial(self._first_dims, size) for size in sizes}
            for key, one in zip((HYBRID, keys.HYBRID_EXPANDED), words, strict=False):
                hybrid(key, EXACT, one)
        if self.stores.is_sparse or self.sparse is not None:
            plan[keys.LEARNED] = self._learned
            for key, one in zip((keys.LEARNED_BM25, keys.LEARNED_EXPANDED), words, strict=False):
                hybrid(key, keys.LEARNED, one)
        if self.sparse is not None:
            hybrid(keys.DENSE_LEARNED, EXACT, keys.LEARNED)
        if with_base:
            plan[keys.BASE] = self._base
            hybrid(keys.BASE_BM25, keys.BASE, BM25)
        # That of the student and BM25: a single weight that is given is its own, and its passages are reranked.
        self.first_hybrid = next(key for key in plan if key in keys.HYBRIDS)
        if self.teacher_name is not None:
            if len(self.collection.corpus) <= self.settings.late_interaction.max_passages:
                plan[keys.TEACHER] = self._exhaustive
            plan[keys.RERANKED] = self._reranked
        return plan

    def claim(self) -> None:
        """Claim the folders of runs and times for all that they depend on."""
        settings, also = self.settings, self.collection.also
        depends: dict[str, Any] = {**self.stores.depends, "teacher": None}
        if settings.expansion.path is not None:
            depends["expansion"] = settings.expansion.depends()
        for role, stores in (("sparse_student", self.sparse), ("base", self.base)):
            if stores is not None:
                depends[role] = stores.depends["student"]
        digests = {
            name: hashlib.sha256(json.dumps(sorted(split.queries.items())).encode()).hexdigest()
            for name, split in also.items()
        }
        if self.tuning != tuning_queries(replace(self.collection, also={}), settings.hybrid):
            # Runs of the tuning queries are of those that are left: with other further splits they would be others.
            depends["also_report"] = digests
        if self.teacher_name is not None:
            self.teacher = open_reranker(self.teacher_name, self.stores)
            auto = settings.precision == "auto" and has_bfloat16(self.teacher.device)
            self.bf16 = settings.precision == "bf16" or auto
            depends["teacher"] = {**describe_teacher(self.teacher), "bf16": self.bf16}
        depends["settings"] = {
            "depth": self.depth,
            "relevance": settings.measures.relevance,
            "measure": settings.measures.names[0],
            "hybrid": asdict(settings.hybrid),
            "ann": asdict(settings.ann),
            "late_interaction": asdict(settings.late_interaction),
        }
        self.depends = depends
        claim(self.output / "runs", depends)
        for name in also:
            claim(self.output / "runs" / name, {**depends, "queries": digests[name]})
        claim(self.output / "costs", {**depends, "cost": asdict(settings.cost), "machine": machine_key()})

    def systems(self) -> list[System]:
        """Make the indexes and all that searching needs, in the order of the table."""
        self.stores.encode()
        for key, make in self.plan.items():
            self.made[key] = make()
        return [self.made[key] for key in self.plan]

    def _words(self, key: str) -> System:
        stored = self.stores.bm25() if key == BM25 else self.stores.expanded(self.settings.expansion)
        self.names[key] = "BM25" if key == BM25 else "expanded BM25"
        if key != BM25:
            self.notes.append(_expansion_note(stored.index.settings))
        return bm25_system(key, self.names[key], stored, self.depth)

    def _exact(self) -> System:
        self.names[EXACT] = "dense"
        return student_system(EXACT, "dense, exact", self.stores, self.stores.dense("Flat"), self.depth)

    def _approximate(self) -> System:
        """An approximate index, which hybrids take where "auto" would deploy it."""
        settings, tuning, count = self.settings.ann, self.tuning, len(self.collection.corpus)
        auto, factory = factory_for(count), settings.factory
        if factory == "auto":
            factory = "HNSW32" if auto == "Flat" else auto
            if auto == "Flat":
                self.notes.append(
                    f"At {count:,} passages exact search is the index to take (up to 50,000); the ANN index is there "
                    "to show what it would cost and lose."
                )
        self.ann = stored = self.stores.dense(
            factory,
            query_vectors=self.stores.encode_queries(tuning.queries) if tuning is not None else None,
            tuned_on=f"{len(tuning.queries)} {tuning.split} queries" if tuning is not None else "passages",
            recall=settings.recall,
        )
        if (tuned := stored.index.tuning) is not None:
            on = f"{tuned['slice']} {tuning.split} queries" if tuning else f"{tuned['slice']} passages"
            shown = ", ".join(f"{name} {value:g}" for name, value in stored.index.parameters.items())
            self.notes.append(
                f"{factory}: {shown}, chosen on {on} for Recall@{tuned['k']} {tuned['recall']} against exact search "
                f"({tuned['measured']:.3f} there)."
            )
        if auto != "Flat":
            self.deployed, self.names[keys.ANN] = keys.ANN, f"dense ({stored.index.factory})"
        return student_system(keys.ANN, f"dense, ANN ({stored.index.factory})", self.stores, stored, self.depth)

    def _first_dims(self, size: int) -> System:
        """Exact search with the first dimensions of the student's vectors; the corpus is encoded once."""
        title, stored = f"dense, first {size} dimensions", self.stores.first_dims(size)
        return student_system(f"dense-first-{size}", title, self.stores, stored, self.depth, size=size)

    def _learned(self) -> System:
        stores = self.sparse or self.stores
        stores.encode()
        stored, queries = stores.sparse(), stores.encode_queries(self.test.queries)
        active, index = queries.nnz / queries.shape[0], stored.index
        self.active_dims = {"query_active_dims": active, "document_active_dims": index.active_dims}
        self.notes.append(
            f"Sparse student: {active:.1f} active dims a query, {index.active_dims:.1f} a passage, of "
            f"{index.dimension:,}; exact search of inverted lists, 8 bytes an active dim of a passage."
        )
        self.names[keys.LEARNED] = "sparse student"
        return student_system(keys.LEARNED, "sparse student (learned)", stores, stored, self.depth)

    def _base(self) -> System:
        assert self.base is not None
        self.base.encode()
        self.names[keys.BASE] = "base"
        return student_system(keys.BASE, "base as it is", self.base, self.base.exact(), self.depth)

    def _hybrid(self, key: str, first: str, weighted: str) -> System:
        """`alpha * weighted + first`, alpha tuned where it is not given."""
        first = self.deployed if first == EXACT else first
        title = f"{self.names[first]} + {self.names[weighted]}"
        several = sum(name in keys.HYBRIDS for name in self.plan) > 1
        which = f"Hybrid {title}" if several else "Hybrid"
        settings, measures, tuning = self.settings.hybrid, self.settings.measures, self.tuning
        alpha = settings.weight(key, alone=key == self.first_hybrid)
        if alpha is not None:
            self.notes.append(f"{which}: alpha {alpha:g} as it was given, tuned nowhere in this report.")
        elif tuning is None:
            self.notes.append(
                f"{which}: there is no dev or train query to tune alpha on, so that the two lists are fused by "
                "reciprocal ranks."
            )
        else:
            parts, split = [self.made[weighted], self.made[first]], tuning.split
            runs = run_systems(parts, {split: tuning.queries}, self.output / "runs", write=lambda line: None)
            lists = (runs[weighted, split], runs[first, split])
            options: dict[str, Any] = {"normalize": settings.normalize, "relevance": measures.relevance}
            alpha = tune_alpha(*lists, tuning.qrels, measures.names[0], **options)
            left = f"; {tuning.left_out} with the text of a reported query left out" if tuning.left_out else ""
            plain = "dense" if first == self.deployed else self.names[first]
            self.notes.append(
                f"{which}: alpha * {self.names[weighted]} + {plain}, alpha {weight_text(alpha)} tuned for "
                f"{alpha.measure} on {len(tuning.queries):,} {split} queries (none of them reported{left})."
            )
        self.alphas[key] = alpha
        return hybrid_system(
            key,
            f"{title}, {'by rank' if alpha is None else f'alpha {weight_text(alpha)}'}",
            self.made[first],
            self.made[weighted],
            alpha=None if alpha is None else float(alpha),
            normalize=settings.normalize,
            depth=self.depth,
        )

    def _exhaustive(self) -> System:
        """MaxSim of every passage, whose token vectors are encoded first where they are not there."""
        claim(
            self.output / "tokens", {"corpus": self.depends["corpus"], "teacher": self.depends["teacher"], "format": 2}
        )
        seconds_file, begun = self.output / "tokens" / "seconds.json", time.perf_counter()
        fresh = not any(self.tokens_folder.glob("*.npz"))
        corpus, write = self.collection.corpus, self.write
        self.tokens = encode_tokens(self.teacher, corpus, self.tokens_folder, bf16=self.bf16, write=write)
        if fresh:
            write_json_atomic(seconds_file, {"seconds": time.perf_counter() - begun})
        if seconds_file.is_file():
            self.seconds = json.loads(seconds_file.read_text(encoding="utf-8"))["seconds"]
        mean, dim = float(self.tokens.lengths.mean()), int(self.tokens.tokens.shape[1])
        self.measured = {"dimension": dim, "tokens_per_passage": mean}
        self.notes.append(
            f"{self.late_name[0].upper()}{self.late_name[1:]}: {mean:.1f} token vectors a passage of {dim} dimensions "
            "in float16 on disk; exhaustive search multiplies float32 copies in memory; reranking reads the float16."
        )
        tokens = self.tokens

        def find(batch: Batch) -> Batch:
            return batch.found(dict(zip(batch.queries, tokens.search(batch.vectors, self.depth), strict=True)))

        return System(
            keys.TEACHER,
            f"{self.late_name}, every passage by MaxSim",
            {_TOKEN_ENCODING: self._encode_by_token, "MaxSim": find},
            kind="late interaction",
            disk=[self.tokens_folder],
            memory=lambda: tokens.block_bytes,
            build_seconds=self.seconds,
        )

    def _encode_by_token(self, batch: Batch) -> Batch:
        return replace(batch, vectors=encode_query_tokens(self.teacher, [*batch.queries.values()], bf16=self.bf16))

    def _reranked(self) -> System:
        """The best passages of the hybrid scored again, encoded anew for every query where no vectors are kept."""
        first, corpus, tokens = self.made[self.first_hybrid], self.collection.corpus, self.tokens
        settings = self.settings.late_interaction
        top = min(settings.rerank, self.depth)
        title = f"{self.late_name} over the hybrid's top {top}"

        def kept(batch: Batch) -> Batch:
            assert tokens is not None
            reranked = {}
            for query, vectors in zip(batch.queries, batch.vectors, strict=True):
                hits = list(batch.runs[-1].get(query, {}))
                reranked[query] = above(tokens.rerank(vectors, hits[:top]), hits[top:])
            return batch.joined(reranked)

        def anew(batch: Batch) -> Batch:
            pool = {name for hits in batch.runs[-1].values() for name, _ in rank(hits)[:top]}
            texts = dict(zip(pool, corpus[[rows[name] for name in pool]]["text"], strict=True)) if pool else {}
            return batch.joined(rerank_run(self.teacher, batch.runs[-1], texts, batch.queries, top, bf16=self.bf16))

        folders: Any = first.disk
        if tokens is not None:
            own: dict[str, Stage] = {_TOKEN_ENCODING: self._encode_by_token, f"MaxSim of {top}": kept}
            disk: Any = [*folders, self.tokens_folder]
            held, seconds = tokens.nbytes, self.seconds
        else:
            count, limit = len(corpus), settings.max_passages
            self.notes.append(
                f"{self.late_name[0].upper()}{self.late_name[1:]}: only reranking, passages encoded anew for every "
                f"query: {count:,} passages are more than late_interaction.max_passages ({limit:,})."
            )
            rows = {name: row for row, name in enumerate(corpus["id"])}
            own = {"encoding of query and passages by token, MaxSim": anew}
            held, seconds = sum(len(text.encode()) for text in corpus["text"]), 0.0
            disk = bytes_on_disk(folders) + held
            title += ", passages encoded anew"
        return System(
            keys.RERANKED,
            title,
            {**first.stages, **own},
            of=(first.key,),
            own=len(own),
            kind="late interaction",
            disk=disk,
            memory=lambda: first.memory() + held,
            build_seconds=added(first.build_seconds, seconds),
        )

    def search(self, systems: Sequence[System], split: str) -> dict[str, Run]:
        """The runs of a reported split, made or read, by the key of the system."""
        queries = self.test.queries if split == "test" else self.collection.also[split].queries
        folder = self.output / "runs" if split == "test" else self.output / "runs" / split
        runs = run_systems(systems, {split: queries}, folder, write=self.write)
        return {system.key: runs[system.key, split] for system in systems}

    def cost(self, system: System, place: int, count: int) -> dict[str, Any]:
        """What the system costs, measured or read."""
        file = self.output / "costs" / f"{system.key}.json"
        if not file.is_file():
            self.write(f"  time {place} of {count}: {system.title}")
            load = load_average()
            measured = measure_cost(system, self.test.queries, len(self.collection.corpus), self.settings.cost)
            write_json_atomic(file, {**measured.to_dict(), "load_average": load})
        return json.loads(file.read_text(encoding="utf-8"))


def _expansion_note(settings: Mapping[str, Any]) -> str:
    """What an expanded index was built over, in a line."""
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
