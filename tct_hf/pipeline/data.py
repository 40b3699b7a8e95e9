"""What a run trains and is measured on: a collection, and triples of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from tct_hf.data.collection import Collection, load_collection
from tct_hf.data.near_duplicates import folded
from tct_hf.data.rows import BadRow, SkippedRows
from tct_hf.data.streamed import StreamedTriples
from tct_hf.pipeline.settings import DataSettings, TriplesSettings
from tct_hf.retrieval.triples import load_triples
from tct_hf.retrieval.words import LANGUAGE, STEMMER, analyser

# Of questions without judgements, where there are no judgements to measure with.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 500


def read_collection(
    data: DataSettings, *, train: bool = True, test: bool = True, also: Sequence[str] = ()
) -> Collection:
    """Load the splits that `data` names, a part of them, and questions without judgements.

    Without labels (`labels` 0, or questions alone) it may lack train and test; where there are questions, a tenth of
    them is then held out for test.

    Args:
        train: whether the train split must be there where `labels` asks for it.
        test: whether the split to report must be there.
        also: more splits to report, by name.
    """
    required = [use for use, needed in (("train", train), ("test", test)) if needed and data.labels > 0]
    if data.dev_split not in ("auto", None):
        required.append("dev")
    collection = load_collection(
        data.source,
        packages=data.packages,
        test_split=data.test_split,
        dev_split=data.dev_split,
        required=required,
        also=also,
        skip_bad_rows=data.skip_bad_rows,
        ignore_identical_ids=data.ignore_identical_ids,
    )
    if data.dev_share and "train" in collection.splits:
        collection.hold_out_dev(data.dev_share)
    words: dict[str, Any] = {"language": data.language, "stemmer": data.stemmer}
    if words != {"language": LANGUAGE, "stemmer": STEMMER}:
        analyser(**words)  # what it does not know is refused now
        collection.read_words(**words)
    collection = collection.part(passages=data.max_passages, queries=data.max_queries)
    if data.questions is not None:
        collection.add_questions(data.questions)
        _hold_out(collection)
    if data.made_questions:
        collection.make_questions(data.made_questions, seed=0)
        _hold_out(collection)
    return collection


def _hold_out(collection: Collection) -> None:
    """Take a part of the questions for test, where there is none with judgements."""
    if "test" not in collection.splits:
        collection.hold_out_questions(_HELD_OUT_SHARE, most=_MOST_HELD_OUT)


def read_triples(
    triples: TriplesSettings, *, seed: int, write: Callable[[str], None], scores: str | None = None
) -> Dataset | IterableDataset | None:
    """Load and check the triples that are named, None where none are; `seed` is of the order of streamed rows."""
    if triples.path is None:
        return None
    skipped, given = SkippedRows(), asdict(triples)
    path, shuffle_buffer = given.pop("path"), given.pop("shuffle_buffer")
    rows = load_triples(path, **given, scores=scores, skipped=skipped)
    if triples.streaming:
        return rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    write(f"  {path}: {len(rows):,} triples")
    if skipped.total:
        write("  " + skipped.summary().replace("\n", "\n  "))
    return rows


@dataclass(frozen=True)
class _Reported:
    """Refuses queries that a run is measured on, each with the split it is of."""

    splits: dict[str, str]
    name: str

    def __call__(self, query: str) -> None:
        if (use := self.splits.get(folded(query))) is not None:
            why = f"{query!r} ({use} of {self.name}): figures on queries that were trained on say nothing"
            raise BadRow("query of dev or test", why, "query")


def leave_out_reported(
    rows: Dataset | IterableDataset, collection: Collection, write: Callable[[str], None]
) -> Dataset | IterableDataset:
    """Triples without those of queries of dev or test: figures on these would say nothing.

    Queries are compared whatever their case, punctuation and white space. Streamed rows are left out as they pass.
    """
    splits = {use: split for use, split in collection.splits.items() if use != "train"}
    reported = {folded(text): use for use, split in splits.items() for text in split.queries.values()}
    if isinstance(rows, StreamedTriples):
        return rows.checked(_Reported(reported, collection.name), "query")
    queries = (query for batch in rows.select_columns("query").iter(10_000) for query in batch["query"])
    kept = np.fromiter((folded(query) not in reported for query in queries), bool, len(rows))
    if kept.all():
        return rows
    if not kept.any():
        raise ValueError(
            "triples.path: all rows have queries of dev or test; measure on others with data.dev_split and "
            "data.test_split"
        )
    write(f"  {np.count_nonzero(~kept):,} of {len(rows):,} rows are left out: their queries are of dev or test")
    return rows.select(np.flatnonzero(kept))
