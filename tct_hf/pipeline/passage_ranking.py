"""The files of MS MARCO's passage ranking task, turned once into a BEIR folder that every later step reads."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tct_hf.data.beir import load_beir
from tct_hf.data.ids import hash_of
from tct_hf.data.qrels import HEADER, Judgements, Qrels, read_qrels
from tct_hf.data.rows import BadRow, byte_lines, file_key, is_hub_id, parse_tsv_line
from tct_hf.data.sources import load_from_hub
from tct_hf.data.texts import joined, read_texts
from tct_hf.files import claim, write_aside, write_json_atomic
from tct_hf.settings import setting

# Of a sample: at most so much for passages that are relevant to a query, and for negatives of its triples.
_RELEVANT, _NEGATIVES = 0.5, 0.25
# Queries of train that are drawn for each of every other split.
_TRAIN_A_TURN = 4
# Negatives kept of a query, as they come in the file: it may hold a thousand of each.
_NEGATIVES_A_QUERY = 8
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
    language: str = setting("english", "of BM25, where a sample draws triples with it; see the recipe train")
    stemmer: str | None = setting("auto", "of BM25, where a sample draws triples with it; see the recipe train")
    expected_triples: int | None = setting(None, "triples there must be; unchecked when null")


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
        sample: keep so many passages, see :class:`_Sample`; all when None.
        cache_dir: folder of the prepared corpus, from which BM25 draws triples; by default `default_cache_dir()`.
        write: takes lines of progress.

    Returns:
        What counts.json holds: passages, and queries and judgements of each split.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a malformed line, another count than expected, a judged query or passage without a text, or a
            sample too small to hold anything.
    """
    out = Path(out_dir)
    keys = {"source": asdict(source), "sample": sample}
    source = _located(source)
    claim(out, {**keys, "files": {n: file_key(Path(p)) for n, p in _places(source) if Path(p).is_file()}})
    if (out / COUNTS_FILE).is_file():
        write(f"  {out}: it is there already")
        counts: dict[str, Any] = json.loads((out / COUNTS_FILE).read_text(encoding="utf-8"))
        return counts
    splits = {name: _read_split(name, source) for name in source.splits}
    if source.triples is not None and source.expected_triples is not None:
        found = _count_lines(source.triples, write)
        _check_count(found, source.expected_triples, source.triples, "triples", "expected_triples")
    judged = _drawn(source, splits)
    for name, grades in judged.items():
        write(f"  {name}: {len(grades):,} queries, {sum(map(len, grades.values())):,} judgements")
    drawn = None
    if sample is not None:
        drawn = _draw(source, judged, sample, write)
        judged = drawn.qrels
    if not (out / "queries.jsonl").is_file():
        with write_aside(out / "queries.jsonl") as aside, aside.open("w", encoding="utf-8") as file:
            file.writelines(_line(query_id, "", text) for query_id, text in _query_texts(source, judged).items())
    for name, grades in judged.items():
        if not (out / "qrels" / f"{name}.tsv").is_file():
            lines = ("\t".join((q, p, str(grade))) for q, found in grades.items() for p, grade in found.items())
            with write_aside(out / "qrels" / f"{name}.tsv") as aside:
                aside.write_text("\n".join(["\t".join(HEADER), *lines]) + "\n", encoding="utf-8")
    count = _write_corpus(out / "corpus.jsonl", None if drawn is None else drawn.passages, judged, source, write)
    if drawn is not None and not (out / TRIPLES_FILE).is_file():
        rows = drawn.triples if drawn.triples is not None else _bm25_triples(out, source, cache_dir)
        with write_aside(out / TRIPLES_FILE) as aside:
            aside.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    counts = {
        "passages": count,
        "splits": {
            name: {"queries": len(grades), "judgements": sum(map(len, grades.values()))}
            for name, grades in judged.items()
        },
        "read": {name: {"queries": len(split.qrels), "judgements": split.count} for name, split in splits.items()},
    }
    write_json_atomic(out / COUNTS_FILE, counts)
    return counts


def _located(source: PassageRankingFiles) -> PassageRankingFiles:
    """Put paths and Hub ids for names; refuses settings that name too little, and files that are not there."""
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
    splits = {
        name: replace(
            split, queries=_place_of(source.files, split.queries), qrels=_place_of(source.files, split.qrels)
        )
        for name, split in source.splits.items()
    }
    collection, triples = (_place_of(source.files, name) for name in (source.collection, source.triples))
    found = replace(source, collection=str(collection), triples=triples, splits=splits)
    for setting_name, place in _places(found):
        path = Path(place)
        if not path.is_file() and not (is_hub_id(place) and setting_name != "triples"):
            raise FileNotFoundError(
                f"{setting_name}: {path}: no such file; download it, or name its folder with --files"
            )
    return found


