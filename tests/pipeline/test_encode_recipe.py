"""The encoding recipe: whole, interrupted, refused."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models import tiny_bert
from tests.recipe import ROOT, environment, write_beir
from tests.warm_process import run_warm

RECIPE = ROOT / "recipes" / "encode.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tct_hf import build_student, save_student

    folder = tmp_path_factory.mktemp("encode")
    save_student(
        build_student(str(tiny_bert(folder / "base")), encoding="tct", document_length=24), folder / "student"
    )
    write_beir(folder / "collection")
    return folder


def run(folder: Path, output: str, *options: str, before: list[str] | None = None, code: int = 0) -> tuple[str, str]:
    words = [
        *(before or [sys.executable]),
        str(RECIPE),
        f"--model={folder / 'student'}",
        f"--source={folder / 'collection'}",
        f"--output_dir={folder / output}",
        "--shard_size=8",
        "--precision=fp32",
        *options,
    ]
    done = run_warm(words[1:], env=environment(folder))
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[str, str]:
    return run(folder, "whole")


def test_a_collection_becomes_vectors_and_one_table(folder: Path, whole: tuple[str, str]) -> None:
    from sentence_transformers import SentenceTransformer

    from tct_hf import load_vectors
    from tct_hf.data.beir import load_beir_corpus

    ids, vectors, manifest = load_vectors(folder / "whole")
    corpus = load_beir_corpus(folder / "collection", cache_dir=folder / "cache")
    assert ids == list(corpus["id"]) and manifest["model"]["id"] == str(folder / "student")
    model = SentenceTransformer(str(folder / "student"), device="cpu")
    np.testing.assert_allclose(vectors, model.encode_document(list(corpus["text"])), atol=1e-5)
    said, errors = whole
    assert errors == ""
    size = sum(file.stat().st_size for file in (folder / "whole").glob("*.arrow")) / 60
    assert said.splitlines()[-1] == f"| 60 | 32 | fp32 | float32 | 8 | {size:.0f} | {folder / 'whole'} |"


def test_a_killed_recipe_goes_on_to_the_bytes_of_an_undisturbed_one(folder: Path, whole: tuple[str, str]) -> None:
    before = [sys.executable, "-m", "tests.recipe_worker", "24 of 60 passages"]
    run(folder, "killed", "--progress_every=0", before=before, code=-signal.SIGKILL)
    assert not (folder / "killed" / "manifest.json").exists()
    said, _ = run(folder, "killed")
    assert "60 passages (16 were there)" in said
    files = [{file.name: file.read_bytes() for file in (folder / name).iterdir()} for name in ("killed", "whole")]
    timed = [json.loads(made.pop("encoding_seconds.json")) for made in files]  # what a report shows of building
    assert files[0] == files[1]
    assert [one["passages_timed"] for one in timed] == [44, 60] and all(one["seconds"] > 0 for one in timed)


def test_a_folder_of_another_setting_is_one_message(folder: Path, whole: tuple[str, str]) -> None:
    _, errors = run(folder, "whole", "--dtype=float16", code=1)
    [line] = errors.splitlines()
    assert "dtype = 'float32', but now dtype = 'float16'" in line


@pytest.mark.slow
def test_first_dimensions_are_encoded_alone(folder: Path, whole: tuple[str, str]) -> None:
    from tct_hf import load_vectors

    said, _ = run(folder, "first", "--truncate_dim=8")
    assert "| 8 |" in said
    (ids, first, _), (others, vectors, _) = load_vectors(folder / "first"), load_vectors(folder / "whole")
    assert ids == others and np.array_equal(first, vectors[:, :8])
    _, refused = run(folder, "none", "--truncate_dim=33", code=2)
    assert "truncate_dim: 33 is not between 1 and the 32 dimensions of the vectors" in refused
