"""Tasks of mteb in a report, over a local folder; the names that are found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
from huggingface_hub import ModelCard

from tct_hf import BM25Index, Report, fuse
from tct_hf.evaluation.tasks import MEASURES, evaluate_tasks, find_tasks
from tct_hf.evaluation.workspace import Workspace, open_student
from tct_hf.hub.cards import CardFacts, write_card
from tct_hf.retrieval.fusion import equal_spread_alpha
from tests.evaluation.reports import make
from tests.searching import Material


@pytest.fixture
def mteb() -> Any:
    return pytest.importorskip("mteb", reason="mteb is not installed: pip install 'tct_hf[mteb]'")


def test_a_report_has_mtebs_figures_of_models_bm25_and_hybrids(
    mteb: Any, material: Material, splade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beir, output = shutil.copytree(material.beir, tmp_path / "beir"), tmp_path / "output"
    student = str(material.folder / "base")  # compares by cosine
    options: dict[str, Any] = {"student": student, "sparse_student": splade, "base": str(material.student)}
    options |= {"teacher": None, "tasks": [f"mteb:{beir}"]}
    report = make(material, output, **options)
    task = report.tasks["beir"]
    keys = ["bm25", "dense-exact", "learned-sparse", "base"]
    assert list(task["systems"]) == [*keys, "hybrid", "learned-sparse-bm25", "dense-learned-sparse", "base-bm25"]
    assert task["splits"] == ["test"] and task["mteb"] == mteb.__version__
    for key in keys[1:]:  # our own search and measures
        ours = report.system(key).effectiveness
        for measure in ("nDCG@10", "RR@10"):
            assert task["systems"][key][measure] == pytest.approx(ours[measure]["mean"], abs=1e-4), (key, measure)
    collection = material.collection()
    test, model = collection.splits["test"], open_student(student)
    bm25 = BM25Index.build(collection.corpus["text"], collection.corpus["id"]).run(test.queries, 60)
    dense = Workspace(collection, model, "base", precision="fp32", in_memory=True).search(test.queries, 60)
    judged = pytrec_eval.RelevanceEvaluator(test.qrels, {"ndcg_cut.10"})
    for key, run in {"bm25": bm25, "hybrid": fuse(bm25, dense, equal_spread_alpha(bm25, dense))}.items():
        figures = [one["ndcg_cut_10"] for one in judged.evaluate(run).values()]
        assert task["systems"][key]["nDCG@10"] == pytest.approx(sum(figures) / len(figures), abs=1e-4), key

    assert Report.load(output) == report and report.task_table() in report.markdown()
    [head, _, row] = report.task_table().splitlines()
    assert head.startswith("| nDCG@10 |  BM25 | dense | sparse student (learned) | base as it is | dense + BM25 |")
    assert row.startswith("| beir    | ")
    facts = CardFacts(license="mit", base_model="some/base", training_data="words")
    card = ModelCard(write_card(Path(student), "student", "some/student", facts, report=report))
    found = [one for one in card.data.eval_results if one.dataset_name == "MTEB beir"]
    assert {one.metric_name: one.metric_value for one in found} == {
        measure: round(value, 4) for measure, value in task["systems"]["dense-exact"].items()
    }
    assert found[0].dataset_type == "beir" and found[0].dataset_revision == task["revision"]
    assert report.task_table() in card.text and str(tmp_path) not in str(card)

    asked = []
    measured = mteb.evaluate
    monkeypatch.setattr(mteb, "evaluate", lambda *args, **options: asked.append(args) or measured(*args, **options))
    assert make(material, output, **options).tasks == report.tasks and not asked
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\ntest0\tp1\t1\n")
    assert make(material, output, **options).tasks["beir"]["revision"] != task["revision"] and asked


def test_tasks_are_found_by_name_and_wrong_ones_are_refused(mteb: Any, material: Material) -> None:
    assert len(find_tasks(["nanobeir"])) == 13
    assert [task.metadata.name for task in find_tasks(["mteb:SciFact", "NFCorpus"])] == ["SciFact", "NFCorpus"]
    assert find_tasks(find_tasks(["SciFact"]))[0].metadata.name == "SciFact"
    for names, message in (
        (["SciFakt"], "tasks: 'SciFakt' not found. Did you mean: 'SciFact'.* a BEIR folder"),
        (["STS12"], "tasks: STS12 is of type STS; name tasks of type Retrieval"),
        (["nanobeir", "NanoSciFactRetrieval"], "tasks: NanoSciFactRetrieval comes twice"),
    ):
        with pytest.raises(ValueError, match=message):
            find_tasks(names)


def test_a_folder_of_queries_that_are_passages_is_measured_as_beir_does(mteb: Any, tmp_path: Path) -> None:
    folder = tmp_path / "arguments"
    (folder / "qrels").mkdir(parents=True)
    texts = {"a": "wind and more wind", "b": "wind and nothing", "c": "a stone"}
    rows = "".join(json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in texts.items())
    (folder / "corpus.jsonl").write_text(rows)
    (folder / "queries.jsonl").write_text(rows.splitlines()[0] + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\tb\t1\n")
    assert evaluate_tasks(find_tasks([str(folder)]), {}, tmp_path, words={})["arguments"]["systems"] == {
        "bm25": {"nDCG@10": 1.0, "RR@10": 1.0, "R@100": 1.0}
    }


def test_without_mteb_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert find_tasks([]) == []
    with pytest.raises(ImportError, match=r"pip install 'tct_hf\[mteb\]'"):
        find_tasks(["nanobeir"])


@pytest.mark.network
def test_a_task_of_the_hub(mteb: Any, material: Material, tmp_path: Path) -> None:
    models = {"dense-exact": open_student(str(material.student))}
    found = evaluate_tasks(find_tasks(["NanoSciFactRetrieval"]), models, tmp_path, words={})
    figures = found["NanoSciFactRetrieval"]["systems"]
    assert list(figures) == ["bm25", "dense-exact", "hybrid"] and figures["bm25"].keys() == MEASURES.keys()
    assert figures["bm25"]["nDCG@10"] > 0.6
