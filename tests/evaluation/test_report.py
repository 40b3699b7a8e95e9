from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SparseEncoder

from tct_hf import Report, compare_runs, evaluate_run, fuse, read_run, tune_alpha
from tct_hf.evaluation.settings import CostSettings, HybridSettings, MeasureSettings
from tct_hf.evaluation.tune_alpha import tuning_queries
from tct_hf.files import CLAIM_FILE, claim
from tests.evaluation.reports import check_late_interaction, graded, make, run_of, tiny_settings
from tests.models import load_colbert
from tests.searching import Material

# Key of a hybrid: what is weighted, and what it is added to.
HYBRIDS = {
    "hybrid": ("bm25", "dense-exact"),
    "hybrid-expanded": ("bm25-expanded", "dense-exact"),
    "learned-sparse-bm25": ("bm25", "learned-sparse"),
    "learned-sparse-bm25-expanded": ("bm25-expanded", "learned-sparse"),
    "dense-learned-sparse": ("learned-sparse", "dense-exact"),
}
KEYS = [
    *("bm25", "bm25-expanded", "dense-exact", "dense-ann", "hybrid", "hybrid-expanded", "learned-sparse"),
    *("learned-sparse-bm25", "learned-sparse-bm25-expanded", "dense-learned-sparse", "teacher", "reranked"),
]


def cost(report: Report, key: str) -> dict[str, Any]:
    found = report.system(key).cost
    assert found is not None
    return found


def bytes_of(report: Report, key: str) -> float:
    return float(cost(report, key)["disk_bytes_per_passage"])


def test_every_system_has_effectiveness_latency_bytes_and_a_run(report: Report, output: Path) -> None:
    assert [system.key for system in report.systems] == KEYS
    for system in report.systems:
        assert set(system.effectiveness) == {"RR@10", "nDCG@10", "R@20"} and read_run(output / system.run["file"])
        costs = cost(report, system.key)
        total = costs["latency"]["total"]
        assert total["queries"] == (3 if system.key in ("teacher", "reranked") else 4)
        assert 0 < total["p50"] <= total["p95"] <= total["p99"]
        figures = ("queries_per_second", "build_seconds", "disk_bytes_per_passage", "memory_bytes_per_passage")
        assert all(costs[figure] > 0 for figure in figures)
    fused = ["query encoding", "dense search", "BM25 search", "fusion", "total"]
    both = ["dense query encoding", "dense search", "sparse query encoding", "sparse search", "fusion", "total"]
    for key, stages in (("hybrid", fused), ("hybrid-expanded", fused), ("dense-learned-sparse", both)):
        assert list(cost(report, key)["latency"]) == stages
    parts = bytes_of(report, "bm25-expanded") + bytes_of(report, "dense-exact")
    assert bytes_of(report, "hybrid-expanded") == pytest.approx(parts)
    teacher = report.models["teacher"]
    vectors = teacher["tokens_per_passage"] * 16 * 2
    assert teacher["dimension"] == 16
    assert vectors < bytes_of(report, "teacher") < vectors + 20  # lengths and headers of the files


def test_the_table_says_what_the_json_says(report: Report, output: Path) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table().splitlines()]
    assert rows[0] == ["system", "RR@10", "nDCG@10", "R@20", "p50 ms", "bytes a passage"]
    for row, system in zip(rows[2:], report.systems, strict=True):
        assert row[0] == system.title
        for shown, measure in zip(row[1:4], report.measures, strict=True):
            assert shown.strip("* †") == f"{system.effectiveness[measure]['mean']:.3f}"
            tests = system.significance
            assert ("†" in shown) == (tests is not None and tests[measure]["p_randomisation_holm"] < 0.05)
        assert row[5] == f"{bytes_of(report, system.key):,.0f}"
    text = (output / "report.md").read_text()
    assert report.table() in text and report.cost_table() in text
    assert all(report.significance_table(measure) in text for measure in report.measures)
    for name in ("latency.png", "storage.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_systems_are_tested_against_the_baseline_with_holms_correction(
    report: Report, material: Material, output: Path
) -> None:
    runs = {key: run_of(output, key) for key in KEYS}
    qrels = material.collection().splits["test"].qrels
    compared = compare_runs(runs, qrels, baseline="dense-exact", measure="RR@10").to_dict()["systems"]
    found = {system.key: system.significance and system.significance["RR@10"] for system in report.systems}
    assert found == {"dense-exact": None, **json.loads(json.dumps(compared))}


