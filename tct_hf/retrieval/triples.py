"""Training triples from wherever they are: files, folders, the Hub, memory; checked before any training."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, concatenate_datasets

from tct_hf.cache import prepared
from tct_hf.data.beir import hub_configurations, load_beir
from tct_hf.data.column_names import KNOWN, KNOWN_TEXTS, LABELLED, SCORES, negative_columns
from tct_hf.data.file_sources import ROWS_A_BATCH, LineSource
from tct_hf.data.ids import stable_id
from tct_hf.data.irds import is_irds, open_irds
from tct_hf.data.near_duplicates import text_key
from tct_hf.data.neighbours import in_our_columns
from tct_hf.data.qrels import KnownPositives, own_positive
from tct_hf.data.rows import SkippedRows, first_lines, is_header, is_hub_id, names_ids
from tct_hf.data.sources import open_source, write_rows
from tct_hf.data.streamed import StreamedTriples, TripleStream
from tct_hf.data.texts import TextSource, open_texts
from tct_hf.retrieval.negatives import bm25_triples
from tct_hf.retrieval.words import LANGUAGE, STEMMER

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 6
_TYPES = {
    KNOWN: pa.list_(pa.string()),
    KNOWN_TEXTS: pa.list_(pa.int64()),
    LABELLED: pa.bool_(),
    SCORES: pa.list_(pa.float64()),
}
_MARGIN = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
# First lines that are recognised as a header, whatever the columns are used for; so is one of nothing but id columns.
_HEADERS = (("query", "positive", "negative"), ("anchor", "positive", "negative"), ("query", "pos", "neg"))


def load_triples(
    path_or_hub_id: str | Path | Dataset | IterableDataset,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    collection: TextSource | None = None,
    queries: TextSource | None = None,
    qrels: str | Path | Mapping[str, Mapping[str, int]] | None = None,
    num_negatives: int | None = None,
    scores: str | None = None,
    depth: int = 100,
    seed: int = 0,
    language: str = LANGUAGE,
    stemmer: str | None = STEMMER,
    streaming: bool = False,
    skip_bad_rows: bool = False,
    skipped: SkippedRows | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Load training triples from anywhere, check every row, and give the columns that training takes.

    Sources:

    - MS MARCO TSV (.tsv or .txt, plain or .gz): text triples `query, positive, negative`; or id triples
      `query id, positive id, negative id` with `collection` and `queries`. With num_negatives=n, lines have 2 + n
      fields.
    - JSONL (.jsonl, .json or .ndjson, plain or .gz) and .parquet, with the columns below.
    - Rows of Tevatron, FlagEmbedding, PyLate, GPL, sentence-transformers, DPR and ColBERT, as docs/data.md lists them,
      where `columns` names none.
    - A Hub id, or a local folder in the Hub's layout.
    - A BEIR folder or Hub data set: BM25 negatives for its judged queries (`bm25_triples`).
    - "irds:ID" of ir_datasets: its docpairs, or, where it has none, as a BEIR folder.
    - A `datasets.Dataset`, or an `IterableDataset` with streaming=True.

    Columns read: query, positive, negative; or negative_1 ... negative_n; or a list, negatives (or negative).
    Ids: query_id, positive_id, negative_id, or negative_1_id ... negative_n_id, or a list, negative_ids. A list of
    positives makes one row of each. Lists may hold passages as objects {docid, title, text}. Ids stand in for texts
    when `queries` or `collection` have them, under a text's name too. A column labelled is true, or false in rows that
    are not judged: their positive is a mere candidate. Other columns are left out.

    Args:
        path_or_hub_id: the source.
        split: of a Hub data set, a folder or a BEIR folder; a single file has none.
        config: configuration of a Hub data set.
        revision: branch, tag or commit of a Hub data set; not of a BEIR collection.
        columns: our name to the source's, {"query": "anchor"}; None leaves a column out, {"positive_id": None}. A
            column that is named here has no other use under its own name.
        collection: passage texts by id: a TSV (id, text), JSONL (_id, title, text) or parquet file, a Hub id
            ("owner/name:configuration:split"), a data set or a mapping.
        queries: query texts by id, from the same kinds of sources.
        qrels: a file of judgements (BEIR or TREC) or {query id: {passage id: grade}}: known positives that must not
            train as negatives; by default all that the source itself gives for a query (none when streaming).
        num_negatives: the first so many of each row; None takes all, the same number in every row. Of BEIR folders:
            how many to sample, 1 by default.
        scores: keep a teacher's scores too, for `StoredScores`: the name of a column of lists (one score a candidate,
            positive first), or what follows positive_ and negative_ (or negative_1_ ...), such as "teacher_score".
        depth: of BEIR folders, as `bm25_triples` takes it.
        seed: of BEIR folders, as `bm25_triples` takes it.
        language: of BEIR folders, as `bm25_triples` takes it.
        stemmer: of BEIR folders, as `bm25_triples` takes it.
        streaming: read and check row by row while training: memory and disk do not grow with the source.
        skip_bad_rows: leave bad rows out instead of refusing the source: of the triples, and of a collection, queries
            and judgements; of a BEIR folder as `load_beir` does. Rows of which the positive is the query, or a
            negative a positive of the row, are always left out, and counted.
        skipped: takes what was left out, per kind, with the first of each; when streaming, of the pass under way in
            this process. It is also logged, and stands in the description of the result's `info`.
        cache_dir: where prepared data are kept; by default `default_cache_dir()`.

    Returns:
        Columns query, positive, negative (or negative_1 ... negative_n), all text; query_id, positive_id,
        negative_id (or negative_1_id ...) and known_positive_ids where there are ids; labelled where the source has
        it; scores, a list of floats, where they are asked for. Memory-mapped, prepared once for each source and
        setting. With streaming=True an `IterableDataset` in the order of the source: trainers do not shuffle it, use
        its `shuffle(seed=..., buffer_size=...)`.

    Raises:
        FileNotFoundError: no such file, folder, data set or split.
        ValueError: a bad row (missing column, empty text, unknown id, wrong number of fields, not UTF-8, mixed
            types, a score that is missing or not finite), an id that comes twice, a broken .gz, nothing to train on,
            texts where ids are to be looked up, or settings that do not fit the source; names file, line, column and
            the fix.
        OSError: the cache can't be written, or the Hub can't be reached.
    """
    if num_negatives is not None and num_negatives < 0:
        raise ValueError(f"num_negatives={num_negatives}: it must be 0 or more, or None for all there are")
    skipped = skipped if skipped is not None else SkippedRows()
    # BEIR first: its folder would also pass for one in the Hub's layout.
    if _is_beir(path_or_hub_id, config):
        own = {"columns": columns or None, "collection": collection, "queries": queries, "qrels": qrels}
        for name, value in {**own, "scores": scores, "streaming": streaming or None, "revision": revision}.items():
            if value is not None:
                raise ValueError(
                    f"{name}= does not go with a BEIR collection; leave it out (of another revision, download it and "
                    "give its folder)"
                )
        skipped.replace(SkippedRows())
        found = load_beir(path_or_hub_id, split, skip_bad_rows=skip_bad_rows, skipped=skipped, cache_dir=cache_dir)
        sample = {"depth": depth, "seed": seed, "language": language, "stemmer": stemmer}
        triples = _from_beir(*found, num_negatives, sample, cache_dir)
        triples.info.description = skipped.summary()
        return triples

    if is_irds(path_or_hub_id):
        collection, queries = collection or path_or_hub_id, queries or path_or_hub_id
        qrels = qrels or (path_or_hub_id if open_irds(path_or_hub_id).has("qrels") else None)

    def tsv(path: Path) -> LineSource:
        return _open_tsv(path, columns, queries is not None, collection is not None, num_negatives)

    source = open_source(
        path_or_hub_id, "triples", tsv, config=config, split=split, revision=revision, streaming=streaming
    )
    source = in_our_columns(source, columns)
    of_texts = SkippedRows() if skip_bad_rows else None
    stream = TripleStream(
        source,
        columns,
        num_negatives,
        None if queries is None else open_texts(queries, "queries", cache_dir, of_texts),
        None if collection is None else open_texts(collection, "collection", cache_dir, of_texts),
        None if qrels is None else KnownPositives(qrels, of_texts),
        skip_bad_rows,
        skipped,
        scores,
        of_texts or SkippedRows(),
    )
    if streaming:
        return _streamed(stream)
    if source.key is None:
        raise ValueError(f"{source.name}: an IterableDataset; pass streaming=True, or make a Dataset of it first")
    return _prepared(stream, cache_dir)


