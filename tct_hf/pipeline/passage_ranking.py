"""The files of MS MARCO's passage ranking task, turned once into a BEIR folder that every later step reads."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from tct_hf.data.beir import load_beir
from tct_hf.data.ids import hash_of
from tct_hf.data.irds import is_irds
from tct_hf.data.qrels import HEADER, Qrels, read_qrels
from tct_hf.data.rows import byte_lines, file_key, is_hub_id
from tct_hf.data.sources import named_by_header, open_source
from tct_hf.data.texts import joined, read_texts
from tct_hf.files import MADE_AGAIN, claim, read_json, write_aside, write_json_atomic
from tct_hf.settings import setting

# Share of a sample that passages relevant to its queries may take.
_RELEVANT = 0.5
# Queries of train that are drawn for each of every other split.
_TRAIN_A_TURN = 4
# What is written beside the collection, last: how many there are of everything.
COUNTS_FILE = "counts.json"
_BAR: dict[str, Any] = {"unit": "", "unit_scale": True, "mininterval": 10, "disable": None}  # only in a terminal


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
    triples: str | None = setting(None, "query, positive, negative: counted here, and read by the training")
    language: str = setting("english", "of BM25, with which a sample draws triples; see the recipe train")
    stemmer: str | None = setting("auto", "of BM25, with which a sample draws triples; see the recipe train")
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

    No file takes its name before it is whole; a call that was stopped begins again.

    Args:
        source: what to read, and how many there must be.
        out_dir: gets corpus.jsonl, queries.jsonl, qrels/<split>.tsv, counts.json, and of a sample triples.tsv (ids).
        sample: number of passages to keep; all when None.
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
    given, source = asdict(source), _located(source)
    places = [source.collection, source.triples, *(p for s in source.splits.values() for p in (s.queries, s.qrels))]
    keys = {place: file_key(Path(place)) for place in places if place is not None and Path(place).is_file()}
    claim(out, {"source": given, "sample": sample, "files": keys})
    if (out / COUNTS_FILE).is_file():
        write(f"  {out}: it is there already")
        return dict(read_json(out / COUNTS_FILE, MADE_AGAIN))

    qrels = {name: _judgements(name, split) for name, split in source.splits.items()}
    if source.triples is not None and source.expected_triples is not None:
        found = sum(1 for _ in tqdm(byte_lines(Path(source.triples)), "triples", **_BAR))
        _check_count(found, source.expected_triples, source.triples, "triples", "expected_triples")
    judged = _kept_queries(source, qrels)
    queries = _query_texts(source, judged)
    for name, grades in judged.items():
        write(f"  {name}: {len(grades):,} queries, {sum(map(len, grades.values())):,} judgements")
    passages = None
    if sample is not None:
        passages, judged = _sample(source, judged, sample, write)

    kept_queries = dict.fromkeys(query for grades in judged.values() for query in grades)
    _write_lines(out / "queries.jsonl", (_line(query, "", queries[query]) for query in kept_queries))
    for name, grades in judged.items():
        rows = ((query, passage, str(grade)) for query, found in grades.items() for passage, grade in found.items())
        _write_lines(out / "qrels" / f"{name}.tsv", ("\t".join(row) + "\n" for row in chain([HEADER], rows)))
    counts: dict[str, Any] = {"passages": _write_lines(out / "corpus.jsonl", _corpus_lines(source, judged, passages))}
    if sample is not None:
        from tct_hf.retrieval.negatives import bm25_triples  # heavy: numba

        words: dict[str, Any] = {"language": source.language, "stemmer": source.stemmer}
        loaded = load_beir(out, "train", cache_dir=cache_dir)
        drawn = bm25_triples(*loaded, num_negatives=1, depth=100, seed=0, **words)  # one a judgement
        triples = zip(drawn["query_id"], drawn["positive_id"], drawn["negative_id"], strict=True)
        _write_lines(out / "triples.tsv", ("\t".join(row) + "\n" for row in triples))
    counts["splits"] = {
        name: {"queries": len(grades), "judgements": sum(map(len, grades.values()))} for name, grades in judged.items()
    }
    write_json_atomic(out / COUNTS_FILE, counts)
    return counts


def _located(source: PassageRankingFiles) -> PassageRankingFiles:
    """The same with paths and Hub ids for names; refuses files that are not there."""

    def place(name: str | None, setting_name: str) -> str:
        if name is None:
            raise ValueError(f"{setting_name}: name the file or Hub id that holds them")
        path = Path(source.files or "", name)
        for file in (path, path.with_name(f"{path.name}.gz")):
            if file.is_file():
                return str(file)
        if (is_irds(name) or is_hub_id(name)) and setting_name != "triples":
            return name
        raise FileNotFoundError(f"{setting_name}: {path}: no such file; download it, or name its folder with --files")

    if not source.splits:
        raise ValueError("splits: there is none; name the queries and qrels of train, and of a split to report")
    splits = {}
    for name, split in source.splits.items():
        other = source.splits.get(split.without or name)
        if split.without is not None and (other is None or other.without is not None):
            raise ValueError(f"splits.{name}.without: {split.without!r} is no split, or is itself without another")
        found = {part: place(getattr(split, part), f"splits.{name}.{part}") for part in ("queries", "qrels")}
        splits[name] = replace(split, **found)  # type: ignore[arg-type]
    triples = None if source.triples is None else place(source.triples, "triples")
    return replace(source, collection=place(source.collection, "collection"), triples=triples, splits=splits)


def _judgements(name: str, split: SplitFiles) -> Qrels:
    place = str(split.qrels)
    rows = place if Path(place).is_file() else open_source(place, "qrels", named_by_header)
    # MS MARCO's qrels.train.tsv has the same line twice here and there.
    found = read_qrels(rows, allow_repeats=True)
    _check_count(len(found.qrels), split.expected_queries, place, "judged queries", f"splits.{name}.expected_queries")
    _check_count(found.count, split.expected_qrels, place, "judgements", f"splits.{name}.expected_qrels")
    return found.qrels


def _check_count(found: int, expected: int | None, place: str, what: str, setting_name: str) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f"{place}: {found:,} {what}, but {expected:,} are expected: download the file again; if it is meant to be "
            f"another, set {setting_name} to its count, or to null"
        )


def _kept_queries(source: PassageRankingFiles, qrels: Mapping[str, Qrels]) -> dict[str, Qrels]:
    """Leave out what another split has, then keep the first queries by hash."""
    kept: dict[str, Qrels] = {}
    # Those that others are without come first.
    for name in sorted(qrels, key=lambda name: source.splits[name].without is not None):
        split = source.splits[name]
        left = set(qrels[name]).difference(kept[split.without] if split.without is not None else ())
        if split.most is not None:
            left = set(sorted(left, key=hash_of)[: split.most])
        if not left:
            raise ValueError(f"splits.{name}: no query is left of it; see its settings without and most")
        kept[name] = {query: grades for query, grades in qrels[name].items() if query in left}
    return {name: kept[name] for name in qrels}


def _query_texts(source: PassageRankingFiles, judged: Mapping[str, Qrels]) -> dict[str, str]:
    """The texts of all judged queries."""
    texts: dict[str, str] = {}
    for name, grades in judged.items():
        split = source.splits[name]
        missing = set(grades)
        for where, (query_id, title, text) in read_texts(str(split.queries), f"splits.{name}.queries"):
            if query_id in grades:
                missing.discard(query_id)
                if texts.setdefault(query_id, joined(title, text)) != joined(title, text):
                    raise ValueError(f"{where}: query {query_id!r} has another text elsewhere; give it another id")
        if missing:
            raise ValueError(
                f"{split.qrels}: query {min(missing)!r} is judged, but has no text in {split.queries}; give the file "
                f"of all queries as splits.{name}.queries"
            )
    return texts


def _corpus_lines(source: PassageRankingFiles, judged: Mapping[str, Qrels], kept: set[str] | None) -> Iterator[str]:
    """The passages that are kept, all when None. The last one is followed by the checks of the whole collection."""
    place, read = source.collection, 0
    missing = {passage for grades in judged.values() for found in grades.values() for passage in found}
    for _, (passage_id, title, text) in tqdm(read_texts(place, "collection"), "passages", **_BAR):
        read += 1
        missing.discard(passage_id)
        if kept is None or passage_id in kept:
            yield _line(passage_id, title, text)
    _check_count(read, source.expected_passages, place, "passages", "expected_passages")
    if missing:
        raise ValueError(
            f"{place}: {len(missing):,} judged passages are not in it, such as {min(missing)!r}; give the collection "
            "that was judged"
        )


def _line(text_id: str, title: str, text: str) -> str:
    row = {"_id": text_id, "title": title, "text": text} if title else {"_id": text_id, "text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines to a file that takes its name after the last one; their number."""
    with write_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        return sum(1 for line in lines if file.write(line))


