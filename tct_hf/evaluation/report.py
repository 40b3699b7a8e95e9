"""A report: retrieval of one collection with many systems side by side, in effect, time and space.

`build_report` makes one. report.json is what its dataclasses hold; docs/evaluation.md describes the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tct_hf.evaluation.cost import BYTES, MILLISECONDS
from tct_hf.evaluation.measures import relevant_from
from tct_hf.evaluation.plots import TradeOff, missing_plot, plot_trade_off
from tct_hf.evaluation.tables import difference_table, markdown_table, mean_rows, milliseconds, whole
from tct_hf.files import command, read_json, write_json_atomic, write_text_atomic

JSON_FILE, MARKDOWN_FILE, LATENCY_FILE, STORAGE_FILE = "report.json", "report.md", "latency.png", "storage.png"
FORMAT = 1
SIGNIFICANT = 0.05
_SPEEDS = ("queries_per_second", "build_seconds")
Tested: TypeAlias = tuple[str, Mapping[str, Any], Mapping[str, Any] | None]


@dataclass(frozen=True)
class SystemResult:
    """One system of a report; the fields are those of report.json."""

    key: str
    title: str
    kind: str
    effectiveness: dict[str, dict[str, float]]
    significance: dict[str, dict[str, float]] | None
    cost: dict[str, Any] | None
    run: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """A finished comparison; the fields are those of report.json."""

    collection: dict[str, Any]
    models: dict[str, Any]
    measures: list[str]
    relevance: int
    depth: int
    baseline: str
    tuning: dict[str, Any]
    systems: list[SystemResult]
    machine: dict[str, Any]
    threads: dict[str, int]
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]
    also: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read report.json, or the one in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another format.
        """
        file = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such report; make one with {command('evaluate')}")
        content = read_json(file, "make the report again", needs=["format", "systems"])
        if (found := content.pop("format")) != FORMAT:
            raise ValueError(f"{file}: format {found!r} where this version reads {FORMAT}; make the report again")
        try:
            content["systems"] = [SystemResult(**system) for system in content["systems"]]
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{file}: a damaged report ({error}); make it again") from error

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds."""
        return {"format": FORMAT, **asdict(self)}

    def system(self, key: str) -> SystemResult:
        """The system of a key.

        Raises:
            KeyError: the report has no such system.
        """
        found = {system.key: system for system in self.systems}
        if key not in found:
            raise KeyError(f"no system {key!r} in this report; there are {', '.join(found)}")
        return found[key]

    def table(self) -> str:
        """Effectiveness, latency and storage, one line a system, as a Markdown table.

        The best of each measure is bold; a dagger marks what differs from the baseline.
        """
        rows = [["system", *self.measures, "p50 ms", "bytes a passage"]]
        for system, cells in zip(self.systems, _effect_rows(self._tested(), self.measures), strict=True):
            costs = ["", ""]
            if (cost := system.cost) is not None:
                costs = [milliseconds(cost["latency"]["total"]["p50"]), whole(cost["disk_bytes_per_passage"])]
            rows.append([*cells, *costs])
        return markdown_table(rows)

    def cost_table(self) -> str:
        """Latency, throughput, storage and building time, one line a system, as a Markdown table."""
        heads = ["system", "p50 ms", "p95 ms", "p99 ms", "timed", "queries/s"]
        rows = [[*heads, "B/passage, disk", "B/passage, memory", "build s"]]
        for system in self.systems:
            if (cost := system.cost) is not None:
                total = cost["latency"]["total"]
                latency = [milliseconds(total[name]) for name in ("p50", "p95", "p99")]
                sizes = [whole(cost[f"{where}_bytes_per_passage"]) for where in ("disk", "memory")]
                rate, build = ("?" if cost[name] is None else f"{cost[name]:,.1f}" for name in _SPEEDS)
                rows.append([system.title, *latency, str(total["queries"]), rate, *sizes, build])
        return markdown_table(rows)

    def task_table(self, measure: str = "nDCG@10") -> str:
        """A measure of each system on mteb's tasks, one line a task and their mean, as a Markdown table."""
        figures = {name: [one[measure] for one in task["systems"].values()] for name, task in self.tasks.items()}
        if len(figures) > 1:
            figures["mean"] = [sum(column) / len(column) for column in zip(*figures.values(), strict=True)]
        keys = next(iter(self.tasks.values()))["systems"]
        heads = [self.system(key).title.split(", ")[0] for key in keys]  # without the weight of this collection
        rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in figures.items()]
        return markdown_table([[measure, *heads], *rows])

    def _tested(self, split: str | None = None) -> dict[str, Tested]:
        """Title, effectiveness and significance of each system by key, of a further split where it is named."""
        if split is None:
            return {one.key: (one.title, one.effectiveness, one.significance) for one in self.systems}
        titles, found = {one.key: one.title for one in self.systems}, self.also[split]["systems"]
        return {key: (titles[key], one["effectiveness"], one["significance"]) for key, one in found.items()}

    def significance_table(self, measure: str | None = None) -> str:
        """Every system against the baseline in one measure, the first by default, as a Markdown table."""
        return _significance(self._tested(), measure or self.measures[0], self.baseline)

    def markdown(self) -> str:
        """What report.md holds."""
        collection, base, others = self.collection, self.system(self.baseline).title, len(self.systems) - 1
        threads = ", ".join(f"{name} {count}" for name, count in self.threads.items()) or "not known"
        parts = [
            f"# {collection['name']}: {collection['passages']:,} passages, {collection['queries']:,} "
            f"{collection['split']} queries",
            self.table(),
            f"Bold: the best. †: differs from {base} (paired randomisation test, p < {SIGNIFICANT}, "
            f"Holm-corrected over {others} systems). p50 ms: median time of a query from text to ranking. "
            "Bytes a passage: of all that searching needs on disk, models aside.\n"
            f"{_grades(self.measures, self.relevance)} Runs hold {self.depth} passages a query.",
            "\n".join(f"- {note}" for note in self.notes),
        ]
        splits = [("", self._tested(), self.measures)]
        for name, split in self.also.items():
            found, measures = self._tested(name), split["measures"]
            splits.append((f"{name} ({split['queries']:,} queries), ", found, measures))
            lacking = {found[key][0]: one["run"]["missing_queries"] for key, one in split["systems"].items()}
            said = [f"†: differs from {base}, as above. {_grades(measures, split['relevance'])}"]
            said += [f"- {one}: no passage for {n:,} queries, which count as 0." for one, n in lacking.items() if n]
            parts += [f"## {name}: {split['queries']:,} queries"]
            parts += [markdown_table([["system", *measures], *_effect_rows(found, measures)]), "\n".join(said)]
        if self.tasks:
            version = ", ".join(sorted({task["mteb"] for task in self.tasks.values()}))
            how = f"Measured by mteb {version}. In a hybrid both lists have the same spread; nothing is tuned."
            parts += ["## Tasks of mteb", self.task_table(), how]
        stages = {
            system.title: ", ".join(f"{n} {milliseconds(one['p50'])}" for n, one in latency.items() if n != "total")
            for system in self.systems
            if system.cost is not None and len(latency := system.cost["latency"]) > 2
        }
        parts += [
            "## Cost",
            self.cost_table(),
            "From text to ranking, one query at a time after warm-up; queries/s in batches. Models take no part in "
            "the bytes. Building includes encoding the corpus, with the threads of the run.\n"
            f"CPU threads while timing: {threads}. {self.machine['processor']}, {self.machine['cpu_count']} cores, "
            f"models on {self.machine['device']}.",
            "Median milliseconds of each stage:",
            "\n".join(f"- {title}: {figures}" for title, figures in stages.items()),
        ]
        for head, found, measures in splits:
            for measure in measures:
                parts += [f"## Significance, {head}{measure}", _significance(found, measure, self.baseline)]
        over = f", Holm-corrected over {others} systems" if others > 1 else ""
        models = []
        for role, model in self.models.items():
            if model is not None:
                known = {name: value for name, value in model.items() if name != "name" and value is not None}
                figures = ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in known.items())
                models.append(f"- {role}: {model['name']} ({figures})")
        parts += [
            f"{collection['queries']:,} queries where no other number stands; ±: standard error of the mean; "
            f"two-sided paired tests against {base}{over}.",
            "## Models",
            "\n".join(models),
            f"Plots: {LATENCY_FILE}, {STORAGE_FILE}. All figures: {JSON_FILE}. Runs (TREC format): runs/.\n",
        ]
        return "\n\n".join(part for part in parts if part)

    def save(self, folder: str | Path) -> list[str]:
        """Write report.json, report.md and the plots to a folder.

        Returns:
            A line for each plot that could not be made: matplotlib is not installed, or there is nothing to plot.
        """
        folder = Path(folder)
        write_json_atomic(folder / JSON_FILE, self.to_dict())
        write_text_atomic(folder / MARKDOWN_FILE, self.markdown())
        measure, name, problems = self.measures[0], self.collection["name"], []
        for file, xlabel, value in (
            (LATENCY_FILE, MILLISECONDS, lambda cost: cost["latency"]["total"]["p50"]),
            (STORAGE_FILE, BYTES, lambda cost: cost["disk_bytes_per_passage"]),
        ):
            points = [
                TradeOff(one.title, value(one.cost), found["mean"], found["standard_error"], one.kind)
                for one in self.systems
                if one.cost is not None and (found := one.effectiveness[measure])
            ]
            labels = {"xlabel": xlabel, "ylabel": measure, "title": name}
            problems.append(missing_plot(plot_trade_off, points, folder / file, **labels))
        return [problem for problem in problems if problem]

    def __str__(self) -> str:
        return self.table()


