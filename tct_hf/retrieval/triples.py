"""Training triples from wherever they are: files, folders, the Hub, memory; checked before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.cache import build_once, default_cache_dir
from tct_hf.data.column_names import KNOWN, LABELLED, SCORES, check_mapping
from tct_hf.data.known_positives import KnownPositives, SeenPositives
from tct_hf.data.lookups import HUB_ID, JSON_SUFFIXES, TSV_SUFFIXES, TextSource, format_of, open_texts
from tct_hf.data.row_parsing import SkippedRows
from tct_hf.data.sources import DatasetSource, JsonSource, ParquetSource, Source, load_from_hub
from tct_hf.data.triple_stream import ROWS_A_BATCH, TripleStream
from tct_hf.data.tsv_fields import open_tsv

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Part of the cache key: raise it when the prepared form of the same source changes.
_FORMAT = 2
_SUFFIXES = (*TSV_SUFFIXES, *JSON_SUFFIXES, ".parquet")


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
    - A Hub id, or a local folder in the Hub's layout.
    - A BEIR folder or Hub data set: BM25 negatives for its judged queries (`bm25_triples`).
    - A `datasets.Dataset`, or an `IterableDataset` with streaming=True.

    Columns read: query, positive, negative; or negative_1 ... negative_n; or a list, negatives (or negative).
    Ids: query_id, positive_id, negative_id, or negative_1_id ... negative_n_id, or a list, negative_ids. A list of
    positives makes one row of each. Lists may hold passages as objects {docid, title, text}. Ids stand in for texts
    when `queries` or `collection` have them, under a text's name too (query, positive, negative that hold ids). A
    column labelled is true, or false in rows that nobody has judged: their positive is a mere candidate. Other columns
    are left out.

    Args:
        path_or_hub_id: the source.
        split: of a Hub data set, a folder or a BEIR folder; a single file has none.
        config: configuration of a Hub data set.
        revision: branch, tag or commit of a Hub data set; not of a BEIR collection.
        columns: our name to the source's, {"query": "anchor"}; None leaves a column out, {"positive_id": None}. A
            column that is named here has no other use under its own name.
        collection: passage texts by id: a TSV (id, text), JSONL (_id, title, text) or parquet file, a Hub id
            ("owner/name:configuration:split"), a data set or a mapping.
        queries: query texts by id, likewise.
        qrels: a file of judgements (BEIR or TREC) or {query id: {passage id: grade}}: known positives that must not
            train as negatives. Without it they are all positives that the source itself gives for a query (not when
            streaming: that would take a whole pass).
        num_negatives: take the first this many of each row; None takes all, the same number in every row. Of BEIR
            folders: how many to sample, 1 by default.
        scores: keep a teacher's scores too, for `StoredScores`: the name of a column of lists (one score a candidate,
            positive first), or what follows positive_ and negative_ (or negative_1_ ...), such as "teacher_score" of
            mined and of scored triples. Every row is checked to have a finite score of each candidate.
        depth: of BEIR folders: how many of BM25's best passages to sample from.
        seed: of BEIR folders: of the sample.
        streaming: read and check row by row while training: memory and disk do not grow with the source.
        skip_bad_rows: leave bad rows out instead of refusing the source. A bad line of a collection, of queries or of
            judgements is always refused, and so is one of a BEIR folder.
        skipped: takes what was left out, per kind, with the first of each. It is also logged, and stands in the
            description of the result's `info`. When streaming, it belongs to the pass under way in this process.
        cache_dir: where prepared data are kept; by default `default_cache_dir()`.

    Returns:
        Columns query, positive, negative (or negative_1 ... negative_n), all text; query_id, positive_id,
        negative_id (or negative_1_id ...) and known_positive_ids where there are ids; labelled where the source has
        it; scores, a list of floats, where they are asked for. Memory-mapped, prepared once for
        each source and setting. With streaming=True an `IterableDataset` in the order of the source, which trainers do
        not shuffle: use its `shuffle(seed=..., buffer_size=...)`.

    Raises:
        FileNotFoundError: no such file, folder, data set or split.
        ValueError: a bad row (missing column, empty text, unknown id, wrong number of fields, not UTF-8, mixed
            types), an id that comes twice, a broken .gz, nothing to train on, texts where ids are to be looked up, or
            settings that do not fit the source.
            The message names file, line, column and the mend.
        OSError: the cache can't be written, or the Hub not be reached.
    """
    check_mapping(columns or {})
    if num_negatives is not None and num_negatives < 0:
        raise ValueError(f"num_negatives={num_negatives}: it must be 0 or more, or None for all there are")
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    skipped = skipped if skipped is not None else SkippedRows()
    # BEIR first: its folder would also pass for one in the Hub's layout.
    if _is_beir(path_or_hub_id, config):
        _refuse_for_beir(
            columns=columns or None,
            collection=collection,
            queries=queries,
            qrels=qrels,
            scores=scores,
            streaming=streaming or None,
        )
        if revision is not None:
            raise ValueError(
                f"revision= does not go with a BEIR collection, whose judgements may be in another repository; "
                f"download revision {revision!r} and give its folder"
            )
        skipped.replace(SkippedRows())
        return _from_beir(path_or_hub_id, split, num_negatives, depth, seed, cache)
    source = _open_source(
        path_or_hub_id, split, config, revision, columns, collection, queries, num_negatives, streaming
    )
    stream = TripleStream(
        source,
        columns,
        num_negatives,
        None if queries is None else open_texts(queries, "query", "queries", cache),
        None if collection is None else open_texts(collection, "passage", "collection", cache),
        None if qrels is None else KnownPositives(qrels),
        skip_bad_rows,
        skipped,
        scores,
    )
    if streaming:
        return _streamed(stream)
    if source.key is None:
        raise ValueError(f"{source.name}: an IterableDataset; pass streaming=True, or make a Dataset of it first")
    return _prepared(stream, cache)


