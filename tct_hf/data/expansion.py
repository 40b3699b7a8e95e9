"""Generated queries beside a corpus (doc2query): how they are read, and joined to the passages at index time.

They stay apart from the passages, so that how many are appended, and which are left out, is decided when an index is
built. The format is in `tct_hf.data.expansion_store`; `expand_corpus` writes it, and `write_expansions` does so from
queries of any other origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.data import expansion_store as store
from tct_hf.files import claim, file_digest

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

__all__ = ["expanded_texts", "load_expansions", "write_expansions"]

# Part of the cache key: raise it when the prepared form of the same folder changes.
_FORMAT = 1
_ROWS_A_BATCH = 1000
_MOST_NAMED = 3


def load_expansions(path: str | Path, *, cache_dir: str | Path | None = None) -> Dataset:
    """Open a folder of expansions.

    Every file is compared with its checksum once, when the folder is read into the cache.

    Args:
        path: the folder that `expand_corpus` or `write_expansions` wrote.
        cache_dir: where the prepared form is kept; by default `default_cache_dir()`.

    Returns:
        A memory-mapped data set in the corpus's order: `id`, `queries` (as generated, repeats included) and, where
        `score_expansions` has finished, `scores`, one float32 a query.

    Raises:
        FileNotFoundError: there is no such folder, it is not finished, or a shard is missing.
        ValueError: a file is damaged or was altered, or scores don't belong to the queries; names the file.
        OSError: the cache can't be written.
    """
    from hashlib import sha256

    from datasets import Dataset

    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of expansions; expand the corpus first, or mend the path")
    manifest = store.read_manifest(folder, "expansions")
    scores = folder / store.SCORES_FOLDER
    scored = (scores / store.MANIFEST_FILE).is_file()
    digests = [file_digest(place / store.MANIFEST_FILE) for place in ((folder, scores) if scored else (folder,))]
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    key = sha256(repr((_FORMAT, digests)).encode()).hexdigest()[:16]
    ready = build_once(cache / f"expansions-{key}", lambda staging: _build(staging, folder, manifest, scored))
    return Dataset.from_file(str(ready / "expansions.arrow"))


def _build(staging: Path, folder: Path, manifest: Mapping[str, Any], scored: bool) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    fields = [("id", pa.string()), ("queries", pa.list_(pa.string()))]
    tables: Iterator[tuple[Any, Any]] = ((table, None) for table in store.checked_shards(folder, manifest, "queries"))
    if scored:
        scores = folder / store.SCORES_FOLDER
        theirs = store.read_manifest(scores, "scores")
        if [entry["count"] for entry in theirs["shards"]] != [entry["count"] for entry in manifest["shards"]]:
            raise ValueError(f"{scores}: made of other expansions: delete it, and score again")
        fields.append(("scores", pa.list_(pa.float32())))
        tables = zip(
            store.checked_shards(folder, manifest, "queries"),
            store.checked_shards(scores, theirs, "scores"),
            strict=True,
        )
    schema = pa.schema(fields)
    with pa.OSFile(str(staging / "expansions.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for number, (table, beside) in enumerate(tables):
            if beside is not None:
                lengths = [pc.list_value_length(column) for column in (table["queries"], beside["scores"])]
                if table["id"] != beside["id"] or lengths[0] != lengths[1]:
                    file = store.shard_file(folder / store.SCORES_FOLDER, number)
                    raise ValueError(f"{file}: it has not one score a query of that shard: delete scores, score again")
                table = table.append_column("scores", beside["scores"])
            for batch in table.cast(schema).to_batches(max_chunksize=_ROWS_A_BATCH):
                writer.write_batch(batch)


def write_expansions(
    rows: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    *,
    settings: Mapping[str, Any],
    shard_size: int = 4096,
) -> dict[str, Any]:
    """Write generated queries of any origin as a folder of expansions, in flat memory.

    Args:
        rows: mappings with "id" and "queries" (a list of texts), in the corpus's order.
        out_dir: the folder; made when missing.
        settings: JSON-ready, what the queries were made with, such as {"source": "castorini/doc2query..."}.
        shard_size: passages a shard.

    Returns:
        The manifest: the settings, "count" and "shards".

    Raises:
        ValueError: a row without id or queries, naming it; no row; a folder of other settings or other queries.
        OSError: the folder can't be written.
    """
    from itertools import islice

    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}.")
    folder = Path(out_dir)
    checked = _checked(rows)
    number, count = 0, 0
    while shard := list(islice(checked, shard_size)):
        if not number:
            claim(folder, {**settings, "shard_size": shard_size})
        made_of = store.passages_digest([(passage_id, "\0".join(queries)) for passage_id, queries in shard])
        if not store.is_made_of(folder, number, made_of):
            ids, queries = zip(*shard, strict=True)
            store.write_shard(folder, number, ids, "queries", queries, made_of)
        count += len(shard)
        number += 1
    if not count:
        raise ValueError("rows: there is none; check where they come from.")
    return store.finish(folder, number, count)


def _checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(rows):
        passage_id, queries = row.get("id"), row.get("queries")
        if not isinstance(passage_id, str):
            raise ValueError(f"rows: number {number} has id = {passage_id!r}: it has to be a string.")
        if not isinstance(queries, (list, tuple)) or not all(isinstance(query, str) for query in queries):
            raise ValueError(
                f"rows: {passage_id!r} (number {number}) has queries = {queries!r}: give a list of texts."
            )
        yield passage_id, list(queries)


def expanded_texts(
    corpus: Iterable[Mapping[str, Any]],
    expansions: Dataset,
    *,
    num_queries: int | None = None,
    drop_repeats: bool = False,
    drop_share: float = 0.0,
) -> Iterator[str]:
    """Each passage with its generated queries appended, joined by spaces, for an index of words.

    By default every query is kept, as published: a query that was drawn twice says twice that its words belong to
    the passage, and BM25 counts words (Nogueira and Lin, docTTTTTquery, 2019). Of the first `num_queries` queries of a
    passage, repeats are left out first, then those with the lowest scores of all that are left in the whole corpus
    (Doc2Query--, Gospodinov et al., ECIR 2023), so that one passage may lose all its queries and another none.

    Args:
        corpus: passages with "id" and "text"; a data set, or any iterable, read once as the texts are taken.
        expansions: of :func:`load_expansions`, of the same passages in the same order.
        num_queries: the first so many of a passage; all when None.
        drop_repeats: leave out a query that equals an earlier one of its passage but for case and white space.
        drop_share: share of the queries to leave out by score, 0 to below 1. Those that equal the score at the border
            are kept, so it may be a little less.

    Returns:
        The texts in the corpus's order, made as they are taken, in memory that does not grow with the corpus.

    Raises:
        ValueError: an unknown share; a share without scores; passages without expansions or in another order, naming
            them. Of a data set this is found at once, of another iterable where it happens.
    """
    if num_queries is not None and num_queries < 0:
        raise ValueError(f"num_queries must be at least 0, or None for all, got {num_queries}.")
    if not 0.0 <= drop_share < 1.0:
        raise ValueError(f"drop_share must be at least 0 and below 1, got {drop_share}.")
    if drop_share and "scores" not in expansions.column_names:
        raise ValueError(
            f"drop_share is {drop_share}, but the queries have no scores: score them with score_expansions "
            "(recipes/expand.py --teacher), or leave drop_share at 0."
        )
    if hasattr(corpus, "column_names") and hasattr(corpus, "__len__"):
        _refuse_other_passages(corpus, expansions)
    border = float("-inf")
    if drop_share:
        border = _border(lambda: (scores for _, scores in _kept(expansions, num_queries, drop_repeats)), drop_share)
    return _joined(corpus, expansions, num_queries, drop_repeats, border)


def _joined(
    corpus: Iterable[Mapping[str, Any]],
    expansions: Dataset,
    num_queries: int | None,
    drop_repeats: bool,
    border: float,
) -> Iterator[str]:
    kept = _kept(expansions, num_queries, drop_repeats)
    ids = (passage_id for batch in expansions.select_columns("id").iter(_ROWS_A_BATCH) for passage_id in batch["id"])
    number = 0
    for number, passage in enumerate(_rows(corpus), 1):
        passage_id = next(ids, None)
        if passage_id != passage["id"]:
            raise ValueError(
                f"expansions: passage {passage['id']!r} (number {number - 1}) has none at its place, "
                + ("they end before it" if passage_id is None else f"there are those of {passage_id!r}")
                + ": expand this corpus as it is, in its order."
            )
        queries, scores = next(kept)
        if border > float("-inf"):
            queries = [query for query, score in zip(queries, scores, strict=True) if score >= border]
        yield " ".join([passage["text"], *queries])
    if (left := next(ids, None)) is not None:
        raise ValueError(
            f"expansions: of {len(expansions):,} passages, but the corpus ends after {number:,}; {left!r} is the "
            "first without a passage: expand this corpus as it is."
        )


def _rows(corpus: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not hasattr(corpus, "iter"):
        yield from corpus
        return
    for batch in corpus.iter(_ROWS_A_BATCH):  # a data set gives a thousand rows in little more time than one
        for passage_id, text in zip(batch["id"], batch["text"], strict=True):
            yield {"id": passage_id, "text": text}


def _kept(expansions: Dataset, num_queries: int | None, drop_repeats: bool) -> Iterator[tuple[list[str], list[float]]]:
    """Queries of each passage that are not left out for their number or as repeats, and their scores, if any."""
    for batch in expansions.iter(_ROWS_A_BATCH):
        for row, queries in enumerate(batch["queries"]):
            queries = queries[:num_queries]
            scores = batch["scores"][row][:num_queries] if "scores" in batch else []
            if drop_repeats:
                first: dict[str, int] = {}
                for place, query in enumerate(queries):
                    first.setdefault(" ".join(query.split()).casefold(), place)
                queries = [queries[place] for place in first.values()]
                scores = [scores[place] for place in first.values()] if scores else []
            yield queries, scores


def _border(scores: Callable[[], Iterable[list[float]]], share: float) -> float:
    """The score below which a share of all scores lies, in two passes and 256 KiB each, however many there are."""
    import numpy as np

    def counts(of: Callable[[Any], Any]) -> np.ndarray:
        found = np.zeros(1 << 16, np.int64)
        for block in _blocks(scores()):
            found += np.bincount(of(_ordered(block)), minlength=1 << 16)
        return found

    high = counts(lambda keys: keys >> 16)
    rank = int(share * high.sum())  # so many are dropped
    if not high.sum():
        return float("-inf")
    upper = int(np.searchsorted(np.cumsum(high), rank, side="right"))
    low = counts(lambda keys: (keys[keys >> 16 == upper]) & 0xFFFF)
    rank -= int(high[:upper].sum())
    key = upper << 16 | int(np.searchsorted(np.cumsum(low), rank, side="right"))
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _ordered(scores: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of float32 scores: their bits, negative ones turned over."""
    import numpy as np

    bits = (scores + np.float32(0.0)).view(np.uint32).astype(np.int64)  # -0.0 becomes 0.0
    return np.where(bits & 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


def _blocks(rows: Iterable[list[float]]) -> Iterator[np.ndarray]:
    import numpy as np

    block: list[float] = []
    for row in rows:
        block += row
        if len(block) >= 1 << 16:
            yield np.array(block, np.float32)
            block = []
    if block:
        yield np.array(block, np.float32)


def _refuse_other_passages(corpus: Any, expansions: Dataset) -> None:
    """Before hours of indexing: each passage has its expansions at its place."""
    columns = (corpus.select_columns("id"), expansions.select_columns("id"))
    same = len(corpus) == len(expansions) and all(
        mine["id"] == theirs["id"] for mine, theirs in zip(*(c.iter(_ROWS_A_BATCH) for c in columns), strict=True)
    )
    if same:
        return
    ids = [[name for batch in column.iter(_ROWS_A_BATCH) for name in batch["id"]] for column in columns]
    known, wanted = set(ids[1]), set(ids[0])
    for left, has, more in (
        ([name for name in ids[0] if name not in known], "no expansions", "expand this corpus as it is"),
        ([name for name in ids[1] if name not in wanted], "expansions but no passage", "give the corpus they are of"),
    ):
        if left:
            named = ", ".join(repr(name) for name in left[:_MOST_NAMED]) + (", ..." if len(left) > _MOST_NAMED else "")
            total = len(ids[0] if left[0] in wanted else ids[1])
            raise ValueError(f"expansions: {len(left):,} of {total:,} passages have {has} ({named}): {more}.")
    place = next(place for place, (mine, theirs) in enumerate(zip(*ids, strict=False)) if mine != theirs)
    raise ValueError(
        f"expansions: they are in another order than the corpus (passage number {place} is {ids[0][place]!r}, the "
        f"expansions there are of {ids[1][place]!r}): expand this corpus as it is, in its order."
    )
