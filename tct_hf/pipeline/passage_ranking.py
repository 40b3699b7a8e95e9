"""The files of MS MARCO's passage ranking task, turned once into a BEIR folder that every later step reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from tct_hf.data.beir_format import HEADER, Qrels, add_judgement, check_positives, check_record
from tct_hf.data.hub_tables import is_hub_table, load_hub_table
from tct_hf.data.known_positives import judgement_lines
from tct_hf.data.lookups import TSV_SUFFIXES, file_key, format_of, open_texts, read_tsv_texts
from tct_hf.data.row_parsing import byte_lines
from tct_hf.files import claim, write_aside, write_json_atomic
from tct_hf.settings import setting

# What is written beside the collection: how many there are of everything.
COUNTS_FILE = "counts.json"
TRIPLES_FILE = "triples.tsv"


@dataclass
class SplitFiles:
    """Where the queries and judgements of one split are, and how many there must be."""

    queries: str | None = setting(None, "texts by id: a file (MS MARCO's TSV, JSONL, parquet) or a Hub id")
    qrels: str | None = setting(
        None, "judgements: a file (TREC's four fields, BEIR's three) or owner/name:config:split"
    )
    expected_queries: int | None = setting(None, "judged queries there must be; unchecked when null")
    expected_qrels: int | None = setting(None, "judgements there must be, repeated lines counted; unchecked when null")
    without: str | None = setting(None, "another split, whose queries are left out of this one")
    most: int | None = setting(None, "keep so many of its queries, drawn by a hash of the id; all when null")


@dataclass
class PassageRankingFiles:
    """Passages, splits and triples, as they were published."""

    files: str | None = setting(
        None, "folder that the names of files below are relative to; what is not there is looked for with .gz"
    )
    collection: str = setting("collection.tsv", "passages: a file of id and text, or a Hub id (owner/name:config)")
    expected_passages: int | None = setting(None, "passages there must be; unchecked when null")
    splits: dict[str, SplitFiles] = setting({}, "name to the files of a split; train is trained on")
    triples: str | None = setting(
        None,
        "query, positive, negative, as ids or texts: counted; a sample keeps its part, and draws with BM25 when none",
    )
    expected_triples: int | None = setting(None, "triples there must be; unchecked when null")


@dataclass
class Judged:
    """A split as it is read: judgements, and how many of them and of queries there were in the source."""

    qrels: Qrels
    queries: int
    lines: int


def prepare_passage_ranking(
    source: PassageRankingFiles,
    out_dir: str | Path,
    *,
    sample: int | None = None,
    cache_dir: Path | None = None,
    write: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Turn passages, queries and judgements into a BEIR folder, in constant memory but for ids and judgements.

    Each file is written aside and renamed: a call that was stopped goes on with the files that are missing.

    Args:
        source: what to read, and how many there must be.
        out_dir: gets corpus.jsonl, queries.jsonl, qrels/<split>.tsv, counts.json, and of a sample triples.tsv (ids).
        sample: keep so many passages, see :func:`tct_hf.pipeline.passage_sample.draw_sample`; all when None.
        cache_dir: where texts that are no TSV are prepared; by default `default_cache_dir()`.
        write: takes lines of progress.

    Returns:
        What counts.json holds: passages, and queries and judgements of each split.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a malformed line, another count than expected, a judged query or passage without a text, or a
            sample too small to hold anything.
    """
    out = Path(out_dir)
    check_source(source)
    claim(out, {"source": asdict(source), "sample": sample, "files": _keys(source)})
    if (out / COUNTS_FILE).is_file():
        write(f"  {out}: it is there already")
        counts: dict[str, Any] = json.loads((out / COUNTS_FILE).read_text(encoding="utf-8"))
        return counts
    splits = {name: _read_split(name, source) for name in source.splits}
    triples = place_of(source.files, source.triples) if source.triples is not None else None
    if triples is not None and source.expected_triples is not None:
        found = _count_lines(triples, write)
        _check_count(found, source.expected_triples, triples, "triples", "expected_triples")
    judged = {name: split.qrels for name, split in _drawn(source, splits).items()}
    for name, grades in judged.items():
        write(f"  {name}: {len(grades):,} queries, {sum(map(len, grades.values())):,} judgements")
    collection = place_of(source.files, source.collection)
    passages = lambda: read_texts(collection, "passage", "collection", cache_dir)  # noqa: E731
    kept: set[str] | None = None
    if sample is not None:
        from tct_hf.pipeline.passage_sample import draw_sample, write_triples

        texts = lambda: _query_texts(source, judged, cache_dir)  # noqa: E731
        drawn = draw_sample(passages, judged, texts, triples, size=sample, write=write)
        kept, judged = drawn.passages, drawn.qrels
    if not (out / "queries.jsonl").is_file():
        _write_jsonl(out / "queries.jsonl", _query_texts(source, judged, cache_dir).items())
    for name, grades in judged.items():
        if not (out / "qrels" / f"{name}.tsv").is_file():
            lines = ("\t".join((q, p, str(grade))) for q, found in grades.items() for p, grade in found.items())
            with write_aside(out / "qrels" / f"{name}.tsv") as aside:
                aside.write_text("\n".join(["\t".join(HEADER), *lines]) + "\n", encoding="utf-8")
    count = _write_corpus(out / "corpus.jsonl", passages, kept, judged, source, write)
    if sample is not None and not (out / TRIPLES_FILE).is_file():
        write_triples(out / TRIPLES_FILE, out, drawn, cache_dir=cache_dir)
    counts = {
        "passages": count,
        "splits": {
            name: {"queries": len(grades), "judgements": sum(map(len, grades.values()))}
            for name, grades in judged.items()
        },
        "read": {name: {"queries": split.queries, "judgements": split.lines} for name, split in splits.items()},
    }
    write_json_atomic(out / COUNTS_FILE, counts)
    return counts


