"""Collections in the BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, in a folder or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tct_hf.cache import default_cache_dir
from tct_hf.data.beir_format import (
    MissingSplitError,
    Qrels,
    check_passages,
    check_queries,
    prepare_corpus,
    read_qrels,
    read_records,
)

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_beir(
    path_or_hub_id: str | Path, split: str, *, allow_empty: bool = False, cache_dir: str | Path | None = None
) -> tuple[Dataset, dict[str, str], Qrels]:
    """Load a collection in the BEIR layout.

    Files may be plain or compressed (.gz). A passage's text is its title and text joined by a space. The corpus is
    converted once, in constant memory, and kept in the cache under the file's path, size and time.

    Args:
        path_or_hub_id: a folder, or a Hub data set with configurations "corpus" and "queries" whose judgements are
            in `<id>-qrels`, or in its own configuration "default" or "qrels".
        split: the judgements to load, for instance "test".
        allow_empty: keep passages without any text (some published collections have them) instead of refusing them.
        cache_dir: where the prepared corpus is kept; by default `default_cache_dir()`.

    Returns:
        The corpus (memory-mapped, columns id and text), the queries judged in the split {query id: text} and the
        judgements {query id: {passage id: relevance}}, both in the order of the judgements.

    Raises:
        FileNotFoundError: a missing folder or file, and `MissingSplitError` for a split; the message lists what
            there is.
        ValueError: a malformed file, named with its line, or a split without positives.
        OSError: the cache can't be written, or the Hub not be reached.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return _load_folder(folder, split, allow_empty, cache)
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds corpus.jsonl, queries.jsonl and qrels/")
    if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id):
        from tct_hf.data.beir_hub import load_beir_from_hub

        return load_beir_from_hub(path_or_hub_id, split, allow_empty=allow_empty, cache_dir=cache)
    raise FileNotFoundError(f"{folder}: no such folder, and not a Hub id (owner/name) either; give the right path")


def load_beir_corpus(
    path_or_hub_id: str | Path, *, allow_empty: bool = False, cache_dir: str | Path | None = None
) -> Dataset:
    """Load the passages alone of a collection in the BEIR layout: queries and judgements may be missing.

    Args:
        path_or_hub_id: as in `load_beir`.
        allow_empty: likewise.
        cache_dir: likewise.

    Returns:
        The corpus (memory-mapped, columns id and text).

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_beir`.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return _load_corpus(_find(folder, "corpus.jsonl"), allow_empty, cache)
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds corpus.jsonl")
    if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id):
        from tct_hf.data.beir_hub import load_corpus_from_hub

        return load_corpus_from_hub(path_or_hub_id, allow_empty=allow_empty, cache_dir=cache)
    raise FileNotFoundError(f"{folder}: no such folder, and not a Hub id (owner/name) either; give the right path")


def _load_folder(folder: Path, split: str, allow_empty: bool, cache: Path) -> tuple[Dataset, dict[str, str], Qrels]:
    corpus_file = _find(folder, "corpus.jsonl")
    qrels_file = _find_split(folder, split)
    queries_file = _find(folder, "queries.jsonl")
    qrels, places = read_qrels(qrels_file)
    queries = check_queries(read_records(queries_file, title=False), qrels, places, str(queries_file))
    corpus = _load_corpus(corpus_file, allow_empty, cache)
    check_passages(corpus, qrels, places, str(corpus_file))
    return corpus, queries, qrels


def _load_corpus(file: Path, allow_empty: bool, cache: Path) -> Dataset:
    stat = file.stat()
    return prepare_corpus(
        lambda: read_records(file, title=True, allow_empty=allow_empty),
        str(file),
        cache,
        [str(file.resolve()), stat.st_size, stat.st_mtime_ns, allow_empty],
    )


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"{folder}: neither {name} nor {name}.gz is there (there is: {there})")


def _find_split(folder: Path, split: str) -> Path:
    for path in (folder / "qrels" / f"{split}.tsv", folder / "qrels" / f"{split}.tsv.gz"):
        if path.is_file():
            return path
    splits = sorted({path.name.split(".tsv")[0] for path in (folder / "qrels").glob("*.tsv*")})
    raise MissingSplitError(
        f"{folder / 'qrels'}: no {split}.tsv or {split}.tsv.gz; splits there: {', '.join(splits) or 'none'}"
    )
