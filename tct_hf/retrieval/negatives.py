"""Training triples with lexical negatives: the first round of every first-stage retriever."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tct_hf.data.collection import Collection, Split

if TYPE_CHECKING:
    from datasets import Dataset

    from tct_hf.data.made_questions import MadeQuestion
    from tct_hf.retrieval.bm25 import BM25Index

_QUERIES_A_BATCH = 512


def bm25_triples(
    corpus: Dataset,
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    num_negatives: int = 1,
    depth: int = 100,
    seed: int,
    index: BM25Index | None = None,
    unlabelled: Mapping[str, str] | None = None,
    candidates: Mapping[str, Mapping[str, float]] | None = None,
    without: Mapping[str, MadeQuestion] | None = None,
) -> Dataset:
    """Pair every query and positive with negatives sampled from BM25's best passages.

    A negative is never a known positive of its query, nor the same text as one, and no two negatives of a row have
    the same text. Where BM25 finds too few, random passages under the same rule fill up. Each row draws from its own
    generator, made of seed, query id and positive id, so that a row does not depend on which others are asked for.

    Questions that nobody has judged give rows too, for a teacher to say what their passages are worth: the best
    passage stands in column positive, and the negatives are sampled from the next best. With `candidates` the best
    are a teacher's, and its first passage is a pseudo-positive that counts as much as the teacher is sure of it.

    Args:
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        num_negatives: negatives a row.
        depth: how many of BM25's best passages to sample from. The paper's triples use the top 1000 (MS MARCO);
            100 makes harder negatives of a small corpus.
        seed: the seed.
        index: BM25 over this corpus, when there is one already; built with its defaults otherwise.
        unlabelled: query id to text of questions without judgements.
        candidates: a run of these and other queries, scores are logits; the best passages of its queries, instead of
            BM25's, are what negatives are sampled from.
        without: unlabelled questions that are sentences of passages, query id to where it comes from: the passage
            without the sentence is the positive, whatever else is found.

    Returns:
        One row a (query, positive): query, positive, negative, query_id, positive_id, negative_id,
        known_positive_ids (all of the query). With several negatives, negative_1, negative_2, ... and negative_1_id,
        negative_2_id, ... in place of negative and negative_id. With unlabelled questions there is also a column
        labelled, false in their rows, and with their candidates a column label_weight: 1 for a judged positive, the
        softmax of the first candidate for a pseudo-positive.

    Raises:
        ValueError: a setting out of range, a query or passage that judgements name and the data lack, an index over
            another corpus, neither a positive nor an unlabelled question, a query id in both, or a corpus too small
            for so many negatives.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset

    from tct_hf.retrieval.bm25 import BM25Index
    from tct_hf.retrieval.runs import rank

    if num_negatives < 1 or depth < 1:
        raise ValueError(f"num_negatives={num_negatives}, depth={depth}: both must be 1 or more")
    ids = passage_ids(corpus)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    unlabelled = unlabelled or {}
    positives = positive_rows(queries, qrels, row_of) if qrels or not unlabelled else {}
    if both := [query_id for query_id in unlabelled if query_id in positives]:
        raise ValueError(f"unlabelled: query {both[0]!r} has positives in qrels; leave it out of one of them")
    if index is None:
        index = BM25Index.build((row["text"] for row in corpus.select_columns("text")), ids)
    elif len(index) != len(ids) or any(passage_id not in row_of for passage_id in index.ids):
        raise ValueError(
            f"index: its {len(index)} passages are not the corpus's {len(ids)}; build it from this corpus"
        )
    types = {"known_positive_ids": pa.list_(pa.string()), "labelled": pa.bool_(), "label_weight": pa.float32()}
    names = column_names(num_negatives)
    if unlabelled:
        names += ["labelled"] if candidates is None else ["labelled", "label_weight"]
    candidates = candidates or {}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    sampler = _Sampler(corpus, ids, num_negatives, seed)
    texts = {**{query_id: queries[query_id] for query_id in positives}, **unlabelled}
    asked = list(texts)
    batches = []
    for start in range(0, len(asked), _QUERIES_A_BATCH):
        part = asked[start : start + _QUERIES_A_BATCH]
        searched = [query_id for query_id in part if query_id not in candidates]
        found, _ = index.search_rows([texts[query_id] for query_id in searched], depth)
        best = {name: [row_of[index.ids[hit]] for hit in hits] for name, hits in zip(searched, found, strict=True)}
        rows: list[tuple[Any, ...]] = []
        for query_id in part:
            ranked = rank(candidates.get(query_id, {}))
            hits = best[query_id] if query_id in best else [row_of[passage_id] for passage_id, _ in ranked[:depth]]
            if without and query_id in without:
                rows.append(
                    (
                        *sampler.made_row(query_id, without[query_id], row_of[without[query_id].passage_id], hits),
                        False,
                        1.0,
                    )[: len(names)]
                )
            elif query_id in unlabelled:
                row = sampler.unlabelled_row(query_id, texts[query_id], hits)
                rows.append((*row, False, _softmax_of_first([score for _, score in ranked]))[: len(names)])
            else:
                made = sampler.rows(query_id, texts[query_id], positives[query_id], hits)
                rows.extend((*row, True, 1.0)[: len(names)] for row in made)
        columns = zip(*rows, strict=True)
        batches.append(
            pa.record_batch(
                [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
            )
        )
    return Dataset(pa.Table.from_batches(batches, schema))


def _softmax_of_first(scores: Sequence[float]) -> float:
    """How sure a teacher is of the first of its candidates; 0 where it has none."""
    return 1 / sum(math.exp(score - scores[0]) for score in scores) if scores else 0.0


def column_names(num_negatives: int) -> list[str]:
    """Name the columns of triples with this many negatives a row.

    Args:
        num_negatives: negatives a row, at least one.

    Returns:
        The names, in the order of `bm25_triples`.
    """
    negatives = ["negative"] if num_negatives == 1 else [f"negative_{place + 1}" for place in range(num_negatives)]
    return [
        "query",
        "positive",
        *negatives,
        "query_id",
        "positive_id",
        *(f"{name}_id" for name in negatives),
        "known_positive_ids",
    ]


class _Sampler:
    def __init__(self, corpus: Dataset, ids: Sequence[str], num_negatives: int, seed: int) -> None:
        self._texts = corpus.select_columns("text")
        self._ids = ids
        self._num_negatives = num_negatives
        self._seed = seed

    def _text(self, row: int) -> str:
        text: str = self._texts[row]["text"]
        return text

    def rows(
        self, query_id: str, query: str, positive_rows: Sequence[int], candidates: Sequence[int]
    ) -> Iterator[tuple[Any, ...]]:
        positive_texts = {row: self._text(row) for row in positive_rows}
        known = [self._ids[row] for row in positive_rows]
        for row in positive_texts:
            yield self._row(query_id, query, row, positive_texts, candidates, known)

    def unlabelled_row(self, query_id: str, query: str, candidates: Sequence[int]) -> tuple[Any, ...]:
        # A question of which BM25 knows no word gets random passages: the teacher scores those as well.
        best = candidates[0] if candidates else random.Random(f"{self._seed}\x1f{query_id}").randrange(len(self._ids))
        return self._row(query_id, query, best, {best: self._text(best)}, candidates, [])

    def made_row(self, query_id: str, made: MadeQuestion, own: int, candidates: Sequence[int]) -> tuple[Any, ...]:
        others = [row for row in candidates if row != own]
        return self._row(query_id, made.text, own, {own: made.rest}, others, [made.passage_id])

    def _row(
        self,
        query_id: str,
        query: str,
        positive: int,
        positives: Mapping[int, str],
        candidates: Sequence[int],
        known: list[str],
    ) -> tuple[Any, ...]:
        draw = row_generator(self._seed, query_id, self._ids[positive])
        negatives = self._negatives(draw, query_id, positives, candidates)
        return (
            query,
            positives[positive],
            *(text for _, text in negatives),
            query_id,
            self._ids[positive],
            *(self._ids[negative] for negative, _ in negatives),
            known,
        )

    def _negatives(
        self, draw: random.Random, query_id: str, positives: Mapping[int, str], candidates: Sequence[int]
    ) -> list[tuple[int, str]]:
        taken = {_normal(text) for text in positives.values()}
        chosen: list[tuple[int, str]] = []
        for row in self._order(draw, candidates):
            text = self._text(row)
            if row not in positives and _normal(text) not in taken:
                taken.add(_normal(text))
                chosen.append((row, text))
                if len(chosen) == self._num_negatives:
                    return chosen
        raise ValueError(
            f"corpus: query {query_id!r} has only {len(chosen)} passages that differ from its positives and from one "
            f"another, and num_negatives is {self._num_negatives}; lower it or add passages"
        )

    def _order(self, draw: random.Random, candidates: Sequence[int]) -> Iterator[int]:
        """BM25's candidates in random order, then random passages, in the end every passage."""
        yield from draw.sample(list(candidates), len(candidates))
        yield from random_rows(draw, len(self._ids), 100 * self._num_negatives)


def passage_ids(corpus: Dataset) -> list[str]:
    """The ids of a corpus.

    Args:
        corpus: columns id and text.

    Raises:
        ValueError: one of the columns is missing.
    """
    missing = [name for name in ("id", "text") if name not in corpus.column_names]
    if missing:
        raise ValueError(f"corpus: column {missing[0]!r} is missing; it has {', '.join(corpus.column_names)}")
    ids: list[str] = corpus["id"][:]
    return ids


def row_generator(seed: int, query_id: str, positive_id: str) -> random.Random:
    """The generator of one row's negatives, so that a row does not depend on which others are asked for."""
    # A string seed goes through SHA-512: the same numbers on every platform and in every process.
    return random.Random(f"{seed}\x1f{query_id}\x1f{positive_id}")


def random_rows(draw: random.Random, total: int, tries: int) -> Iterator[int]:
    """Random rows of a corpus, in the end every one; a row may come more than once.

    Args:
        draw: the generator.
        total: passages in the corpus.
        tries: of a large corpus, draws before all of its rows are put in order.
    """
    if total > 10_000:
        for _ in range(tries):
            yield draw.randrange(total)
    yield from draw.sample(range(total), total)


def positive_rows(
    queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]], row_of: Mapping[str, int]
) -> dict[str, list[int]]:
    """The positives of each query that has any, as rows of the corpus.

    Args:
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive.
        row_of: passage id to row.

    Raises:
        ValueError: a query or passage that judgements name and the data lack, or no positive at all.
    """
    found: dict[str, list[int]] = {}
    for query_id, grades in qrels.items():
        wanted = [passage_id for passage_id, grade in grades.items() if grade >= 1]
        if not wanted:
            continue
        if query_id not in queries:
            raise ValueError(f"qrels: query {query_id!r} is not among the queries; load both from the same split")
        for passage_id in wanted:
            if passage_id not in row_of:
                raise ValueError(
                    f"qrels: passage {passage_id!r} (query {query_id!r}) is not in the corpus; load both together"
                )
        found[query_id] = [row_of[passage_id] for passage_id in wanted]
    if not found:
        raise ValueError("qrels: no positive judgement, so there is no triple to make; check the split")
    return found


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def collection_bm25(collection: Collection) -> BM25Index:
    """The BM25 index of a collection's corpus, built once."""
    from tct_hf.retrieval.bm25 import BM25Index

    if collection.index is None:
        collection.index = BM25Index.build(collection.corpus["text"], collection.corpus["id"])
    return collection.index