def _effect_rows(systems: Mapping[str, Tested], measures: Sequence[str]) -> list[list[str]]:
    marked = [
        [name for name in measures if tests and tests[name]["p_randomisation_holm"] < SIGNIFICANT]
        for _, _, tests in systems.values()
    ]
    means = [(title, {name: effects[name]["mean"] for name in measures}) for title, effects, _ in systems.values()]
    return mean_rows(means, measures, marked)


def _significance(systems: Mapping[str, Tested], measure: str, baseline: str) -> str:
    rows = []
    for key in (baseline, *(key for key in systems if key != baseline)):
        title, effects, tests = systems[key]
        mean = f"{effects[measure]['mean']:.4f} ± {effects[measure]['standard_error']:.4f}"
        shown = f"{title} (baseline)" if key == baseline else title
        rows.append((shown, mean, None if tests is None else tests[measure]))
    return difference_table(measure, rows)


def _grades(measures: Sequence[str], relevance: int) -> str:
    grades: dict[int | None, list[str]] = {}
    for measure in measures:
        grades.setdefault(relevant_from(measure, relevance), []).append(measure)
    parts = [f"from grade {grade} on in {', '.join(names)}" for grade, names in grades.items() if grade is not None]
    said = [f"A passage is relevant {', '.join(parts)}."] if parts else []
    if None in grades:
        said.append(f"Grades are gains in {', '.join(grades[None])}.")
    return " ".join(said)


def _figure(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