def test_every_pair_has_a_weight_of_its_own_tuned_on_dev_and_the_report_says_so(
    report: Report, output: Path, material: Material
) -> None:
    [note] = [note for note in report.notes if note.startswith("Expanded BM25: ")]
    assert "with 2 generated queries of a/writer" in note and "k1 2.18, b 0.86" in note
    hybrids = report.tuning["hybrids"]
    assert list(hybrids) == list(HYBRIDS) and report.tuning["hybrid"] == hybrids["hybrid"]
    tuning = tuning_queries(graded(material)["collection"], HybridSettings())
    assert tuning is not None
    told = {"split": "dev", "queries": len(tuning.queries), "alpha": hybrids["hybrid"]["alpha"]}
    assert {key: hybrids["hybrid"][key] for key in told} == told
    assert (report.tuning["ann"]["split"], report.tuning["ann"]["source"]) == ("dev", "queries")
    assert f"alpha {told['alpha']:.3g} tuned for RR@10 on {told['queries']} dev queries" in report.markdown()
    for key, pair in HYBRIDS.items():
        on = [run_of(output, one, "dev") for one in pair]
        assert set(on[1]) == set(tuning.queries)
        assert hybrids[key]["alpha"] == tune_alpha(*on, tuning.qrels, "RR@10"), key
        for split in ("test", "graded"):
            weighted, first, fused = (run_of(output, one, split) for one in (*pair, key))
            assert fused == fuse(weighted, first, hybrids[key]["alpha"], k=20), (key, split)


def test_the_teachers_runs_are_those_of_exhaustive_search_and_of_reranking(
    report: Report, material: Material, output: Path
) -> None:
    check_late_interaction(load_colbert(material.teacher), material, output)


def test_a_sparse_students_run_and_figures_are_those_of_the_whole_product(
    report: Report, output: Path, material: Material, splade: str
) -> None:
    model, collection = SparseEncoder(splade, device="cpu"), material.collection()
    passages = model.encode_document(list(collection.corpus["text"])).to_dense().numpy()
    queries = model.encode_query(list(collection.splits["test"].queries.values())).to_dense().numpy()
    for scores, found in zip(queries @ passages.T, run_of(output, "learned-sparse").values(), strict=True):
        np.testing.assert_allclose(list(found.values()), np.sort(scores)[::-1][: len(found)], rtol=1e-4)

    settings = tiny_settings(cost=CostSettings(queries=3, warm_up=1, batch_size=2))
    alone = make(material, material.folder / "alone", student=splade, settings=settings)
    keys = ["bm25", "learned-sparse", "learned-sparse-bm25"]
    assert [system.key for system in alone.systems] == [*keys, "teacher", "reranked"]
    assert alone.baseline == "learned-sparse" and alone.tuning["ann"] is None
    assert alone.system("learned-sparse").title == "sparse student (learned)"
    assert alone.system("learned-sparse-bm25").title.startswith("sparse student + BM25, alpha ")
    assert list(cost(alone, "learned-sparse")["latency"]) == ["query encoding", "sparse search", "total"]
    assert all(alone.system(key).effectiveness == report.system(key).effectiveness for key in keys)
    dims = {f"{side}_active_dims": (v > 0).sum(1).mean() for side, v in (("document", passages), ("query", queries))}
    for one, role in ((report, "sparse_student"), (alone, "student")):
        measured = one.models[role]
        assert {key: measured[key] for key in dims} == pytest.approx(dims)
        assert measured["name"] == splade and measured["dimension"] == passages.shape[1]
        assert bytes_of(one, "learned-sparse") > 8 * dims["document_active_dims"]
        assert f"{dims['document_active_dims']:.1f} a passage" in one.markdown()
        assert "query active dims" in one.markdown()
    assert "query_active_dims" not in report.models["student"]
    for pair in ("BM25 + sparse student", "sparse student + dense"):
        assert any(f"alpha * {pair}, alpha" in note for note in report.notes)


def test_a_further_split_is_measured_on_its_judged_queries_alone(
    report: Report, output: Path, material: Material
) -> None:
    found, qrels = report.also["graded"], graded(material)["collection"].also["graded"].qrels
    assert found["queries"] == len(qrels) == 5 and list(found["systems"]) == KEYS
    for key, system in found["systems"].items():
        run = read_run(output / system["run"]["file"])
        assert set(run) == set(qrels)
        means = {name: one["mean"] for name, one in system["effectiveness"].items()}
        assert means == evaluate_run(run, qrels, found["measures"]).mean, key
        assert (system["significance"] is None) == (key == "dense-exact")
    shown = report.markdown()
    assert "## graded: 5 queries" in shown
    for measure in found["measures"]:
        _, _, table = shown.partition(f"## Significance, graded (5 queries), {measure}\n\n")
        rows = table.split("\n\n")[0].splitlines()
        assert len(rows) == 2 + len(KEYS) and rows[2].startswith("| dense, exact (baseline) ")
    assert "from grade 2 on in R(rel=2)@20, from grade 1 on in R(rel=1)@20. Grades are gains in nDCG@10." in shown


def test_a_report_is_loaded_as_it_was_saved(report: Report, output: Path, tmp_path: Path) -> None:
    assert Report.load(output) == report == Report.load(output / "report.json")
    content = json.loads((output / "report.json").read_text())
    assert content == report.to_dict()
    (tmp_path / "report.json").write_text(json.dumps({key: content[key] for key in content if key != "also"}))
    assert Report.load(tmp_path).also == {}  # as a report of before had it
    for content, message in (
        ('{"format": 99, "systems": []}', "format 99 where this version reads 1"),
        ('{"format": 1}', r"report\.json .*'systems' is missing.*make the report again"),
        ('{"format": 1, "systems": []}', "a damaged report"),
    ):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Report.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such report"):
        Report.load(tmp_path / "elsewhere.json")
    with pytest.raises(KeyError, match="there are bm25"):
        report.system("splade")