def collection_triples(
    collection: Collection,
    *,
    num_negatives: int,
    depth: int,
    seed: int,
    labels: float = 1.0,
    unlabelled: bool = False,
    max_questions: int | None = None,
    candidates: Mapping[str, Mapping[str, float]] | None = None,
) -> Dataset:
    """Training triples of a collection with negatives that are no known positives; see `bm25_triples`.

    Args:
        collection: whose train split and questions they are made of.
        num_negatives: negatives a row.
        depth: BM25 ranks they are sampled from.
        seed: of the sample.
        labels: share of the train queries whose judgements are used, 0 to 1; the same ones whatever the seed.
        unlabelled: also give rows of the other train queries and of `questions`, without labels.
        max_questions: at most so many of these.
        candidates: the best passages of some queries, instead of BM25's.

    Raises:
        ValueError: there is nothing to train on.
    """
    train = collection.splits.get("train", Split({}, {}))
    labelled = collection.labelled(labels)
    others = collection.unjudged(labels, max_questions) if unlabelled else {}
    if not labelled and not others:
        raise ValueError(
            f"{collection.name}: no train query has a label (data.labels is {labels}), and "
            + (
                "there is no question without one either: give a file of them as data.questions."
                if unlabelled
                else "unlabelled questions are not asked for: set data.unlabelled, or raise data.labels."
            )
        )
    return bm25_triples(
        collection.corpus,
        train.queries,
        labelled,
        num_negatives=num_negatives,
        depth=depth,
        seed=seed,
        index=collection_bm25(collection),
        unlabelled=others,
        candidates=candidates,
        without=collection.made,
    )
