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
                sparse_student: alike, of one beside a dense student, where there is one;
                base: alike, of the base as it is, where it is reported;
                teacher: name ("own" of the student's own token vectors), weights_sha256, parameters, dimension,
                tokens_per_passage, encoded_in; or null
measures        ir-measures names, the first one plotted
relevance       grade from which a passage is relevant
depth           passages a query in the runs
baseline        key of the system that the others are tested against
tuning          hybrid: fusion ("alpha" or "ranks"), alpha, split, queries, left_out, measure, value, curve, normalize;
                hybrids: alike, by the key of each hybrid's system, where there are several;
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

from tct_hf.files import write_json_atomic, write_text_atomic

JSON_FILE, MARKDOWN_FILE, LATENCY_FILE, STORAGE_FILE = "report.json", "report.md", "latency.png", "storage.png"
FORMAT = 1
# Keys of the systems of a sparse student: alone, fused with BM25, fused with a dense student.
LEARNED, LEARNED_BM25, DENSE_LEARNED = "learned-sparse", "learned-sparse-bm25", "dense-learned-sparse"
# Of BM25 over passages with generated queries: alone, fused with a sparse student.
EXPANDED, LEARNED_EXPANDED = "bm25-expanded", "learned-sparse-bm25-expanded"
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
            raise FileNotFoundError(f"{file}: no such report; make one with recipes/evaluate.py")
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
        best = {name: max(one.effectiveness[name]["mean"] for one in self.systems) for name in self.measures}
        rows = [["system", *self.measures, "p50 ms", "bytes a passage"]]
        for system in self.systems:
            row = [system.title]
            for name in self.measures:
                mean = system.effectiveness[name]["mean"]
                shown = f"**{mean:.3f}**" if mean == best[name] else f"{mean:.3f}"
                row.append(shown + (" †" if system.differs(name) else ""))
            cost = system.cost
            row += [
                "" if cost is None else _milliseconds(cost["latency"]["total"]["p50"]),
                "" if cost is None else _whole(cost["disk_bytes_per_passage"]),
            ]
            rows.append(row)
        return markdown_table(rows)

    def cost_table(self) -> str:
        """Latency, throughput, storage and building time, one line a system, as a Markdown table."""
        rows = [
            [
                "system",
                "p50 ms",
                "p95 ms",
                "p99 ms",
                "timed",
                "queries/s",
                "B/passage, disk",
                "B/passage, memory",
                "build s",
            ],
        ]
        for system in self.systems:
            if (cost := system.cost) is None:
                continue
            total = cost["latency"]["total"]
            rate, build = cost["queries_per_second"], cost["build_seconds"]
            rows.append(
                [
                    system.title,
                    *(_milliseconds(total[name]) for name in ("p50", "p95", "p99")),
                    str(total["queries"]),
                    "?" if rate is None else f"{rate:,.1f}",
                    _whole(cost["disk_bytes_per_passage"]),
                    _whole(cost["memory_bytes_per_passage"]),
                    "?" if build is None else f"{build:,.1f}",
                ]
            )
        return markdown_table(rows)

    def significance_table(self, measure: str | None = None) -> str:
        """Every system against the baseline in one measure, the first by default, as a Markdown table."""
        measure = measure or self.measures[0]
        systems = {one.key: (one.title, one.effectiveness, one.significance) for one in self.systems}
        return significance_rows(systems, measure, self.baseline)

    def markdown(self) -> str:
        """What report.md holds."""
        from tct_hf.evaluation.report_splits import grades_line, split_lines

        collection = self.collection
        base = self.system(self.baseline)
        others = len(self.systems) - 1
        threads = ", ".join(f"{name} {count}" for name, count in self.threads.items()) or "not known"
        lines = [
            f"# {collection['name']}: {collection['passages']:,} passages, {collection['queries']:,} "
            f"{collection['split']} queries",
            "",
            self.table(),
            "",
            f"Bold: the best. †: differs from {base.title} (paired randomisation test, p < {SIGNIFICANT}, "
            f"Holm-corrected over {others} systems). p50 ms: median time of a query from text to ranking. "
            f"Bytes a passage: of all that searching needs on disk, models aside.",
            f"{grades_line(self.measures, self.relevance)} Runs hold {self.depth} passages a query.",
            "",
        ]
        lines += [*(f"- {note}" for note in self.notes), ""]
        titles = {system.key: system.title for system in self.systems}
        for name, split in self.also.items():
            lines += split_lines(name, split, titles, self.baseline, SIGNIFICANT)
        lines += ["## Cost", "", self.cost_table(), ""]
        lines += [
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
                lines.append(f"- {system.title}: {', '.join(f'{name} {_milliseconds(ms)}' for name, ms in stages)}")
        for measure in self.measures:
            lines += ["", f"## Significance, {measure}", "", self.significance_table(measure)]
        over = f", Holm-corrected over {others} systems" if others > 1 else ""
        for name, split in self.also.items():
            found = split["systems"]
            tested = {key: (titles[key], one["effectiveness"], one["significance"]) for key, one in found.items()}
            for measure in split["measures"]:
                table = significance_rows(tested, measure, self.baseline)
                lines += ["", f"## Significance, {name} ({split['queries']:,} queries), {measure}", "", table]
        lines += [
            "",
            f"{collection['queries']:,} queries where no other number stands; ±: standard error of the mean; "
            f"two-sided paired tests against {base.title}{over}.",
            "",
            "## Models",
            "",
        ]
        for role, model in self.models.items():
            if model is not None:
                figures = ", ".join(
                    f"{name.replace('_', ' ')} {_figure(value)}"
                    for name, value in model.items()
                    if name != "name" and value is not None
                )
                lines.append(f"- {role}: {model['name']} ({figures})")
        lines += [
            "",
            f"Plots: {LATENCY_FILE}, {STORAGE_FILE}. All figures: {JSON_FILE}. Runs (TREC format): runs/.",
            "",
        ]
        return "\n".join(lines)

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
        from tct_hf.evaluation.plots import TradeOff, plot_trade_off

        measure = self.measures[0]
        timed = [(system, system.cost) for system in self.systems if system.cost is not None]
        problems = []
        for file, xlabel, value in (
            (LATENCY_FILE, "milliseconds a query, median", lambda cost: cost["latency"]["total"]["p50"]),
            (STORAGE_FILE, "bytes a passage on disk", lambda cost: cost["disk_bytes_per_passage"]),
        ):
            points = [
                TradeOff(
                    system.title,
                    value(cost),
                    system.effectiveness[measure]["mean"],
                    system.effectiveness[measure]["standard_error"],
                    system.kind,
                )
                for system, cost in timed
            ]
            try:
                plot_trade_off(points, folder / file, xlabel=xlabel, ylabel=measure, title=self.collection["name"])
            except (ImportError, ValueError) as error:  # the figures count, the plot is for the eye
                problems.append(f"no {file}: {error}")
        return problems

    def __str__(self) -> str:
        return self.table()


def significance_rows(
    systems: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any] | None]], measure: str, baseline: str
) -> str:
    """Systems against a baseline in one measure, as a Markdown table.

    Args:
        systems: title, effectiveness and significance, as in report.json, by key.
        measure: one of theirs.
        baseline: key of a system, which comes first.
    """
    rows = [["system", measure, "difference", "better/worse", "p (randomisation)", "p (t-test)"]]
    for key in (baseline, *(key for key in systems if key != baseline)):
        title, effectiveness, significance = systems[key]
        found = effectiveness[measure]
        row = [title, f"{found['mean']:.4f} ± {found['standard_error']:.4f}"]
        if significance is None:
            rows.append([f"{title} (baseline)" if key == baseline else title, row[1], "", "", "", ""])
            continue
        one = significance[measure]
        p_values = (_p(one[name]) for name in ("p_randomisation_holm", "p_t_test_holm"))
        rows.append([*row, f"{one['difference']:+.4f}", f"{one['better']}/{one['worse']}", *p_values])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, the first row its head, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _milliseconds(value: float) -> str:
    """Three digits that say something, not seven."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _figure(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
