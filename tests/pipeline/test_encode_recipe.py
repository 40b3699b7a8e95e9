"""The encoding recipe: whole, refused, with a dense and a sparse student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from tct_hf import load_vectors
from tct_hf.data.beir import open_beir
from tests.recipe import ROOT, load_recipe, run
from tests.searching import Material
from tests.splade import tiny_splade


def encode(material: Material, model: Path, output: Path, *more: str, code: int = 0) -> tuple[str, str]:
    words = [f"--model={model}", f"--source={material.beir}", f"--output_dir={output}", "--shard_size=8"]
    done = run("encode", material.folder, *words, "--precision=fp32", *more, code=code)
    return done.stdout, done.stderr


def test_a_collection_becomes_vectors_and_one_table(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    said, errors = encode(material, material.student, folder)
    ids, vectors, manifest = load_vectors(folder)
    corpus = open_beir(material.beir).corpus()
    assert ids == list(corpus["id"]) and manifest["model"]["id"] == str(material.student)
    model = SentenceTransformer(str(material.student), device="cpu")
    np.testing.assert_allclose(vectors, model.encode_document(list(corpus["text"])), atol=1e-5)
    assert errors == ""
    size = sum(file.stat().st_size for file in folder.glob("*.arrow")) / 60
    assert said.splitlines()[-1] == f"| 60 | 32 | fp32 | float32 | 8 | {size:.0f} | {folder} |"
    summary = load_recipe(ROOT / "recipes" / "encode.py").summary
    assert "| fp32 by OpenVINO |" in summary({**manifest, "backend": "openvino"}, folder)
    [line] = encode(material, material.student, folder, "--dtype=float16", code=1)[1].splitlines()
    assert "dtype = 'float32', but now dtype = 'float16'" in line
    (tmp_path / "pq").mkdir()
    (tmp_path / "pq" / "00001.parquet").write_bytes(b"of a larger corpus")
    first = encode(material, material.student, tmp_path / "first", "--truncate_dim=8", f"--parquet={tmp_path / 'pq'}")
    assert "| 8 |" in first[0] and first[0].endswith(f"1 parquet file in {tmp_path / 'pq'}\n")
    assert len([*(tmp_path / "pq").iterdir()]) == 1
    exported = pq.read_table(tmp_path / "pq" / "00000.parquet")  # through to_pylist: by Arrow's own reading of lists
    assert exported["docid"].to_pylist() == ids
    assert np.array_equal(np.array(exported["vector"].to_pylist(), np.float32), vectors[:, :8])
    levels = [column.path for column in map(pq.ParquetFile(tmp_path / "pq" / "00000.parquet").schema.column, (0, 1))]
    assert levels == ["docid", "vector.list.element"]  # the names that Anserini reads
    assert np.array_equal(load_vectors(tmp_path / "first")[1], vectors[:, :8])
    _, refused = encode(material, material.student, tmp_path / "none", "--truncate_dim=33", code=2)
    assert "truncate_dim: 33 is not between 1 and the 32 dimensions of the vectors" in refused


def test_jobs_share_nothing_but_the_folder(material: Material, tmp_path: Path) -> None:
    folder, jobs = tmp_path / "jobs", "--num_shards=2"
    said, errors = encode(material, material.student, folder, jobs, "--shard_index=1")
    assert errors == "" and said.splitlines()[-1] == "job 1 of 2 (from 0) has ended; shards of others are missing"
    said, _ = encode(material, material.student, folder, jobs)
    assert said.splitlines()[-1].startswith("| 60 | 32 | fp32 |") and len(load_vectors(folder)[0]) == 60
    for more, message in (
        ("--shard_index=2", "shard_index, num_shards: 2 of 2"),
        ("--parquet=pq", "parquet: a job has only its own part"),
    ):
        assert message in encode(material, material.student, folder, jobs, more, code=2)[1]


def test_a_sparse_student_is_encoded_too(material: Material, tmp_path: Path) -> None:
    model, folder = tiny_splade(tmp_path), tmp_path / "vectors"
    said, errors = encode(material, model, folder)
    ids, vectors, manifest = load_vectors(folder)
    assert errors == "" and len(ids) == vectors.shape[0] == 60 and len(manifest["shards"]) == 8
    [names, _, figures] = said.splitlines()[-3:]
    cells = dict(zip(*([cell.strip() for cell in row.split("|")[1:-1]] for row in (names, figures)), strict=True))
    assert cells["active dims"] == f"{vectors.nnz / 60:.1f}"
    _, errors = encode(material, model, folder, "--dtype=float16", code=1)
    assert "is not known for these vectors: use one of float32" in errors.splitlines()[-1]
