"""A student's first dimensions alone: what `SentenceTransformer(path, truncate_dim=96)` finds and costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.evaluation.report_systems import ReportSystem, added
from tct_hf.files import CLAIM_FILE

if TYPE_CHECKING:
    from tct_hf.evaluation.stores import Stores


def key_of(size: int) -> str:
    """Of the system in a report."""
    return f"dense-first-{size}"


def first_dims_system(stores: Stores, size: int, depth: int) -> ReportSystem:
    """Exact search with the first dimensions of the student's vectors, as they are; the corpus is encoded once.

    Args:
        stores: of the student.
        size: how many dimensions.
        depth: passages a query.
    """
    stored = stores.first_dims(size)
    return ReportSystem(
        key=key_of(size),
        title=f"dense, first {size} dimensions",
        kind="dense",
        run=lambda queries, split: stored.index.run(
            list(queries), stores.sliced(stores.encode_queries(queries), size)[:], depth
        ),
        stages={
            "query encoding": lambda text: stores.sliced(stores.encode_texts([text]), size)[:],
            "dense search": lambda vector: stored.index.search(vector, depth),
        },
        batch=lambda texts: stored.index.search(stores.sliced(stores.encode_texts(texts), size)[:], depth),
        disk=[stored.folder],
        memory=lambda: stored.memory_bytes,
        build_seconds=added(stores.encoding_seconds, stored.build_seconds),
    )


def sizes_to_measure(student: str, dims: Sequence[int] | None, dimension: int | None) -> list[int]:
    """The sizes below the whole that a report measures, the largest first.

    Args:
        student: as it was given; a folder's record of the training is read.
        dims: sizes that are asked for; None: those it was trained at.
        dimension: of its vectors.

    Raises:
        ValueError: a size that is not between 1 and the dimensions of the vectors.
    """
    from tct_hf.evaluation.systems import check_dims

    if dims is None:
        # Of a student that was cut after its training, those that are left.
        sizes = [size for size in _trained_dims(Path(student)) if dimension is None or size < dimension]
    else:
        sizes = list(dims)
    check_dims(sizes, dimension)
    return sorted({size for size in sizes if size != dimension}, reverse=True)


def _trained_dims(folder: Path) -> list[int]:
    """The Matryoshka sizes that recipes/train.py, or an arm of a comparison, records beside a student."""
    file = folder / CLAIM_FILE
    if not file.is_file():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    training = {**(record.get("training") or {})}
    training |= ((record.get("student") or record.get("arm") or {}).get("training")) or {}
    return [size for size in training.get("matryoshka_dims") or [] if isinstance(size, int)]
