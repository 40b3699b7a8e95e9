"""Systems side by side on the same queries: runs, one table, examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.measures import Evaluation, evaluate_run
from tct_hf.evaluation.tune_alpha import tune_alpha
from tct_hf.files import write_json_atomic
from tct_hf.retrieval.fusion import equal_spread_alpha, fuse
from tct_hf.retrieval.runs import Run, rank, read_run, write_run

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


@dataclass(frozen=True)
class System:
    """A system of the comparison.

    Args:
        key: of its run's file name and in the metrics.
        title: in the table.
        search: from queries, id to text, and the runs of the systems in `of`, to a run.
        of: keys of systems before it whose passages it puts in another order.
    """

    key: str
    title: str
    search: Callable[..., Run]
    of: tuple[str, ...] = ()


def run_systems(
    systems: Sequence[System],
    queries: Mapping[str, Mapping[str, str]],
    folder: str | Path,
    *,
    write: Callable[[str], None] = print,
) -> dict[tuple[str, str], Run]:
    """Run every system on every set of queries, or read the run where an earlier call has left it.

    Args:
        systems: to run.
        queries: name of a set ("dev", "test") to its queries, id to text.
        folder: of the runs, one TREC file each.
        write: takes lines of progress.

    Returns:
        (key, set) to run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merged = {f"{name}\0{query}": text for name, part in queries.items() for query, text in part.items()}
    runs: dict[tuple[str, str], Run] = {}
    for place, system in enumerate(systems, 1):
        files = {name: folder / f"{system.key}.{name}.trec" for name in queries}
        if not all(file.is_file() for file in files.values()):
            write(f"  {place} of {len(systems)}: {system.title}")
            first = [
                {f"{name}\0{query}": hits for name in queries for query, hits in runs[key, name].items()}
                for key in system.of
            ]
            found = system.search(merged, *first)  # the corpus is encoded once, for all sets
            for name, file in files.items():
                prefix = f"{name}\0"
                part = {query.removeprefix(prefix): hits for query, hits in found.items() if query.startswith(prefix)}
                write_run(part, file, system.key)
        for name, file in files.items():
            runs[system.key, name] = read_run(file)
    return runs


def fused_key(key: str) -> str:
    """The key of a system fused with BM25."""
    return f"{key}-bm25"


def fuse_with_bm25(
    keys: Sequence[str],
    runs: dict[tuple[str, str], Run],
    bm25: Mapping[str, Run],
    collection: Collection,
    measure: str,
    *,
    depth: int,
    folder: Path,
) -> dict[str, float]:
    """Add `alpha * BM25 + system` of some systems to their runs, and write it beside them.

    Alpha is tuned on dev where dev is judged and searched; otherwise both lists have the same spread.

    Args:
        keys: of the systems.
        runs: (key, split) to run; the fused runs are added.
        bm25: split to BM25's run.
        collection: whose dev queries are judged.
        measure: that alpha is tuned for.
        depth: passages a query.
        folder: of the runs.

    Returns:
        Key of the fused system to alpha.
    """
    alphas: dict[str, float] = {}
    for key in keys:
        name = fused_key(key)
        if "dev" in bm25 and collection.splits["dev"].qrels:
            alpha: float = tune_alpha(bm25["dev"], runs[key, "dev"], collection.splits["dev"].qrels, measure)
        else:
            split = [*bm25][-1]
            alpha = equal_spread_alpha(bm25[split], runs[key, split])
        alphas[name] = float(alpha)
        for split, words in bm25.items():
            runs[name, split] = fuse(words, runs[key, split], alpha, k=depth)
            file = folder / f"{name}.{split}.trec"
            if not file.is_file():
                write_run(runs[name, split], file, name)
    return alphas


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over queries."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def table(rows: Sequence[tuple[str, Evaluation]], measures: Sequence[str]) -> str:
    """A Markdown table, one line a system, the best of each column in bold.

    Args:
        rows: title and evaluation of each system.
        measures: columns.
    """
    best = {measure: max(evaluation.mean[measure] for _, evaluation in rows) for measure in measures}
    widths = [max(len("**0.000**"), len(measure)) for measure in measures]
    first = max(len("system"), *(len(title) for title, _ in rows))
    heads = [f"{measure:>{width}}" for measure, width in zip(measures, widths, strict=True)]
    lines = [
        f"| {'system':{first}} | " + " | ".join(heads) + " |",
        f"|{'-' * (first + 2)}|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|",
    ]
    for title, evaluation in rows:
        cells = []
        for measure, width in zip(measures, widths, strict=True):
            value = f"{evaluation.mean[measure]:.3f}"
            value = f"**{value}**" if evaluation.mean[measure] == best[measure] else value
            cells.append(f"{value:>{width}}")
        lines.append(f"| {title:{first}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_examples(collection: Collection, run: Run, *, count: int, depth: int = 3) -> str:
    """Questions of the test split and the best passages a run has for them, the known answer marked.

    The questions are evenly spaced in the order of their ids, so that nobody has picked them.

    Args:
        collection: of the run.
        run: to show.
        count: questions.
        depth: passages a question.
    """
    test = collection.splits["test"]
    names = sorted(test.queries)
    count = min(count, len(names))
    chosen = [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
    hits = {query: rank(run.get(query, {}))[:depth] for query in chosen}
    wanted = {passage for found in hits.values() for passage, _ in found}
    texts = {
        passage: text
        for batch in collection.corpus.iter(1000)
        for passage, text in zip(batch["id"], batch["text"], strict=True)
        if passage in wanted
    }
    lines = []
    for query in chosen:
        lines.append(f'Question: "{test.queries[query]}"')
        for place, (passage, score) in enumerate(hits[query], 1):
            mark = "  <- the answer" if test.qrels[query].get(passage, 0) > 0 else ""
            lines.append(f"  {place}. {passage} ({score:.1f}){mark}")
            lines.append(f"     {shorten(texts[passage], 100)}")
        if not any(test.qrels[query].get(passage, 0) > 0 for passage, _ in hits[query]):
            answers = ", ".join(passage for passage, grade in test.qrels[query].items() if grade > 0)
            lines.append(f"  the answer is {answers}")
        lines.append("")
    return "\n".join(lines).rstrip()


def shorten(text: str, width: int) -> str:
    """The start of a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def write_metrics(path: str | Path, evaluations: Mapping[str, Mapping[str, Evaluation]], **extra: Any) -> None:
    """Write means and standard errors as JSON.

    Args:
        path: file.
        evaluations: set of queries to system key to evaluation.
        extra: more to record, JSON-ready.
    """
    measured = {
        name: {
            key: {
                measure: {"mean": mean, "standard_error": standard_error(list(evaluation.per_query[measure].values()))}
                for measure, mean in evaluation.mean.items()
            }
            for key, evaluation in part.items()
        }
        for name, part in evaluations.items()
    }
    write_json_atomic(path, {"measured": measured, **extra})


def evaluate_all(
    runs: Mapping[tuple[str, str], Run], collection: Collection, measures: Sequence[str]
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate every run on the judgements of its split: split to system key to evaluation."""
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for (key, split), run in runs.items():
        evaluations.setdefault(split, {})[key] = evaluate_run(run, collection.splits[split].qrels, measures)
    return evaluations


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The training log beside a model, empty where there is none."""
    from tct_hf.files import LOG_FILE

    path = Path(folder) / LOG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