# Sources -----------------------------------------------------------------------------------------------------------


def _open_source(
    given: Any,
    split: str,
    config: str | None,
    revision: str | None,
    columns: Mapping[str, str | None] | None,
    collection: TextSource | None,
    queries: TextSource | None,
    num_negatives: int | None,
    streaming: bool,
) -> Source:
    if not isinstance(given, (str, Path)):
        return _open_dataset(given, split, streaming)
    path = Path(given)
    if path.is_file():
        return _open_file(path, columns, collection, queries, num_negatives)
    name = str(given)
    if not path.is_dir() and (
        not HUB_ID.fullmatch(name) or format_of(path) in _SUFFIXES or path.suffix.lower() == ".gz"
    ):
        raise FileNotFoundError(
            f"{given}: no such file or folder, and not a Hub id (owner/name) either; check the path"
        )
    if path.is_dir() and not any(path.iterdir()):
        raise FileNotFoundError(f"{given}: an empty folder; give the folder or file that holds the triples")
    loaded = load_from_hub(name, config, split, revision=revision, streaming=streaming)
    return DatasetSource(loaded, f"{name} ({config}, {split})" if config else f"{name} ({split})")


def _open_dataset(given: Any, split: str, streaming: bool) -> Source:
    from datasets import Dataset, IterableDataset

    if isinstance(given, dict) and given:  # DatasetDict and IterableDatasetDict
        if split not in given:
            raise ValueError(f"the data set has no split {split!r}; splits there: {', '.join(map(str, given))}")
        given = given[split]
    if not isinstance(given, (Dataset, IterableDataset)):
        raise ValueError(
            f"a {type(given).__name__} can't be loaded; give a path, a Hub id, or a datasets.Dataset "
            "(Dataset.from_list makes one)"
        )
    return DatasetSource(given, "the data set")


def _open_file(
    path: Path,
    columns: Mapping[str, str | None] | None,
    collection: TextSource | None,
    queries: TextSource | None,
    num_negatives: int | None,
) -> Source:
    suffix = format_of(path)
    if suffix in JSON_SUFFIXES:
        return JsonSource(path)
    if suffix == ".parquet":
        return ParquetSource(path)
    if suffix in TSV_SUFFIXES:
        return open_tsv(
            path,
            columns,
            has_queries=queries is not None,
            has_passages=collection is not None,
            num_negatives=num_negatives,
        )
    raise ValueError(
        f"{path}: ends in {suffix or 'nothing'}; known are {', '.join(_SUFFIXES[:-1])} (plain or .gz) and .parquet. "
        "Unpack archives first."
    )


# BEIR --------------------------------------------------------------------------------------------------------------


