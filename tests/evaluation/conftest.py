from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tct_hf import Report, write_expansions
from tests.evaluation.reports import graded, make
from tests.searching import Material, write_material
from tests.splade import tiny_splade


@pytest.fixture(scope="package")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """With generated queries, and a split "graded": nine queries in the file, of which five are judged in grades."""
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


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCT_HF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def splade(material: Material) -> str:
    return str(tiny_splade(material.folder / "splade"))


@pytest.fixture(scope="package")
def output(material: Material) -> Path:
    return material.folder / "output"


@pytest.fixture(scope="package")
def report(material: Material, output: Path, splade: str) -> Report:
    """Of every system, with a further split."""
    return make(material, output, sparse_student=splade, plots=True, **graded(material))