def _open_tsv(
    path: Path,
    columns: Mapping[str, str | None] | None,
    has_queries: bool,
    has_passages: bool,
    num_negatives: int | None,
) -> LineSource:
    """A file of triples; fields go by position, or with `columns` by the header that the file then must have."""
    lines = first_lines(path)
    if not lines:
        raise ValueError(f"{path}: no row to train on; it is empty")
    first = lines[0]
    if any(theirs is not None for theirs in (columns or {}).values()):
        if len(set(first)) != len(first):
            raise ValueError(f"{path}, line 1: columns= needs a header, and this one has equal names: {first}")
        return LineSource(path, first, header=True)
    suffix = "_id" if has_passages else ""
    candidates = ["positive", *negative_columns(1 if num_negatives is None else num_negatives)]
    names = ["query_id" if has_queries else "query", *(f"{name}{suffix}" for name in candidates)]
    # Unlike names, texts of all columns have several words.
    named = is_header(first, len(lines[-1]) == len(first) and all(" " in text.strip() for text in lines[-1]))
    of_ids = named and all(map(names_ids, first))
    header = named and (of_ids or has_queries or has_passages or tuple(map(str.lower, first)) in _HEADERS)
    if named and not header:
        mapped = ", ".join(f"{ours!r}: {theirs!r}" for ours, theirs in zip(names, first, strict=False))
        raise ValueError(
            f"{path}, line 1: {first} are names of columns; read by them with columns={{{mapped}}}, or remove the line"
        )
    # Numbers are taken for ids in the first line with data; it shows what the others are.
    numbers = len(lines) > header and len(lines[header]) == len(names) and all(map(str.isdigit, lines[header]))
    lacks = [name for name, there in (("queries", has_queries), ("collection", has_passages)) if not there]
    if lacks and (of_ids or numbers):
        shown, what = (first, "are names of ids") if of_ids else (lines[header], "look like ids")
        raise ValueError(
            f"{path}, line {1 if of_ids else header + 1}: {shown} {what}, not texts; pass "
            f"{' and '.join(f'{name}=' for name in lacks)} with their texts"
            + ("; remove this line if they are texts" if of_ids else "")
        )
    if num_negatives is None and not lacks and len(lines[-1]) == 4 and _MARGIN.fullmatch(lines[-1][3]):
        names.append("margin")  # GPL
    return LineSource(path, names, header=header)


