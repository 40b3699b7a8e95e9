"""Sparse, dense, hybrid and late-interaction retrieval of one collection side by side: effect, time, space.

`build_report` (in `tct_hf.evaluation.reporting`) makes a report, `Report.save` writes it to a folder:

report.md       for people
report.json     all of it, for programs (a model card, say); the layout is below
latency.png     effectiveness against milliseconds a query
storage.png     effectiveness against bytes a passage
runs/           the runs, `<system>.<split>.trec`; those of further splits in a folder each

report.json, format 1; a figure that is not known is null:

format          1
collection      name, passages, split, queries, fingerprint (sha256 of texts and judgements, and more)
models          student: name, weights_sha256, parameters, dimension, similarity, encoded_in ("bf16" or "fp32"), and of
                a sparse one query_active_dims, document_active_dims (means);
                sparse_student: the same of one beside a dense student, where there is one;
                base: the same of the base as it is, where it is reported;
                teacher: name ("own" of the student's own token vectors), weights_sha256, parameters, dimension,
                tokens_per_passage, encoded_in; or null
measures        ir-measures names, the first one plotted
relevance       grade from which a passage is relevant
depth           passages a query in the runs
baseline        key of the system that the others are tested against
tuning          hybrid: fusion ("alpha" or "ranks"), alpha, split, queries, left_out, measure, value, curve, normalize;
                hybrids: the same by the key of each hybrid's system, where there are several;
                ann: factory, parameters, recall wanted ("recall") and measured, k, source, slice, split; null of a
                sparse student
systems         list, in the order of the table:
  key, title, kind ("sparse", "learned sparse", "dense", "hybrid", "late interaction", "other")
  effectiveness   measure: mean, standard_error
  significance    measure: mean, difference, better, worse, p_randomisation, p_t_test, and both Holm-corrected
                  (..._holm); null for the baseline, and where a single query is judged
  cost            latency: stage, and "total": p50, p95, p99, mean (milliseconds), queries (timed);
                  queries_per_second, batch_size, disk_bytes, disk_bytes_per_passage, memory_bytes,
                  memory_bytes_per_passage, build_seconds, passages, load_average (of the machine, before timing);
                null for runs from elsewhere
  run             file, beside report.json or as it was given; sha256; missing_queries
machine         processor, memory_bytes, cpu_count, platform, device
threads         library: CPU threads while timing
environment     versions of packages and Python
settings        as they were given
notes           lines for people
also            by the name of each further split: queries, measures, relevance, systems: effectiveness, significance
                and run, as above, by the key of the system
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tct_hf.evaluation.measures import relevant_from
from tct_hf.evaluation.plots import TradeOff, plot_trade_off
from tct_hf.evaluation.settings import LEARNED as LEARNED
from tct_hf.evaluation.settings import LEARNED_BM25 as LEARNED_BM25
from tct_hf.evaluation.tables import difference_cells, markdown_table, mean_rows, milliseconds, whole
from tct_hf.files import command, write_json_atomic, write_text_atomic

JSON_FILE, MARKDOWN_FILE, LATENCY_FILE, STORAGE_FILE = "report.json", "report.md", "latency.png", "storage.png"
FORMAT = 1
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class SystemResult:
    """One system of a report; the fields are those of report.json, in the module's docstring."""

    key: str
    title: str
    kind: str
    effectiveness: dict[str, dict[str, float]]
    significance: dict[str, dict[str, float]] | None
    cost: dict[str, Any] | None
    run: dict[str, Any]

    def differs(self, measure: str) -> bool:
        """Whether the randomisation test, Holm-corrected, tells it from the baseline."""
        return self.significance is not None and self.significance[measure]["p_randomisation_holm"] < SIGNIFICANT


