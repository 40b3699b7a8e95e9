from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from tct_hf.data.collection import Collection, load_collection
from tct_hf.data.made_questions import questions_from
from tct_hf.retrieval.negatives import collection_triples

TEXTS = {
    "a": "Sorting an array. This function sorts the values of an array in place. It returns nothing.",
    "b": "Too short.",
    "c": "Only one sentence of eight words stands here",
    "d": "x = [1, 2, 3, 4]; y = {5: 6}. The median of all values is computed along one axis.",
}


def corpus() -> Dataset:
    return Dataset.from_dict({"id": list(TEXTS), "text": list(TEXTS.values())})


def test_a_question_is_a_sentence_that_its_passage_no_longer_holds() -> None:
    made = {one.passage_id: one for one in questions_from(corpus(), 10, seed=1)}
    assert set(made) == {"a", "d"}
    assert made["a"].text == "This function sorts the values of an array in place."
    assert made["a"].rest == "Sorting an array. It returns nothing."
    assert made["d"].text == "The median of all values is computed along one axis."
    assert list(questions_from(corpus(), 1, seed=1)) == list(questions_from(corpus(), 10, seed=1))[:1]


def test_a_title_long_enough_is_the_question_and_leaves_its_passage() -> None:
    titles = ["How arrays are sorted", "Too short", ""]
    bodies = ["The values all stay in place. It returns nothing.", "The median is computed along one axis.", ""]
    texts = [f"{title} {body}".strip() for title, body in zip(titles, bodies, strict=True)]
    corpus = Dataset.from_dict({"id": ["a", "b", "c"], "title": titles, "text": texts})
    (made,) = questions_from(corpus, 10, seed=1)  # b would keep two words
    assert (made.passage_id, made.text, made.rest) == ("a", titles[0], bodies[0])
    (made,) = questions_from(corpus, 10, seed=1, without=["how arrays are sorted?"])
    assert (made.text, made.rest) == ("The values all stay in place.", "How arrays are sorted It returns nothing.")


def test_titles_reach_the_collection_of_a_beir_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    row = {"_id": "d1", "title": "How arrays are sorted", "text": "The values stay where they are."}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row) + "\n")
    collection = load_collection(str(tmp_path), required=())
    collection.make_questions(5, seed=0)
    assert collection.questions == {"made-d1": "How arrays are sorted"}
    assert collection.made["made-d1"].rest == "The values stay where they are."


def test_rows_of_made_questions_learn_from_the_rest_of_their_passage() -> None:
    collection = Collection("made", corpus(), {}, {})
    collection.make_questions(10, seed=1)
    candidates = {name: {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.5} for name in collection.questions}
    rows = collection_triples(
        collection, num_negatives=1, depth=10, seed=0, labels=0.0, unlabelled=True, candidates=candidates
    )
    by_passage = {row["positive_id"]: row for row in rows}
    assert set(by_passage) == {"a", "d"}
    assert by_passage["a"]["positive"] == "Sorting an array. It returns nothing."
    assert by_passage["a"]["negative_id"] != "a" and by_passage["a"]["label_weight"] == 1.0
    assert not by_passage["a"]["labelled"]


def test_so_many_unlabelled_questions_are_the_same_ones_whatever_else_is_asked_for() -> None:
    collection = Collection("made", corpus(), {}, {}, questions={f"q{number}": "a b" for number in range(50)})
    ten = collection.unjudged(most=10)
    assert len(ten) == 10 and set(ten) < set(collection.unjudged(most=20)) < set(collection.unjudged())