def _is_beir(given: Any, config: str | None) -> bool:
    if not isinstance(given, (str, Path)):
        return False
    if is_irds(given):
        return not open_irds(given).has("docpairs")
    path = Path(given)
    if path.is_dir():
        return any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz"))
    return config is None and is_hub_id(str(given)) and {"corpus", "queries"} <= set(hub_configurations(str(given)))


def _from_beir(
    corpus: Dataset, queries: Any, qrels: Any, num_negatives: int | None, sample: dict[str, Any], cache: Any
) -> Dataset:
    count = 1 if num_negatives is None else num_negatives
    judgements = sha256(json.dumps([queries, qrels]).encode()).hexdigest()
    # The prepared corpus is named by what it was made from.
    made_from = [Path(file["filename"]).parent.name for file in corpus.cache_files]

    def build(staging: Path) -> None:
        triples = bm25_triples(corpus, queries, qrels, num_negatives=count, **sample)
        _write(staging / "rows.arrow", triples.column_names, (dict(row) for row in triples))

    folder = prepared("triples", [_FORMAT, "beir", made_from, judgements, count, sample], build, cache)
    return Dataset.from_file(str(folder / "rows.arrow"))


def _key_of(stream: TripleStream) -> list[Any]:
    texts = [None if found is None else found.key for found in (stream.queries, stream.passages)]
    return [
        stream.source.key,
        sorted((stream.columns or {}).items()),
        stream.num_negatives,
        texts,
        None if stream.known is None else stream.known.key,
        stream.skip_bad_rows,
        *([] if stream.scores is None else [["scores", stream.scores]]),
    ]


