"""A sample of a passage ranking collection: judged passages first, then negatives of triples, then any others."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tct_hf.data.beir_format import Qrels
from tct_hf.data.row_parsing import BadRow, byte_lines, parse_tsv_line
from tct_hf.files import write_aside
from tct_hf.pipeline.passage_ranking import order_of

# Of the sample: at most so much for passages that are relevant to a query, and for negatives of its triples.
_RELEVANT, _NEGATIVES = 0.5, 0.25
# Queries of train that are drawn for each of every other split.
_TRAIN_A_TURN = 4
# Negatives kept of a query, as they come in the file: it may hold a thousand of each.
_NEGATIVES_A_QUERY = 8

Passages = Callable[[], Iterable[tuple[str, str, str]]]


@dataclass(frozen=True)
class Sample:
    """What is kept.

    Args:
        passages: their ids.
        qrels: of each split, of the queries kept and among the passages kept.
        triples: (query, positive, negative) ids; none where there was no file of them.
    """

    passages: set[str]
    qrels: dict[str, Qrels]
    triples: list[tuple[str, str, str]] | None


def draw_sample(
    passages: Passages,
    qrels: Mapping[str, Qrels],
    queries: Callable[[], Mapping[str, str]],
    triples: str | None,
    *,
    size: int,
    write: Callable[[str], None],
) -> Sample:
    """Choose the passages of a sample and what is judged among them; the same ones every time.

    Queries are drawn in the order of a hash of their ids, four of train for one of each other split, with all
    passages that are relevant to them, up to half of the sample. Negatives of their triples take up to a quarter.
    Then come other passages, in the order of a hash. Queries are easier in a sample: figures of it stand for
    themselves alone.

    Args:
        passages: reads all passages: place, id, text.
        qrels: of each split.
        queries: texts of the judged queries by id; called where triples hold texts.
        triples: a file of query, positive and negative, as ids or as texts.
        size: passages to keep.
        write: takes lines of progress.

    Raises:
        ValueError: the sample is too small to hold a query of each split, or a triple.
    """
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
    if triples is not None:
        rows = _choose_triples(triples, chosen["train"], passages, queries, int(size * _NEGATIVES), write)
        if not rows:
            raise ValueError(f"sample: {triples} has no row of the {len(chosen['train'])} train queries; take more")
        kept.update(negative for _, _, negative in rows)
    # The heap holds the smallest hashes seen; negated, since heapq's root is the smallest.
    room = size - len(kept)
    heap: list[tuple[int, str]] = []
    for _, passage_id, _ in passages():
        if passage_id not in kept and room > 0:
            place = (-order_of(passage_id), passage_id)
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
    return Sample(kept, within, rows)


def write_triples(path: Path, folder: Path, sample: Sample, *, cache_dir: Path | None) -> None:
    """Write the triples of a sample as ids; where there was no file of them, BM25 draws one a judgement.

    Args:
        path: the file.
        folder: the sample, in the BEIR layout.
        sample: as it was drawn.
        cache_dir: where the prepared corpus is kept.
    """
    rows: Iterable[tuple[str, str, str]]
    if sample.triples is not None:
        rows = sample.triples
    else:
        from tct_hf.data.beir import load_beir
        from tct_hf.retrieval.negatives import bm25_triples

        corpus, queries, qrels = load_beir(folder, "train", cache_dir=cache_dir)
        drawn = bm25_triples(corpus, queries, qrels, num_negatives=1, depth=100, seed=0)
        rows = zip(drawn["query_id"], drawn["positive_id"], drawn["negative_id"], strict=True)
    with write_aside(path) as aside:
        aside.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def _choose_queries(qrels: Mapping[str, Qrels], room: int) -> dict[str, Qrels]:
    waiting = {
        name: iter(sorted((q for q, grades in found.items() if max(grades.values()) > 0), key=order_of))
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
    file: str,
    train: Qrels,
    passages: Passages,
    queries: Callable[[], Mapping[str, str]],
    room: int,
    write: Callable[[str], None],
) -> list[tuple[str, str, str]]:
    by_text = _holds_texts(Path(file))
    texts = {text: query for query, text in queries().items() if query in train} if by_text else {}
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
        for _, passage_id, text in passages():
            if text in wanted:
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
