"""An experiment: systems run on judged queries, the runs kept on disk, fused with BM25, measured and tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.collection import Split
from tct_hf.evaluation.measures import Evaluation, check_measures, evaluate_run, standard_error
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.tables import shorten
from tct_hf.evaluation.tune_alpha import tune_alpha
from tct_hf.files import LOG_FILE, read_json, write_json_atomic
from tct_hf.retrieval.fusion import equal_spread_alpha, fuse
from tct_hf.retrieval.runs import Run, rank, read_run, without_own, write_run

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


@dataclass
class Experiment:
    """Systems on the queries of some splits, one search each: :meth:`search`, then :meth:`evaluate`.

    Args:
        measures: ir-measures names, the first one tuned for.
        ignore_identical_ids: leave a passage with the query's own id out of its ranking; systems then find one passage
            more than `depth`, see `Collection.reach`.
        runs: (key of the system, split) to run.
        titles: key of a system to its title, in the order of the search.
    """

    splits: dict[str, Split]
    measures: Sequence[str]
    depth: int
    relevance: int = 1
    ignore_identical_ids: bool = False
    write: Callable[[str], None] = print
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, collection: Collection, *args: Any, splits: Sequence[str] | None = None, **options: Any) -> Experiment:
        """An experiment on a collection, by its rule on the queries' own ids, on all splits but train by default."""
        names = [name for name in collection.splits if name != "train"] if splits is None else splits
        judged = {name: collection.splits[name] for name in names if name in collection.splits}
        return cls(judged, *args, **options | {"ignore_identical_ids": collection.skips_own})

    def search(self, systems: Sequence[System], folder: Path) -> None:
        """Run every system on all queries, or read the runs that an earlier call has left in the folder."""
        asked = {name: split.queries for name, split in self.splits.items()}
        merged = {f"{name}\0{query}": text for name, part in asked.items() for query, text in part.items()}
        for place, system in enumerate(systems, 1):
            files = {name: folder / f"{system.key}.{name}.trec" for name in self.splits}
            if not all(file.is_file() for file in files.values()):
                self.write(f"  search {place} of {len(systems)}: {system.title}")
                first = [
                    {f"{name}\0{query}": hits for name in files for query, hits in self.runs[key, name].items()}
                    for key in system.of
                ]
                found = system.run(merged, *first)  # the corpus is encoded once, for all splits
                for name, file in files.items():
                    own = {query: found[f"{name}\0{query}"] for query in asked[name] if f"{name}\0{query}" in found}
                    write_run(without_own(own, self.depth) if self.ignore_identical_ids else own, file, system.key)
            # As read: floats and order do not depend on whether a run was there.
            self.runs |= {(system.key, name): read_run(file) for name, file in files.items()}
            self.titles[system.key] = system.title

    def fuse_with_bm25(self, keys: Sequence[str], folder: Path, *, tune: bool = True) -> dict[str, float]:
        """Add `alpha * BM25 + system` of some systems to the runs; the key of each fused system with its alpha.

        Alpha is tuned on dev, where it is judged; otherwise, and always without `tune`, as a run without labels must,
        both lists have the same spread.
        """
        alphas: dict[str, float] = {}
        dev = self.splits["dev"].qrels if tune and "dev" in self.splits else {}
        tuned_on = "dev" if dev else [*self.splits][-1]
        for key in keys:
            name, lists = fused_key(key), (self.runs["bm25", tuned_on], self.runs[key, tuned_on])
            # The queries' own passages are out already.
            tuned = tune_alpha(*lists, dev, self.measures[0], ignore_identical_ids=False) if dev else None
            alpha = alphas[name] = equal_spread_alpha(*lists) if tuned is None else float(tuned)
            for split in self.splits:
                self.runs[name, split] = fuse(self.runs["bm25", split], self.runs[key, split], alpha, k=self.depth)
                if not (file := folder / f"{name}.{split}.trec").is_file():
                    write_run(self.runs[name, split], file, name)
        return alphas

    def evaluate(self) -> dict[str, dict[str, Evaluation]]:
        """Measure every run on the judgements of its split: split to key of the system to evaluation."""
        found: dict[str, dict[str, Evaluation]] = {}
        for (key, split), run in self.runs.items():
            qrels = self.splits[split].qrels
            rules: dict[str, Any] = {"relevance": self.relevance, "ignore_identical_ids": self.ignore_identical_ids}
            found.setdefault(split, {})[key] = evaluate_run(run, qrels, self.measures, **rules)
        return found


def fused_key(key: str) -> str:
    """The key of a system fused with BM25."""
    return f"{key}-bm25"


def check_evaluation(collection: Collection, measures: Sequence[str], depth: int) -> None:
    """Refuse before any training what would stop the evaluation after it: a measure, the depth, an id."""
    check_measures(measures, depth, setting="evaluation.depth")
    check_ids(collection)


def check_ids(collection: Collection) -> None:
    """Refuse ids of passages and queries that a TREC run can't hold."""
    splits = [*collection.splits.values(), *collection.also.values()]
    for what, ids in (("passage", collection.corpus["id"]), *(("query", split.queries) for split in splits)):
        for one in ids:
            if not one or one.split() != [one]:
                raise ValueError(f"The {what} id {one!r} has white space, which a TREC run can't hold: rename it.")


def show_examples(collection: Collection, run: Run, *, count: int, depth: int = 3) -> str:
    """Questions of the test split, evenly spaced in the order of ids, and a run's best passages, the answer marked."""
    test, rows = collection.splits["test"], {name: row for row, name in enumerate(collection.corpus["id"])}
    names = sorted(test.queries)
    count = min(count, len(names))
    shown = []
    for query in (names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)):
        answers = [passage for passage, grade in test.qrels[query].items() if grade > 0]
        hits = rank(run.get(query, {}))[:depth]
        lines = [f'Question: "{test.queries[query]}"']
        for place, (passage, score) in enumerate(hits, 1):
            lines.append(f"  {place}. {passage} ({score:.1f}){'  <- the answer' if passage in answers else ''}")
            lines.append(f"     {shorten(collection.corpus[rows[passage]]['text'], 100)}")
        if not any(passage in answers for passage, _ in hits):
            lines.append(f"  the answer is {', '.join(answers)}")
        shown.append("\n".join(lines))
    return "\n\n".join(shown)


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


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The training log beside a model, empty where there is none."""
    path = Path(folder) / LOG_FILE
    return read_json(path, "copy it again, or delete it.", kind=list) if path.is_file() else []