def _is_beir(given: Any, config: str | None) -> bool:
    if not isinstance(given, (str, Path)):
        return False
    path = Path(given)
    if path.is_dir():
        return any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz"))
    if path.exists() or config is not None or not HUB_ID.fullmatch(str(given)) or "/" not in str(given):
        return False
    from datasets import get_dataset_config_names

    from tct_hf.data.beir_hub import _reach

    return {"corpus", "queries"} <= set(_reach(str(given), lambda: get_dataset_config_names(str(given))))


def _refuse_for_beir(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"{name}= does not go with a BEIR collection, whose texts and judgements are its own; leave it out"
            )


def _from_beir(given: Any, split: str, num_negatives: int | None, depth: int, seed: int, cache: Path) -> Dataset:
    from datasets import Dataset

    from tct_hf.data.beir import load_beir
    from tct_hf.retrieval.negatives import bm25_triples

    corpus, queries, qrels = load_beir(given, split, cache_dir=cache)
    count = 1 if num_negatives is None else num_negatives
    judgements = sha256(json.dumps([queries, qrels]).encode()).hexdigest()
    # The prepared corpus is named by what it was made from.
    made_from = [Path(file["filename"]).parent.name for file in corpus.cache_files]

    def build(staging: Path) -> None:
        triples = bm25_triples(corpus, queries, qrels, num_negatives=count, depth=depth, seed=seed)
        _write_arrow(staging / "rows.arrow", triples.column_names, (dict(row) for row in triples))

    folder = build_once(_folder(cache, ["beir", made_from, judgements, count, depth, seed]), build)
    return Dataset.from_file(str(folder / "rows.arrow"))


# Results -----------------------------------------------------------------------------------------------------------


def _folder(cache: Path, key: Sequence[Any]) -> Path:
    return cache / f"triples-{sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:16]}"


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


def _prepared(stream: TripleStream, cache: Path) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    def build(staging: Path) -> None:
        names = stream.output_columns()
        seen = None
        if "positive_id" in names and stream.known is None:
            # What all rows of a query say together is known at the end only: a column of its own, beside the rows.
            seen = SeenPositives()
            names = [name for name in names if name != KNOWN]

        def rows() -> Any:
            for row in stream():
                if seen is not None:
                    seen.add(row)
                    row.pop(KNOWN, None)
                yield row

        _write_arrow(staging / "rows.arrow", names, rows())
        if seen is not None:
            seen.write(staging / "known.arrow")
        report = {"counts": stream.skipped.counts, "examples": stream.skipped.examples}
        (staging / "skipped.json").write_text(json.dumps(report), encoding="utf-8")

    folder = build_once(_folder(cache, _key_of(stream)), build)
    parts = [Dataset.from_file(str(folder / "rows.arrow"))]
    if (folder / "known.arrow").is_file():
        parts.append(Dataset.from_file(str(folder / "known.arrow")))
    dataset = concatenate_datasets(parts, axis=1) if len(parts) > 1 else parts[0]
    stream.skipped.replace(SkippedRows(**json.loads((folder / "skipped.json").read_text(encoding="utf-8"))))
    dataset.info.description = stream.skipped.summary()
    return dataset


def _write_arrow(path: Path, names: Sequence[str], rows: Any) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    types = {KNOWN: pa.list_(pa.string()), LABELLED: pa.bool_(), SCORES: pa.list_(pa.float64())}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            batch.clear()

        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_A_BATCH:
                flush()
        if batch:
            flush()


def _streamed(stream: TripleStream) -> IterableDataset:
    from datasets import Features, IterableDataset, Value
    from datasets import List as ListOf

    from tct_hf.data.streamed import RowsAsStored, RowsRead, StreamedTriples

    head = TripleStream(
        stream.source,
        stream.columns,
        stream.num_negatives,
        stream.queries,
        stream.passages,
        stream.known,
        stream.skip_bad_rows,
        scores=stream.scores,
    )
    # The first rows are checked now: what is wrong with all of them should not wait for the first step.
    judged = 0
    for number, row in enumerate(head(), start=1):
        judged += stream.known is not None and row["query_id"] in stream.known.positives
        if number == ROWS_A_BATCH:
            head.check_judged(judged)
            break
    types = {KNOWN: ListOf(Value("string")), LABELLED: Value("bool"), SCORES: ListOf(Value("float64"))}
    names = stream.output_columns()
    features = Features({name: types.get(name, Value("string")) for name in names})
    return StreamedTriples.of(IterableDataset.from_generator(RowsAsStored(stream)), RowsRead(stream, names), features)