def _place_of(files: str | None, name: str | None) -> str | None:
    """The path of a file below the folder of files, with .gz where this alone is there; or a Hub id."""
    if name is None:
        return None
    path = Path(name) if files is None else Path(files) / name
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and packed.is_file():
        return str(packed)
    return name if not path.exists() and is_hub_id(name) else str(path)


def _read_split(name: str, source: PassageRankingFiles) -> Judgements:
    split = source.splits[name]
    place = str(split.qrels)
    rows = place if Path(place).is_file() else load_from_hub(place)
    # MS MARCO's qrels.train.tsv has the same line twice here and there.
    found = read_qrels(rows, place, allow_repeats=True)
    _check_count(len(found.qrels), split.expected_queries, place, "judged queries", f"splits.{name}.expected_queries")
    _check_count(found.count, split.expected_qrels, place, "judgements", f"splits.{name}.expected_qrels")
    return found


def _drawn(source: PassageRankingFiles, splits: Mapping[str, Judgements]) -> dict[str, Qrels]:
    """Leave out what another split has, then keep the first queries by hash."""
    done: dict[str, Qrels] = {}
    # Those that others are without come first.
    for name in sorted(splits, key=lambda name: source.splits[name].without is not None):
        settings, qrels = source.splits[name], splits[name].qrels
        others = done[settings.without] if settings.without is not None else {}
        left = [query for query in qrels if query not in others]
        kept = set(left if settings.most is None else sorted(left, key=hash_of)[: settings.most])
        if not kept:
            raise ValueError(f"splits.{name}: no query is left of it without those of {settings.without}")
        done[name] = {query: grades for query, grades in qrels.items() if query in kept}
    return {name: done[name] for name in splits}


def _query_texts(source: PassageRankingFiles, judged: Mapping[str, Qrels]) -> dict[str, str]:
    """The texts of all judged queries, each once, in the order of the splits."""
    texts: dict[str, str] = {}
    for name, grades in judged.items():
        place = str(source.splits[name].queries)
        found: dict[str, str] = {}
        for where, (query_id, title, text) in read_texts(place, f"splits.{name}.queries"):
            if query_id not in grades:
                continue
            text = joined(title, text)
            if found.setdefault(query_id, text) != text or texts.get(query_id, text) != text:
                raise ValueError(f"{where}: query {query_id!r} has another text elsewhere; give it another id")
        for query_id in grades:
            if query_id not in found:
                raise ValueError(
                    f"{source.splits[name].qrels}: query {query_id!r} is judged, but has no text in {place}; give the "
                    f"file of all queries as splits.{name}.queries"
                )
        texts.update((query_id, found[query_id]) for query_id in grades)
    return texts


