"""The systems of a report: models, indexes and hybrids, each made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection, Split
from tct_hf.data.shards import has_shards
from tct_hf.encoding.weights import has_bfloat16
from tct_hf.evaluation.cost import Footprint, bytes_on_disk, machine_key
from tct_hf.evaluation.experiment import Experiment
from tct_hf.evaluation.maxsim import TokenVectors, above, encode_tokens, rerank_run
from tct_hf.evaluation.settings import HYBRIDS, ReportSettings, check_codes
from tct_hf.evaluation.systems import Batch, System, bm25_system, by_token, hybrid_system, student_system
from tct_hf.evaluation.tables import weight_text
from tct_hf.evaluation.tune_alpha import tune_alpha, tuning_queries
from tct_hf.evaluation.workspace import (
    BASE_FOLDER,
    OWN,
    SPARSE_FOLDER,
    Stored,
    Workspace,
    check_dims,
    dense_name,
    has_own_maxsim,
    open_beside,
    open_reranker,
    open_student,
    said_of,
)
from tct_hf.files import CLAIM_FILE, claim, json_digest, read_json, write_json_atomic
from tct_hf.retrieval.encode_corpus import read_seconds
from tct_hf.retrieval.faiss_tools import codes_for
from tct_hf.retrieval.runs import Run, rank
from tct_hf.teachers.colbert import describe_teacher

# What stands for a system in the title of a hybrid, and titles of students that are searched exactly.
_NAMES = {
    "bm25": "BM25",
    "bm25-expanded": "expanded BM25",
    "dense-exact": "dense",
    "learned-sparse": "sparse student",
    "base": "base",
}
_TITLES = {"dense-exact": "dense, exact", "learned-sparse": "sparse student (learned)", "base": "base as it is"}
_ANEW = "encoding of query and passages by token, MaxSim"


class ReportSystems:
    """What the steps of a report share: models, indexes, runs and times, each made once and read from then on.

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
        runs: Mapping[str, str | None],
        device: str | None = None,
    ) -> None:
        self.collection, self.settings, self.output, self.write = collection, settings, output, write
        self.runs, self.foreign = runs, dict[str, Run]()  # other systems' by name; no file of a function
        self.depth, self.test = collection.reach(settings.measures.depth), collection.splits["test"]
        self.tuning = tuning_queries(collection, settings.hybrid)
        self.hybrids: dict[str, dict[str, Any]] = {}  # how each was tuned, as in report.json
        self.ann: dict[str, Any] | None = None  # the same of the approximate index
        self.notes, self.names = list(collection.own_note), dict(_NAMES)
        self.made: dict[str, System] = {}
        self.tasks: dict[str, Any] = {}  # figures of mteb's tasks, as in report.json
        self.deployed = "dense-exact"  # the system of the dense student that hybrids take
        self.teacher: Any = None  # of one vector a token
        self.tokens: TokenVectors | None = None
        self.measured: dict[str, Any] = {"dimension": None, "tokens_per_passage": None}  # of the teacher
        options: Any = {"precision": settings.precision, "threads": settings.build_threads, "write": write}
        self.student = Workspace(collection, open_student(student, device), student, output, **options)
        self.workspaces = {"student": self.student}  # by role
        sparse, dimension = self.student.is_sparse, self.student.student.get_embedding_dimension()
        if sparse and (dims or settings.codes):
            raise ValueError("dims, codes: a sparse student has no first dimensions and no codes; leave them out")
        for role, name, load, folder in (
            ("sparse_student", sparse_student, partial(open_beside, self.student), SPARSE_FOLDER),
            ("base", base, open_student, BASE_FOLDER),
        ):
            if name is not None:
                self.workspaces[role] = Workspace(collection, load(name, device), name, output / folder, **options)
        self.learned = self.student if sparse else self.workspaces.get("sparse_student")
        exact = {"dense-exact": None if sparse else self.student, "learned-sparse": self.learned}
        exact["base"] = self.workspaces.get("base")
        self.exact = {key: space for key, space in exact.items() if space is not None}
        self.teacher_name = None if teacher == OWN and not has_own_maxsim(self.student.student) else teacher
        self.late_name = "own MaxSim" if teacher == OWN else "teacher"
        sizes, codes = list[int](), list[str]()
        if not sparse:
            settings.ann.check(dimension, len(collection.corpus))
            sizes = self._sizes(dims, dimension)
            codes = codes_for(self._trained("passage_bits")) if settings.codes is None else settings.codes
            check_codes(codes, [dimension or 1, *sizes], len(collection.corpus))
        self.plan = self._plan(sizes, codes)
        # That of the student and BM25: a single weight that is given is its own, and its passages are reranked.
        self.first_hybrid = next(key for key in self.plan if key in HYBRIDS)
        rows = [*self.plan, *runs]
        self.baseline = settings.measures.baseline or ("learned-sparse" if sparse else "dense-exact")
        if self.baseline not in rows:
            raise ValueError(f"measures.baseline: there is no row {self.baseline!r}; there are {', '.join(rows)}")
        if isinstance(settings.hybrid.alpha, dict) and (absent := settings.hybrid.alpha.keys() - set(self.plan)):
            raise ValueError(f"hybrid.alpha.{min(absent)}: this report has no such pair; leave it out")
        if taken := [name for name in runs if name in self.plan]:
            raise ValueError(f"runs.{taken[0]}: the report has a system of that name; give the run another.")

    def _sizes(self, dims: Sequence[int] | None, dimension: int | None) -> list[int]:
        """First dimensions to measure alone, the largest first: those asked for, or those the training recorded."""
        if dims is None:
            # Of a student that was cut after its training, those that are left.
            trained = self._trained("matryoshka_dims")
            dims = [one for one in trained if isinstance(one, int) and (dimension is None or one < dimension)]
        check_dims(dims, dimension)
        return sorted({size for size in dims if size != dimension}, reverse=True)

    def _trained(self, name: str) -> list[Any]:
        """A list among the settings that the student's training recorded, empty where there is none."""
        file = Path(self.student.name) / CLAIM_FILE
        found = read_json(file, "copy the student again.") if file.is_file() else {}
        return ((found.get("student") or {}).get("training") or {}).get(name) or []

    def _plan(self, sizes: Sequence[int], codes: Sequence[str]) -> dict[str, Callable[[], System]]:
        """The systems by key, in the order of the table, each made when it is called."""
        settings, dense, late = self.settings, not self.student.is_sparse, self.teacher_name is not None
        searched = late and len(self.collection.corpus) <= settings.late_interaction.max_passages
        rows: dict[str, tuple[Any, Callable[[str], System]]] = {  # whether there is one, and what makes it
            "bm25": (True, self._words),
            "bm25-expanded": (settings.expansion.path is not None, self._words),
            "dense-exact": (dense, self._exact),
            "dense-ann": (dense, self._approximate),
            "dense-engine": (dense and settings.engine.name is not None, self._engine),
            **{
                dense_name(code, size): (dense, partial(self._part, size, code))
                for size, code in [*product([None, *sizes], ["Flat", *codes])][1:]
            },
            "hybrid": (True, self._hybrid),
            "hybrid-expanded": (True, self._hybrid),
            "learned-sparse": (self.learned, self._exact),
            "learned-sparse-bm25": (True, self._hybrid),
            "learned-sparse-bm25-expanded": (True, self._hybrid),
            "dense-learned-sparse": (True, self._hybrid),
            "base": ("base" in self.workspaces, self._exact),
            "base-bm25": (True, self._hybrid),
            "teacher": (searched, self._exhaustive),
            "reranked": (late, self._reranked),
        }
        parts = [key for key, (there, _) in rows.items() if there]
        kept = [key for key in parts if all(part in parts for part in HYBRIDS.get(key, ()))]
        return {key: partial(rows[key][1], key) for key in kept}

    def claim(self) -> None:
        """Claim the folders of runs and times for all that they depend on."""
        settings = self.settings
        depends: dict[str, Any] = {**self.student.depends, "teacher": None}
        if settings.expansion.path is not None:
            depends["expansion"] = settings.expansion.depends()
        depends |= {role: space.depends["student"] for role, space in self.workspaces.items() if role != "student"}
        # Further splits may take some of the tuning queries, and be added when they take none.
        depends["tuning_queries"] = self.tuning and json_digest(self.tuning.queries)
        if self.teacher_name is not None:
            self.teacher = open_reranker(self.teacher_name, self.student)
            auto = settings.precision == "auto" and has_bfloat16(self.teacher.device)
            self.bf16 = settings.precision == "bf16" or auto
            depends["teacher"] = {**describe_teacher(self.teacher), "bf16": self.bf16}
        if "dense-engine" in self.plan:
            self.stored_engine = self.student.engine(settings.engine)
            depends["engine"] = {"rows": self.stored_engine.index.digest, "ef_search": settings.engine.ef_search}
        depends["settings"] = {
            "depth": settings.measures.depth,
            **self.collection.own_rule,
            "relevance": settings.measures.relevance,
            "measure": settings.measures.names[0],
            **{name: asdict(getattr(settings, name)) for name in ("hybrid", "ann", "late_interaction")},
        }
        self.depends = depends
        names: dict[str, str | None] = {f"{role}.weights": space.name for role, space in self.workspaces.items()}
        names |= {"teacher.weights": self.teacher_name}
        if "engine" in depends:
            names["engine.rows"] = settings.engine.name
        claim(self.output / "runs", depends, names)
        for name, split in self.collection.also.items():
            claim(self.output / "runs" / name, {**depends, "queries": json_digest(split.queries)}, names)
        claim(self.output / "costs", {**depends, "cost": asdict(settings.cost), "machine": machine_key()}, names)

    def _words(self, key: str) -> System:
        stored = self.student.bm25() if key == "bm25" else self.student.expanded(self.settings.expansion)
        if key == "bm25-expanded":
            self.notes.append(_expansion_note(stored.index.settings))
        return bm25_system(key, self.names[key], stored, self.depth)

    def _exact(self, key: str) -> System:
        space = self.exact[key]
        space.encode()
        stored = space.exact()
        if key == "learned-sparse":
            queries, index = space.encode_queries(self.test.queries), stored.index
            active = queries.nnz / queries.shape[0]
            self.active_dims = {"query_active_dims": active, "document_active_dims": index.active_dims}
            self.notes.append(
                f"Sparse student: {active:.1f} active dims a query, {index.active_dims:.1f} a passage, of "
                f"{index.dimension:,}; exact search of inverted lists, 8 bytes an active dim of a passage."
            )
        return student_system(key, _TITLES[key], space, stored, self.depth)

    def _approximate(self, key: str) -> System:
        """An approximate index, which hybrids take where "auto" would deploy it."""
        settings, tuning, count = self.settings.ann, self.tuning, len(self.collection.corpus)
        auto, factory = self.student.factory, settings.factory
        if factory == "auto":
            factory = "HNSW32" if auto == "Flat" else auto
            if auto == "Flat":
                self.notes.append(
                    f"At {count:,} passages exact search is the index to take (up to 50,000); the ANN index is there "
                    "to show what it would cost and lose."
                )
        stored = self._tuned(factory)
        index, source = stored.index, "passages" if tuning is None else f"{tuning.split} queries"
        if (tuned := index.tuning) is not None:
            shown = ", ".join(f"{name} {value:g}" for name, value in index.parameters.items())
            self.notes.append(
                f"{factory}: {shown}, chosen on {tuned['slice']} {source} for Recall@{tuned['k']} {tuned['recall']} "
                f"against exact search ({tuned['measured']:.3f} there)."
            )
        split = tuning.split if tuning is not None else None
        self.ann = {"factory": index.factory, "parameters": index.parameters, **(index.tuning or {}), "split": split}
        if auto != "Flat":
            self.deployed, self.names["dense-exact"] = key, f"dense ({index.factory})"
        return student_system(key, f"dense, ANN ({index.factory})", self.student, stored, self.depth)

    def _engine(self, key: str) -> System:
        stored = self.stored_engine
        index = stored.index
        how = f"{'graph' if index.uses_graph() else 'every passage'}, ef_search {index.ef_search}"
        self.notes.append(
            f"{index.engine}: table {index.name}, {how}; times include the wire, bytes are the engine's."
        )
        return student_system(key, f"dense, {index.engine}", self.student, stored, self.depth)

    def _part(self, size: int | None, code: str, key: str) -> System:
        """The student's vectors in codes, or their first dimensions, or both."""
        title, stored = f"dense{said_of(code, size)}", self._tuned(code, size)
        return student_system(key, title, self.student, stored, self.depth, size=size)

    def _tuned(self, factory: str, size: int | None = None) -> Stored[Any]:
        """A Faiss index, tuned on queries where there are some."""
        return self.student.dense(factory, size, tuning=self.tuning, recall=self.settings.ann.recall)

    def _hybrid(self, key: str) -> System:
        """`alpha * weighted + first`, alpha tuned where it is not given."""
        first, weighted = HYBRIDS[key]
        title = f"{self.names[first]} + {self.names[weighted]}"
        which = f"Hybrid {title}" if sum(name in HYBRIDS for name in self.plan) > 1 else "Hybrid"
        lists = [self.made[weighted], self.made[self.deployed if first == "dense-exact" else first]]
        settings, measures, tuning = self.settings.hybrid, self.settings.measures, self.tuning
        alpha = settings.weight(key, alone=key == self.first_hybrid)
        record: dict[str, Any] = {"fusion": "alpha", "alpha": alpha, "split": None, "normalize": settings.normalize}
        if alpha is not None:
            said = f"alpha {alpha:g} as it was given, tuned nowhere in this report."
        elif tuning is None:
            record["fusion"] = "ranks"
            said = "there is no dev or train query to tune alpha on; the two lists are fused by reciprocal ranks."
        else:
            on = self.experiment(tuning.split, Split(tuning.queries, tuning.qrels), write=lambda line: None)
            on.search(lists, self.output / "runs")
            found = tune_alpha(
                on.runs[lists[0].key, tuning.split],
                on.runs[lists[1].key, tuning.split],
                tuning.qrels,
                measures.names[0],
                normalize=settings.normalize,
                relevance=measures.relevance,
                ignore_identical_ids=False,  # they are out already
            )
            alpha, record = float(found), record | found.to_dict()
            record |= {"split": tuning.split, "left_out": tuning.left_out}
            left = f"; {tuning.left_out} with the text of a reported query left out" if tuning.left_out else ""
            said = (
                f"alpha * {self.names[weighted]} + {_NAMES[first]}, alpha {weight_text(alpha)} tuned for "
                f"{found.measure} on {len(tuning.queries):,} {tuning.split} queries (none of them reported{left})."
            )
        self.notes.append(f"{which}: {said}")
        self.hybrids[key] = record
        title = f"{title}, {'by rank' if alpha is None else f'alpha {weight_text(alpha)}'}"
        return hybrid_system(key, title, *lists, alpha=alpha, normalize=settings.normalize, depth=self.depth)

    def _exhaustive(self, key: str) -> System:
        """MaxSim of every passage, whose token vectors are encoded first where they are not there."""
        folder, begun = self.output / "tokens", time.perf_counter()
        depends = {"corpus": self.depends["corpus"], "teacher": self.depends["teacher"]}
        options: dict[str, Any] = {"bf16": self.bf16, "names": {"teacher.weights": self.teacher_name}}
        seconds_file, fresh = folder / "seconds.json", not has_shards(folder)
        tokens = encode_tokens(self.teacher, self.collection.corpus, folder, depends, write=self.write, **options)
        if fresh:
            write_json_atomic(seconds_file, {"seconds": time.perf_counter() - begun})
        self.made_tokens = Footprint(bytes_on_disk([*folder.glob("*.arrow")]), 0, read_seconds(seconds_file))
        mean, dim = float(tokens.lengths.mean()), int(tokens.tokens.shape[1])
        self.tokens, self.measured = tokens, {"dimension": dim, "tokens_per_passage": mean}
        self._late_note(
            f"{mean:.1f} token vectors a passage of {dim} dimensions in float16 on disk; exhaustive search multiplies "
            "float32 copies in memory; reranking reads the float16."
        )

        def find(batch: Batch) -> Batch:
            return batch.found(dict(zip(batch.queries, tokens.search(batch.vectors, self.depth), strict=True)))

        stages = {**by_token(self.teacher, self.bf16), "MaxSim": find}
        footprint = self.made_tokens + Footprint(memory=tokens.block_bytes)
        title = f"{self.late_name}, every passage by MaxSim"
        return System(key, title, stages, kind="late interaction", footprint=footprint)

    def _reranked(self, key: str) -> System:
        """The best passages of the hybrid scored again, encoded anew for every query where no vectors are kept."""
        first, corpus, settings = self.made[self.first_hybrid], self.collection.corpus, self.settings.late_interaction
        top, model = min(settings.rerank, self.settings.measures.depth), self.teacher
        tokens: Any = self.tokens

        def kept(batch: Batch) -> Batch:
            reranked = {}
            for query, vectors in zip(batch.queries, batch.vectors, strict=True):
                hits = list(batch.runs[-1].get(query, {}))
                reranked[query] = above(tokens.rerank(vectors, hits[:top]), hits[top:])
            return batch.joined(reranked)

        def anew(batch: Batch) -> Batch:
            pool = {name for hits in batch.runs[-1].values() for name, _ in rank(hits)[:top]}
            texts = dict(zip(pool, corpus[[rows[name] for name in pool]]["text"], strict=True)) if pool else {}
            return batch.joined(rerank_run(model, batch.runs[-1], texts, batch.queries, top, bf16=self.bf16))

        title = f"{self.late_name} over the hybrid's top {top}"
        if tokens is not None:
            own = {**by_token(model, self.bf16), f"MaxSim of {top}": kept}
            made = self.made_tokens + Footprint(memory=tokens.tokens.nbytes)
        else:
            self._late_note(
                f"only reranking, passages encoded anew for every query: {len(corpus):,} passages are more than "
                f"late_interaction.max_passages ({settings.max_passages:,})."
            )
            title, own = f"{title}, passages encoded anew", {_ANEW: anew}
            rows = {name: row for row, name in enumerate(corpus["id"])}
            held = sum(len(text.encode()) for text in corpus["text"])
            made = Footprint(held, held)
        stages, footprint = {**first.stages, **own}, first.footprint + made
        return System(key, title, stages, (first.key,), len(own), kind="late interaction", footprint=footprint)

    def _late_note(self, note: str) -> None:
        self.notes.append(f"{self.late_name[0].upper()}{self.late_name[1:]}: {note}")

    def experiment(self, name: str, split: Split, **options: Any) -> Experiment:
        """An experiment on one split."""
        measures, own = self.settings.measures, self.collection.skips_own
        options = {"write": self.write, "ignore_identical_ids": own, **options}
        return Experiment({name: split}, measures.names, measures.depth, measures.relevance, **options)


def _expansion_note(settings: Mapping[str, Any]) -> str:
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
