"""What the public names give on tiny models, against what they gave before: tests/golden.json.

`python tests/test_golden.py` records it anew. Look at the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

import tct_hf
from tct_hf import BM25Index, DenseIndex, TeacherTargets, TightlyCoupledLoss
from tct_hf.encoding import checkpoint
from tct_hf.evaluation.settings import CostSettings, ReportSettings
from tests.models import tiny_bert
from tests.searching import write_material

GOLDEN = Path(__file__).parent / "golden.json"
TOLERANCE = 1e-4
CORPUS = {
    "p1": "the teacher of a student",
    "p2": "dense retrieval of a passage",
    "p3": "distillation: tokens of the teacher",
    "p4": "representations of a query",
    "p5": "Dense  retrieval of a PASSAGE",
    "p6": "the student is dense, the teacher is not",
    "p7": "passage tokens and query tokens",
}
QUERIES = {"q1": "what is a dense student", "q2": "query tokens", "q3": "the teacher of retrieval"}
QRELS = {"q1": {"p6": 2, "p1": 1, "p2": 0}, "q2": {"p7": 1}, "q3": {"p2": 1, "p3": 1}}
LOSSES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "reverse": {"temperature": 1.0, "student_temperature": 3.0, "student_divisor": 4.0, "kl_direction": "reverse"},
    "margins": {"hard_label_weight": 1.0, "margin_mse_weight": 0.05},
}
MODULE_LOSSES: dict[str, dict[str, Any]] = {
    "in-batch": {"temperature": 1.0},
    "in parts": {"temperature": 1.0, "mini_batch_size": 2},
    "sliced": {"temperature": 1.0, "student_scale": 2.0, "matryoshka_dims": [8, 32]},
    "self-coupled": {"temperature": 1.0, "self_coupled": [6.0, 12.0]},
}


def vectors(student: SentenceTransformer) -> dict[str, list[list[float]]]:
    """The first numbers and the norm of every text's vector."""
    texts = [CORPUS["p3"], "passage " * 70, ""]
    encoded = {"query": student.encode_query([*QUERIES.values(), ""])}
    encoded |= {"document": student.encode_document(texts), "plain": student.encode(texts)}
    return {kind: [[*row[:4], np.linalg.norm(row)] for row in rows] for kind, rows in encoded.items()}


def targets(queries: int, columns: int) -> TeacherTargets:
    """Scores without a random generator; the last query has no label."""
    grid = torch.arange(1.0, queries * columns + 1).reshape(queries, columns)
    mask = (grid % 5 > 0).fill_diagonal_(True)
    index = torch.tensor([*range(queries - 1), -1])
    return TeacherTargets(grid.sin() * 3, mask, index, torch.linspace(1, 0.5, queries))


def losses(student: SentenceTransformer) -> dict[str, Any]:
    told = targets(4, 8)
    scores = torch.cos(torch.arange(32.0)).reshape(4, 8) * 2
    masked = {"candidate_mask": told.mask, "positive_index": told.positive_index, "label_weight": told.label_weight}
    values: dict[str, Any] = {"plain": tct_hf.coupled_loss(scores, told.scores)}
    values |= {name: tct_hf.coupled_loss(scores, told.scores, **masked, **given) for name, given in LOSSES.items()}
    texts = [*QUERIES.values(), *CORPUS.values()]
    columns = [("query", texts[:3]), ("document", texts[3:6]), ("document", texts[6:9])]
    for name, given in MODULE_LOSSES.items():
        features = [student.preprocess(column, prompt=student.prompts[kind], task=kind) for kind, column in columns]
        told = targets(3, 6)
        found = TightlyCoupledLoss(student, **given)(features, told)
        values[name] = {"loss": sum(found.values()) if isinstance(found, dict) else found, "report": told.report}
    return values


def triples(bm25: BM25Index) -> dict[str, Any]:
    judged = (Dataset.from_dict({"id": [*CORPUS], "text": [*CORPUS.values()]}), QUERIES, QRELS)
    return {
        "bm25": list(tct_hf.bm25_triples(*judged, num_negatives=2, depth=4, seed=3, index=bm25)),
        "unlabelled": list(tct_hf.bm25_triples(judged[0], {}, {}, seed=3, index=bm25, unlabelled=QUERIES)),
        "mined": list(tct_hf.mine_triples(bm25.run(QUERIES), *judged, origin="x", seed=3, num_negatives=2)),
    }


