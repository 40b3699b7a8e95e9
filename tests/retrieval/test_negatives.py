from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset

from tct_hf import BM25Index, bm25_triples, load_triples, mine_triples

TEXTS = {
    "apple": "apple tree fruit garden",
    "apple2": "apple pie with cream",
    "copy": "Apple  tree, fruit GARDEN!",
    "pear": "pear tree fruit orchard",
    "plum": "plum tree fruit jam",
    "car": "engine wheel motor road",
    "boat": "sail river harbour water",
}
QUERIES = {"q1": "apple fruit", "q2": "tree fruit", "q3": "zebra", "q4": "never judged positive"}
QRELS = {"q1": {"apple": 1, "apple2": 2, "car": 0}, "q2": {"pear": 1}, "q3": {"boat": 1}, "q4": {"car": 0}}


def corpus(texts: dict[str, str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def index(texts: dict[str, str] = TEXTS) -> BM25Index:
    return BM25Index.build(texts.values(), texts.keys(), backend="numpy")


def triples(**options: object) -> list[dict]:
    settings: dict = {"seed": 1, "index": index(), **options}
    return list(bm25_triples(corpus(), QUERIES, QRELS, **settings))


def test_one_row_for_each_query_and_positive_with_all_known_positives() -> None:
    rows = triples()
    pairs = [(row["query_id"], row["positive_id"]) for row in rows]
    assert pairs == [("q1", "apple"), ("q1", "apple2"), ("q2", "pear"), ("q3", "boat")]
    assert rows[0]["known_positive_ids"] == ["apple", "apple2"]
    for row in rows:
        assert row["query"] == QUERIES[row["query_id"]]
        assert row["positive"] == TEXTS[row["positive_id"]] and row["negative"] == TEXTS[row["negative_id"]]
    for row in [row for seed in range(6) for row in triples(seed=seed, num_negatives=2)]:
        negatives = {row["negative_1_id"], row["negative_2_id"]}
        assert len(negatives) == 2 and not negatives & set(row["known_positive_ids"])
        assert row["query_id"] != "q1" or "copy" not in negatives


def test_negatives_come_from_the_best_passages_and_random_ones_fill_up() -> None:
    rows = [row for seed in range(30) for row in triples(seed=seed)]
    # Three passages besides the positive hold a query word (two of them with the same text).
    assert {row["negative_id"] for row in rows if row["query_id"] == "q2"} == {"apple", "copy", "plum"}
    assert {row["negative_id"] for row in rows if row["query_id"] == "q3"} == set(TEXTS) - {"boat"}
    nearest = {row["negative_id"] for seed in range(12) for row in triples(seed=seed, depth=2)[2:3]}
    assert len(nearest) < 3


def test_a_row_does_not_depend_on_order_or_on_other_queries() -> None:
    whole = triples()
    for texts in (TEXTS, dict(reversed(TEXTS.items()))):
        [alone] = bm25_triples(corpus(texts), QUERIES, {"q2": {"pear": 1}}, seed=1, index=index(texts))
        assert alone == whole[2]
    rows = with_questions()
    judged = [{key: row[key] for key in row if key != "labelled"} for row in rows if row["labelled"]]
    assert judged == whole and "labelled" not in whole[0]
    for row in rows[len(judged) :]:
        asked = {row["query_id"]: row["query"]}
        assert list(bm25_triples(corpus(), {}, {}, seed=1, index=index(), unlabelled=asked)) == [row]


def test_wrong_arguments_and_judgements_are_named() -> None:
    for qrels, options, message in (
        ({"q9": {"apple": 1}}, {}, "query 'q9' is not among the queries"),
        ({"q1": {"nothing": 1}}, {}, "passage 'nothing'.*not in the corpus"),
        ({"q1": {"apple": 0}}, {}, "no positive judgement"),
        ({}, {"unlabelled": {}}, "no positive judgement"),
        (QRELS, {"unlabelled": {"u1": "a", "q1": "b"}}, r"unlabelled: query 'q1' has positives in qrels; leave"),
        (QRELS, {"num_negatives": 0}, "num_negatives=0"),
        (QRELS, {"index": index({"apple": "apple"})}, "build it from this corpus"),
        # q1 leaves pear, plum, car and boat: the two positives and the copy of one are out.
        (QRELS, {"num_negatives": 5}, r"query 'q1' has only 4 passages.*num_negatives is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            bm25_triples(corpus(), QUERIES, qrels, **{"seed": 1, "index": index(), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (corpus().rename_column("text", "body"), "column 'text' is missing"),
        (list(corpus()), "a list where a Dataset"),
        (Dataset.from_dict({"id": ["a", "b"], "text": ["x", None]}), "the text of row 1 is missing"),
        (Dataset.from_dict({"id": ["a", None], "text": ["x", "y"]}), "the id of row 1 is missing"),
        (Dataset.from_dict({"id": ["a", "b", "a"], "text": ["x", "y", "z"]}), "'a' comes twice"),
        (Dataset.from_dict({"id": [1, 2, 1], "text": ["x", "y", "z"]}), "'1' comes twice"),
    ],
)
def test_a_corpus_that_names_no_passages_is_refused(mined: bool, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^(corpus|ids): .*{message}"):
        if mined:
            mine_triples({"q1": {"pear": 1.0}}, given, QUERIES, QRELS, origin="a run", seed=1)  # type: ignore[arg-type]
        else:
            bm25_triples(given, QUERIES, QRELS, seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [None, "arrow", "numpy", "pandas", "int"])
def test_a_corpus_of_any_format_or_with_numbers_as_ids_gives_the_same_rows(form: str | None) -> None:
    given = Dataset.from_dict({"id": list(map(str, range(len(TEXTS)))), "text": list(TEXTS.values())})
    qrels = {"q1": {"0": 1}, "q2": {"3": 1}}
    plain = list(bm25_triples(given, QUERIES, qrels, seed=1, num_negatives=2))
    numbers = Dataset.from_dict({"id": list(range(len(TEXTS))), "text": list(TEXTS.values())})
    made = numbers if form == "int" else given.with_format(form)
    assert list(bm25_triples(made, QUERIES, qrels, seed=1, num_negatives=2)) == plain
    run = {name: {str(at): float(-at) for at in range(7)} for name in qrels}
    mined = [list(mine_triples(run, one, QUERIES, qrels, origin="a run", seed=1)) for one in (given, made)]
    assert mined[0] == mined[1]


QUESTIONS = {"u1": "plum jam on a tree", "u2": "quagga", "q4": "pear orchard"}


def with_questions(questions: dict[str, str] = QUESTIONS, **options: object) -> list[dict]:
    return triples(unlabelled=questions, **options)


def test_a_question_without_judgements_has_bm25s_best_passage_or_any_as_its_positive() -> None:
    rows = {row["query_id"]: row for row in with_questions() if not row["labelled"]}
    assert list(rows) == list(QUESTIONS) and (rows["u1"]["positive_id"], rows["q4"]["positive_id"]) == ("plum", "pear")
    for name, row in rows.items():
        assert row["query"] == QUESTIONS[name] and row["known_positive_ids"] == []
        assert row["positive"] == TEXTS[row["positive_id"]] and row["negative"] == TEXTS[row["negative_id"]]
    # Of u2 BM25 knows no word: it has the same two passages whatever else is asked for.
    assert rows["u2"]["positive_id"] != rows["u2"]["negative_id"]
    assert rows["u2"] in with_questions({"u2": QUESTIONS["u2"]})
    unknown = [row for seed in range(30) for row in with_questions(seed=seed) if row["query_id"] == "u2"]
    assert len({row["positive_id"] for row in unknown}) > 3


@pytest.mark.parametrize("depth", [3, 100])
def test_negatives_of_a_question_without_judgements_are_ranked_below_its_positive(depth: int) -> None:
    ranked = list(index().run({"u1": QUESTIONS["u1"]}, 100)["u1"])
    assert ranked[0] == "plum" and len(ranked) == 4
    rows = [row for seed in range(12) for row in with_questions(seed=seed, depth=depth) if row["query_id"] == "u1"]
    assert {row["negative_id"] for row in rows} == set(ranked[1:depth])


def test_the_first_candidate_of_an_unlabelled_question_is_a_positive_as_sure_as_its_softmax() -> None:
    candidates = {"u1": {"boat": 1.0, "plum": 3.0, "car": 2.0}, "q2": {"boat": 2.0, "pear": 1.0, "car": 0.5}}
    questions = {"u1": "apple tree", "u2": "pear orchard"}
    rows = triples(unlabelled=questions, candidates=candidates, num_negatives=2)
    by_query = {row["query_id"]: row for row in rows}
    pseudo, judged = by_query["u1"], by_query["q2"]
    assert pseudo["positive_id"] == "plum" and not pseudo["labelled"]
    assert {pseudo["negative_1_id"], pseudo["negative_2_id"]} == {"car", "boat"}
    assert pseudo["label_weight"] == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)))
    # A question without candidates has BM25's, and no positive; a judged one counts whole.
    assert by_query["u2"]["positive_id"] == "pear" and by_query["u2"]["label_weight"] == 0.0
    assert judged["labelled"] and judged["label_weight"] == 1.0
    assert {judged["negative_1_id"], judged["negative_2_id"]} == {"boat", "car"}
    assert "label_weight" not in triples(candidates=candidates)[0]