@dataclass(frozen=True)
class Report:
    """A finished comparison; the fields are those of report.json, in the module's docstring."""

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

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report.

        Args:
            path: report.json, or the folder it is in.

        Returns:
            The report.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another format.
        """
        file = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such report; make one with {command('evaluate')}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = content.pop("format")
            if found == FORMAT:
                content["systems"] = [SystemResult(**system) for system in content["systems"]]
                return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file}: no report of this package, or a damaged one ({error!r}); make it again"
            ) from error
        raise ValueError(f"{file}: format {found!r} where this version reads {FORMAT}; make the report again")

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds."""
        return {"format": FORMAT, **asdict(self)}

    def system(self, key: str) -> SystemResult:
        """The system of a key.

        Raises:
            KeyError: the report has no such system.
        """
        for system in self.systems:
            if system.key == key:
                return system
        raise KeyError(f"no system {key!r} in this report; there are {', '.join(one.key for one in self.systems)}")

    def table(self) -> str:
        """Effectiveness, latency and storage, one line a system, as a Markdown table.

        The best of each measure is bold; a dagger marks what differs from the baseline.
        """
        rows = [["system", *self.measures, "p50 ms", "bytes a passage"]]
        found = [(one.title, one.effectiveness, one.significance) for one in self.systems]
        for system, cells in zip(self.systems, _effect_rows(found, self.measures), strict=True):
            cost = system.cost
            p50 = "" if cost is None else milliseconds(cost["latency"]["total"]["p50"])
            rows.append([*cells, p50, "" if cost is None else whole(cost["disk_bytes_per_passage"])])
        return markdown_table(rows)

    def cost_table(self) -> str:
        """Latency, throughput, storage and building time, one line a system, as a Markdown table."""
        heads = ["system", "p50 ms", "p95 ms", "p99 ms", "timed", "queries/s"]
        rows = [[*heads, "B/passage, disk", "B/passage, memory", "build s"]]
        for system in self.systems:
            if (cost := system.cost) is None:
                continue
            total = cost["latency"]["total"]
            rate, build = cost["queries_per_second"], cost["build_seconds"]
            rows.append(
                [
                    system.title,
                    *(milliseconds(total[name]) for name in ("p50", "p95", "p99")),
                    str(total["queries"]),
                    "?" if rate is None else f"{rate:,.1f}",
                    whole(cost["disk_bytes_per_passage"]),
                    whole(cost["memory_bytes_per_passage"]),
                    "?" if build is None else f"{build:,.1f}",
                ]
            )
        return markdown_table(rows)

    def significance_table(self, measure: str | None = None) -> str:
        """Every system against the baseline in one measure, the first by default, as a Markdown table."""
        found = {one.key: (one.title, one.effectiveness, one.significance) for one in self.systems}
        return _significance(found, measure or self.measures[0], self.baseline)

    def markdown(self) -> str:
        """What report.md holds."""
        collection, base, others = self.collection, self.system(self.baseline).title, len(self.systems) - 1
        titles = {system.key: system.title for system in self.systems}
        threads = ", ".join(f"{name} {count}" for name, count in self.threads.items()) or "not known"
        lines = [
            f"# {collection['name']}: {collection['passages']:,} passages, {collection['queries']:,} "
            f"{collection['split']} queries",
            "",
            self.table(),
            "",
            f"Bold: the best. †: differs from {base} (paired randomisation test, p < {SIGNIFICANT}, "
            f"Holm-corrected over {others} systems). p50 ms: median time of a query from text to ranking. "
            f"Bytes a passage: of all that searching needs on disk, models aside.",
            f"{_grades(self.measures, self.relevance)} Runs hold {self.depth} passages a query.",
            "",
            *(f"- {note}" for note in self.notes),
            "",
        ]
        for name, split in self.also.items():
            systems, measures = split["systems"], split["measures"]
            found = [(titles[key], one["effectiveness"], one["significance"]) for key, one in systems.items()]
            lacking = {titles[key]: one["run"]["missing_queries"] for key, one in systems.items()}
            lines += [
                f"## {name}: {split['queries']:,} queries",
                "",
                markdown_table([["system", *measures], *_effect_rows(found, measures)]),
                "",
                f"†: differs from {base}, as above. {_grades(measures, split['relevance'])}",
                *(f"- {one}: no passage for {n:,} queries, which count as 0." for one, n in lacking.items() if n),
                "",
            ]
        lines += [
            "## Cost",
            "",
            self.cost_table(),
            "",
            "From text to ranking, one query at a time after warm-up; queries/s in batches. Models take no part in "
            "the bytes. Building includes encoding the corpus, with the threads of the run.",
            f"CPU threads while timing: {threads}. {self.machine['processor']}, {self.machine['cpu_count']} cores, "
            f"models on {self.machine['device']}.",
            "",
            "Median milliseconds of each stage:",
            "",
        ]
        for system in self.systems:
            if system.cost is not None and len(system.cost["latency"]) > 2:
                stages = [(name, one["p50"]) for name, one in system.cost["latency"].items() if name != "total"]
                lines.append(f"- {system.title}: {', '.join(f'{name} {milliseconds(ms)}' for name, ms in stages)}")
        for measure in self.measures:
            lines += ["", f"## Significance, {measure}", "", self.significance_table(measure)]
        for name, split in self.also.items():
            tested = {
                key: (titles[key], one["effectiveness"], one["significance"]) for key, one in split["systems"].items()
            }
            for measure in split["measures"]:
                head = f"## Significance, {name} ({split['queries']:,} queries), {measure}"
                lines += ["", head, "", _significance(tested, measure, self.baseline)]
        over = f", Holm-corrected over {others} systems" if others > 1 else ""
        lines += [
            "",
            f"{collection['queries']:,} queries where no other number stands; ±: standard error of the mean; "
            f"two-sided paired tests against {base}{over}.",
            "",
            "## Models",
            "",
        ]
        for role, model in self.models.items():
            if model is not None:
                known = {name: value for name, value in model.items() if name != "name" and value is not None}
                figures = ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in known.items())
                lines.append(f"- {role}: {model['name']} ({figures})")
        files = f"Plots: {LATENCY_FILE}, {STORAGE_FILE}. All figures: {JSON_FILE}. Runs (TREC format): runs/."
        return "\n".join([*lines, "", files, ""])

    def save(self, folder: str | Path) -> list[str]:
        """Write report.json, report.md and the plots.

        Args:
            folder: made when missing.

        Returns:
            What could not be done, in a line each: plots, where matplotlib is not installed or there is nothing to
            plot.

        Raises:
            OSError: a file can't be written.
        """
        folder = Path(folder)
        write_json_atomic(folder / JSON_FILE, self.to_dict())
        write_text_atomic(folder / MARKDOWN_FILE, self.markdown())
        return self._plot(folder)

    def _plot(self, folder: Path) -> list[str]:
        measure, name, problems = self.measures[0], self.collection["name"], []
        timed = [(one, one.effectiveness[measure], one.cost) for one in self.systems if one.cost is not None]
        for file, xlabel, value in (
            (LATENCY_FILE, "milliseconds a query, median", lambda cost: cost["latency"]["total"]["p50"]),
            (STORAGE_FILE, "bytes a passage on disk", lambda cost: cost["disk_bytes_per_passage"]),
        ):
            points = [
                TradeOff(one.title, value(cost), found["mean"], found["standard_error"], one.kind)
                for one, found, cost in timed
            ]
            try:
                plot_trade_off(points, folder / file, xlabel=xlabel, ylabel=measure, title=name)
            except (ImportError, ValueError) as error:  # the figures count, the plot is for the eye
                problems.append(f"no {file}: {error}")
        return problems

    def __str__(self) -> str:
        return self.table()


