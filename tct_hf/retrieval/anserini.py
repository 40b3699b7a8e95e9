"""Vectors as Anserini's ParquetDenseVectorCollection reads them: parquet files of docid and vector."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tct_hf.files import write_aside
from tct_hf.retrieval.vectors import BLOCK, as_matrix, load_vectors


def write_anserini(vectors: str | Path, output_dir: str | Path) -> list[Path]:
    """Write the vectors of an `encode_corpus` folder as parquet files, instead of earlier ones; returns these.

    Raises:
        ValueError: the folder holds sparse vectors, or is damaged.
    """
    ids, matrix, manifest = load_vectors(vectors, mmap=True, verify=False)
    if manifest.get("layout") == "sparse":
        raise ValueError(f"{vectors}: sparse vectors; only those of a dense student can be written for Anserini")
    files: list[Path] = []
    for start in range(0, len(ids), BLOCK):
        block = as_matrix(matrix[start : start + BLOCK], str(vectors), start)
        offsets = pa.array(range(0, block.size + 1, block.shape[1]), pa.int32())
        table = {"docid": ids[start : start + BLOCK], "vector": pa.ListArray.from_arrays(offsets, block.ravel())}
        files.append(Path(output_dir) / f"{len(files):05}.parquet")
        with write_aside(files[-1]) as aside:
            pq.write_table(pa.table(table), aside, compression="snappy")
    for former in set(Path(output_dir).glob("[0-9]" * 5 + ".parquet")) - {*files}:  # of a larger corpus
        former.unlink()
    return files
