"""A teacher's score of each generated query with its passage, beside the queries: to leave out the worst."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data import expansion_store as store
from tct_hf.data.passages import checked_passages
from tct_hf.files import claim, file_digest
from tct_hf.progress import PassageProgress, print_at_once

if TYPE_CHECKING:
    from accelerate import PartialState

    from tct_hf.teachers.base import Teacher
    from tct_hf.teachers.colbert import ColBERTTeacher
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher

__all__ = ["score_expansions"]

Row = tuple[str, str, list[str]]  # id, text, queries


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
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Score every generated query with its own passage, into `scores` in the folder of the expansions.

    Stopped and called again, it goes on after the last whole shard. `load_expansions` then gives the scores beside the
    queries, and `expanded_texts(..., drop_share=0.3)` leaves the lowest out.

    Args:
        teacher: a `ColBERTTeacher`, or a `CrossEncoderTeacher` of own candidates; it scores on the device it is on,
            with `state` on that of its process.
        corpus: the passages that were expanded, "id" and "text", in the same order; read once.
        folder: of `expand_corpus` or `write_expansions`, finished.
        depends: JSON-ready, all that the scores depend on beside the texts, for instance `describe_teacher`.
        batch_size: pairs that are scored together, at most, but for a passage with more queries.
        state: the processes of a distributed run, which share the shards; one process when None.
        write: takes a line of progress; printed by the main process when None.
        write_every: seconds between such lines.
        clock: seconds from a fixed moment, never going back.

    Returns:
        The manifest of the scores: `depends`, "count" and "shards".

    Raises:
        ValueError: another kind of teacher; a corpus with other passages; a score that is not finite; a folder with
            scores of another teacher.
        FileNotFoundError: the expansions are not there, or not finished.
        OSError: the folder can't be written.

    Source: Gospodinov, MacAvaney, Macdonald, Doc2Query--, ECIR 2023 (arXiv 2301.03266).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    scorer = _checked_teacher(teacher)
    place = Path(folder)
    scores = place / store.SCORES_FOLDER
    manifest = store.read_manifest(place, "expansions")
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if rank == 0:
        claim(scores, {**depends, "batch_size": batch_size, "expansions": file_digest(place / store.MANIFEST_FILE)})
        for left in scores.glob(".*.tmp"):  # by a killed process
            left.unlink()
    if state is not None:
        state.wait_for_everyone()
        scorer.to(state.device)
    passages = checked_passages(corpus, True)
    progress = PassageProgress(
        manifest["count"], processes, write or print_at_once, write_every, clock, enabled=rank == 0
    )
    for number, entry in enumerate(manifest["shards"]):
        made_of = entry["sha256"]
        table = store.read_shard(place, number, "queries")
        rows = list(_with_texts(table, passages, store.shard_file(place, number)))
        if store.is_made_of(scores, number, made_of):
            progress.skipped(len(rows))
        elif number % processes == rank:
            found: list[list[float]] = []
            for batch in _batches(rows, batch_size):
                found += _scores(scorer, batch)
                progress.encoded(len(batch))
            store.write_shard(scores, number, [row[0] for row in rows], "scores", found, made_of)
    if next(passages, None) is not None:
        raise ValueError(f"corpus: it has more passages than the {manifest['count']:,} that were expanded.")
    if state is not None:
        state.wait_for_everyone()
    progress.finish(manifest["count"])
    if rank == 0:
        store.finish(scores, len(manifest["shards"]), manifest["count"])
    if state is not None:
        state.wait_for_everyone()
    return store.read_manifest(scores, "scores")


def _checked_teacher(teacher: Teacher) -> ColBERTTeacher | CrossEncoderTeacher:
    from tct_hf.teachers.colbert import ColBERTTeacher
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher

    if isinstance(teacher, CrossEncoderTeacher) and teacher.covers == "in-batch":
        raise ValueError(
            'The cross-encoder would score every query with every passage: load it with candidates="own".'
        )
    if not isinstance(teacher, (ColBERTTeacher, CrossEncoderTeacher)):
        raise ValueError(
            f"Generated queries can't be scored by a {type(teacher).__name__}: use a ColBERTTeacher or a "
            "CrossEncoderTeacher."
        )
    return teacher


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


def _scores(teacher: ColBERTTeacher | CrossEncoderTeacher, batch: Sequence[Row]) -> list[list[float]]:
    """One score a query, of each passage of a batch."""
    import torch
    from accelerate.utils import send_to_device

    from tct_hf.teachers.colbert import ColBERTTeacher

    # A query that was drawn several times is scored once.
    pairs = list(dict.fromkeys((row, query) for row, (*_, queries) in enumerate(batch) for query in queries))
    if not pairs:
        return [[] for _ in batch]
    queries, of = [query for _, query in pairs], [row for row, _ in pairs]
    # A ColBERT encodes each passage once and compares it with all queries; other pairs cost next to nothing.
    live = isinstance(teacher, ColBERTTeacher)
    passages = [text for _, text, _ in batch] if live else [batch[row][1] for row in of]
    inputs = teacher.collate(queries, [passages], [{} for _ in queries])
    matrix = teacher.score_matrix(send_to_device(inputs or {}, teacher.model.device), gather=False)
    columns = torch.tensor(of if live else range(len(of)), device=matrix.device)
    found = matrix.gather(1, columns[:, None])[:, 0].float().cpu()
    finite = torch.isfinite(found)
    if not finite.all():
        row, query = pairs[int((~finite).nonzero()[0])]
        raise ValueError(
            f"The teacher gave a score that is not finite for the query {query!r} of passage {batch[row][0]!r}: load "
            "it with dtype float32, and check that its checkpoint scores single texts finitely."
        )
    known = dict(zip(pairs, found.tolist(), strict=True))
    return [[known[row, query] for query in queries] for row, (*_, queries) in enumerate(batch)]
