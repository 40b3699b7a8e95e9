"""A teacher's scores of a set of triples, written once: to distil them later without the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.files import claim, write_aside, write_json_atomic

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset

    from tct_hf.teachers.base import Teacher

__all__ = ["SCORE_NAME", "score_triples"]

# What follows a candidate's name in the columns of scores, as in mined triples.
SCORE_NAME = "teacher_score"
TRIPLES_FOLDER = "triples"
SUMMARY_FILE = "summary.json"


def score_triples(
    teacher: Teacher,
    triples: Dataset,
    output_dir: str | Path,
    *,
    depends: Mapping[str, Any],
    name: str | None = None,
    rows_a_shard: int = 4096,
    batch_size: int = 32,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score every row's own candidates, into parquet shards in `output_dir/triples`.

    Stopped and called again, it goes on after the last whole shard; finished, it returns at once.

    Args:
        teacher: of any kind but an ensemble for the whole batch, whose scores depend on the other rows of a batch.
        triples: as `load_triples` gives them.
        output_dir: a folder of other arguments is refused.
        depends: JSON-ready, all that the scores depend on beside the triples, for instance `describe_teacher`.
        name: of the teacher, for the summary; what class it is when None.
        rows_a_shard: what is lost at most when a process is killed.
        batch_size: rows that are scored together.
        state: the processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress a shard.

    Returns:
        "rows", "candidates" a row, "shards", "positive_on_top" (share of the rows) and "margin" (mean of the
        positive's score less the best negative's; both None without negatives), "teacher", and of its scores, as they
        are stored, "scores": "kind" (MaxSim, logit ...), "training_scale" (what the teacher's own training multiplied
        them by, for that of `StoredScores`), "count", "min", "max" and "mean"; as in `summary.json`. The shards hold
        the columns of the triples, and positive_teacher_score, negative_teacher_score (or negative_1_teacher_score
        ...): `load_triples(output_dir / "triples", scores="teacher_score")` reads them for `StoredScores`.

    Raises:
        ValueError: sizes below 1, no row, scores that are there already or are not finite, a teacher that is not for
            a query's own candidates alone, a folder of other arguments.
        OSError: output_dir can't be written.
    """
    from tct_hf.data.column_names import candidate_columns
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher
    from tct_hf.teachers.ensemble import TeacherEnsemble

    for setting, size in (("rows_a_shard", rows_a_shard), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{setting} must be at least 1, got {size}.")
    if isinstance(teacher, TeacherEnsemble) and teacher.covers == "in-batch":
        raise ValueError(
            "A TeacherEnsemble of teachers for the whole batch normalises over it, so that its scores depend on the "
            "rows beside a row: score with each teacher alone, and mix StoredScores."
        )
    if isinstance(teacher, CrossEncoderTeacher) and teacher.covers == "in-batch":
        raise ValueError(
            'The cross-encoder would score every query with every passage: load it with candidates="own".'
        )
    if not len(triples):
        raise ValueError("triples: there is no row to score.")
    names = candidate_columns(triples.column_names)
    taken = [f"{name}_{SCORE_NAME}" for name in names if f"{name}_{SCORE_NAME}" in triples.column_names]
    if taken:
        raise ValueError(f"triples: they have a column {taken[0]!r} already; remove it, or train on it as it is.")
    folder = Path(output_dir)
    shards = -(-len(triples) // rows_a_shard)
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if rank == 0:
        sizes = {"rows": len(triples), "rows_a_shard": rows_a_shard, "batch_size": batch_size}
        claim(folder, {**depends, "triples": triples._fingerprint, "columns": list(triples.column_names), **sizes})
    if state is not None:
        state.wait_for_everyone()
        teacher.to(state.device)
    for shard in range(rank, shards, processes):
        file = _shard(folder, shard, shards)
        if file.is_file():
            continue
        rows = triples.select(range(shard * rows_a_shard, min((shard + 1) * rows_a_shard, len(triples))))
        _write_shard(file, rows, names, _scores(teacher, rows, names, batch_size, state))
        if write is not None:
            write(f"  shard {shard + 1} of {shards}: {len(rows):,} rows")
    if state is not None:
        state.wait_for_everyone()
    if rank == 0:
        found = _summary(folder, shards, names)
        scale = {"kind": teacher.score_kind, "training_scale": teacher.training_scale}
        found |= {"teacher": name or type(teacher).__name__, "scores": {**scale, **found["scores"]}}
        write_json_atomic(folder / SUMMARY_FILE, found)
    if state is not None:
        state.wait_for_everyone()
    import json

    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def _shard(folder: Path, number: int, shards: int) -> Path:
    return folder / TRIPLES_FOLDER / f"train-{number:05d}-of-{shards:05d}.parquet"


def _scores(teacher: Teacher, rows: Dataset, names: list[str], batch_size: int, state: PartialState | None) -> Any:
    """`(rows, candidates)` float32, on the CPU."""
    import torch
    from accelerate.utils import send_to_device

    from tct_hf.batches import own_places

    device = state.device if state is not None else torch.device("cpu")
    found = []
    for batch in rows.iter(batch_size):
        queries = batch["query"]
        each = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        inputs = teacher.collate(queries, [batch[name] for name in names], each)
        scores = teacher.score_matrix(send_to_device(inputs or {}, device), gather=False)
        places, _ = own_places(len(queries), len(names), scores.device, gather=False)
        own = scores.gather(1, places)
        finite = torch.isfinite(own).all(1)
        if not finite.all():
            query = queries[int((~finite).nonzero()[0])]
            raise ValueError(
                f"The teacher gave a score that is not finite for the candidates of query {query!r}: load it with "
                "dtype float32, and check that its checkpoint scores single texts finitely."
            )
        found.append(own.float().cpu())
    return torch.cat(found)


def _write_shard(file: Path, rows: Dataset, names: list[str], scores: Any) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    table = rows.with_format("arrow")[:]
    for name, column in zip(names, scores.T.numpy(), strict=True):
        table = table.append_column(f"{name}_{SCORE_NAME}", [column])
    with write_aside(file) as aside:
        pq.write_table(table.replace_schema_metadata(None), aside, compression="zstd")


def _summary(folder: Path, shards: int, names: list[str]) -> dict[str, Any]:
    import numpy as np
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    count, on_top, margin, total = 0, 0, 0.0, 0.0
    least, most = np.inf, -np.inf
    for number in range(shards):
        table = pq.read_table(_shard(folder, number, shards), columns=[f"{name}_{SCORE_NAME}" for name in names])
        scores = np.stack([column.to_numpy() for column in table.columns]).astype(np.float64)
        count += len(table)
        total += float(scores.sum())
        least, most = min(least, float(scores.min())), max(most, float(scores.max()))
        if len(names) > 1:
            margins = scores[0] - scores[1:].max(0)
            on_top += int((margins > 0).sum())
            margin += float(margins.sum())
    found = {"positive_on_top": on_top / count, "margin": margin / count} if len(names) > 1 else {}
    none = dict.fromkeys(("positive_on_top", "margin"))
    number_of = count * len(names)
    scores_are = {"count": number_of, "min": least, "max": most, "mean": total / number_of}
    return {"rows": count, "candidates": len(names), "shards": shards, **none, **found, "scores": scores_are}