def _effect_rows(systems: Sequence[tuple[str, Any, Any]], measures: Sequence[str]) -> list[list[str]]:
    """Title and means of (title, effectiveness, significance) each, the best bold, a dagger on differences."""
    marked = {
        (row, name)
        for row, (_, _, tests) in enumerate(systems)
        for name in measures
        if tests is not None and tests[name]["p_randomisation_holm"] < SIGNIFICANT
    }
    means = [(title, {name: effects[name]["mean"] for name in measures}) for title, effects, _ in systems]
    return mean_rows(means, measures, marked)


def _significance(systems: Mapping[str, tuple[str, Any, Any]], measure: str, baseline: str) -> str:
    """Systems, (title, effectiveness, significance) by key, against a baseline in one measure, which comes first."""
    rows = [["system", measure, "difference", "better/worse", "p (randomisation)", "p (t-test)"]]
    for key in (baseline, *(key for key in systems if key != baseline)):
        title, effects, tests = systems[key]
        mean = f"{effects[measure]['mean']:.4f} ± {effects[measure]['standard_error']:.4f}"
        cells = difference_cells(tests[measure]) if tests is not None else [""] * 4
        rows.append([f"{title} (baseline)" if key == baseline else title, mean, *cells])
    return markdown_table(rows)


def _grades(measures: Sequence[str], relevance: int) -> str:
    """The lowest relevant grade of each measure, in a sentence."""
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
