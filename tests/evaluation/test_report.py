"""A report of a small collection: every system, what it says, what it reuses, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tct_hf import Report, build_report, read_run, write_run
from tct_hf.data.collection import Collection, Split
from tct_hf.evaluation.settings import (
    AnnSettings,
    CostSettings,
    HybridSettings,
    LateInteractionSettings,
    MeasureSettings,
    ReportSettings,
)
from tests.searching import Material, write_material

KEYS = ["bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"]


def tiny_settings(**changes: Any) -> ReportSettings:
    made = ReportSettings(
        measures=MeasureSettings(names=["RR@10", "nDCG@10", "R@20"], depth=20),
        cost=CostSettings(queries=4, teacher_queries=3, warm_up=1, batch_size=2),
        precision="fp32",
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(material.folder / "cache"))


@pytest.fixture(scope="module")
def output(material: Material) -> Path:
    return material.folder / "output"


@pytest.fixture(scope="module")
def report(material: Material, output: Path) -> Report:
    return make(material, output)


def make(material: Material, output: Path, collection: Collection | None = None, **options: Any) -> Report:
    options = {"teacher": str(material.teacher), "settings": tiny_settings(), "write": lambda line: None, **options}
    return build_report(collection or material.collection(), str(material.student), output, **options)


def without_times(report: Report) -> dict[str, Any]:
    content = report.to_dict()
    for system in content["systems"]:
        system["cost"] = None
    return content


def test_every_system_has_effectiveness_latency_bytes_and_a_run(report: Report, output: Path) -> None:
    assert [system.key for system in report.systems] == KEYS
    for system in report.systems:
        assert set(system.effectiveness) == {"RR@10", "nDCG@10", "R@20"}
        assert system.cost is not None
        total = system.cost["latency"]["total"]
        assert total["queries"] == (3 if system.key in ("teacher", "reranked") else 4)
        assert 0 < total["p50"] <= total["p95"] <= total["p99"]
        assert system.cost["queries_per_second"] > 0 and system.cost["build_seconds"] > 0
        assert system.cost["disk_bytes_per_passage"] > 0 and system.cost["memory_bytes_per_passage"] > 0
        assert read_run(output / system.run["file"])
    stages = list(report.system("hybrid").cost["latency"])  # type: ignore[index]
    assert stages == ["query encoding", "dense search", "BM25 search", "fusion", "total"]
    teacher = report.models["teacher"]
    assert teacher["dimension"] == 16
    cost = report.system("teacher").cost
    assert cost is not None
    vectors = teacher["tokens_per_passage"] * 16 * 2
    assert vectors < cost["disk_bytes_per_passage"] < vectors + 20  # lengths and headers of the files


def test_the_table_says_what_the_json_says(report: Report, output: Path) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table().splitlines()]
    assert rows[0] == ["system", "RR@10", "nDCG@10", "R@20", "p50 ms", "bytes a passage"]
    for row, system in zip(rows[2:], report.systems, strict=True):
        assert row[0] == system.title
        for shown, measure in zip(row[1:4], report.measures, strict=True):
            assert shown.strip("* †") == f"{system.effectiveness[measure]['mean']:.3f}"
            assert ("†" in shown) == system.differs(measure)
        assert system.cost is not None
        assert row[5] == f"{system.cost['disk_bytes_per_passage']:,.0f}"
    text = (output / "report.md").read_text()
    assert report.table() in text and report.cost_table() in text
    assert all(report.significance_table(measure) in text for measure in report.measures)
    for name in ("latency.png", "storage.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_systems_are_tested_against_the_baseline_with_holms_correction(report: Report, material: Material) -> None:
    from tct_hf import compare_runs

    runs = {system.key: read_run(material.folder / "output" / system.run["file"]) for system in report.systems}
    qrels = material.collection().splits["test"].qrels
    compared = compare_runs(runs, qrels, baseline="dense-exact", measure="RR@10")
    assert report.system("dense-exact").significance is None
    for key, difference in compared.systems.items():
        found = report.system(key).significance
        assert found is not None
        assert found["RR@10"] == json.loads(json.dumps(difference.__dict__))


def test_alpha_is_tuned_on_dev_and_the_report_says_so(report: Report, output: Path) -> None:
    hybrid = report.tuning["hybrid"]
    assert hybrid["split"] == report.tuning["ann"]["split"] == "dev" and hybrid["queries"] == 10
    assert report.tuning["ann"]["source"] == "queries"
    assert f"alpha {hybrid['alpha']:.3g} tuned for RR@10 on 10 dev queries" in report.markdown()
    assert set(read_run(output / "runs" / "dense-exact.dev.trec")) == {f"dev{number}" for number in range(10)}


@pytest.mark.parametrize("tune_on", ["auto", "train"])
def test_alpha_is_never_tuned_on_the_reported_queries(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune_on: Any
) -> None:
    from tct_hf.evaluation import report_work as hybrid

    collection = material.collection()
    test, dev = collection.splits["test"], collection.splits["dev"]
    # A reported question is also among those of dev, in other words of the same letters.
    dev.queries["dev0"] = f"  {test.queries['test0'].upper()} "
    seen: list[set[str]] = []
    tune = hybrid.tune_alpha

    def watched(sparse: Any, dense: Any, qrels: Any, *more: Any, **options: Any) -> Any:
        seen.append({*sparse, *dense, *qrels})
        return tune(sparse, dense, qrels, *more, **options)

    monkeypatch.setattr(hybrid, "tune_alpha", watched)
    settings = tiny_settings(hybrid=HybridSettings(tune_on=tune_on))
    found = make(material, tmp_path, collection, teacher=None, settings=settings)
    [tuned] = seen
    assert tuned and tuned.isdisjoint(test.queries) and "dev0" not in tuned
    assert found.tuning["hybrid"]["left_out"] == (0 if tune_on == "train" else 1)


def test_a_split_that_shares_queries_with_the_reported_one_is_refused(material: Material, tmp_path: Path) -> None:
    collection = material.collection()
    collection.splits["dev"] = collection.splits["test"]
    with pytest.raises(ValueError, match=r"hybrid\.tune_on: alpha would be tuned on 12 of the queries .* reported"):
        make(material, tmp_path, collection)
    assert not tmp_path.joinpath("vectors").exists()


def test_without_other_queries_lists_are_fused_by_rank(material: Material, tmp_path: Path) -> None:
    collection = material.collection()
    del collection.splits["dev"], collection.splits["train"]
    found = make(material, tmp_path, collection, teacher=None)
    assert found.tuning["hybrid"]["fusion"] == "ranks" and found.tuning["hybrid"]["alpha"] is None
    assert found.tuning["ann"]["source"] == "passages"
    assert "fused by reciprocal ranks" in found.markdown()
    settings = tiny_settings(hybrid=HybridSettings(tune_on="train"))
    with pytest.raises(ValueError, match=r"hybrid\.tune_on: .* no train query to tune on .* set hybrid\.alpha"):
        make(material, tmp_path / "other", collection, settings=settings)


def test_the_teachers_runs_are_those_of_exhaustive_search_and_of_reranking(
    report: Report, material: Material, output: Path
) -> None:
    from tct_hf.evaluation.maxsim import late_interaction_run, rerank_run
    from tests.models import load_colbert

    collection, model = material.collection(), load_colbert(material.teacher)
    queries, corpus = collection.splits["test"].queries, collection.corpus
    exhaustive = late_interaction_run(model, corpus["id"][:], corpus["text"][:], queries, k=20)
    first = read_run(output / "runs" / "hybrid.test.trec")
    for key, expected in (("teacher", exhaustive), ("reranked", rerank_run(model, first, corpus, queries))):
        found = read_run(output / "runs" / f"{key}.test.trec")
        for query, hits in expected.items():
            common = [name for name in hits if name in found[query]]
            assert len(common) >= 19  # float16 may exchange two at the cut
            assert [found[query][name] for name in common] == pytest.approx([hits[name] for name in common], abs=0.02)


def test_by_default_the_students_own_token_vectors_search_and_rerank_by_the_mean_over_query_tokens(
    material: Material, tmp_path: Path
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    from tct_hf import build_student, save_student

    student = str(save_student(build_student(str(material.folder / "base"), encoding="own"), tmp_path / "student"))
    output = tmp_path / "output"
    found = build_report(material.collection(), student, output, settings=tiny_settings(), write=lambda line: None)
    assert [system.key for system in found.systems] == KEYS
    assert found.system("reranked").title == "own MaxSim over the hybrid's top 20"
    assert found.models["teacher"]["name"] == "own" and found.system("reranked").cost is not None
    collection, model = material.collection(), SentenceTransformer(student, device="cpu")

    def tokens(text: str, task: str) -> torch.Tensor:
        [one] = getattr(model, f"encode_{task}")([text], output_value="token_embeddings")
        return torch.nn.functional.normalize(one, dim=-1)

    texts = {one["id"]: tokens(one["text"], "document") for one in collection.corpus}
    hybrid, reranked, exhaustive = (
        read_run(output / "runs" / f"{key}.test.trec") for key in ("hybrid", "reranked", "teacher")
    )
    for query, text in collection.splits["test"].queries.items():
        asked = tokens(text, "query")
        scores = {name: float((asked @ texts[name].T).amax(1).mean()) for name in texts}
        assert reranked[query] == pytest.approx({name: scores[name] for name in hybrid[query]}, abs=0.002)
        assert exhaustive[query] == pytest.approx({name: scores[name] for name in exhaustive[query]}, abs=0.002)
        assert min(exhaustive[query].values()) >= sorted(scores.values())[-20] - 0.002


def test_the_base_as_it_is_has_a_row_and_one_fused_with_bm25(material: Material, tmp_path: Path) -> None:
    from tct_hf import fuse
    from tct_hf.evaluation.references import dense_run

    base = material.folder / "base"
    found = make(material, tmp_path, teacher=None, base=str(base))
    assert [system.key for system in found.systems] == [*KEYS[:4], "base", "base-bm25"]
    assert found.system("base").title == "base as it is" and found.models["base"]["name"] == str(base)
    assert set(found.tuning["hybrids"]) == {"hybrid", "base-bm25"}
    collection = material.collection()
    from sentence_transformers import SentenceTransformer

    ids, texts = collection.corpus["id"], collection.corpus["text"]
    expected = dense_run(SentenceTransformer(str(base)), ids, texts, collection.splits["test"].queries, k=20)
    runs = {key: read_run(tmp_path / "runs" / f"{key}.test.trec") for key in ("bm25", "base", "base-bm25")}
    for query, hits in expected.items():
        assert runs["base"][query] == pytest.approx(hits, abs=1e-4)
    assert runs["base-bm25"] == fuse(runs["bm25"], runs["base"], found.tuning["hybrids"]["base-bm25"]["alpha"], k=20)


def test_too_many_passages_for_token_vectors_are_only_reranked(
    report: Report, material: Material, tmp_path: Path
) -> None:
    settings = tiny_settings(late_interaction=LateInteractionSettings(max_passages=59, rerank=5))
    found = make(material, tmp_path, settings=settings)
    assert [system.key for system in found.systems] == [*KEYS[:4], "reranked"]
    assert "max_passages" in found.markdown() and "top 5" in found.system("reranked").title
    first, again = (read_run(tmp_path / "runs" / f"{key}.test.trec") for key in ("hybrid", "reranked"))
    for query, hits in again.items():
        assert list(hits)[5:] == list(first[query])[5:] and set(hits) == set(first[query])


def test_a_second_call_makes_nothing_again(report: Report, material: Material, output: Path) -> None:
    def made() -> dict[Path, int]:
        # The report itself, and the vectors' manifest, are written again with the same content.
        files = (file for file in output.rglob("*") if file.is_file() and file.parent != output)
        return {file: file.stat().st_mtime_ns for file in files if file.name != "manifest.json"}

    before, lines = made(), []
    assert make(material, output, write=lines.append) == report
    assert made() == before
    assert not [line for line in lines if "search" in line or "time" in line]


def test_what_is_lost_is_made_again_as_it_was(report: Report, material: Material, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(material.folder / "output", tmp_path / "copy")
    for lost in ("vectors/manifest.json", "runs/hybrid.test.trec", "tokens/vectors/00000.npz"):
        (tmp_path / "copy" / lost).unlink()
    for lost in ("indexes/dense-flat/index", "indexes/dense-hnsw32/index"):
        shutil.rmtree(tmp_path / "copy" / lost)
    assert without_times(make(material, tmp_path / "copy")) == without_times(report)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"measures": MeasureSettings(names=["RR@10"], depth=30)}, "settings.depth = 20, but now settings.depth = 30"),
        ({"cost": CostSettings(queries=5)}, "cost.queries = 4, but now cost.queries = 5"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(
    report: Report, material: Material, output: Path, changes: dict[str, Any], named: str
) -> None:
    before = (output / "report.json").read_bytes()
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as refused:
        make(material, output, settings=tiny_settings(**changes))
    assert "choose another --output_dir" in str(refused.value)
    assert (output / "report.json").read_bytes() == before


def test_a_run_from_elsewhere_stands_in_the_table_without_a_cost(material: Material, tmp_path: Path) -> None:
    collection = material.collection()
    perfect = {query: dict.fromkeys(grades, 1.0) for query, grades in collection.splits["test"].qrels.items()}
    perfect.pop("test3")
    write_run(perfect, tmp_path / "ideal.trec", "ideal")
    found = make(material, tmp_path / "out", teacher=None, runs={"ideal system": str(tmp_path / "ideal.trec")})
    system = found.systems[-1]
    assert (system.title, system.kind, system.cost) == ("ideal system", "other", None)
    assert system.effectiveness["RR@10"]["mean"] == pytest.approx(11 / 12)
    assert system.significance is not None and system.run["missing_queries"] == 1
    assert "lacks 1 of the reported queries" in found.markdown()
    assert Report.load(tmp_path / "out") == found


def test_what_would_stop_the_report_is_said_before_any_model_is_loaded(material: Material, tmp_path: Path) -> None:
    def refused(said: str, collection: Collection | None = None, **options: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            build_report(collection or material.collection(), "no-such-model", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def foreign(run: dict[str, dict[str, float]]) -> dict[str, str]:
        write_run(run, tmp_path / "other.trec", "other")
        return {"other": str(tmp_path / "other.trec")}

    spoilt = material.collection()
    spoilt.splits["test"].queries["test1"] = " \t"
    refused("query 'test1' is blank", spoilt)
    spoilt.splits["test"] = Split({}, {})
    refused("no judged query to report on", spoilt)
    unknown = foreign({"test0": {"p1": 2.0, "nowhere": 1.0}})
    refused("passage 'nowhere' for query 'test0', which is not in the corpus", runs=unknown)
    refused("none of the 12 reported queries", runs=foreign({"q": {"p1": 2.0}}))
    refused(r"runs\.bm25: a system of the report has this name", runs={"bm25": "other.trec"})
    for changes, said in (
        ({"measures": MeasureSettings(names=["R@1000"])}, r"measures\.depth is 100, too little for R@1000"),
        ({"cost": CostSettings(batch_size=0)}, r"cost\.batch_size: 0 is below 1"),
        ({"ann": AnnSettings(recall=1.0)}, r"ann\.recall: 1\.0 is not between"),
        ({"ann": AnnSettings(factory="nonsense")}, r"ann\.factory: Faiss knows no index 'nonsense'"),
        ({"ann": AnnSettings(factory="IVF64,Flat")}, r"ann\.factory: 'IVF64,Flat' has 64 lists for 60 passages"),
        ({"hybrid": HybridSettings(alpha=-3.0)}, r"hybrid\.alpha: -3\.0 must be finite"),
    ):
        refused(said, settings=tiny_settings(**changes))
    for factory in ("OPQ16_64,IVF8,PQ16x4fs,RFlat", "PQ48"):
        tiny_settings(ann=AnnSettings(factory=factory)).check(60)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ("no/such/folder", None, "student: there is no folder no/such/folder"),
        ("teacher", None, "one vector a token, and no student is"),
        ("student", "student", "is a SentenceTransformer, one vector a text, and no ColBERT"),
    ],
)
def test_a_wrong_model_is_refused(material: Material, tmp_path: Path, student: str, teacher: Any, said: str) -> None:
    places = {"teacher": str(material.teacher), "student": str(material.student), None: None}
    options = {"teacher": places[teacher], "settings": tiny_settings()}
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        build_report(material.collection(), places.get(student) or student, tmp_path, **options)


@pytest.mark.parametrize(("side", "said"), [("student", "passage 'p0'"), ("teacher", "passage 'p0' has a NaN")])
def test_a_model_that_gives_nan_is_named_with_the_passage(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, said: str
) -> None:
    import torch

    from tct_hf.evaluation import report_work as module

    opener = {"student": "open_student", "teacher": "open_reranker"}[side]
    load = getattr(module, opener)

    def spoilt(*names: Any) -> Any:
        model = load(*names)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(module, opener, spoilt)
    with pytest.raises(ValueError, match=said):
        make(material, tmp_path)


def test_a_report_is_loaded_as_it_was_saved_or_refused(report: Report, output: Path, tmp_path: Path) -> None:
    assert Report.load(output) == report == Report.load(output / "report.json")
    assert json.loads((output / "report.json").read_text()) == report.to_dict()
    with pytest.raises(FileNotFoundError, match="no such report"):
        Report.load(tmp_path / "report.json")
    content = json.loads((output / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ValueError, match="format 99 where this version reads 1"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="damaged"):
        Report.load(tmp_path)
    with pytest.raises(KeyError, match="there are bm25"):
        report.system("splade")


def test_ties_of_token_vectors_are_ordered_by_id() -> None:
    import numpy as np
    import torch

    from tct_hf.evaluation.maxsim import TokenVectors

    vectors = np.array([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]], np.float16)
    stored = TokenVectors(["b", "c", "a"], torch.from_numpy(vectors), np.array([2, 1, 2]))
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert stored.search([query], 2) == [{"a": 5.0, "b": 5.0}]
    assert list(stored.search([query], 2)[0]) == ["a", "b"]
    assert stored.search([query], 9) == [{"a": 5.0, "b": 5.0, "c": 2.0}]
    assert stored.rerank(query, ["c", "b"]) == {"b": 5.0, "c": 2.0}
    assert stored.nbytes == 5 * 2 * 2


def test_first_dimensions_are_measured_as_trained_or_as_asked(
    material: Material, report: Report, output: Path, tmp_path: Path
) -> None:
    import shutil

    import numpy as np
    from sentence_transformers import SentenceTransformer

    from tct_hf import DenseIndex
    from tct_hf.files import CLAIM_FILE, write_json_atomic

    shutil.copytree(material.student, tmp_path / "student")
    record = {"student": {"training": {"matryoshka_dims": [8, 16, 32]}}}
    write_json_atomic(tmp_path / "student" / CLAIM_FILE, record)
    shutil.copytree(output, tmp_path / "output")
    options: dict[str, Any] = {"settings": tiny_settings(), "write": lambda line: None}
    trained = build_report(material.collection(), str(tmp_path / "student"), tmp_path / "trained", **options)
    sizes = ["dense-first-16", "dense-first-8"]
    assert [system.key for system in trained.systems] == [*KEYS[:3], *sizes, "hybrid"]
    whole, first = trained.system("dense-exact"), trained.system("dense-first-8")
    assert first.title == "dense, first 8 dimensions" and whole.cost is not None and first.cost is not None
    saved = whole.cost["disk_bytes_per_passage"] - first.cost["disk_bytes_per_passage"]
    assert saved == pytest.approx((32 - 8) * 4, abs=3)
    student = SentenceTransformer(str(tmp_path / "student"), device="cpu", truncate_dim=8)
    queries = material.collection().splits["test"].queries
    scores = (
        student.encode_query(list(queries.values())) @ student.encode_document(material.collection().corpus["text"]).T
    )
    run = read_run(tmp_path / "trained" / first.run["file"])
    for row, query in enumerate(queries):
        assert sorted(run[query].values(), reverse=True) == pytest.approx(np.sort(scores[row])[::-1][:20], abs=1e-4)
    folder = tmp_path / "trained" / "indexes" / "dense-first-8" / "index"
    assert DenseIndex.load(folder, model=student).dimension == 8
    with pytest.raises(ValueError, match="with another truncate_dim than"):
        DenseIndex.load(folder, model=SentenceTransformer(str(tmp_path / "student"), device="cpu"))
    # Asked for, in a folder that has all the rest; and not at all.
    asked = make(material, tmp_path / "output", dims=[4])
    assert [system.key for system in asked.systems] == [*KEYS[:3], "dense-first-4", *KEYS[3:]]
    assert [system.effectiveness for system in asked.systems if system.key in KEYS] == [
        system.effectiveness for system in report.systems
    ]
    none = build_report(material.collection(), str(tmp_path / "student"), tmp_path / "trained", dims=[], **options)
    assert [system.key for system in none.systems] == [*KEYS[:3], "hybrid"]


def test_sizes_that_the_student_does_not_have_are_refused(material: Material, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dims: 33 is not between 1 and the 32 dimensions"):
        make(material, tmp_path, dims=[33])
    taken = tmp_path / "run.trec"
    write_run({"test0": {"p0": 1.0}}, taken, "run")
    with pytest.raises(ValueError, match=r"runs\.dense-first-8: the report has a system of that name"):
        make(material, tmp_path, dims=[8], runs={"dense-first-8": str(taken)})