def search(bm25: BM25Index, student: SentenceTransformer) -> dict[str, Any]:
    kept = [passage for passage in CORPUS if passage != "p5"]  # its vector is that of p2
    dense = DenseIndex.build(student.encode_document([CORPUS[passage] for passage in kept]), kept)
    runs = {"bm25": bm25.run(QUERIES), "dense": dense.run([*QUERIES], student.encode_query([*QUERIES.values()]), k=5)}
    runs["fused"] = tct_hf.fuse(runs["bm25"], runs["dense"], 0.5, k=6)
    runs["normalised"] = tct_hf.fuse(runs["bm25"], runs["dense"], 0.5, normalize=True)
    return {
        "runs": {name: {q: [*found.items()] for q, found in run.items()} for name, run in runs.items()},
        "figures": {name: vars(tct_hf.evaluate_run(run, QRELS)) for name, run in runs.items()},
        "compared": tct_hf.compare_runs(runs, QRELS, baseline="bm25").to_dict(),
    }


def key_names(content: Any, above: str = "") -> list[str]:
    """The names of all keys, nested ones behind a dot, but for those that differ from machine to machine."""
    parts = [item for item in (content if isinstance(content, list) else [content]) if isinstance(item, dict) and item]
    if not parts or above in ("environment", "machine", "threads"):
        return [above]
    pairs = [(f"{above}.{key}".lstrip("."), item) for part in parts for key, item in part.items()]
    return sorted({name for key, item in pairs for name in key_names(item, key)})


def release_and_report(folder: Path) -> dict[str, Any]:
    """What lies in a release with its report, and what the report says."""
    material = write_material(folder)
    (folder / "settings.yaml").write_text("seed: 13\n")
    (folder / "card.md").write_text("---\nlicense: mit\nbase_model: x/y\nlibrary_name: sentence-transformers\n---\n")
    student, teacher = str(material.student), str(material.teacher)
    settings = ReportSettings(cost=CostSettings(queries=4, teacher_queries=3, warm_up=1, batch_size=2))
    options: dict[str, Any] = {"teacher": teacher, "settings": settings, "write": lambda line: None}
    tct_hf.build_report(material.collection(), student, folder / "report", **options)
    given = {"report": folder / "report", "card": folder / "card.md", "folder": folder / "release", "dry_run": True}
    done = tct_hf.release(student, "some/student", **given)
    files = sorted(str(path.relative_to(folder / "release")) for path in (folder / "release").rglob("*"))
    report = json.loads((folder / "report" / "report.json").read_text())
    return {
        "release": {"files": files, "sent": sorted(done.sent), "family": done.family},
        "report": {"keys": key_names(report), "systems": [system["key"] for system in report["systems"]]},
    }


def made() -> dict[str, Any]:
    """All values, as JSON gives them back."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCT_HF_CACHE", f"{name}/cache")
        # The look at the vectors from a fresh interpreter takes longer than all the rest.
        patch.setattr(checkpoint, "fresh_vectors", lambda path, texts, loader: checkpoint.own_vectors(path, loader))
        base = str(tiny_bert(Path(name) / "encoder"))
        own, tct = (tct_hf.build_student(base, encoding=kind, document_length=48) for kind in ("own", "tct"))
        bm25 = BM25Index.build(CORPUS.values(), CORPUS, backend="numpy")
        found = {"own": vectors(own), "tct": vectors(tct), "losses": losses(tct), "triples": triples(bm25)}
        found |= {"search": search(bm25, tct), **release_and_report(Path(name))}
    text = json.dumps(found, default=lambda number: number.item())
    return json.loads(text, parse_float=lambda number: round(float(number), 5))


def differences(found: Any, golden: Any, at: str = "") -> list[str]:
    """Where two values differ, numbers by more than TOLERANCE."""
    if isinstance(found, dict) and isinstance(golden, dict) and found.keys() == golden.keys():
        return [line for key in golden for line in differences(found[key], golden[key], f"{at}/{key}")]
    if isinstance(found, list) and isinstance(golden, list) and len(found) == len(golden):
        return [line for n in range(len(golden)) for line in differences(found[n], golden[n], f"{at}/{n}")]
    near = type(found) is type(golden) is float and abs(found - golden) <= TOLERANCE * max(1.0, abs(golden))
    return [] if near or found == golden else [f"{at}: {found!r}, was {golden!r}"]


def test_what_the_public_names_give_is_what_they_gave() -> None:
    assert not differences(made(), json.loads(GOLDEN.read_text()))


def test_every_public_name_resolves() -> None:
    assert all(getattr(tct_hf, name) is not None for name in tct_hf.__all__)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(made(), indent=1) + "\n")
