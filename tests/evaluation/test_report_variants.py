"""Reports with fewer systems, other models, other splits and runs from elsewhere; what stops one is said at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tct_hf import (
    DenseIndex,
    Report,
    build_colbert,
    build_report,
    build_student,
    fuse,
    read_run,
    save_student,
    write_run,
)
from tct_hf.data.collection import Split, load_collection
from tct_hf.evaluation import report_systems
from tct_hf.evaluation.reporting import check_report
from tct_hf.evaluation.settings import (
    AnnSettings,
    CostSettings,
    ExpansionSettings,
    HybridSettings,
    LateInteractionSettings,
    MeasureSettings,
)
from tct_hf.evaluation.tune_alpha import tuning_queries
from tct_hf.evaluation.workspace import Workspace, open_student
from tct_hf.files import CLAIM_FILE, write_json_atomic
from tests.evaluation.reports import check_late_interaction, graded, make, run_of, tiny_settings
from tests.hub.models import TEXTS, published_tct, pyserini_vectors
from tests.searching import Material

KEYS = ["bm25", "dense-exact", "dense-ann", "hybrid", "teacher", "reranked"]


def test_alpha_is_never_tuned_on_reported_queries_nor_on_those_of_a_further_split(
    material: Material, output: Path, report: Report, splade: str
) -> None:
    collection = material.collection()
    test, dev = collection.splits["test"], collection.splits["dev"]
    # A reported question is also among those of dev, in other words of the same letters.
    dev.queries["dev0"] = f"  {test.queries['test0'].upper()} "
    for tune_on, left_out in (("auto", 1), ("train", 0)):
        tuning = tuning_queries(collection, HybridSettings(tune_on=tune_on))  # type: ignore[arg-type]
        assert tuning is not None and tuning.queries and tuning.queries.keys() == tuning.qrels.keys()
        assert tuning.queries.keys().isdisjoint(test.queries) and "dev0" not in tuning.queries
        assert tuning.left_out == left_out
    options = graded(material)
    found = options["collection"]
    taken = next(iter(found.splits["dev"].queries))
    found.also["graded"].queries["other-id"] = found.splits["dev"].queries[taken].upper()
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and taken not in tuning.queries and tuning.left_out >= 1
    with pytest.raises(ValueError, match=r"tuning_queries = '.*', but now tuning_queries = "):
        make(material, output, sparse_student=splade, **options)
    found.also["graded"].queries.update(found.splits["dev"].queries)
    tuning = tuning_queries(found, HybridSettings())
    assert tuning is not None and tuning.split == "train"
    # A split has one use.
    found = load_collection(str(material.beir), also=["dev"])
    assert "dev" not in found.splits and len(found.also["dev"].queries) == 10
    part = graded(material)["collection"].part(queries=3)
    assert len(part.also["graded"].queries) == 3 == len(part.also["graded"].qrels)
    for name, given in (("test", {}), ("dev", {"dev_split": "dev"})):
        with pytest.raises(ValueError, match=f"also_report: '{name}'"):
            load_collection(str(material.beir), also=[name], **given)


def test_without_other_queries_lists_are_fused_by_rank(material: Material, tmp_path: Path) -> None:
    collection = material.collection()
    del collection.splits["dev"], collection.splits["train"]
    found = make(material, tmp_path, collection=collection, teacher=None)
    assert found.tuning["hybrid"]["fusion"] == "ranks" and found.tuning["hybrid"]["alpha"] is None
    assert found.tuning["ann"]["source"] == "passages"
    assert "fused by reciprocal ranks" in found.markdown()
    with pytest.raises(ValueError, match=r"hybrid\.tune_on: .* no train query to tune on .* set hybrid\.alpha"):
        tuning_queries(collection, HybridSettings(tune_on="train"))


def test_by_default_the_students_own_token_vectors_search_and_rerank(material: Material, tmp_path: Path) -> None:
    student = str(save_student(build_student(str(material.folder / "base"), encoding="own"), tmp_path / "student"))
    options: dict[str, Any] = {"settings": tiny_settings(), "write": lambda line: None}
    found = build_report(material.collection(), student, tmp_path / "output", **options)
    assert [system.key for system in found.systems] == KEYS
    assert found.system("reranked").title == "own MaxSim over the hybrid's top 20"
    assert found.models["teacher"]["name"] == "own" and found.system("reranked").cost is not None
    check_late_interaction(build_colbert(student, encoding="own"), material, tmp_path / "output")


def test_the_base_as_it_is_has_a_row_and_one_fused_with_bm25(material: Material, tmp_path: Path) -> None:
    base = str(material.folder / "base")
    found = make(material, tmp_path, teacher=None, base=base)
    assert [system.key for system in found.systems] == [*KEYS[:4], "base", "base-bm25"]
    assert found.system("base").title == "base as it is" and found.models["base"]["name"] == base
    assert set(found.tuning["hybrids"]) == {"hybrid", "base-bm25"}
    collection = material.collection()
    exact = Workspace(collection, SentenceTransformer(base), "base", precision="fp32", in_memory=True)
    expected = exact.search(collection.splits["test"].queries, 20)
    bm25, dense, fused = (run_of(tmp_path, key) for key in ("bm25", "base", "base-bm25"))
    for query, hits in expected.items():
        assert dense[query] == pytest.approx(hits, abs=1e-4)
    assert fused == fuse(bm25, dense, found.tuning["hybrids"]["base-bm25"]["alpha"], k=20)


def test_too_many_passages_for_token_vectors_are_only_reranked(material: Material, tmp_path: Path) -> None:
    settings = tiny_settings(late_interaction=LateInteractionSettings(max_passages=59, rerank=5))
    found = make(material, tmp_path, settings=settings)
    assert [system.key for system in found.systems] == [*KEYS[:4], "reranked"]
    assert "max_passages" in found.markdown() and "top 5" in found.system("reranked").title
    first, again = run_of(tmp_path, "hybrid"), run_of(tmp_path, "reranked")
    for query, hits in again.items():
        assert list(hits)[5:] == list(first[query])[5:] and set(hits) == set(first[query])


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


def test_a_function_is_a_system_that_is_asked_at_every_call(material: Material, tmp_path: Path) -> None:
    options = graded(material, expansion=ExpansionSettings())
    collection = options["collection"]
    qrels = {**collection.also["graded"].qrels, **collection.splits["test"].qrels}
    asked: list[dict[str, str]] = []

    def ideal(queries: Any) -> dict[str, dict[str, np.float32]]:
        asked.append(dict(queries))
        return {query: {p: np.float32(grade) for p, grade in qrels[query].items()} for query in queries}

    for calls in (1, 2):
        found = make(material, tmp_path, teacher=None, runs={"my own": ideal}, **options)
        assert len(asked) == calls
    assert asked[0] == {**collection.also["graded"].queries, **collection.splits["test"].queries}
    system, graded_one = found.system("my own"), found.also["graded"]["systems"]["my own"]
    assert system.effectiveness["RR@10"]["mean"] == 1 == graded_one["effectiveness"]["nDCG@10"]["mean"]
    assert system.cost is None and "my own: run from a function, at most " in found.markdown()
    for run, split in ((system.run, collection.splits["test"]), (graded_one["run"], collection.also["graded"])):
        assert read_run(tmp_path / run["file"]) == split.qrels and run["missing_queries"] == 0
    for given in (None, ["p1"], {"p1": np.nan}):
        wrong = {query: given for query in collection.splits["test"].queries} if given else given
        with pytest.raises(ValueError, match=r"runs\.mine: the function returns no run .* passage id to score"):
            check_report(collection, options["settings"], {"mine": lambda queries, wrong=wrong: wrong})


def test_first_dimensions_are_measured_as_trained_or_as_asked(material: Material, tmp_path: Path) -> None:
    student = save_student(open_student(str(material.student), "cpu"), tmp_path / "student")
    write_json_atomic(student / CLAIM_FILE, {"student": {"training": {"matryoshka_dims": [8, 16, 32]}}})
    options: dict[str, Any] = {"student": str(student), "teacher": None}
    trained = make(material, tmp_path / "trained", **options)
    sizes = ["dense-first-16", "dense-first-8"]
    assert [system.key for system in trained.systems] == [*KEYS[:3], *sizes, "hybrid"]
    whole, first = trained.system("dense-exact"), trained.system("dense-first-8")
    assert first.title == "dense, first 8 dimensions" and whole.cost is not None and first.cost is not None
    saved = whole.cost["disk_bytes_per_passage"] - first.cost["disk_bytes_per_passage"]
    assert saved == pytest.approx((32 - 8) * 4, abs=3)
    cut = SentenceTransformer(str(student), device="cpu", truncate_dim=8)
    folder = tmp_path / "trained" / "indexes" / "dense-first-8" / "index"
    assert DenseIndex.load(folder, model=cut).dimension == 8
    with pytest.raises(ValueError, match="with another truncate_dim than"):
        DenseIndex.load(folder, model=SentenceTransformer(str(student), device="cpu"))
    # Asked for, and not at all, in a folder that has all the rest.
    for dims in ([4], []):
        asked = make(material, tmp_path / "trained", dims=dims, **options)
        assert [one.key for one in asked.systems] == [*KEYS[:3], *(f"dense-first-{size}" for size in dims), "hybrid"]
        assert all(asked.system(key).effectiveness == trained.system(key).effectiveness for key in KEYS[:4])


def test_codes_are_measured_at_every_size_as_trained_or_as_asked(material: Material, tmp_path: Path) -> None:
    student = save_student(open_student(str(material.student), "cpu"), tmp_path / "student")
    training = {"matryoshka_dims": [8, 32], "passage_bits": [32, 8]}
    write_json_atomic(student / CLAIM_FILE, {"student": {"training": training}})
    options: dict[str, Any] = {"student": str(student), "teacher": None}
    found = make(material, tmp_path / "out", **options)
    coded = ["dense-sq8", "dense-first-8", "dense-first-8-sq8"]
    assert [system.key for system in found.systems] == [*KEYS[:3], *coded, "hybrid"]
    assert found.system("dense-first-8-sq8").title == "dense, first 8 dimensions, SQ8"
    whole, byte = (found.system(key).cost for key in ("dense-first-8", "dense-first-8-sq8"))
    assert whole is not None and byte is not None
    assert whole["disk_bytes_per_passage"] - byte["disk_bytes_per_passage"] == pytest.approx(8 * 3, abs=4)
    asked = tiny_settings(codes=["RaBitQfs,Refine(SQ8)"])
    found = make(material, tmp_path / "out", dims=[], settings=asked, **options)
    assert [system.key for system in found.systems] == [*KEYS[:3], "dense-rabitqfs-refine-sq8", "hybrid"]
    with pytest.raises(ValueError, match="codes: Faiss knows no index 'SQ9'"):
        make(material, tmp_path / "out", settings=tiny_settings(codes=["SQ9"]), **options)


def test_each_choice_of_generated_queries_is_an_index_of_its_own(material: Material, tmp_path: Path) -> None:
    workspace = Workspace(material.collection(), open_student(str(material.student)), "student", tmp_path)
    chosen = ExpansionSettings(path=str(material.folder / "queries"), num_queries=1)
    assert workspace.expanded(replace(chosen)) is workspace.expanded(chosen)
    with pytest.raises(ValueError, match=r"num_queries = 1, but now expansion\.num_queries = 2"):
        workspace.expanded(replace(chosen, num_queries=2))  # not the other index


def test_a_bare_tct_checkpoint_is_searched_with_its_own_vectors(tmp_path: Path) -> None:
    published = published_tct(tmp_path / "tct_colbert-msmarco")
    student = open_student(str(published), "cpu")
    expected = pyserini_vectors(published, TEXTS[:3], "query")
    np.testing.assert_allclose(student.encode_query(TEXTS[:3]), expected, atol=1e-5)


BOTH = Split({"test0": "words", "test1": "other words"}, {"test0": {"p1": 1}, "test1": {"p2": 1}})


@pytest.mark.parametrize(
    ("splits", "run", "message"),
    [
        ({"dev": BOTH, "test": BOTH}, {}, r"hybrid\.tune_on: alpha would be tuned on 2 of the queries .* reported"),
        ({"test": Split({"test1": " \t"}, {})}, {}, "query 'test1' is blank"),
        ({"test": Split({}, {})}, {}, "no judged query to report on"),
        ({}, {"test0": {"p1": 2.0, "gone": 1.0}}, "passage 'gone' for query 'test0', which is not in the corpus"),
        ({}, {"q": {"p1": 2.0}}, "none of the 12 reported queries"),
    ],
)
def test_what_would_stop_the_report_is_said_before_any_model_is_loaded(
    material: Material, tmp_path: Path, splits: dict[str, Split], run: dict[str, Any], message: str
) -> None:
    collection = material.collection()
    collection.splits.update(splits)
    write_run(run, tmp_path / "other.trec", "other")
    runs = {"other": str(tmp_path / "other.trec")} if run else {}
    with pytest.raises(ValueError, match=message):
        build_report(collection, "no-such-model", tmp_path / "out", runs=runs)
    assert not (tmp_path / "out").exists()


def test_settings_that_would_stop_the_report_are_refused_by_name(material: Material) -> None:
    wrong: list[tuple[str, Any, str]] = [
        ("measures", MeasureSettings(names=["R@1000"]), r"measures\.depth is 100, too little for R@1000"),
        ("cost", CostSettings(batch_size=0), r"cost\.batch_size: 0 is below 1"),
        ("ann", AnnSettings(recall=1.0), r"ann\.recall: 1\.0 is not between"),
        ("hybrid", HybridSettings(alpha=-3.0), r"hybrid\.alpha: -3\.0 must be finite"),
        ("hybrid", HybridSettings(alpha={"hybrid": -1.0}), r"hybrid\.alpha\.hybrid: -1\.0 must be finite"),
        ("hybrid", HybridSettings(alpha={"bm25": 1.0}), r"hybrid\.alpha\.bm25: there is no such pair"),
        ("also_report", {"graded": []}, r"also_report\.graded is empty"),
        ("also_report", {"graded": ["trec-dl"]}, r"measures\.depth is 20, too little for R\(rel=2\)@1000"),
        ("also_report", {"other": ["RR@10"]}, r"also_report\.other: .* no judged query of this split"),
        ("expansion", ExpansionSettings(path="nowhere"), "nowhere: no expansions here"),
    ]
    for section, value, message in wrong:
        options = graded(material, **{section: value})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_report(options["collection"], options["settings"], {})


def test_an_index_that_can_not_be_built_is_refused() -> None:
    AnnSettings(factory="OPQ16_32,IVF8,PQ16x4fs,RFlat").check(32, 60)
    for factory, said in (
        ("nonsense", "Faiss knows no index 'nonsense' for inner products of 32 dimensions"),
        ("PQ48", "Faiss knows no index 'PQ48'"),
        ("IVF64,Flat", "'IVF64,Flat' has 64 lists for 60 passages"),
    ):
        with pytest.raises(ValueError, match=rf"ann\.factory: {said}"):
            AnnSettings(factory=factory).check(32, 60)


def test_a_wrong_model_is_refused(material: Material, splade: str, tmp_path: Path) -> None:
    student, teacher = str(material.student), str(material.teacher)
    run = tmp_path / "run.trec"
    write_run({"test0": {"p0": 1.0}}, run, "run")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("student: there is no folder no/such/folder", {"student": "no/such/folder"}),
        ("one vector a token, and no student is", {"student": teacher}),
        ("is a SentenceTransformer and no ColBERT", {"teacher": student}),
        ("which is sparse itself", {"student": splade, "sparse_student": splade}),
        ("is no SparseEncoder", {"sparse_student": student}),
        ("dims: 33 is not between 1 and the 32 dimensions", {"dims": [33]}),
        (r"runs\.dense-first-8: the report has a system of", {"dims": [8], "runs": {"dense-first-8": str(run)}}),
    ]
    for model, baseline in ((splade, "dense-exact"), (student, "learned-sparse")):
        settings = tiny_settings(measures=MeasureSettings(names=["RR@10"], baseline=baseline))
        message = rf"measures\.baseline: there is no row '{baseline}'; there are bm25, "
        wrong.append((message, {"student": model, "settings": settings}))
    for message, options in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make(material, tmp_path / "out", **{"teacher": None, **options})
    cosine = open_student(splade, "cpu")
    cosine.similarity_fn_name = "cosine"
    with pytest.raises(ValueError, match="of a sparse student only dot can be searched"):
        Workspace(material.collection(), cosine, "student", tmp_path)


@pytest.mark.parametrize("opener", ["open_student", "open_reranker"])
def test_a_model_that_gives_nan_is_named_with_the_passage(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: str
) -> None:
    load = getattr(report_systems, opener)

    def spoilt(*names: Any) -> Any:
        model = load(*names)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(report_systems, opener, spoilt)
    with pytest.raises(ValueError, match="passage 'p0' has a NaN"):
        make(material, tmp_path)
