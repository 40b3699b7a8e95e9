"""A teacher's scores written once, of triples or of generated queries: to distil or to filter without the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor

from tct_hf.batches import own_places
from tct_hf.data import shards
from tct_hf.data.column_names import candidate_columns
from tct_hf.data.expansion import SCORES_FOLDER, score_columns
from tct_hf.data.file_sources import read_parquet, write_parquet
from tct_hf.data.texts import checked_passages
from tct_hf.files import claim, file_digest, read_json, working_in, write_json_atomic
from tct_hf.progress import PassageProgress
from tct_hf.teachers.base import Teacher
from tct_hf.teachers.colbert import ColBERTTeacher
from tct_hf.teachers.cross_encoder import CrossEncoderTeacher
from tct_hf.teachers.ensemble import TeacherEnsemble
from tct_hf.teachers.remote import URLTeacher

Row = tuple[str, str, list[str]]  # id, text, queries


def _check(teacher: Teacher, **sizes: int) -> None:
    for setting, size in sizes.items():
        if size < 1:
            raise ValueError(f"{setting} must be at least 1, got {size}.")
    if isinstance(teacher, (CrossEncoderTeacher, URLTeacher)) and teacher.covers == "in-batch":
        raise ValueError('The teacher would score every query with every passage: load it with candidates="own".')


def _checked(scores: Tensor, queries: Sequence[str], *, of: Sequence[str] | None = None) -> Tensor:
    """Scores `(queries, ...)` on the CPU, in float32; `of` names each query's passage for the message."""
    finite = torch.isfinite(scores).reshape(len(scores), -1).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        place = f" of passage {of[row]!r}" if of is not None else ""
        raise ValueError(
            f"The teacher gave a score that is not finite for the query {queries[row]!r}{place}: load it in float32."
        )
    return scores.float().cpu()


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
        teacher: teacher of any kind but an ensemble for the whole batch, whose scores depend on the other rows.
        triples: triples of `load_triples`.
        output_dir: folder of the result; one of other arguments is refused.
        depends: JSON-ready, all that the scores depend on beside the triples, for instance `describe_teacher`.
        name: name of the teacher in the summary; its class when None.
        rows_a_shard: rows that are lost at most when a process is killed.
        batch_size: rows that are scored together.
        state: processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress a shard.

    Returns:
        The content of `summary.json`: "rows", "candidates" a row, "shards", "positive_on_top" (share of the rows) and
        "margin" (mean of the positive's score less the best negative's; both None without negatives), "teacher", and
        of its "scores" the "kind" (MaxSim, logit ...), "training_scale", "count", "min", "max" and "mean". The shards
        hold the triples' columns, and positive_teacher_score, negative_teacher_score (or negative_1_teacher_score
        ...): `load_triples(output_dir / "triples", scores="teacher_score")` reads them for `StoredScores`.

    Raises:
        ValueError: no row, scores that are there already or are not finite, a teacher that is not for a query's own
            candidates alone, a folder of other arguments.
        OSError: output_dir can't be written.
    """
    if isinstance(teacher, TeacherEnsemble) and teacher.covers == "in-batch":
        raise ValueError(
            "A TeacherEnsemble's scores of a batch depend on the rows beside a row: score with each teacher alone."
        )
    if not len(triples):
        raise ValueError("triples: there is no row to score.")
    names = candidate_columns(triples.column_names)
    columns = [f"{name}_teacher_score" for name in names]
    for column in columns:
        if column in triples.column_names:
            raise ValueError(f"triples: they have a column {column!r} already; remove it, or train on it as it is.")
    folder = Path(output_dir)
    summary = folder / "summary.json"
    sizes = {"rows_a_shard": rows_a_shard, "batch_size": batch_size}
    settings = {**depends, "triples": triples._fingerprint, "columns": list(triples.column_names)}
    _check(teacher, **sizes)
    wait = state.wait_for_everyone if state is not None else lambda: None
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    with working_in(folder, rank == 0):
        if rank == 0:
            claim(folder, {**settings, "rows": len(triples), **sizes})
        wait()
        if state is not None:
            teacher.to(state.device)
        shards = -(-len(triples) // rows_a_shard)
        files = [folder / "triples" / f"train-{shard:05d}-of-{shards:05d}.parquet" for shard in range(shards)]
        for shard in [number for number in range(rank, shards, processes) if not files[number].is_file()]:
            rows = triples.select(range(shard * rows_a_shard, min((shard + 1) * rows_a_shard, len(triples))))
            table = rows.with_format("arrow")[:]
            for column, scores in zip(columns, _own_scores(teacher, rows, names, batch_size).T, strict=True):
                table = table.append_column(column, [scores])
            write_parquet(files[shard], table)
            if write is not None:
                write(f"  shard {shard + 1} of {shards}: {len(rows):,} rows")
        wait()
        if rank == 0:
            write_json_atomic(summary, _summary(teacher, name, files, columns))
        wait()
    return dict(read_json(summary, "delete it, and score again."))


def _own_scores(teacher: Teacher, rows: Dataset, names: list[str], batch_size: int) -> np.ndarray:
    """`(rows, candidates)` float32."""
    found = []
    for batch in rows.iter(batch_size):
        queries = batch["query"]
        each = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        inputs = teacher.collate(queries, [batch[name] for name in names], each)
        scores = teacher.score_matrix(send_to_device(inputs or {}, teacher.device), gather=False)
        places, _ = own_places(len(queries), len(names), scores.device, gather=False)
        found.append(_checked(scores.gather(1, places), queries))
    return torch.cat(found).numpy()


def _summary(teacher: Teacher, name: str | None, files: Sequence[Path], columns: list[str]) -> dict[str, Any]:
    scores = np.concatenate(  # (rows, candidates)
        [np.stack([column.to_numpy() for column in read_parquet(file, columns).columns], 1) for file in files]
    ).astype(np.float64)
    margins = scores[:, 0] - scores[:, 1:].max(1) if len(columns) > 1 else None
    return {
        "rows": len(scores),
        "candidates": len(columns),
        "shards": len(files),
        "positive_on_top": None if margins is None else float((margins > 0).mean()),
        "margin": None if margins is None else float(margins.mean()),
        "teacher": name or type(teacher).__name__,
        "scores": {
            "kind": teacher.score_kind,
            "training_scale": teacher.training_scale,
            "count": scores.size,
            "min": float(scores.min()),
            "max": float(scores.max()),
            "mean": float(scores.mean()),
        },
    }


def score_expansions(
    teacher: Teacher,
    corpus: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    depends: Mapping[str, Any],
    batch_size: int = 256,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
    write_every: float = 10.0,
) -> dict[str, Any]:
    """Score every generated query with its own passage, into `scores` in the folder of the expansions.

    Stopped and called again, it goes on after the last whole shard. `load_expansions` then gives the scores beside the
    queries, and `expanded_texts(..., drop_share=0.3)` leaves the lowest out.

    Args:
        teacher: a `ColBERTTeacher`, or a `CrossEncoderTeacher` of own candidates; it scores on the device it is on,
            with `state` on that of its process.
        corpus: the passages that were expanded, "id" and "text", in the same order; read once.
        folder: folder of `expand_corpus` or `write_expansions`, finished.
        depends: JSON-ready, all that the scores depend on beside the texts, for instance `describe_teacher`.
        batch_size: most pairs that are scored together, but for a passage with more queries.
        state: processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress; printed by the main process when None.
        write_every: seconds between such lines.

    Returns:
        The manifest of the scores: `depends`, "count" and "shards".

    Raises:
        ValueError: another kind of teacher; a corpus with other passages; a score that is not finite; a folder with
            scores of another teacher.
        FileNotFoundError: the expansions are not there, or not finished.
        OSError: the folder can't be written.

    Source: Gospodinov, MacAvaney, Macdonald, Doc2Query--, ECIR 2023 (arXiv 2301.03266).
    """
    if not isinstance(teacher, (ColBERTTeacher, CrossEncoderTeacher)):
        what = f"Generated queries can't be scored by a {type(teacher).__name__}"
        raise ValueError(f"{what}: use a ColBERTTeacher or a CrossEncoderTeacher.")
    place = Path(folder)
    scores = place / SCORES_FOLDER
    manifest = shards.read_manifest(place, "expansions")
    settings = {**depends, "batch_size": batch_size, "expansions": file_digest(place / shards.MANIFEST_FILE)}
    _check(teacher, batch_size=batch_size)
    if state is not None:
        teacher.to(state.device)
    passages = checked_passages(corpus, True)
    count = manifest["count"]
    progress = PassageProgress(count, state, write, write_every)

    def parts() -> Iterator[tuple[str, list[Row]]]:
        tables = shards.checked_shards(place, manifest)
        for number, (entry, table) in enumerate(zip(manifest["shards"], tables, strict=True)):
            yield entry["sha256"], list(_with_texts(table, passages, shards.shard_file(place, number)))
        if next(passages, None) is not None:
            raise ValueError(f"corpus: it has more passages than the {count:,} that were expanded.")

    def make(rows: Sequence[Row]) -> dict[str, Any]:
        found: list[list[float]] = []
        for batch in _batches(rows, batch_size):
            found += _query_scores(teacher, batch)
            progress.encoded(len(batch))
        return score_columns([row[0] for row in rows], found)

    made = shards.run_shards(scores, settings, parts(), make, state=state, progress=progress)
    progress.finish(count)
    return made


def _with_texts(table: Any, passages: Iterator[tuple[str, str]], file: Path) -> Iterator[Row]:
    for name, queries in zip(table["id"].to_pylist(), table["queries"].to_pylist(), strict=True):
        passage_id, text = next(passages, (None, ""))
        if passage_id != name:
            there = "the corpus ends before it" if passage_id is None else f"the corpus has {passage_id!r} there"
            raise ValueError(f"{file}: passage {name!r}, but {there}: give the corpus that was expanded.")
        yield name, text, queries


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Consecutive passages with at most so many queries together."""
    batch: list[Row] = []
    for row in rows:
        if batch and sum(len(queries) for *_, queries in batch) + len(row[2]) > batch_size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _query_scores(teacher: ColBERTTeacher | CrossEncoderTeacher, batch: Sequence[Row]) -> list[list[float]]:
    """One score a query, of each passage of a batch."""
    # A query that was drawn several times is scored once.
    pairs = list(dict.fromkeys((row, query) for row, (*_, queries) in enumerate(batch) for query in queries))
    if not pairs:
        return [[] for _ in batch]
    of, queries = map(list, zip(*pairs, strict=True))
    # A ColBERT encodes each passage once and compares it with all queries; other pairs cost next to nothing.
    live = isinstance(teacher, ColBERTTeacher)
    passages = [text for _, text, _ in batch] if live else [batch[row][1] for row in of]
    inputs = teacher.collate(queries, [passages], [{} for _ in queries])
    matrix = teacher.score_matrix(send_to_device(inputs or {}, teacher.device), gather=False)
    columns = torch.tensor(of if live else range(len(of)), device=matrix.device)
    found = _checked(matrix.gather(1, columns[:, None])[:, 0], queries, of=[batch[row][0] for row in of])
    known = dict(zip(pairs, found.tolist(), strict=True))
    return [[known[row, query] for query in queries] for row, (*_, queries) in enumerate(batch)]
