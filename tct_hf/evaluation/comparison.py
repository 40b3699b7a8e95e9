"""An experiment: systems run on sets of queries, the runs kept on disk, evaluated, fused with BM25, shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.measures import Evaluation, evaluate_run, standard_error
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import shorten
from tct_hf.evaluation.tune_alpha import tune_alpha
from tct_hf.files import LOG_FILE, write_json_atomic
from tct_hf.retrieval.fusion import equal_spread_alpha, fuse
from tct_hf.retrieval.runs import Run, rank, read_run, write_run

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


def run_systems(
    systems: Sequence[System],
    queries: Mapping[str, Mapping[str, str]],
    folder: str | Path,
    *,
    write: Callable[[str], None] = print,
) -> dict[tuple[str, str], Run]:
    """Run every system on every set of queries, or read the run that an earlier call has left in the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merged = {f"{name}\0{query}": text for name, part in queries.items() for query, text in part.items()}
    runs: dict[tuple[str, str], Run] = {}
    for place, system in enumerate(systems, 1):
        files = {name: folder / f"{system.key}.{name}.trec" for name in queries}
        if not all(file.is_file() for file in files.values()):
            write(f"  search {place} of {len(systems)}: {system.title}")
            first = [
                {f"{name}\0{query}": hits for name in queries for query, hits in runs[key, name].items()}
                for key in system.of
            ]
            found = system.run(merged, *first)  # the corpus is encoded once, for all sets
            for name, file in files.items():
                prefix = f"{name}\0"
                part = {query.removeprefix(prefix): hits for query, hits in found.items() if query.startswith(prefix)}
                write_run(part, file, system.key)
        # As read: floats and order do not depend on whether a run was there.
        runs |= {(system.key, name): read_run(file) for name, file in files.items()}
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
    tune: bool = True,
) -> dict[str, float]:
    """Add `alpha * BM25 + system` of some systems to their runs, (key, split) to run, and write it beside them.

    Alpha is tuned on dev for `measure`, where dev is judged and searched; otherwise, and always without `tune`, as a
    run without labels must, both lists have the same spread. Returns the key of each fused system with its alpha.
    """
    alphas: dict[str, float] = {}
    for key in keys:
        name = fused_key(key)
        if tune and "dev" in bm25 and collection.splits["dev"].qrels:
            alpha: float = tune_alpha(bm25["dev"], runs[key, "dev"], collection.splits["dev"].qrels, measure)
        else:
            split = [*bm25][-1]
            alpha = equal_spread_alpha(bm25[split], runs[key, split])
        alphas[name] = float(alpha)
        for split, words in bm25.items():
            runs[name, split] = fuse(words, runs[key, split], alpha, k=depth)
            if not (file := folder / f"{name}.{split}.trec").is_file():
                write_run(runs[name, split], file, name)
    return alphas


def show_examples(collection: Collection, run: Run, *, count: int, depth: int = 3) -> str:
    """Questions of the test split, evenly spaced in the order of ids, and a run's best passages, the answer marked."""
    test = collection.splits["test"]
    names = sorted(test.queries)
    count = min(count, len(names))
    chosen = [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
    hits = {query: rank(run.get(query, {}))[:depth] for query in chosen}
    wanted = {passage for found in hits.values() for passage, _ in found}
    rows = [row for row, name in enumerate(collection.corpus["id"]) if name in wanted]
    texts = {one["id"]: one["text"] for one in map(collection.corpus.__getitem__, rows)}
    lines = []
    for query in chosen:
        answers = [passage for passage, grade in test.qrels[query].items() if grade > 0]
        lines.append(f'Question: "{test.queries[query]}"')
        for place, (passage, score) in enumerate(hits[query], 1):
            lines.append(f"  {place}. {passage} ({score:.1f}){'  <- the answer' if passage in answers else ''}")
            lines.append(f"     {shorten(texts[passage], 100)}")
        if not any(passage in answers for passage, _ in hits[query]):
            lines.append(f"  the answer is {', '.join(answers)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def effectiveness(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Measure to mean and standard error."""
    return {
        measure: {"mean": mean, "standard_error": standard_error(list(evaluation.per_query[measure].values()))}
        for measure, mean in evaluation.mean.items()
    }


def write_metrics(path: str | Path, evaluations: Mapping[str, Mapping[str, Evaluation]], **extra: Any) -> None:
    """Write means and standard errors, by set of queries and system key, and what is `extra`, as JSON."""
    measured = {name: {key: effectiveness(one) for key, one in part.items()} for name, part in evaluations.items()}
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
    path = Path(folder) / LOG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