def _write_corpus(
    path: Path,
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
        for _, (passage_id, title, text) in read_texts(source.collection, "collection"):
            read += 1
            wanted.discard(passage_id)
            if kept is None or passage_id in kept:
                file.write(_line(passage_id, title, text))
                written += 1
            if read % 1_000_000 == 0:
                write(f"  {read:,} passages read")
        # Before the file takes its name: one that is whole has been checked.
        place = source.collection
        _check_count(read, source.expected_passages, place, "passages", "expected_passages")
        if wanted:
            raise ValueError(
                f"{place}: {len(wanted):,} judged passages are not in it, such as {min(wanted)!r}; give the "
                "collection that was judged"
            )
    return written


def _line(text_id: str, title: str, text: str) -> str:
    row = {"_id": text_id, "title": title, "text": text} if title else {"_id": text_id, "text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


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
    yield "collection", source.collection
    for name, split in source.splits.items():
        yield from ((f"splits.{name}.{part}", getattr(split, part)) for part in ("queries", "qrels"))
    if source.triples is not None:
        yield "triples", source.triples


# A sample -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """A part of the collection: its passages, judgements among them, and triples of ids, None where there are none.

    Queries are drawn in the order of a hash of their ids, four of train for one of each other split, with all
    passages that are relevant to them, up to half of the sample. Negatives of their triples take up to a quarter.
    Then come other passages, in the order of a hash. Queries are easier in a sample: figures of it stand for
    themselves alone.
    """

    passages: set[str]
    qrels: dict[str, Qrels]
    triples: list[tuple[str, str, str]] | None


def _draw(
    source: PassageRankingFiles,
    qrels: Mapping[str, Qrels],
    size: int,
    write: Callable[[str], None],
) -> _Sample:
    chosen = _choose_queries(qrels, int(size * _RELEVANT))
    if lacking := [name for name, found in chosen.items() if not found]:
        raise ValueError(
            f"sample: {size} passages can't hold those relevant to one query of {', '.join(lacking)}; take more"
        )
    relevant = {
        p for found in chosen.values() for grades in found.values() for p, grade in grades.items() if grade > 0
    }
    rows = None
    kept = set(relevant)
    if source.triples is not None:
        rows = _choose_triples(source, source.triples, chosen["train"], int(size * _NEGATIVES), write)
        if not rows:
            raise ValueError(
                f"sample: {source.triples} has no row of the {len(chosen['train'])} train queries; take more"
            )
        kept.update(negative for _, _, negative in rows)
    # The heap holds the smallest hashes seen; negated, since heapq's root is the smallest.
    room = size - len(kept)
    heap: list[tuple[int, str]] = []
    for _, (passage_id, _, _) in read_texts(source.collection, "collection"):
        if passage_id not in kept and room > 0:
            place = (-hash_of(passage_id), passage_id)
            if len(heap) < room:
                heapq.heappush(heap, place)
            elif place > heap[0]:
                heapq.heapreplace(heap, place)
    kept.update(passage_id for _, passage_id in heap)
    within = {
        name: {query: {p: grade for p, grade in grades.items() if p in kept} for query, grades in found.items()}
        for name, found in chosen.items()
    }
    shown = ", ".join(f"{len(found):,} {name}" for name, found in within.items())
    write(f"  sample: {len(kept):,} passages, {len(relevant):,} of them relevant; queries: {shown}")
    return _Sample(kept, within, rows)


def _bm25_triples(folder: Path, source: PassageRankingFiles, cache_dir: Path | None) -> Iterable[tuple[str, str, str]]:
    """One triple a judgement."""
    from tct_hf.retrieval.negatives import bm25_triples  # heavy: numba

    corpus, queries, qrels = load_beir(folder, "train", cache_dir=cache_dir)
    words: dict[str, Any] = {"language": source.language, "stemmer": source.stemmer}
    drawn = bm25_triples(corpus, queries, qrels, num_negatives=1, depth=100, seed=0, **words)
    return zip(drawn["query_id"], drawn["positive_id"], drawn["negative_id"], strict=True)


def _choose_queries(qrels: Mapping[str, Qrels], room: int) -> dict[str, Qrels]:
    waiting = {
        name: iter(sorted((q for q, grades in found.items() if max(grades.values()) > 0), key=hash_of))
        for name, found in qrels.items()
    }
    chosen: dict[str, Qrels] = {name: {} for name in qrels}
    taken: set[str] = set()
    while waiting:
        for name in list(waiting):
            turn = list(islice(waiting[name], _TRAIN_A_TURN if name == "train" else 1))
            if not turn:
                del waiting[name]
            for query in turn:
                grades = qrels[name][query]
                new = {passage for passage, grade in grades.items() if grade > 0} - taken
                if len(taken) + len(new) <= room:
                    taken |= new
                    chosen[name][query] = grades
    return chosen


def _choose_triples(
    source: PassageRankingFiles, file: str, train: Qrels, room: int, write: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    by_text = _holds_texts(Path(file))
    texts = {text: query for query, text in _query_texts(source, {"train": train}).items()} if by_text else {}
    found: dict[str, list[tuple[str, str]]] = {}
    for number, line in byte_lines(Path(file)):
        if number % 10_000_000 == 0:
            write(f"  {number:,} triples read")
        query, positive, negative = _fields(line, file, number)
        query_id = texts.get(query) if by_text else query
        if query_id in train and len(rows := found.setdefault(query_id, [])) < _NEGATIVES_A_QUERY:
            rows.append((positive, negative))
    ids: dict[str, str] = {}
    if by_text:
        wanted = {text for rows in found.values() for row in rows for text in row}
        for _, (passage_id, title, text) in read_texts(source.collection, "collection"):
            if (text := joined(title, text)) in wanted:
                ids.setdefault(text, passage_id)
    chosen: list[tuple[str, str, str]] = []
    negatives: set[str] = set()
    for query, rows in found.items():
        for positive, negative in rows:
            pair = (ids.get(positive, ""), ids.get(negative, "")) if by_text else (positive, negative)
            # Another passage may have the text of the judged one.
            if pair[0] not in train[query] or not pair[1] or train[query].get(pair[1], 0) > 0:
                continue
            if pair[1] in negatives or len(negatives) < room:
                negatives.add(pair[1])
                chosen.append((query, *pair))
    return chosen


def _holds_texts(path: Path) -> bool:
    for number, line in byte_lines(path):
        fields = _fields(line, str(path), number)
        return any(" " in one for one in fields)
    raise ValueError(f"{path}: no triple in it; it is empty")


def _fields(line: bytes, file: str, number: int) -> tuple[str, str, str]:
    try:
        row = parse_tsv_line(line, ("query", "positive", "negative"))
    except BadRow as error:
        raise ValueError(error.at(f"{file}, line {number}")) from None
    return row["query"].strip(), row["positive"].strip(), row["negative"].strip()
