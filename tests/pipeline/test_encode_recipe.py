"""The encoding recipe: whole, interrupted, refused, with a dense and a sparse student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tct_hf import load_vectors
from tct_hf.data.beir import open_beir
from tests.searching import Material, run_recipe
from tests.splade import tiny_splade


def encode(
    material: Material, output: str, *more: str, model: Path | None = None, code: int = 0, kill_at: str | None = None
) -> tuple[str, str]:
    words = [f"--model={model or material.student}", f"--source={material.beir}"]
    words += [f"--output_dir={material.folder / 'encoded' / output}", "--shard_size=8", "--precision=fp32"]
    done = run_recipe("encode", material, *words, *more, code=code, kill_at=kill_at)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def whole(material: Material) -> tuple[str, str]:
    return encode(material, "whole")


def test_a_collection_becomes_vectors_and_one_table(material: Material, whole: tuple[str, str]) -> None:
    folder = material.folder / "encoded" / "whole"
    ids, vectors, manifest = load_vectors(folder)
    corpus = open_beir(material.beir).corpus()
    assert ids == list(corpus["id"]) and manifest["model"]["id"] == str(material.student)
    model = SentenceTransformer(str(material.student), device="cpu")
    np.testing.assert_allclose(vectors, model.encode_document(list(corpus["text"])), atol=1e-5)
    said, errors = whole
    assert errors == ""
    size = sum(file.stat().st_size for file in folder.glob("*.arrow")) / 60
    assert said.splitlines()[-1] == f"| 60 | 32 | fp32 | float32 | 8 | {size:.0f} | {folder} |"
    _, errors = encode(material, "whole", "--dtype=float16", code=1)
    [line] = errors.splitlines()
    assert "dtype = 'float32', but now dtype = 'float16'" in line


def test_a_killed_recipe_goes_on_to_the_bytes_of_an_undisturbed_one(
    material: Material, whole: tuple[str, str]
) -> None:
    encode(material, "killed", "--progress_every=0", kill_at="24 of 60 passages")
    folders = [material.folder / "encoded" / name for name in ("killed", "whole")]
    assert not (folders[0] / "manifest.json").exists()
    said, _ = encode(material, "killed")
    assert "60 passages (16 were there)" in said
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    timed = [json.loads(made.pop("encoding_seconds.json")) for made in files]  # what a report shows of building
    assert files[0] == files[1]
    assert [one["passages_timed"] for one in timed] == [44, 60] and all(one["seconds"] > 0 for one in timed)


@pytest.mark.slow
def test_first_dimensions_are_encoded_alone(material: Material, whole: tuple[str, str]) -> None:
    said, _ = encode(material, "first", "--truncate_dim=8")
    assert "| 8 |" in said
    (ids, first, _), (others, vectors, _) = (
        load_vectors(material.folder / "encoded" / name) for name in ("first", "whole")
    )
    assert ids == others and np.array_equal(first, vectors[:, :8])
    _, refused = encode(material, "none", "--truncate_dim=33", code=2)
    assert "truncate_dim: 33 is not between 1 and the 32 dimensions of the vectors" in refused


def test_a_sparse_student_is_encoded_too(material: Material) -> None:
    model = tiny_splade(material.folder / "splade")
    said, errors = encode(material, "sparse", model=model)
    ids, vectors, manifest = load_vectors(material.folder / "encoded" / "sparse")
    assert errors == "" and len(ids) == vectors.shape[0] == 60 and len(manifest["shards"]) == 8
    [names, _, figures] = said.splitlines()[-3:]
    cells = dict(zip(*([cell.strip() for cell in row.split("|")[1:-1]] for row in (names, figures)), strict=True))
    assert cells["active dims"] == f"{vectors.nnz / 60:.1f}"
    _, errors = encode(material, "sparse", "--dtype=float16", model=model, code=1)
    assert "the weights of sparse vectors are stored as they are" in errors.splitlines()[-1]
