"""The tables of a comparison: means over seeds, and tests of gains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from tct_hf.evaluation.arms import ArmResult, against_table, arm_table, trade_offs
from tct_hf.evaluation.cost import BYTES
from tct_hf.evaluation.measures import Evaluation
from tct_hf.evaluation.significance import holm, paired_randomisation_test
from tct_hf.evaluation.tables import p_value

QUERIES = [f"q{at}" for at in range(10)]
MEASURES = ["RR@10", "R@100"]


def evaluation(seed: int, shift: float = 0.0) -> Evaluation:
    """Values of ten queries, rounded so that some pairs are equal, in another order of queries for each seed."""
    draw = np.random.default_rng(seed)
    values = {name: np.clip(draw.uniform(0, 1, 10) + shift, 0, 1).round(1).tolist() for name in MEASURES}
    order = draw.permutation(10).tolist()
    per_query = {name: {QUERIES[at]: values[name][at] for at in order} for name in MEASURES}
    return Evaluation({name: statistics.fmean(values[name]) for name in MEASURES}, per_query)


def result(seeds: list[int], *, shift: float = 0.0, offset: int = 0, against: Sequence[str] = ()) -> ArmResult:
    logs = {seed: [{"step": 5, "loss": 1.0}, {"step": 8, "seconds": 120 + 60 * at}] for at, seed in enumerate(seeds)}
    return ArmResult("", against, {seed: {"test": evaluation(seed + offset, shift)} for seed in seeds}, logs)


BM25 = evaluation(9)
RESULTS = {
    "plain": result([1, 2, 3]),
    "taught": result([2, 3, 4], shift=0.3, offset=50, against=["plain", "bm25", "gone"]),
    "once": result([3], against=["plain"]),
}


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_a_line_holds_the_mean_and_the_deviation_over_seeds() -> None:
    head, reference, *lines = cells(arm_table(RESULTS, {"BM25": BM25}, "test", MEASURES))
    assert head == ["system", *MEASURES, "seeds", "steps", "minutes"]
    assert reference == ["BM25", *(f"{BM25.mean[name]:.3f}" for name in MEASURES), "", "", ""]
    for line, (name, found) in zip(lines, RESULTS.items(), strict=True):
        means = [[parts["test"].mean[measure] for parts in found.evaluations.values()] for measure in MEASURES]
        shown = [f"{np.mean(m):.3f}" + (f" ± {np.std(m, ddof=1):.3f}" if len(m) > 1 else "") for m in means]
        assert line[:3] == [name, *shown]
    assert [line[3:] for line in lines] == [["3", "8", "3.0"], ["3", "8", "3.0"], ["1", "8", "2.0"]]


def test_an_arm_named_after_its_dimensions_keeps_its_name_in_a_plot() -> None:
    one, part = evaluation(1), "RR@10, first 8 dimensions, SQ8"
    whole = Evaluation(one.mean | {part: 0.5}, one.per_query | {part: one.per_query["RR@10"]})
    costs = {"RR@10": {BYTES: 32}, part: {BYTES: 8}}
    arms = {"trained, first 8 dimensions": ArmResult("", [], {1: {"test": whole}}, {}, costs)}
    assert [(point.label, point.cost, point.kind) for point in trade_offs(arms, "test", "RR@10", BYTES)] == [
        ("trained, first 8 dimensions", 32, "dense"),
        ("trained, first 8 dimensions, SQ8", 8, ", SQ8"),
    ]


def test_arms_are_tested_query_by_query_on_their_common_seeds_and_corrected_over_the_lines() -> None:
    head, *lines = cells(against_table(RESULTS, {"bm25": BM25}, "test", MEASURES))
    assert head == ["arm", "against", "seeds", *(f"{name} (p; Holm)" for name in MEASURES)]
    common = {("taught", "plain"): [2, 3], ("taught", "bm25"): [2, 3, 4], ("once", "plain"): [3]}
    assert [line[:3] for line in lines] == [[*names, str(len(seeds))] for names, seeds in common.items()]

    def values(name: str, seeds: list[int], measure: str) -> list[float]:
        found = [BM25] if name == "bm25" else [RESULTS[name].evaluations[seed]["test"] for seed in seeds]
        return [statistics.fmean(one.per_query[measure][query] for one in found) for query in QUERIES]

    for column, measure in enumerate(MEASURES, 3):
        pairs = [[values(name, seeds, measure) for name in names] for names, seeds in common.items()]
        gains = [statistics.fmean(x - y for x, y in zip(*pair, strict=True)) for pair in pairs]
        ps = [paired_randomisation_test(*pair) for pair in pairs]
        wanted = [f"{g:+.3f} ({p_value(p)}; {p_value(h)})" for g, p, h in zip(gains, ps, holm(ps), strict=True)]
        assert [line[column] for line in lines] == wanted
    assert against_table({"plain": RESULTS["plain"]}, {}, "test", MEASURES) == ""
    sparse = {"plain": RESULTS["plain"], "sparse": result([1, 2], against=["plain"])}
    for seed in (1, 2):
        del sparse["sparse"].evaluations[seed]["test"].mean[MEASURES[0]]  # type: ignore[attr-defined]
    assert cells(against_table(sparse, {}, "test", MEASURES))[1][3] == ""  # a code that it was not searched by
    assert cells(arm_table(sparse, {}, "test", MEASURES))[2][1] == ""
    with pytest.raises(ValueError, match="'plain' has no seed in common with it"):
        against_table({"plain": result([1]), "once": RESULTS["once"]}, {}, "test", MEASURES)
