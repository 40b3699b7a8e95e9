"""A Space: what is pushed, and that its files serve the page by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoCard

from tct_hf import load_collection, release
from tct_hf.hub.space import open_space
from tests.hub.models import FACTS, dual_encoder
from tests.loopback_hub import LoopbackHub
from tests.recipe import ROOT, write_beir

pytest.importorskip("gradio", reason="a Space needs gradio: pip install 'tct_hf[demo]'")


@pytest.mark.usefixtures("quick")
def test_a_space_serves_the_released_student_from_its_own_files(hub: LoopbackHub, tmp_path: Path) -> None:
    collection = load_collection(str(write_beir(tmp_path / "beir")))
    student = dual_encoder(tmp_path / "student")
    done = release(student, "tester/student", facts=FACTS, space="tester/search", collection=collection)
    assert done.space_url == f"{hub.url}/spaces/tester/search"
    files = hub.files("tester/search", kind="spaces")
    card = RepoCard(files["README.md"].decode())
    wanted = {"sdk": "gradio", "sdk_version": version("gradio"), "app_file": "app.py", "models": ["tester/student"]}
    assert wanted.items() <= card.data.to_dict().items() and "60 passages" in card.content
    pinned = dict(line.split("==") for line in files["requirements.txt"].decode().split())
    assert pinned["faiss-cpu"] == version("faiss-cpu") and "+" not in pinned["torch"]
    project = re.search(r"\ndependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert project is not None and list(pinned) == re.findall(r'^ *"([\w-]+)', project[1], re.MULTILINE)
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert not [name for name in files if "__pycache__" in name]

    space = tmp_path / "space"
    for name, content in files.items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    page = open_space(space)
    assert page.searcher.systems == ["bm25", "dense", "fused", "maxsim"]
    question = next(iter(collection.splits["dev"].queries.values()))
    answer = page.json(question)
    texts = dict(zip(collection.corpus["id"], collection.corpus["text"], strict=True))
    assert all(hit["text"] == texts[hit["id"]] for hits in answer["passages"].values() for hit in hits)
    assert list(page.examples) and page.searcher.alpha is not None
    # The copy of the package that goes along is whole, whatever is installed.
    there = "import app, tct_hf, sys; sys.exit(not tct_hf.__file__.startswith(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": str(space)}
    assert subprocess.run([sys.executable, "-c", there, str(space)], cwd=space, env=env).returncode == 0


@pytest.mark.usefixtures("quick")
def test_a_dry_run_writes_the_space_and_a_second_one_replaces_it(hub: LoopbackHub, tmp_path: Path) -> None:
    collection = load_collection(str(write_beir(tmp_path / "beir")))
    student, kept = dual_encoder(tmp_path / "student"), tmp_path / "kept"
    asked: Any = {"facts": FACTS, "space": "tester/search", "dry_run": True}
    for _ in range(2):
        release(student, "tester/student", collection=collection, folder=kept, **asked)
    assert (tmp_path / "kept-space" / "app.py").is_file() and not hub.repos
    with pytest.raises(ValueError, match="space: it serves a student and what that searches"):
        release(student, "tester/student", **asked)