def test_a_second_call_makes_nothing_again_but_what_is_new_or_lost(
    report: Report, material: Material, output: Path, splade: str, tmp_path: Path
) -> None:
    def made() -> dict[Path, int]:
        # The report itself, and the vectors' manifest, are written again with the same content.
        files = (file for file in output.rglob("*") if file.is_file() and file.parent != output)
        return {file: file.stat().st_mtime_ns for file in files if file.name != "manifest.json"}

    before, lines = made(), list[str]()

    def again(folder: Path, **changes: Any) -> Report:
        return make(material, folder, sparse_student=splade, write=lines.append, **graded(material, **changes))

    assert again(output) == report and made() == before
    copy, other = tmp_path / "copy", {"also_report": {"graded": ["RR(rel=2)@10"]}}
    shutil.copytree(output, copy)
    also = again(copy, **other)
    assert also.systems == report.systems and also.also["graded"]["measures"] == ["RR(rel=2)@10"]
    assert not [line for line in lines if "search" in line or "time" in line]
    timed = copy / "costs" / "bm25.json"
    kept = json.loads(timed.read_text())
    assert kept["run"] == report.system("bm25").run["sha256"]
    timed.write_text('{"run": 7}')
    with pytest.raises(ValueError, match=r"bm25\.json .*'latency' is missing.*delete it, and it is made again"):
        again(copy, **other)
    timed.write_text(json.dumps(kept | {"run": "another"}))
    again(copy, **other)
    assert [line for line in lines if "time" in line] == [f"  time 1 of {len(KEYS)}: BM25"]
    assert json.loads(timed.read_text())["run"] == kept["run"]

    for lost in ("vectors/manifest.json", "runs/hybrid.test.trec", "tokens/00000.arrow"):
        (copy / lost).unlink()
    for lost in ("indexes/dense-flat/index", "indexes/dense-hnsw32/index"):
        shutil.rmtree(copy / lost)
    restored = again(copy, **other)
    assert [replace(one, cost=None) for one in restored.systems] == [replace(one, cost=None) for one in report.systems]
    assert restored.also == also.also


def test_other_settings_in_the_same_folder_are_refused_by_name(
    report: Report, material: Material, output: Path, splade: str
) -> None:
    before = (output / "report.json").read_bytes()
    for changes, named in (
        ({"measures": MeasureSettings(names=["RR@10"], depth=30)}, "settings.depth = 20, but now settings.depth = 30"),
        ({"cost": CostSettings(queries=5)}, "cost.queries = 4, but now cost.queries = 5"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(named)}.*choose another folder"):
            make(material, output, sparse_student=splade, **graded(material, **changes))
    assert (output / "report.json").read_bytes() == before


def test_models_of_a_report_are_refused_by_their_names(report: Report, output: Path, tmp_path: Path) -> None:
    for folder in ("runs", "costs", "tokens", "indexes/dense-flat"):
        shutil.copytree(output / folder, tmp_path / folder)
        kept = json.loads((tmp_path / folder / CLAIM_FILE).read_text())
        for name, model in kept.pop("names").items():
            role = name.removesuffix(".weights")
            changed = {**kept, role: "0" * 64 if isinstance(kept[role], str) else {**kept[role], "weights": "0" * 64}}
            with pytest.raises(ValueError, match=re.escape(f"holds a run with {name} = {model!r} (")):
                claim(tmp_path / folder, changed, {name: "another"})


def test_any_row_may_be_the_baseline_and_each_pair_may_be_given_its_weight(
    report: Report, output: Path, material: Material, splade: str, tmp_path: Path
) -> None:
    alpha = {"hybrid-expanded": 0.25, "dense-learned-sparse": 0.5}
    measures = replace(tiny_settings().measures, baseline="bm25-expanded")
    shutil.copytree(output, tmp_path / "weights", ignore=shutil.ignore_patterns("runs", "costs"))

    def changed(folder: str, **changes: Any) -> Report:
        options = graded(material, measures=measures, **changes)
        return make(material, tmp_path / folder, sparse_student=splade, teacher=None, **options)

    made = changed("weights", hybrid=HybridSettings(alpha=alpha))
    hybrids = made.tuning["hybrids"]
    tuned = {key: one["alpha"] for key, one in report.tuning["hybrids"].items()}
    assert {key: one["alpha"] for key, one in hybrids.items()} == {**tuned, **alpha}
    assert [system.key for system in made.systems if system.significance is None] == ["bm25-expanded"]
    assert made.baseline == "bm25-expanded" and "differs from expanded BM25" in made.markdown()
    with pytest.raises(ValueError, match="this report has no such pair"):
        changed("refused", hybrid=HybridSettings(alpha={"base-bm25": 1.0}))