def check_source(source: PassageRankingFiles) -> None:
    """Refuse settings that name too little, or files that are not there, before anything is read.

    Raises:
        ValueError: a split without files or train, or one that is to be without a split that is not there.
        FileNotFoundError: a missing file.
    """
    if not source.splits:
        raise ValueError("splits: there is none; name the queries and qrels of train, and of a split to report")
    for name, split in source.splits.items():
        for part in ("queries", "qrels"):
            if getattr(split, part) is None:
                raise ValueError(f"splits.{name}.{part}: name the file or Hub id that holds them")
        if split.most is not None and split.most < 1:
            raise ValueError(f"splits.{name}.most: {split.most} is below 1; leave it out to keep all queries")
        if split.without is not None and split.without not in source.splits:
            raise ValueError(f"splits.{name}.without: there is no split {split.without!r}")
        if split.without is not None and source.splits[split.without].without is not None:
            raise ValueError(
                f"splits.{name}.without: {split.without!r} is itself without another; give one that stands alone"
            )
    for setting_name, place in _places(source):
        path = Path(place)
        if not path.is_file() and not (is_hub_table(place) and setting_name != "triples"):
            raise FileNotFoundError(
                f"{setting_name}: {path}: no such file; download it, or name its folder with --files"
            )


def place_of(files: str | None, name: str) -> str:
    """Where something of these settings is.

    Args:
        files: folder of the files, None where names stand for themselves.
        name: of a file, or a Hub id.

    Returns:
        The file's path below the folder, that of its .gz where this alone is there, or the Hub id as it is.
    """
    path = Path(name) if files is None else Path(files) / name
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and packed.is_file():
        return str(packed)
    return name if not path.exists() and is_hub_table(name) else str(path)


def read_texts(source: str, what: str, setting_name: str, cache_dir: Path | None) -> Iterator[tuple[str, str, str]]:
    """Read texts by id: a TSV file line by line, anything else as :func:`tct_hf.data.lookups.open_texts` opens it.

    Yields:
        (place, id, text).

    Raises:
        ValueError: a malformed line, or an empty id or text.
    """
    from tct_hf.cache import default_cache_dir

    path = Path(source)
    if path.is_file() and format_of(path) in TSV_SUFFIXES:
        rows: Iterable[tuple[str, str, str]] = read_tsv_texts(path)
    else:
        dataset = open_texts(source, what, setting_name, cache_dir or default_cache_dir()).dataset
        rows = (
            (f"{source}, {text_id!r}", text_id, text)
            for batch in dataset.iter(1000)
            for text_id, text in zip(batch["id"], batch["text"], strict=True)
        )
    for place, text_id, text in rows:
        yield check_record({"_id": text_id, "text": text}, place, title=False, allow_empty=False)


def order_of(text_id: str) -> int:
    """Where an id comes in an order that depends on nothing else."""
    return int.from_bytes(blake2b(text_id.encode(), digest_size=8).digest(), "big")


def _read_split(name: str, source: PassageRankingFiles) -> Judged:
    split = source.splits[name]
    assert split.qrels is not None
    place = place_of(source.files, split.qrels)
    qrels: Qrels = {}
    places: dict[str, str] = {}
    count = 0
    for where, fields in _judgements(place):
        count += 1
        # MS MARCO's qrels.train.tsv has the same line twice here and there.
        if qrels.get(fields[0], {}).get(fields[1]) == _number(fields[2]):
            continue
        add_judgement(fields, where, qrels, places)
    check_positives(qrels, place)
    _check_count(len(qrels), split.expected_queries, place, "judged queries", f"splits.{name}.expected_queries")
    _check_count(count, split.expected_qrels, place, "judgements", f"splits.{name}.expected_qrels")
    return Judged(qrels, len(qrels), count)


def _number(text: str) -> int | None:
    return int(text) if text.strip().lstrip("-").isdigit() else None


