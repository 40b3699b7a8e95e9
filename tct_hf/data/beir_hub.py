"""Collections in the BEIR layout on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tct_hf.cache import default_cache_dir
from tct_hf.data.beir_format import (
    HEADER,
    MissingSplitError,
    Qrels,
    add_judgement,
    check_passages,
    check_positives,
    check_queries,
    check_record,
    prepare_corpus,
)

if TYPE_CHECKING:
    from datasets import Dataset

Loaded = TypeVar("Loaded")


def load_beir_from_hub(
    hub_id: str, split: str, *, allow_empty: bool = False, cache_dir: str | Path | None = None
) -> tuple[Dataset, dict[str, str], Qrels]:
    """Load a collection in the BEIR layout with `datasets.load_dataset`.

    Args:
        hub_id: what `load_dataset` takes; see `load_beir` for the configurations.
        split: the judgements to load.
        allow_empty: as in `load_beir`.
        cache_dir: as in `load_beir`; `datasets` keeps what it downloads in its own cache.

    Returns:
        As `load_beir`.

    Raises:
        FileNotFoundError: the data set or a configuration is not there; `MissingSplitError`: the split is not.
        ValueError: malformed rows.
        OSError: the Hub can't be reached.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    judgements, source = _load_qrels(hub_id, split)
    missing = [name for name in HEADER if name not in judgements.column_names]
    if missing:
        raise ValueError(
            f"{source}: column {missing[0]!r} is missing (there are: {', '.join(judgements.column_names)})"
        )
    qrels: Qrels = {}
    places: dict[str, str] = {}
    for number, row in enumerate(judgements):
        score = row["score"]
        if isinstance(score, float) and score.is_integer():
            score = int(score)
        add_judgement(
            [str(row["query-id"]), str(row["corpus-id"]), str(score)], f"{source}, row {number}", qrels, places
        )
    check_positives(qrels, source)
    source = f"{hub_id} (queries)"
    queries = check_queries(_records(_load_part(hub_id, "queries"), source, False, False), qrels, places, source)
    corpus = load_corpus_from_hub(hub_id, allow_empty=allow_empty, cache_dir=cache)
    check_passages(corpus, qrels, places, f"{hub_id} (corpus)")
    return corpus, queries, qrels


def load_corpus_from_hub(hub_id: str, *, allow_empty: bool, cache_dir: Path) -> Dataset:
    """Load the passages alone; see `load_beir_from_hub`."""
    source = f"{hub_id} (corpus)"
    rows = _load_part(hub_id, "corpus")
    return prepare_corpus(
        lambda: _records(rows, source, True, allow_empty), source, cache_dir, [hub_id, rows._fingerprint, allow_empty]
    )


def _records(rows: Dataset, source: str, title: bool, allow_empty: bool) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(rows):
        yield check_record(row, f"{source}, row {number}", title=title, allow_empty=allow_empty)


def _load_part(hub_id: str, name: str) -> Dataset:
    """Load the configuration "corpus" or "queries", whose only split has the same name."""
    from datasets import load_dataset

    parts = _reach(hub_id, lambda: load_dataset(hub_id, name))
    if name not in parts and len(parts) != 1:
        raise FileNotFoundError(f"{hub_id} ({name}): no split {name!r}; splits there: {', '.join(parts)}")
    return parts[name] if name in parts else next(iter(parts.values()))


def _load_qrels(hub_id: str, split: str) -> tuple[Dataset, str]:
    """Find the judgements: in the collection's own configuration "default" or "qrels", else in `<id>-qrels`."""
    from datasets import get_dataset_config_names, load_dataset

    own = [name for name in _reach(hub_id, lambda: get_dataset_config_names(hub_id)) if name in ("default", "qrels")]
    if own:
        source = f"{hub_id} ({own[0]})"
        parts = _reach(hub_id, lambda: load_dataset(hub_id, own[0]))
    else:
        source = f"{hub_id}-qrels"
        try:
            parts = _reach(source, lambda: load_dataset(source))
        except FileNotFoundError as error:
            raise MissingSplitError(str(error)) from error
    if split not in parts:
        raise MissingSplitError(f"{source}: no split {split!r}; splits there: {', '.join(parts)}")
    return parts[split], source


def _reach(name: str, load: Callable[[], Loaded]) -> Loaded:
    """Say the mend when the Hub has no such data set, can't be reached, or holds what can't be read."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except FileNotFoundError as error:
        # DatasetNotFoundError is one of these; so is a local path that was mistyped and reads like a Hub id.
        raise FileNotFoundError(
            f"{name}: not a folder here, and not found on the Hub ({error}); check the name, or log in for a private "
            "data set"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{name}: {error}") from error
    except ConnectionError as error:
        raise OSError(
            f"{name}: not a folder here, and the Hub can't be reached ({error}); check the path or the network"
        ) from error
