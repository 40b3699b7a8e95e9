"""Generated queries beside a corpus (doc2query): shards of id and queries, and below `scores` those of a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from tct_hf.data import shards
from tct_hf.data.near_duplicates import folded
from tct_hf.data.rows import checked_texts, plain
from tct_hf.data.sources import rows_in_batches
from tct_hf.files import command

if TYPE_CHECKING:
    from datasets import Dataset

SCORES_FOLDER = "scores"


def query_columns(ids: Sequence[str], queries: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The columns of a shard of generated queries."""
    return {"id": pa.array(ids, pa.string()), "queries": pa.array(queries, pa.list_(pa.string()))}


def score_columns(ids: Sequence[str], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The columns of a shard of their scores."""
    return {"id": pa.array(ids, pa.string()), "scores": pa.array(scores, pa.list_(pa.float32()))}


def load_expansions(path: str | Path) -> Dataset:
    """Open a folder of expansions; every file is compared with its checksum.

    Args:
        path: the folder that `expand_corpus` or `write_expansions` wrote.

    Returns:
        A memory-mapped data set in the corpus's order: `id`, `queries` (as generated, repeats included) and, where
        `score_expansions` has finished, `scores`, one float32 a query.

    Raises:
        FileNotFoundError: there is no such folder, it is not finished, or a shard is missing.
        ValueError: a file is damaged or was altered, or scores don't belong to the queries; names the file.
    """
    from datasets import concatenate_datasets

    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of expansions; expand the corpus first, or fix the path")
    queries = shards.checked_shards(folder, shards.read_manifest(folder, "expansions"))
    parts = [_data_set(folder, len(queries), ["id", "queries"])]
    scores = folder / SCORES_FOLDER
    if (scores / shards.MANIFEST_FILE).is_file():
        found = shards.checked_shards(scores, shards.read_manifest(scores, "scores"))
        for number, (mine, its) in enumerate(zip_longest(queries, found)):
            if mine is None or its is None or _lengths(mine, "queries") != _lengths(its, "scores"):
                what = "it has not one score a query of that shard"
                raise ValueError(f"{shards.shard_file(scores, number)}: {what}: delete scores, score again")
        parts.append(_data_set(scores, len(found), ["scores"]))
    return concatenate_datasets(parts, axis=1)


def _data_set(folder: Path, count: int, columns: list[str]) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    files = [str(shards.shard_file(folder, number)) for number in range(count)]
    return concatenate_datasets([Dataset.from_file(file) for file in files]).select_columns(columns)


def _lengths(table: pa.Table, column: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    return table["id"], pc.list_value_length(table[column])


def write_expansions(
    rows: Iterable[Mapping[str, Any]], out_dir: str | Path, *, settings: Mapping[str, Any], shard_size: int = 4096
) -> dict[str, Any]:
    """Write generated queries of any origin as a folder of expansions.

    Args:
        rows: mappings with "id" and "queries" (a list of texts), in the corpus's order.
        out_dir: the folder; made when missing.
        settings: JSON-ready, what the queries were made with, such as {"source": "castorini/doc2query..."}.
        shard_size: passages a shard.

    Returns:
        The manifest: the settings, "count" and "shards".

    Raises:
        ValueError: a row without id or queries, naming it; no row; a folder of other settings or other queries.
    """
    checked = _checked(rows)

    def parts() -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
        while part := list(islice(checked, shard_size)):
            texts = chain.from_iterable((passage_id, "\0".join(queries)) for passage_id, queries in part)
            yield shards.digest_of(texts), part

    settings = {**settings, "shard_size": shard_size}
    return shards.run_shards(out_dir, settings, parts(), lambda part: query_columns(*zip(*part, strict=True)))


def _checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(rows):
        passage_id, queries = row.get("id"), plain(row.get("queries"))
        if not isinstance(passage_id, str):
            raise ValueError(f"rows: number {number} has id = {passage_id!r}: it must be a string.")
        if not isinstance(queries, (list, tuple)) or not all(isinstance(query, str) for query in queries):
            raise ValueError(f"rows: {passage_id!r} (number {number}) has queries = {queries!r}, no list of texts.")
        [passage_id, *texts] = checked_texts([passage_id, *queries], f"rows: number {number}, id and queries")
        yield passage_id, texts


def expanded_texts(
    corpus: Iterable[Mapping[str, Any]],
    expansions: Dataset,
    *,
    num_queries: int | None = None,
    drop_repeats: bool = False,
    drop_share: float = 0.0,
) -> Iterator[str]:
    """Each passage with its generated queries appended, joined by spaces, for an index of words.

    By default every query is kept, as published (Nogueira and Lin, docTTTTTquery, 2019): one drawn twice counts twice.
    Of the first `num_queries` of a passage, repeats are left out first, then those with the lowest scores in the whole
    corpus (Doc2Query--, Gospodinov et al., ECIR 2023).

    Args:
        corpus: passages with "id" and "text"; a data set, or any iterable, read once as the texts are taken.
        expansions: of :func:`load_expansions`, of the same passages in the same order.
        num_queries: the number of queries kept of a passage, its first ones; all when None.
        drop_repeats: leave out a query that equals an earlier one of its passage but for case, punctuation and white
            space.
        drop_share: share of the queries to leave out by score, 0 to below 1. Queries whose score equals the threshold
            are kept. It takes 4 bytes of memory a query.

    Returns:
        The texts in the corpus's order, made as they are taken.

    Raises:
        ValueError: a share without scores; passages without expansions or in another order, naming the first.
    """
    if num_queries is not None and num_queries < 0:
        raise ValueError(f"num_queries must be at least 0, or None for all, got {num_queries}.")
    if not 0.0 <= drop_share < 1.0:
        raise ValueError(f"drop_share must be at least 0 and below 1, got {drop_share}.")
    if drop_share and "scores" not in expansions.column_names:
        fix = f"score them with score_expansions ({command('expand')} --teacher)"
        raise ValueError(f"drop_share is {drop_share}, but the queries have no scores: {fix}, or leave it at 0.")
    if hasattr(corpus, "select_columns") and hasattr(corpus, "__len__"):  # before hours of indexing
        for _ in _beside(*(rows_in_batches(one.select_columns("id")) for one in (corpus, expansions))):
            pass
    least = None
    if drop_share:
        least = _threshold((row["scores"] for row in _kept(expansions, num_queries, drop_repeats)), drop_share)
    rows = _beside(rows_in_batches(corpus), _kept(expansions, num_queries, drop_repeats, least))
    return (" ".join([passage["text"], *row["queries"]]) for passage, row in rows)


def _beside(passages: Iterator[Any], expansions: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    for number, (passage, row) in enumerate(zip_longest(passages, expansions)):
        if passage is None or row is None or passage["id"] != row["id"]:
            mine, its = ("ends before it" if one is None else f"has {one['id']!r} there" for one in (passage, row))
            where = f"at passage number {number} the corpus {mine} and the expansion {its}"
            raise ValueError(f"expansions: they are not of this corpus: {where}: expand it as it is, in its order.")
        yield passage, row


def _kept(
    expansions: Dataset, num_queries: int | None, drop_repeats: bool, least: float | None = None
) -> Iterator[dict[str, Any]]:
    for row in rows_in_batches(expansions):
        places = list(range(len(row["queries"])))[:num_queries]
        if drop_repeats:
            first: dict[str, int] = {}
            for place in places:
                first.setdefault(folded(row["queries"][place]), place)
            places = list(first.values())
        if least is not None:
            places = [place for place in places if row["scores"][place] >= least]
        yield {name: value if name == "id" else [value[place] for place in places] for name, value in row.items()}


def _threshold(scores: Iterable[list[float]], share: float) -> float:
    """The score below which a share of all scores lies."""
    every = np.fromiter(chain.from_iterable(scores), np.float32)
    rank = int(share * len(every))
    return float(np.partition(every, rank)[rank]) if len(every) else float("-inf")
