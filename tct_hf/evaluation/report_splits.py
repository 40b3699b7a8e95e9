"""What a report says of the test splits beside the first: the same systems, each split with measures of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tct_hf.evaluation.measures import evaluate_run, relevant_from
from tct_hf.evaluation.significance import compare_runs
from tct_hf.files import file_digest
from tct_hf.retrieval.runs import Run


def measure_systems(
    runs: Mapping[str, Run],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
    *,
    relevance: int,
    baseline: str,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """How good each system is on some queries, and whether it differs from the baseline.

    Args:
        runs: by the key of the system.
        qrels: of the queries.
        measures: ir-measures names.
        relevance: grade from which a passage is relevant, where a measure does not say it.
        baseline: key of a system.

    Returns:
        By the key of the system: `effectiveness` as in report.json, and `significance`, empty of a single query.
    """
    from tct_hf.evaluation.comparison import standard_error

    effectiveness = {}
    for key, run in runs.items():
        found = evaluate_run(run, qrels, measures, relevance=relevance)
        effectiveness[key] = {
            measure: {"mean": mean, "standard_error": standard_error(list(found.per_query[measure].values()))}
            for measure, mean in found.mean.items()
        }
    tests: dict[str, dict[str, Any]] = {key: {} for key in runs}
    if len(qrels) > 1:
        for measure in measures:
            compared = compare_runs(runs, qrels, baseline=baseline, measure=measure, relevance=relevance)
            for key, difference in compared.systems.items():
                tests[key][measure] = asdict(difference)
    return effectiveness, tests


def split_record(
    runs: Mapping[str, Run],
    files: Mapping[str, Path],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
    *,
    relevance: int,
    baseline: str,
    output: Path,
) -> dict[str, Any]:
    """One further split, as it stands in report.json.

    Args:
        runs: as in :func:`measure_systems`.
        files: of the runs.
        qrels: likewise.
        measures: likewise.
        relevance: likewise.
        baseline: likewise.
        output: folder of the report, which paths are told from.
    """
    effectiveness, tests = measure_systems(runs, qrels, measures, relevance=relevance, baseline=baseline)
    systems = {}
    for key, run in runs.items():
        file = files[key]
        systems[key] = {
            "effectiveness": effectiveness[key],
            "significance": tests[key] or None,
            "run": {
                "file": str(file.relative_to(output) if file.is_relative_to(output) else file),
                "sha256": file_digest(file),
                "missing_queries": len(qrels.keys() - run.keys()),
            },
        }
    return {"queries": len(qrels), "measures": list(measures), "relevance": relevance, "systems": systems}


def split_lines(
    name: str, record: Mapping[str, Any], titles: Mapping[str, str], baseline: str, significant: float
) -> list[str]:
    """One further split in report.md.

    Args:
        name: of the split.
        record: of :func:`split_record`.
        titles: of the systems, by key.
        baseline: key of a system.
        significant: p value below which a system is marked.
    """
    from tct_hf.evaluation.report import markdown_table

    measures, systems = record["measures"], record["systems"]
    best = {one: max(system["effectiveness"][one]["mean"] for system in systems.values()) for one in measures}
    rows = [["system", *measures]]
    for key, system in systems.items():
        row = [titles[key]]
        for one in measures:
            mean, tests = system["effectiveness"][one]["mean"], system["significance"]
            shown = f"**{mean:.3f}**" if mean == best[one] else f"{mean:.3f}"
            differs = tests is not None and tests[one]["p_randomisation_holm"] < significant
            row.append(shown + (" †" if differs else ""))
        rows.append(row)
    lacking = {titles[key]: system["run"]["missing_queries"] for key, system in systems.items()}
    notes = [
        f"- {title}: no passage for {count:,} queries, which count as 0." for title, count in lacking.items() if count
    ]
    return [
        f"## {name}: {record['queries']:,} queries",
        "",
        markdown_table(rows),
        "",
        f"†: differs from {titles[baseline]}, as above. {grades_line(measures, record['relevance'])}",
        *notes,
        "",
    ]


def grades_line(measures: Sequence[str], relevance: int) -> str:
    """From which grade on a passage is relevant, of each measure.

    Args:
        measures: ir-measures names.
        relevance: where a measure does not say it.
    """
    grades: dict[int | None, list[str]] = {}
    for measure in measures:
        grades.setdefault(relevant_from(measure, relevance), []).append(measure)
    parts = [f"from grade {grade} on in {', '.join(names)}" for grade, names in grades.items() if grade is not None]
    said = [f"A passage is relevant {', '.join(parts)}."] if parts else []
    if None in grades:
        said.append(f"Grades are gains in {', '.join(grades[None])}.")
    return " ".join(said)