def _judgements(place: str) -> Iterator[tuple[str, list[str]]]:
    if Path(place).is_file():
        yield from judgement_lines(Path(place))
        return
    rows = load_hub_table(place)
    if missing := [name for name in HEADER if name not in rows.column_names]:
        raise ValueError(f"{place}: column {missing[0]!r} is missing (there are: {', '.join(rows.column_names)})")
    for number, row in enumerate(rows):
        score = row["score"]
        score = int(score) if isinstance(score, float) and score.is_integer() else score
        yield f"{place}, row {number}", [str(row["query-id"]), str(row["corpus-id"]), str(score)]


def _drawn(source: PassageRankingFiles, splits: Mapping[str, Judged]) -> dict[str, Judged]:
    """Leave out what another split has, then keep the first queries by hash."""
    # Those that others are without come first.
    done: dict[str, Judged] = {}
    for name in sorted(splits, key=lambda name: source.splits[name].without is not None):
        settings, read = source.splits[name], splits[name]
        others = done[settings.without].qrels if settings.without is not None else {}
        left = [query for query in read.qrels if query not in others]
        kept = set(left if settings.most is None else sorted(left, key=order_of)[: settings.most])
        if not kept:
            raise ValueError(f"splits.{name}: no query is left of it without those of {settings.without}")
        done[name] = Judged({q: found for q, found in read.qrels.items() if q in kept}, read.queries, read.lines)
    return {name: done[name] for name in splits}


def _query_texts(source: PassageRankingFiles, judged: Mapping[str, Qrels], cache_dir: Path | None) -> dict[str, str]:
    """The texts of all judged queries, each once, in the order of the splits."""
    texts: dict[str, str] = {}
    for name, grades in judged.items():
        queries = source.splits[name].queries
        assert queries is not None
        place = place_of(source.files, queries)
        found: dict[str, str] = {}
        for where, query_id, text in read_texts(place, "query", f"splits.{name}.queries", cache_dir):
            if query_id not in grades:
                continue
            if found.setdefault(query_id, text) != text or texts.get(query_id, text) != text:
                raise ValueError(f"{where}: query {query_id!r} has another text elsewhere; give it another id")
        for query_id in grades:
            if query_id not in found:
                raise ValueError(
                    f"{place_of(source.files, str(source.splits[name].qrels))}: query {query_id!r} is judged, but "
                    f"has no text in {place}; give the file of all queries as splits.{name}.queries"
                )
        texts.update((query_id, found[query_id]) for query_id in grades)
    return texts


def _write_corpus(
    path: Path,
    passages: Callable[[], Iterable[tuple[str, str, str]]],
    kept: set[str] | None,
    judged: Mapping[str, Qrels],
    source: PassageRankingFiles,
    write: Callable[[str], None],
) -> int:
    """Write the passages that are kept; their number. What is there already is only counted."""
    if path.is_file():
        with path.open("rb") as file:
            return sum(1 for _ in file)
    wanted = set(chain.from_iterable(found for grades in judged.values() for found in grades.values()))
    read = written = 0
    with write_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for _, passage_id, text in passages():
            read += 1
            wanted.discard(passage_id)
            if kept is None or passage_id in kept:
                file.write(_line(passage_id, text))
                written += 1
            if read % 1_000_000 == 0:
                write(f"  {read:,} passages read")
        # Before the file takes its name: one that is whole has been checked.
        place = place_of(source.files, source.collection)
        _check_count(read, source.expected_passages, place, "passages", "expected_passages")
        if wanted:
            raise ValueError(
                f"{place}: {len(wanted):,} judged passages are not in it, such as {min(wanted)!r}; give the "
                "collection that was judged"
            )
    return written


def _write_jsonl(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    with write_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(_line(text_id, text) for text_id, text in texts)


def _line(text_id: str, text: str) -> str:
    return json.dumps({"_id": text_id, "text": text}, ensure_ascii=False) + "\n"


def _count_lines(file: str, write: Callable[[str], None]) -> int:
    number = 0
    for number, _ in byte_lines(Path(file)):
        if number % 10_000_000 == 0:
            write(f"  {number:,} triples counted")
    return number


def _check_count(found: int, expected: int | None, place: str, what: str, setting_name: str) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f"{place}: {found:,} {what}, but {expected:,} are expected: download the file again; if it is meant to be "
            f"another, set {setting_name} to its count, or to null"
        )


def _places(source: PassageRankingFiles) -> Iterator[tuple[str, str]]:
    """Each setting that names a file or Hub id, with the place."""
    yield "collection", place_of(source.files, source.collection)
    for name, split in source.splits.items():
        for part in ("queries", "qrels"):
            yield f"splits.{name}.{part}", place_of(source.files, getattr(split, part))
    if source.triples is not None:
        yield "triples", place_of(source.files, source.triples)


def _keys(source: PassageRankingFiles) -> dict[str, Any]:
    return {name: file_key(Path(place)) for name, place in _places(source) if Path(place).is_file()}