# ArguAna and Quora: the queries are passages of the collection, under their own ids.
ITSELF = {
    **TEXTS,
    "q1": "Garden: apple tree fruit",  # with a title before the query's own text
    "same": "Apple, tree; fruit!",
    "titled": "Orchard. Apple tree fruit",  # under another id too, where the title is known
    "howto": "How to pick an apple tree fruit",  # another text
}


@pytest.mark.parametrize(
    ("make", "qrels"),
    [
        *product(
            ["bm25", "mined", "candidates"],
            [{"q1": {"apple": 1}}, {"q1": {"apple": 1, "q1": 1}}, {"q1": {"apple": 1, "same": 1}}],
        ),
        *product(["bm25", "candidates"], [None]),  # mining takes judged queries only
    ],
)
def test_a_passage_that_is_the_query_itself_is_neither_a_negative_nor_a_positive(
    tmp_path: Path, make: str, qrels: dict
) -> None:
    titles = ["Orchard." if name == "titled" else None for name in ITSELF]
    asked, of_texts = {"q1": "apple tree fruit"}, corpus(ITSELF).add_column("title", titles)
    names = ["same", "titled", "q1", "apple", "pear", "plum", "howto"]
    ranked = {name: 9.0 - place for place, name in enumerate(names)}
    options: dict = {"num_negatives": 3, "seed": 1}
    if make == "mined":
        rows = mine_triples({"q1": ranked}, of_texts, asked, qrels, origin="a run", depth=6, **options)
    else:
        options |= {"candidates": {"q1": ranked} if make == "candidates" else None, "index": index(ITSELF)}
        unlabelled = asked if qrels is None else {}
        rows = bm25_triples(of_texts, asked, qrels or {}, unlabelled=unlabelled, **options)
    [row] = list(rows)
    assert row["positive_id"] in ("apple", "copy")
    if make == "mined":
        assert "howto" in [row[f"negative_{n}_id"] for n in (1, 2, 3)]
    if qrels is not None:
        assert len(load_triples(Dataset.from_list([row]), cache_dir=tmp_path)) == 1
    assert not {row[f"negative_{n}_id"] for n in (1, 2, 3)} & {"q1", "same", "titled", "apple", "copy"}
    if qrels is None and make == "candidates":
        assert row["label_weight"] == pytest.approx(1 / sum(math.exp(-at) for at in range(4)))


@pytest.mark.parametrize("asked", [{"q1": "half \ud800"}, {"q\ud800": "apple"}, {"q1": None}])
@pytest.mark.parametrize("mined", [False, True])
def test_a_query_that_is_no_text_is_named(mined: bool, asked: dict) -> None:
    [name] = asked
    with pytest.raises(ValueError, match=r"query .*, column '(id|text)': (half a surrogate|no text)"):
        if mined:
            mine_triples({name: {"pear": 1.0}}, corpus(), asked, {name: {"apple": 1}}, origin="a run", seed=1)
        else:
            candidates = {name: {"pear": 1.0}}
            bm25_triples(corpus(), asked, {name: {"apple": 1}}, seed=1, index=index(), candidates=candidates)


def test_passages_and_queries_that_are_numbered_each_for_themselves_share_no_ids() -> None:
    texts = {"1": "apple tree fruit", "2": "pear tree", "3": "plum tree", "4": "car road"}
    asked = {"1": "apple", "2": "pear", "3": "plum"}
    made = bm25_triples(corpus(texts), asked, {name: {name: 1} for name in asked}, seed=1, index=index(texts))
    assert made["positive_id"][:] == ["1", "2", "3"]
