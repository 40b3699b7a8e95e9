"""The tables of a comparison, against means, deviations and p values worked out another way."""

from __future__ import annotations

import csv
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tct_hf.evaluation.arm_table import ArmResult, against_table, arm_table, difference, write_students
from tct_hf.evaluation.measures import Evaluation
from tct_hf.pipeline.arms import Arm

QUERIES = [f"q{at}" for at in range(10)]
MEASURES = ["RR@10", "R@100"]


def evaluation(seed: int, shift: float = 0.0) -> Evaluation:
    """Values of ten queries, rounded so that some pairs are equal, in another order of queries for each seed."""
    draw = np.random.default_rng(seed)
    values = {name: np.clip(draw.uniform(0, 1, 10) + shift, 0, 1).round(1).tolist() for name in MEASURES}
    order = draw.permutation(10).tolist()
    per_query = {name: {QUERIES[at]: values[name][at] for at in order} for name in MEASURES}
    return Evaluation({name: statistics.fmean(values[name]) for name in MEASURES}, per_query)


def result(seeds: list[int], *, shift: float = 0.0, minutes: float = 2.0, offset: int = 0, **arm: Any) -> ArmResult:
    evaluations = {
        seed: {"dev": evaluation(100 + seed + offset, shift), "test": evaluation(seed + offset, shift)}
        for seed in seeds
    }
    logs = {
        seed: [
            {"step": 0, "eval_dev_dot_mrr@10": 0.1},
            {"step": 5, "loss": 1.0},
            {"step": 5, "eval_dev_dot_mrr@10": 0.2 + seed / 100},
            {"step": 8, "train_loss": 0.9},
            {"step": 8, "seconds": 60 * (minutes + at)},
        ]
        for at, seed in enumerate(seeds)
    }
    return ArmResult(
        Arm(**{"initialise_from": "teacher", **arm}),
        evaluations,
        logs,
        {"learning_rate": 1e-4, "max_steps": 8, "seed": 1},
    )


@pytest.fixture
def results() -> dict[str, ArmResult]:
    return {
        "plain": result([1, 2, 3], signal="hard labels", layers=[0, 2]),
        "taught": result([2, 3, 4], shift=0.3, offset=50, against=["plain", "bm25"], unlabelled=True),
        "once": result([3], minutes=0.5, signal="own candidates", initialise_from="base", against=["plain"]),
    }


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) <= set("|-:")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_line_holds_the_mean_and_the_deviation_over_seeds(results: dict[str, ArmResult], split: str) -> None:
    head, reference, *lines = cells(arm_table(results, {"BM25": evaluation(9)}, split, MEASURES))
    assert head == ["system", "learns from", "starts from", "layers", *MEASURES, "seeds", "steps", "minutes"]
    assert reference == ["BM25", "", "", "", *(f"{evaluation(9).mean[name]:.3f}" for name in MEASURES), "", "", ""]
    for line, (name, found) in zip(lines, results.items(), strict=True):
        means = [[parts[split].mean[measure] for parts in found.evaluations.values()] for measure in MEASURES]
        shown = [f"{np.mean(m):.3f}" + (f" ± {np.std(m, ddof=1):.3f}" if len(m) > 1 else "") for m in means]
        assert line[0] == name and line[4:6] == shown
    assert [line[1:4] for line in lines] == [
        ["hard labels", "teacher", "2"],
        ["in-batch, also unlabelled", "teacher", "all"],
        ["own candidates", "base", "all"],
    ]
    assert [line[6:] for line in lines] == [["3", "8", "3.0"], ["3", "8", "3.0"], ["1", "8", "0.5"]]


