"""What the exported graphs of a release keep of its vectors, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer

from tct_hf.data.collection import Collection
from tct_hf.encoding.checkpoint import GOLDEN_TEXTS
from tct_hf.encoding.export import exported_files, graph_vectors
from tct_hf.evaluation.measures import evaluate_run
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import encode_texts
from tct_hf.retrieval.vectors import UnitRows

_MEASURE = "RR@10"


def int8_on_dev(folder: Path, collection: Collection) -> dict[str, float]:
    """RR@10 on dev, by exact search, of a checkpoint ("") and of each of its int8 files, by name."""
    if (dev := collection.splits.get("dev")) is None:
        raise ValueError(f"int8_dev: {collection.name} has no dev split; name one, or set data.dev_share.")
    student, found = SentenceTransformer(str(folder), device="cpu"), {}
    sides: dict[Literal["query", "document"], list[str]] = {
        "query": list(dev.queries.values()),
        "document": list(collection.corpus["text"]),
    }
    for file in (None, *(file for file in exported_files(folder) if file.stem.endswith("_int8"))):
        vectors: list[Any] = [
            encode_texts(student, part, task=side) if file is None else graph_vectors(file, part, side)
            for side, part in sides.items()
        ]
        if student.similarity_fn_name == "cosine":
            vectors = [UnitRows(one)[:] for one in vectors]
        run = DenseIndex.build(vectors[1], collection.corpus["id"], "Flat").run(list(dev.queries), vectors[0], 100)
        means = evaluate_run(run, dev.qrels, [_MEASURE], ignore_identical_ids=collection.skips_own).mean
        found["" if file is None else file.relative_to(folder).as_posix()] = means[_MEASURE]
    return found


def graph_section(folder: Path, compared: Mapping[str, float], collection: Collection | None) -> str | None:
    """A card's table of graphs, `compared` by :func:`tct_hf.encoding.export.check_exports`; None where there are none.

    With a collection, those in int8 are measured on its dev split.
    """
    if not compared:
        return None
    on_dev = {} if collection is None else int8_on_dev(folder, collection)
    rows = ["| file | vectors beside the checkpoint's |" + (f" {_MEASURE} |" if on_dev else ""), "|---|---|"]
    if collection is not None:
        rows[1] += "---:|"
        rows.append(f"| the checkpoint | | {on_dev['']:.3f} |")
    for name, value in compared.items():
        small = Path(name).stem.endswith("_int8")
        rows.append(f"| `{name}` | {f'lowest cosine {value:.4f}' if small else f'differ by {value:.0e} at most'} |")
        if on_dev:
            rows[-1] += f" {on_dev[name]:.3f} |" if small else " |"
    said = f"Vectors of {len(GOLDEN_TEXTS)} sample texts"
    if collection is None:
        return "\n".join([*rows, "", f"{said}; what files in int8 lose in ranking was not measured."])
    dev = collection.splits["dev"]
    name = Path(collection.name).name  # of a folder, where it lies is nobody else's business
    where = f"{len(dev.qrels):,} dev queries, {len(collection.corpus):,} passages of {name}"
    return "\n".join([*rows, "", f"{said}; {_MEASURE}: {where}, exact search."])