def _prepared(stream: TripleStream, cache: str | Path | None) -> Dataset:
    def build(staging: Path) -> None:
        names = stream.output_columns()
        if stream.known is None:
            # What all rows of a query say together is known at the end only: a column of its own, beside the rows.
            seen = _SeenPositives() if "positive_id" in names else _SeenTexts()
            names = [name for name in names if name not in (KNOWN, KNOWN_TEXTS)]
            _write(staging / "rows.arrow", names, map(seen.note, stream()))
            if (rows := seen.rows()) is not None:
                _write(staging / "known.arrow", [seen.column], rows)
        else:
            _write(staging / "rows.arrow", names, stream())
        stream.skipped.save(staging)

    folder = prepared("triples", [_FORMAT, *_key_of(stream)], build, cache)
    parts = [
        Dataset.from_file(str(file)) for name in ("rows", "known") if (file := folder / f"{name}.arrow").is_file()
    ]
    dataset = concatenate_datasets(parts, axis=1) if len(parts) > 1 else parts[0]
    stream.skipped.replace(SkippedRows.load(folder))
    dataset.info.description = stream.skipped.summary()
    return dataset


def _write(path: Path, names: Sequence[str], rows: Any) -> None:
    write_rows(path, pa.schema([(name, _TYPES.get(name, pa.string())) for name in names]), rows)


def _query_key(row: Mapping[str, Any]) -> int:
    """Queries without an id are told apart by their text."""
    return stable_id(row["query_id"]) if "query_id" in row else text_key(row["query"])


class _SeenPositives:
    """Positives by query, gathered from the triples themselves.

    It holds each (query, positive) pair once, not each row: memory grows with the judgements, not with the file.
    """

    column = KNOWN

    def __init__(self) -> None:
        self._number: dict[int, int] = {}
        self._of_query: list[dict[str, None]] = []
        # Which query each row has, in the order of the rows.
        self._rows = array("Q")

    def note(self, row: dict[str, Any]) -> dict[str, Any]:
        """Note one row, and give it back."""
        at = self._number.setdefault(_query_key(row), len(self._of_query))
        if at == len(self._of_query):
            self._of_query.append({})
        self._of_query[at].update(dict.fromkeys((*own_positive(row), *row.get(KNOWN, ()))))
        self._rows.append(at)
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """The known positives of each row."""
        return ({KNOWN: list(self._of_query[at])} for at in self._rows)


class _SeenTexts:
    """The same by texts, where passages have no ids, in 16 bytes a row: a file of texts may have a query a row."""

    column = KNOWN_TEXTS

    def __init__(self) -> None:
        self._queries, self._positives = array("q"), array("q")

    def note(self, row: dict[str, Any]) -> dict[str, Any]:
        """Note one row, and give it back."""
        self._queries.append(_query_key(row))
        self._positives.append(text_key(row["positive"]) if row.get(LABELLED, True) else -1)
        return row

    def rows(self) -> Iterator[dict[str, Any]] | None:
        """The known positives of each row; None where each query has one at most."""
        queries, positives = np.array(self._queries), np.array(self._positives)
        order = np.lexsort((positives, queries))
        pairs = np.stack([queries[order], positives[order]])
        fresh = np.ones(len(order), bool)
        fresh[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
        of, found = pairs[:, fresh & (pairs[1] >= 0)]
        if (of[1:] != of[:-1]).all():
            return None
        begins, ends = (np.searchsorted(of, queries, side=side) for side in ("left", "right"))
        return ({KNOWN_TEXTS: found[begin:end].tolist()} for begin, end in zip(begins, ends, strict=True))


def _streamed(stream: TripleStream) -> IterableDataset:
    head = replace(stream, skipped=SkippedRows())
    # The first rows are checked now: what is wrong with all of them should not wait for the first step.
    for _ in head(ROWS_A_BATCH):
        pass
    stream.names = stream.output_columns()
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in stream.names])
    return StreamedTriples.of(
        IterableDataset.from_generator(stream.stored), stream, Features.from_arrow_schema(schema)
    )