def p_by_enumeration(differences: list[float]) -> float:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=10)
    ]
    return sum(value >= abs(sum(differences)) - 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize(("name", "seeds"), [("taught", [2, 3]), ("once", [3])])
@pytest.mark.parametrize("measure", MEASURES)
def test_arms_are_compared_query_by_query_on_their_common_seeds(
    results: dict[str, ArmResult], name: str, seeds: list[int], measure: str
) -> None:
    def means(found: ArmResult) -> list[float]:
        return [
            statistics.fmean(found.evaluations[seed]["test"].per_query[measure][query] for seed in seeds)
            for query in QUERIES
        ]

    differences = [a - b for a, b in zip(means(results[name]), means(results["plain"]), strict=True)]
    delta, p, common = difference(results[name], results["plain"], "test", measure)
    assert common == seeds
    assert delta == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert p == pytest.approx(p_by_enumeration(differences), abs=1e-12)
    backwards, again, _ = difference(results["plain"], results[name], "test", measure)
    assert backwards == pytest.approx(-delta, abs=1e-12) and again == p


def by_hand(one: ArmResult, other: Evaluation, measure: str) -> tuple[float, float]:
    """Difference and p to a system without seeds."""
    found = [parts["test"].per_query[measure] for parts in one.evaluations.values()]
    differences = [statistics.fmean(v[q] for v in found) - other.per_query[measure][q] for q in QUERIES]
    return statistics.fmean(differences), p_by_enumeration(differences)


def test_each_line_shows_difference_p_and_p_after_holms_correction_over_the_lines(
    results: dict[str, ArmResult],
) -> None:
    head, *rows = cells(against_table(results, {"bm25": evaluation(9)}, "test", MEASURES))
    assert head == ["arm", "against", "seeds", *(f"{name} (p; Holm)" for name in MEASURES)]
    assert [row[:3] for row in rows] == [["taught", "plain", "2"], ["taught", "bm25", "3"], ["once", "plain", "1"]]
    for at, measure in enumerate(MEASURES, 3):
        found = [
            difference(results["taught"], results["plain"], "test", measure)[:2],
            by_hand(results["taught"], evaluation(9), measure),
            difference(results["once"], results["plain"], "test", measure)[:2],
        ]
        corrected, highest = {}, 0.0
        for rank, line in enumerate(sorted(range(3), key=lambda line: found[line][1])):
            highest = max(highest, min(1.0, (3 - rank) * found[line][1]))
            corrected[line] = highest
        for line, row in enumerate(rows):
            p, holm = (f"{value:.3f}" if value >= 0.001 else "<0.001" for value in (found[line][1], corrected[line]))
            assert row[at] == f"{found[line][0]:+.3f} ({p}; {holm})"


def test_a_small_p_value_is_not_shown_as_zero() -> None:
    one, other = result([1]), result([1])
    one.evaluations[1]["test"].per_query["RR@10"].update({f"more{at}": 1.0 for at in range(30)})  # type: ignore[index]
    other.evaluations[1]["test"].per_query["RR@10"].update({f"more{at}": 0.0 for at in range(30)})  # type: ignore[index]
    one = ArmResult(Arm(against=["other"]), one.evaluations, one.logs, {})
    assert "(<0.001; <0.001)" in against_table({"one": one, "other": other}, {}, "test", ["RR@10"])


def test_an_arm_is_compared_only_with_one_that_is_there(results: dict[str, ArmResult]) -> None:
    del results["plain"]
    assert against_table(results, {}, "test", MEASURES) == ""
    lines = cells(against_table(results, {"bm25": evaluation(9)}, "test", MEASURES))
    assert [line[:2] for line in lines[1:]] == [["taught", "bm25"]]


def test_a_reference_without_a_measure_has_an_empty_cell_and_no_part_in_holms_correction(
    results: dict[str, ArmResult],
) -> None:
    whole = evaluation(9)
    part = Evaluation({"RR@10": whole.mean["RR@10"]}, {"RR@10": whole.per_query["RR@10"]})
    line = cells(arm_table(results, {"BM25": part}, "test", MEASURES))[1]
    assert line[4:6] == [f"{part.mean['RR@10']:.3f}", ""]
    table = against_table(results, {"bm25": part}, "test", MEASURES, [("taught", "plain"), ("taught", "bm25")])
    alone = against_table(results, {"bm25": part}, "test", MEASURES, [("taught", "plain")])
    both = cells(table)[1:]
    assert [row[4] for row in both] == [cells(alone)[1][4], ""] and all(row[3] for row in both)


def test_how_arms_read_texts_is_a_column_where_one_reads_them_otherwise(results: dict[str, ArmResult]) -> None:
    other = {**results, "cls": result([1], pooling="cls")}
    head, _, *lines = cells(arm_table(other, {"BM25": evaluation(9)}, "test", MEASURES))
    assert head[4] == "texts" and [line[4] for line in lines] == ["", "", "", "start token's vector"]


def test_arms_without_a_common_seed_are_refused_with_the_mend(results: dict[str, ArmResult]) -> None:
    with pytest.raises(ValueError, match=r"no seed in common: give them one with arms\.NAME\.seeds"):
        difference(result([7]), results["plain"], "test", "RR@10")


def test_curves_hold_the_dev_figure_of_each_step(results: dict[str, ArmResult]) -> None:
    assert results["taught"].curve() == {seed: {0: 0.1, 5: 0.2 + seed / 100} for seed in (2, 3, 4)}


def test_there_is_a_line_a_student_with_its_settings_and_figures(
    results: dict[str, ArmResult], tmp_path: Path
) -> None:
    path = tmp_path / "students.csv"
    write_students(path, results, ["dev", "test"], "docs, a part")
    content = path.read_bytes()
    assert b"\r" not in content and content.endswith(b"\n")
    rows = list(csv.DictReader(content.decode().splitlines()))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (name, str(seed)) for name, found in results.items() for seed in found.evaluations
    ]
    for row in rows:
        parts = results[row["arm"]].evaluations[int(row["seed"])]
        assert row["collection"] == "docs, a part"
        for split, measure in itertools.product(("dev", "test"), MEASURES):
            assert row[f"{split} {measure}"] == f"{parts[split].mean[measure]:.4f}"
        assert (row["learning_rate"], row["max_steps"], row["temperature"]) == ("0.0001", "8", "")
        assert row["hard_label_weight"] == "0.1"  # the default of what nobody has set
        assert None not in row and None not in row.values()
    assert [row["layers"] for row in rows] == ["0 2"] * 3 + ["all"] * 4
    assert [row["unlabelled"] for row in rows] == ["False"] * 3 + ["True"] * 3 + ["False"]
    assert [row["minutes"] for row in rows] == ["2.0", "3.0", "4.0", "2.0", "3.0", "4.0", "0.5"]
    assert list(tmp_path.iterdir()) == [path]
