"""Reports with a sparse student, with expanded BM25, and with further test splits and measures of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SparseEncoder

from tct_hf import Report, build_report, evaluate_run, fuse, read_run, tune_alpha, write_expansions
from tct_hf.data.collection import Collection, load_collection
from tct_hf.evaluation.reporting import check_report
from tct_hf.evaluation.settings import CostSettings, ExpansionSettings, HybridSettings, MeasureSettings, ReportSettings
from tct_hf.evaluation.stores import Stores, open_student
from tct_hf.evaluation.tune_alpha import tuning_queries
from tests.hub.models import TEXTS, published_tct, pyserini_vectors
from tests.searching import Material, write_material
from tests.splade import tiny_splade

KEYS = [
    *("bm25", "bm25-expanded", "dense-exact", "dense-ann", "hybrid", "hybrid-expanded", "learned-sparse"),
    *("learned-sparse-bm25", "learned-sparse-bm25-expanded", "dense-learned-sparse"),
]
# Key of a hybrid: what is weighted, and what it is added to.
HYBRIDS = {
    "hybrid": ("bm25", "dense-exact"),
    "hybrid-expanded": ("bm25-expanded", "dense-exact"),
    "learned-sparse-bm25": ("bm25", "learned-sparse"),
    "learned-sparse-bm25-expanded": ("bm25-expanded", "learned-sparse"),
    "dense-learned-sparse": ("learned-sparse", "dense-exact"),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """With a split "graded": of nine queries in the file, the five that are judged, in grades."""
    material = write_material(tmp_path_factory.mktemp("material"))
    corpus = [json.loads(line) for line in (material.beir / "corpus.jsonl").read_text().splitlines()]
    lines = ["query-id\tcorpus-id\tscore"]
    with (material.beir / "queries.jsonl").open("a") as file:
        for number in range(9):
            text = " ".join(corpus[5 * number]["text"].split()[:3])
            file.write(json.dumps({"_id": f"graded{number}", "text": text}) + "\n")
            if number < 5:
                lines += [f"graded{number}\tp{(5 * number + 7 * step) % 60}\t{step % 4}" for step in range(20)]
    (material.beir / "qrels" / "graded.tsv").write_text("\n".join(lines) + "\n")
    rows = [{"id": passage["_id"], "queries": [passage["text"].split()[-1]] * 3} for passage in corpus]
    write_expansions(rows, material.folder / "queries", settings={"model": "a/writer", "num_queries": 3})
    return material


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(material.folder / "cache"))


def tiny_settings(material: Material, **changes: Any) -> ReportSettings:
    made = ReportSettings(
        measures=MeasureSettings(names=["RR@10", "R@20"], depth=20),
        also_report={"graded": ["nDCG@10", "R(rel=2)@20", "R(rel=1)@20"]},
        expansion=ExpansionSettings(path=str(material.folder / "queries"), num_queries=2),
        cost=CostSettings(queries=3, warm_up=1, batch_size=2),
        precision="fp32",
    )
    return replace(made, **changes)


def collection(material: Material, also: tuple[str, ...] = ("graded",)) -> Collection:
    return load_collection(str(material.beir), also=also)


def make(material: Material, output: Path, **options: Any) -> Report:
    options = {"settings": tiny_settings(material), "write": lambda line: None, **options}
    return build_report(collection(material), str(material.student), output, **options)


@pytest.fixture(scope="module")
def output(material: Material) -> Path:
    return material.folder / "output"


@pytest.fixture(scope="module")
def splade(material: Material) -> str:
    return str(tiny_splade(material.folder / "splade"))


@pytest.fixture(scope="module")
def report(material: Material, output: Path, splade: str) -> Report:
    return make(material, output, sparse_student=splade)


@pytest.fixture(scope="module")
def alone(material: Material, splade: str) -> Report:
    settings = tiny_settings(material, also_report={}, expansion=ExpansionSettings())
    options: dict[str, Any] = {"teacher": str(material.teacher), "settings": settings, "write": lambda line: None}
    return build_report(material.collection(), splade, material.folder / "alone", **options)


def test_a_sparse_student_alone_is_searched_fused_and_reranked(alone: Report, report: Report) -> None:
    keys = ["bm25", "learned-sparse", "learned-sparse-bm25"]
    assert [system.key for system in alone.systems] == [*keys, "teacher", "reranked"]
    assert alone.baseline == "learned-sparse" and alone.tuning["ann"] is None
    assert alone.system("learned-sparse").title == "sparse student (learned)"
    assert alone.system("learned-sparse-bm25").title.startswith("sparse student + BM25, alpha ")
    stages = {key: list(one.system(key).cost["latency"]) for one, key in ((alone, keys[1]), (report, KEYS[-1]))}  # type: ignore[index]
    assert stages[keys[1]] == ["query encoding", "sparse search", "total"]
    assert stages[KEYS[-1]] == [
        *("dense query encoding", "dense search", "sparse query encoding", "sparse search", "fusion", "total"),
    ]
    for key in keys:
        assert alone.system(key).effectiveness == report.system(key).effectiveness


def test_every_pair_has_a_row_with_its_own_weight(report: Report, output: Path, material: Material) -> None:
    assert [system.key for system in report.systems] == KEYS
    [note] = [note for note in report.notes if note.startswith("Expanded BM25: ")]
    assert "with 2 generated queries of a/writer" in note and "k1 2.18, b 0.86" in note
    hybrids = report.tuning["hybrids"]
    assert list(hybrids) == list(HYBRIDS) and report.tuning["hybrid"] == hybrids["hybrid"]
    tuning = tuning_queries(collection(material), HybridSettings())
    assert tuning is not None
    for key, (weighted, first) in HYBRIDS.items():
        on = [read_run(output / "runs" / f"{one}.dev.trec") for one in (weighted, first)]
        assert hybrids[key]["alpha"] == tune_alpha(*on, tuning.qrels, "RR@10"), key
        for split, folder in (("test", "runs"), ("graded", "runs/graded")):
            runs = [read_run(output / folder / f"{one}.{split}.trec") for one in (weighted, first, key)]
            assert runs[2] == fuse(*runs[:2], hybrids[key]["alpha"], k=20), (key, split)


def test_any_row_may_be_the_baseline_and_each_pair_may_be_given_its_weight(
    report: Report, output: Path, material: Material, splade: str
) -> None:
    settings = tiny_settings(material)
    alpha = {"hybrid-expanded": 0.25, "dense-learned-sparse": 0.5}
    settings = replace(
        settings, measures=replace(settings.measures, baseline="bm25-expanded"), hybrid=HybridSettings(alpha=alpha)
    )
    shutil.copytree(output, material.folder / "weights", ignore=shutil.ignore_patterns("runs", "costs"))
    made = make(material, material.folder / "weights", settings=settings, sparse_student=splade)
    hybrids = made.tuning["hybrids"]
    assert {key: hybrids[key]["alpha"] for key in alpha} == alpha
    tuned = [key for key in hybrids if key not in alpha]
    assert {key: hybrids[key]["alpha"] for key in tuned} == {
        key: report.tuning["hybrids"][key]["alpha"] for key in tuned
    }
    untested = [system.key for system in made.systems if system.significance is None]
    assert made.baseline == "bm25-expanded" and untested == ["bm25-expanded"]
    assert "differs from expanded BM25" in made.markdown()
    for changes, message in (
        (
            {"measures": replace(settings.measures, baseline="teacher")},
            "there is no row 'teacher'; there are bm25, bm25-",
        ),
        ({"hybrid": HybridSettings(alpha={"hybrid": -1.0})}, r"hybrid\.alpha\.hybrid: -1\.0 must be finite"),
        ({"hybrid": HybridSettings(alpha={"bm25": 1.0})}, r"hybrid\.alpha\.bm25: there is no such pair"),
        ({"hybrid": HybridSettings(alpha={"learned-sparse-bm25": 1.0})}, "this report has no such pair"),
    ):
        options: dict[str, Any] = {"hybrid": HybridSettings(), **changes}
        refused = replace(settings, **options)
        with pytest.raises(ValueError, match=message):
            make(material, material.folder / "refused", settings=refused)


def test_a_hybrid_with_expanded_bm25_costs_both_its_parts(report: Report) -> None:
    costs = {key: report.system(key).cost for key in ("bm25-expanded", "dense-exact", "hybrid-expanded")}
    parts = [cost["disk_bytes_per_passage"] for cost in costs.values() if cost is not None]
    assert parts[2] == pytest.approx(parts[0] + parts[1])
    assert list(costs["hybrid-expanded"]["latency"]) == [  # type: ignore[index]
        *("query encoding", "dense search", "BM25 search", "fusion", "total")
    ]


def test_a_further_split_is_measured_on_its_judged_queries_alone(
    report: Report, output: Path, material: Material
) -> None:
    graded, qrels = report.also["graded"], collection(material).also["graded"].qrels
    assert graded["queries"] == len(qrels) == 5 and list(graded["systems"]) == KEYS
    for key, system in graded["systems"].items():
        run = read_run(output / system["run"]["file"])
        assert set(run) == set(qrels)
        for grade in (1, 2):
            recall = [
                len({name for name, given in qrels[query].items() if given >= grade} & set(run[query]))
                / sum(given >= grade for given in qrels[query].values())
                for query in qrels
            ]
            assert system["effectiveness"][f"R(rel={grade})@20"]["mean"] == pytest.approx(sum(recall) / 5), key
        ndcg = evaluate_run(run, qrels, ["nDCG@10"]).mean["nDCG@10"]
        assert system["effectiveness"]["nDCG@10"]["mean"] == ndcg
        assert (system["significance"] is None) == (key == "dense-exact")
    shown = report.markdown()
    assert "## graded: 5 queries" in shown
    for measure in graded["measures"]:
        _, _, table = shown.partition(f"## Significance, graded (5 queries), {measure}\n\n")
        rows = table.split("\n\n")[0].splitlines()
        assert len(rows) == 2 + len(KEYS) and rows[2].startswith("| dense, exact (baseline) ")
    assert "from grade 2 on in R(rel=2)@20, from grade 1 on in R(rel=1)@20. Grades are gains in nDCG@10." in shown


def test_a_report_with_further_splits_is_loaded_as_it_was(report: Report, output: Path) -> None:
    assert Report.load(output) == report
    content = json.loads((output / "report.json").read_text())
    del content["also"]  # as a report of before had it
    (output / "older.json").write_text(json.dumps(content))
    assert Report.load(output / "older.json").also == {}


def test_a_split_may_be_added_to_a_report(report: Report, output: Path, material: Material, splade: str) -> None:
    said: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in output.glob("runs/*.trec")}
    settings = tiny_settings(material, also_report={"graded": ["RR(rel=2)@10"]})
    again = make(material, output, settings=settings, write=said.append, sparse_student=splade)
    assert not [line for line in said if "search" in line or "time" in line]
    assert {file: file.stat().st_mtime_ns for file in output.glob("runs/*.trec")} == before
    assert again.systems == report.systems and again.also["graded"]["measures"] == ["RR(rel=2)@10"]


def test_queries_of_a_further_split_are_not_tuned_on(material: Material) -> None:
    found = collection(material)
    taken = next(iter(found.splits["dev"].queries))
    found.also["graded"].queries["other-id"] = found.splits["dev"].queries[taken].upper()
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and taken not in tuning.queries and tuning.left_out >= 1
    found.also["graded"].queries.update(found.splits["dev"].queries)
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and tuning.split == "train"


def test_a_further_split_that_takes_tuning_queries_needs_a_folder_of_its_own(
    report: Report, output: Path, material: Material
) -> None:
    found = collection(material)
    found.also["graded"].queries["other-id"] = next(iter(found.splits["dev"].queries.values()))
    with pytest.raises(ValueError, match=r"also_report = None, but now also_report = .'graded'"):
        build_report(found, str(material.student), output, settings=tiny_settings(material), write=lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"also_report": {"graded": []}}, r"also_report\.graded is empty"),
        ({"also_report": {"graded": ["trec-dl"]}}, r"measures\.depth is 20, too little for R\(rel=2\)@1000"),
        ({"also_report": {"other": ["RR@10"]}}, r"also_report\.other: .* no judged query of this split"),
        (
            {"expansion": ExpansionSettings(path="nowhere", drop_share=1.0)},
            r"drop_share: 1\.0 is not from 0 to below 1",
        ),
        ({"expansion": ExpansionSettings(path="nowhere", b=1.5)}, r"expansion\.k1 2\.18, expansion\.b 1\.5"),
        ({"expansion": ExpansionSettings(path="nowhere")}, "nowhere: no expansions here"),
    ],
)
def test_what_would_stop_the_report_is_said_at_once(material: Material, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_report(collection(material), tiny_settings(material, **changes), {})


def test_each_choice_of_generated_queries_is_an_index_of_its_own(material: Material, tmp_path: Path) -> None:
    stores = Stores(
        collection(material),
        open_student(str(material.student)),
        "student",
        tmp_path / "kept",
        write=lambda line: None,
    )
    chosen = ExpansionSettings(path=str(material.folder / "queries"), num_queries=1)
    first = stores.expanded(chosen)
    assert stores.expanded(replace(chosen)) is first
    with pytest.raises(ValueError, match=r"num_queries = 1, but now expansion\.num_queries = 2"):
        stores.expanded(replace(chosen, num_queries=2))  # not the other index


def test_a_split_has_one_use(material: Material) -> None:
    found = load_collection(str(material.beir), also=["dev"])
    assert "dev" not in found.splits and len(found.also["dev"].queries) == 10
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and tuning.split == "train"
    part = collection(material).part(queries=3)
    assert len(part.also["graded"].queries) == 3 == len(part.also["graded"].qrels)
    for name, options in (("test", {}), ("dev", {"dev_split": "dev"})):
        with pytest.raises(ValueError, match=f"also_report: '{name}'"):
            load_collection(str(material.beir), also=[name], **options)


def test_the_run_is_that_of_the_whole_product(report: Report, output: Path, material: Material, splade: str) -> None:
    model = SparseEncoder(splade, device="cpu")
    collection = material.collection()
    run = read_run(output / "runs" / "learned-sparse.test.trec")
    queries = collection.splits["test"].queries
    passages = model.encode_document(list(collection.corpus["text"])).to_dense().numpy()
    vectors = model.encode_query(list(queries.values())).to_dense().numpy()
    for scores, found in zip(vectors @ passages.T, run.values(), strict=True):
        np.testing.assert_allclose(list(found.values()), np.sort(scores)[::-1][: len(found)], rtol=1e-4)


def test_active_dims_and_bytes_are_told(report: Report, alone: Report, material: Material, splade: str) -> None:
    model = SparseEncoder(splade, device="cpu")
    collection = material.collection()
    passages = model.encode_document(list(collection.corpus["text"])).to_dense()
    queries = model.encode_query(list(collection.splits["test"].queries.values())).to_dense()
    for one, role in ((report, "sparse_student"), (alone, "student")):
        measured = one.models[role]
        assert measured["document_active_dims"] == pytest.approx((passages > 0).sum(1).float().mean().item())
        assert measured["query_active_dims"] == pytest.approx((queries > 0).sum(1).float().mean().item())
        assert measured["name"] == splade and measured["dimension"] == passages.shape[1]
        cost = one.system("learned-sparse").cost
        assert cost is not None
        assert cost["disk_bytes_per_passage"] > 8 * measured["document_active_dims"]
        assert cost["memory_bytes_per_passage"] > 8 * measured["document_active_dims"]
        text = one.markdown()
        assert f"{measured['document_active_dims']:.1f} a passage" in text and "query active dims" in text
    assert "query_active_dims" not in report.models["student"]
    assert any("alpha * BM25 + sparse student, alpha" in note for note in report.notes)
    assert any("alpha * sparse student + dense, alpha" in note for note in report.notes)


def test_students_in_the_wrong_place_are_refused(material: Material, splade: str) -> None:
    def refused(student: str, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            build_report(collection(material), student, material.folder / "wrong", **options)

    student = str(material.student)
    refused(splade, "which is sparse itself", sparse_student=splade)
    refused(student, "is no SparseEncoder", sparse_student=student)
    for one, baseline in ((splade, "dense-exact"), (student, "learned-sparse")):
        settings = replace(ReportSettings(), measures=MeasureSettings(names=["RR@10"], baseline=baseline))
        message = rf"measures\.baseline: there is no row '{baseline}'; there are bm25, "
        refused(one, message, settings=settings)


def test_a_sparse_student_that_compares_by_cosine_is_refused(material: Material, splade: str, tmp_path: Path) -> None:
    student = open_student(splade, "cpu")
    student.similarity_fn_name = "cosine"
    with pytest.raises(ValueError, match="of a sparse student only dot can be searched"):
        Stores(collection(material), student, "student", tmp_path)


def test_a_bare_tct_checkpoint_is_searched_with_its_own_vectors(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    published = published_tct(tmp_path / "tct_colbert-msmarco")
    student = open_student(str(published), "cpu")
    np.testing.assert_allclose(
        student.encode_query(TEXTS[:3]), pyserini_vectors(published, TEXTS[:3], "query"), atol=1e-5
    )
