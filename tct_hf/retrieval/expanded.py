"""BM25 over passages with the queries that were generated for them (doc2query)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data import shards as store
from tct_hf.data.expansion import SCORES_FOLDER, expanded_texts, load_expansions
from tct_hf.files import command, file_digest
from tct_hf.retrieval.bm25 import EXPANDED_B, EXPANDED_K1, BM25Index

if TYPE_CHECKING:
    from datasets import Dataset


def expanded_bm25(
    corpus: Dataset,
    expansions: str | Path,
    *,
    num_queries: int | None = None,
    drop_repeats: bool = False,
    drop_share: float = 0.0,
    k1: float = EXPANDED_K1,
    b: float = EXPANDED_B,
    **options: Any,
) -> BM25Index:
    """Index passages with their generated queries appended; the index says with which, under "expansion".

    Args:
        corpus: columns `id` and `text`.
        expansions: folder of `expand_corpus` or `write_expansions`, of this corpus.
        num_queries: the first so many queries of a passage; all when None.
        drop_repeats: leave out a query that equals an earlier one of its passage.
        drop_share: share of the queries to leave out by score, 0 to below 1.
        k1: term frequency saturation; 2.18 with b 0.86 is tuned for MS MARCO passages with 40 queries each.
        b: length normalisation, 0 to 1.
        **options: the rest of the arguments of `BM25Index.build`.

    Raises:
        FileNotFoundError: no finished folder of expansions.
        ValueError: as `load_expansions`, `expanded_texts` and `BM25Index.build`.
    """
    kept: dict[str, Any] = {"num_queries": num_queries, "drop_repeats": drop_repeats, "drop_share": drop_share}
    return BM25Index.build(
        expanded_texts(corpus, load_expansions(expansions), **kept),
        corpus["id"],
        k1=k1,
        b=b,
        expansion=describe_expansion(expansions, **kept),
        **options,
    )


def describe_expansion(
    expansions: str | Path, *, num_queries: int | None, drop_repeats: bool, drop_share: float
) -> dict[str, Any]:
    """What an expanded index is built over, JSON-ready; the arguments are those of :func:`expanded_bm25`."""
    folder = Path(expansions)
    manifest = store.read_manifest(folder, "expansions")
    generated = manifest.get("num_queries")
    wanted = [count for count in (num_queries, generated) if isinstance(count, int)]
    scores_sha256 = None
    if drop_share:
        scores = folder / SCORES_FOLDER
        if not scores.is_dir():
            raise FileNotFoundError(
                f"{scores}: drop_share is {drop_share}, but the queries have no scores: score them with "
                f"score_expansions ({command('expand')} --teacher), or leave drop_share at 0"
            )
        store.read_manifest(scores, "scores")
        scores_sha256 = file_digest(scores / store.MANIFEST_FILE)
    return {
        "model": manifest.get("model"),
        "num_queries": min(wanted, default=None),
        "drop_repeats": drop_repeats,
        "drop_share": drop_share,
        "queries_sha256": file_digest(folder / store.MANIFEST_FILE),
        "scores_sha256": scores_sha256,
    }
