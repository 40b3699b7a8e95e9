"""Training triples with lexical negatives: the first round of every first-stage retriever."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tct_hf.data.collection import Collection, MadeQuestion, Split
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.miner import Judged, Miner, OpenRow, Rules, column_names
from tct_hf.retrieval.runs import rank
from tct_hf.retrieval.words import LANGUAGE, STEMMER

if TYPE_CHECKING:
    from datasets import Dataset

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
    language: str = LANGUAGE,
    stemmer: str | None = STEMMER,
    unlabelled: Mapping[str, str] | None = None,
    candidates: Mapping[str, Mapping[str, float]] | None = None,
    without: Mapping[str, MadeQuestion] | None = None,
) -> Dataset:
    """Pair every query and positive with negatives sampled from BM25's best passages.

    A negative is never a known positive of its query, nor the same text as one, and no two negatives of a row have
    the same text. A passage that is the query itself, by id or text, is neither a negative nor a positive. Where BM25
    finds too few, random passages under the same rule fill up. A row does not depend on which others are asked for.

    Questions without judgements give rows too, for a teacher to say what their passages are worth: the best passage
    stands in column positive, and the negatives are sampled from the next best.

    Args:
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        num_negatives: negatives a row.
        depth: how many of BM25's best passages to sample from. The paper's triples use the top 1000 (MS MARCO);
            100 makes harder negatives of a small corpus.
        seed: the seed.
        index: BM25 over this corpus, when there is one already; built with its defaults otherwise.
        language: of the index that is built; see `BM25Index.build`.
        stemmer: of the index that is built; see `BM25Index.build`.
        unlabelled: query id to text of questions without judgements.
        candidates: a run whose scores are a teacher's logits, instead of BM25's best for the queries it has; the first
            passage of an unlabelled question is then a pseudo-positive that counts as much as the teacher is sure.
        without: unlabelled questions that are sentences of passages, query id to where it comes from: the passage
            without the sentence is the positive, whatever else is found.

    Returns:
        One row a (query, positive): query, positive, negative, query_id, positive_id, negative_id,
        known_positive_ids (all of the query); with several negatives, negative_1, negative_1_id and so on. With
        unlabelled questions also labelled, false in their rows, and with their candidates label_weight: 1 for a judged
        positive, the softmax of the first candidate for a pseudo-positive.

    Raises:
        ValueError: a setting out of range, a query or passage that judgements name and the data lack, an index over
            another corpus, neither a positive nor an unlabelled question, a query id in both, or a corpus too small
            for so many negatives.
    """
    from datasets import Dataset  # slow to import

    rules = Rules(num_negatives, max(depth, num_negatives), seed)
    unlabelled, without = unlabelled or {}, without or {}
    judged = Judged.of(corpus, queries, qrels, may_be_none=bool(unlabelled))
    ids, row_of, positives = judged.ids, judged.row_of, judged.positives
    if both := [query_id for query_id in unlabelled if query_id in positives]:
        raise ValueError(f"unlabelled: query {both[0]!r} has positives in qrels; leave it out of one of them")
    if index is None:
        passages = (row["text"] for row in judged.corpus)
        index = BM25Index.build(passages, ids, language=language, stemmer=stemmer)
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
    texts = {**{query_id: queries[query_id] for query_id in positives}, **unlabelled}
    texts |= {query_id: made.text for query_id, made in without.items() if query_id in texts}
    asked = list(texts)
    batches = []
    for start in range(0, len(asked), _QUERIES_A_BATCH):
        part = asked[start : start + _QUERIES_A_BATCH]
        found = index.run({query_id: texts[query_id] for query_id in part if query_id not in candidates}, depth)
        found |= {query_id: dict(rank(candidates[query_id])[:depth]) for query_id in part if query_id in candidates}
        miner = Miner(judged, rules, {name: texts[name] for name in part})
        miner.read({row_of[passage_id] for hits in found.values() for passage_id in islice(hits, 1)})
        opened: list[OpenRow] = []
        for query_id in part:
            best = {row_of[passage_id]: score for passage_id, score in found[query_id].items()}
            text = None
            if query_id in without:
                own, text = [row_of[without[query_id].passage_id]], without[query_id].rest
                best.pop(own[0], None)
            elif query_id in positives:
                own = positives[query_id]
            else:
                # A question of which BM25 knows no word gets random passages: the teacher scores those as well.
                draw = random.Random(f"{seed}\x1f{query_id}")
                others = chain(best, (draw.randrange(len(ids)) for _ in range(100)))
                own = list(islice((row for row in others if not miner.is_query(query_id, row)), 1))
            opened += [OpenRow(query_id, row, own, best, text) for row in own]
        rows: list[dict[str, Any]] = []
        for row in miner.choose(opened):
            made = {**miner.triple(row), "labelled": row.query_id in positives, "label_weight": 1.0}
            if row.query_id not in positives and row.query_id not in without:
                ranked = [(row_of[name], score) for name, score in rank(candidates.get(row.query_id, {}))]
                miner.read({passage for passage, _ in ranked})
                scores = [score for passage, score in ranked if not miner.is_query(row.query_id, passage)]
                made |= {"known_positive_ids": [], "label_weight": _softmax_of_first(scores)}
            rows.append(made)
        batches.append(pa.RecordBatch.from_pylist(rows, schema))
    return Dataset(pa.Table.from_batches(batches, schema))


def _softmax_of_first(scores: Sequence[float]) -> float:
    """How sure a teacher is of the first of its candidates; 0 where it has none."""
    return 1 / sum(math.exp(score - scores[0]) for score in scores) if scores else 0.0


def collection_bm25(collection: Collection) -> BM25Index:
    """The BM25 index of a collection's corpus, built once."""
    if collection.index is None:
        collection.index = BM25Index.build(collection.corpus["text"], collection.corpus["id"], **collection.words)
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
    """Training triples of a collection's train split and questions, as `bm25_triples` makes them.

    Args:
        collection: the collection.
        num_negatives: negatives a row.
        depth: BM25 ranks they are sampled from.
        seed: of the sample.
        labels: share of the train queries whose judgements are used, 0 to 1; the same ones whatever the seed.
        unlabelled: also give rows of the other train queries and of the questions, without labels.
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
            f"{collection.name}: no train query has a label (data.labels is {labels}), and there is no question "
            "without one: raise data.labels, or set data.unlabelled and give a file as data.questions."
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
