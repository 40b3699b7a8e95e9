"""Reports with expanded BM25, its hybrids, and further test splits with measures of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tct_hf import Report, build_report, evaluate_run, fuse, read_run, tune_alpha, write_expansions
from tct_hf.data.collection import Collection, load_collection
from tct_hf.evaluation.measures import named_measures, relevant_from
from tct_hf.evaluation.report_checks import check_report
from tct_hf.evaluation.report_settings import (
    CostSettings,
    ExpansionSettings,
    HybridSettings,
    MeasureSettings,
    ReportSettings,
)
from tct_hf.evaluation.report_work import rows_of
from tct_hf.evaluation.stores import Stores, open_student
from tct_hf.evaluation.tuning import tuning_queries
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


def test_every_pair_has_a_row_with_its_own_weight(report: Report, output: Path, material: Material) -> None:
    assert [system.key for system in report.systems] == KEYS
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
    report: Report, material: Material, splade: str
) -> None:
    settings = tiny_settings(material)
    alpha = {"hybrid-expanded": 0.25, "dense-learned-sparse": 0.5}
    settings = replace(
        settings,
        measures=replace(settings.measures, baseline="bm25-expanded"),
        hybrid=HybridSettings(alpha=alpha),
    )
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


def test_the_rows_are_known_before_anything_is_made(report: Report, material: Material) -> None:
    settings = tiny_settings(material)
    assert rows_of(settings, 60, sparse=False, beside=True, teacher=False, dims=[]) == [
        one.key for one in report.systems
    ]
    plain = replace(settings, expansion=ExpansionSettings())
    rows = rows_of(plain, 60, sparse=False, beside=False, teacher=True, dims=[16])
    assert rows == ["bm25", "dense-exact", "dense-ann", "dense-first-16", "hybrid", "teacher", "reranked"]
    assert rows_of(plain, 50_001, sparse=True, beside=False, teacher=True, dims=[]) == [
        *("bm25", "learned-sparse", "learned-sparse-bm25", "reranked"),
    ]


def test_a_hybrid_with_expanded_bm25_costs_both_its_parts(report: Report) -> None:
    costs = {key: report.system(key).cost for key in ("bm25-expanded", "dense-exact", "hybrid-expanded")}
    parts = [cost["disk_bytes_per_passage"] for cost in costs.values() if cost is not None]
    assert parts[2] == pytest.approx(parts[0] + parts[1])
    assert list(costs["hybrid-expanded"]["latency"]) == [  # type: ignore[index]
        *("query encoding", "dense search", "BM25 search", "fusion", "total"),
    ]


def test_the_report_says_what_was_expanded_with(report: Report) -> None:
    [note] = [note for note in report.notes if note.startswith("Expanded BM25: ")]
    assert "with 2 generated queries of a/writer" in note and "k1 2.18, b 0.86" in note
    assert report.system("bm25-expanded").title == "expanded BM25"
    assert report.system("hybrid-expanded").title.startswith("dense + expanded BM25, alpha ")


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


def test_dev_can_be_reported_and_is_then_not_tuned_on(material: Material) -> None:
    found = load_collection(str(material.beir), also=["dev"])
    assert "dev" not in found.splits and len(found.also["dev"].queries) == 10
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and tuning.split == "train"
    assert "dev" not in load_collection(str(material.beir), test_split="dev").splits


def test_a_part_of_a_collection_has_its_further_splits(material: Material) -> None:
    part = collection(material).part(queries=3)
    assert len(part.also["graded"].queries) == 3 == len(part.also["graded"].qrels)
    assert load_collection(str(material.beir), test_split="dev").part(queries=3).test_split == "dev"
    assert collection(material).fingerprint == collection(material, also=()).fingerprint


@pytest.mark.parametrize("name", ["test", "train"])
def test_a_split_has_one_use(material: Material, name: str) -> None:
    with pytest.raises(ValueError, match=rf"also_report: '{name}' is no split to report beside the others"):
        load_collection(str(material.beir), also=[name])
    with pytest.raises(ValueError, match="also_report: 'dev'"):
        load_collection(str(material.beir), dev_split="dev", also=["dev"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"also_report": {"graded": []}}, r"also_report\.graded is empty"),
        ({"also_report": {"graded": ["trec-dl"]}}, r"measures\.depth is 20, too little for R\(rel=2\)@1000"),
        ({"also_report": {"other": ["RR@10"]}}, r"also_report\.other: .* no judged query of this split"),
        ({"expansion": {"num_queries": 0}}, r"expansion\.num_queries: 0 is below 1"),
        ({"expansion": {"drop_share": 1.0}}, r"expansion\.drop_share: 1\.0 is not from 0 to below 1"),
        ({"expansion": {"drop_share": 0.3}}, "drop_share is 0.3, but the queries have no scores"),
        ({"expansion": {"b": 1.5}}, r"expansion\.k1 2\.18, expansion\.b 1\.5"),
        ({"expansion": {"path": "nowhere"}}, "nowhere: no expansions here"),
    ],
)
def test_what_would_stop_the_report_is_said_at_once(material: Material, changes: dict[str, Any], message: str) -> None:
    if "expansion" in changes:
        changes = {
            "expansion": ExpansionSettings(**{"path": str(material.folder / "queries"), **changes["expansion"]})
        }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_report(collection(material), tiny_settings(material, **changes), {})


def test_names_of_measure_sets_stand_for_their_measures() -> None:
    assert named_measures(["trec-dl", "nDCG@10", "AP"]) == [
        *("nDCG@10", "RR(rel=2)@10", "R(rel=2)@1000", "R(rel=1)@1000", "AP"),
    ]
    assert [relevant_from(one, 1) for one in named_measures(["msmarco-dev", "trec-dl"])] == [1, 1, None, 2, 2, 1]
    assert relevant_from("RR@10", 2) == 2


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