def _sample(
    source: PassageRankingFiles, qrels: Mapping[str, Qrels], size: int, write: Callable[[str], None]
) -> tuple[set[str], dict[str, Qrels]]:
    """Passages of a sample, and the judgements among them.

    Queries are drawn in the order of a hash of their ids, four of train for one of each other split, with all
    passages that are relevant to them, up to half of the sample. Then come other passages, in the order of a hash.
    Queries are easier in a sample: figures of it stand for themselves alone.
    """
    turns = []
    for place, (name, found) in enumerate(qrels.items()):
        answered = sorted((query for query, grades in found.items() if max(grades.values()) > 0), key=hash_of)
        a_turn = _TRAIN_A_TURN if name == "train" else 1
        turns += [(rank // a_turn, place, rank, name, query) for rank, query in enumerate(answered)]
    chosen: dict[str, Qrels] = {name: {} for name in qrels}
    relevant: set[str] = set()
    for *_, name, query in sorted(turns):
        passages = {passage for passage, grade in qrels[name][query].items() if grade > 0}
        if len(relevant) + len(passages - relevant) <= int(size * _RELEVANT):
            relevant |= passages
            chosen[name][query] = qrels[name][query]
    if lacking := [name for name, found in chosen.items() if not found]:
        raise ValueError(
            f"sample: {size} passages can't hold those relevant to one query of {', '.join(lacking)}; take more"
        )
    ids = (row[0] for _, row in read_texts(source.collection, "collection"))
    others = (passage_id for passage_id in ids if passage_id not in relevant)
    kept = relevant.union(heapq.nsmallest(size - len(relevant), others, key=hash_of))
    within = {
        name: {query: {p: grade for p, grade in grades.items() if p in kept} for query, grades in found.items()}
        for name, found in chosen.items()
    }
    shown = ", ".join(f"{len(found):,} {name}" for name, found in within.items())
    write(f"  sample: {len(kept):,} passages, {len(relevant):,} of them relevant; queries: {shown}")
    return kept, within
