from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tct_hf.data.collection import Collection, Split, load_collection, questions_from
from tct_hf.pipeline.data import read_collection
from tct_hf.pipeline.settings import DataSettings
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.negatives import collection_bm25, collection_triples
from tests.recipe import write_beir


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "beir", passages=20, train=6, dev=3, test=4)


def test_splits_go_by_their_use_and_may_be_missing_where_they_are_not_required(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").rename(beir / "qrels" / "validation.tsv")
    found = load_collection(str(beir), dev_split="validation")
    assert {name: len(split.queries) for name, split in found.splits.items()} == {"train": 6, "dev": 3, "test": 4}
    assert found.splits["dev"].qrels.keys() == found.splits["dev"].queries.keys()
    assert found.summary() == f"{beir}: 20 passages; queries: 6 train, 3 dev, 4 test"
    assert "dev" not in load_collection(str(beir), dev_split=None).splits
    (beir / "qrels" / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="splits there: test, validation"):
        load_collection(str(beir), dev_split=None)
    assert list(load_collection(str(beir), required=["test"]).splits) == ["test"]
    for name in ("qrels/validation.tsv", "qrels/test.tsv", "queries.jsonl"):
        (beir / name).unlink()
    alone = load_collection(str(beir), required=())
    assert alone.splits == {} and len(alone.corpus) == alone.fingerprint["passages"] == 20


def test_wrong_paths_and_splits_and_missing_queries_are_errors_even_where_nothing_is_required(beir: Path) -> None:
    def refused(error: type[Exception], message: str, source: Path = beir, **options: Any) -> None:
        with pytest.raises(error, match=message):
            load_collection(str(source), required=(), **options)

    refused(ValueError, "must not be chosen on the queries that are reported", dev_split="test")
    refused(FileNotFoundError, "no such folder", beir / "nothing")
    refused(FileNotFoundError, r"no tets\.tsv.*splits there: dev, test, train", test_split="tets")
    with pytest.raises(FileNotFoundError, match=r"no tets\.tsv"):
        read_collection(DataSettings(source=str(beir), labels=0.0, test_split="tets"), train=False)
    (beir / "queries.jsonl").unlink()
    refused(FileNotFoundError, r"neither queries\.jsonl nor")
    (beir / "qrels" / "train.tsv").write_text("only one field\n")
    refused(ValueError, r"train\.tsv, line 1")


def test_the_index_is_built_once_and_triples_use_it(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_collection(str(beir))
    index = collection_bm25(found)
    monkeypatch.setattr(BM25Index, "build", None)
    assert collection_bm25(found) is index
    rows = collection_triples(found, num_negatives=2, depth=10, seed=1)
    assert len(rows) == 6 and {"negative_1", "negative_2_id", "known_positive_ids"} <= set(rows.column_names)
    assert set(rows["query_id"]) == set(found.splits["train"].queries)


def test_the_fingerprint_depends_on_texts_and_judgements_alone(beir: Path, tmp_path: Path) -> None:
    first = load_collection(str(beir)).fingerprint
    same = write_beir(tmp_path / "same", passages=20, train=6, dev=3, test=4)
    assert load_collection(str(same)).fingerprint == first
    assert first["passages"] == 20 and first["queries"] == {"train": 6, "dev": 3, "test": 4}

    lines = (same / "qrels" / "test.tsv").read_text().splitlines()
    (same / "qrels" / "test.tsv").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "2"]) + "\n")
    regraded = load_collection(str(same)).fingerprint
    with (same / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "more", "title": "", "text": "one more"}) + "\n")
    longer = load_collection(str(same)).fingerprint
    assert len({print_["sha256"] for print_ in (first, regraded, longer)}) == 3


def test_the_built_in_corpus_comes_with_its_own_fingerprint() -> None:
    found = load_collection("builtin", packages=["bm25s"])
    assert found.name == "built-in API docs" and list(found.splits) == ["train", "dev", "test"]
    assert "sha256" in found.fingerprint and "bm25s" in json.dumps(found.fingerprint)


@pytest.fixture
def larger(tmp_path: Path) -> Collection:
    return load_collection(str(write_beir(tmp_path / "larger", passages=60, train=32, dev=6, test=8)))


def labelled(rows: Any) -> set[str]:
    flags = rows["labelled"] if "labelled" in rows.column_names else [True] * len(rows)
    return {name for name, flag in zip(rows["query_id"], flags, strict=True) if flag}


def made(collection: Collection, labels: float, **options: Any) -> Any:
    return collection_triples(collection, **{"num_negatives": 1, "depth": 10, "seed": 1, "labels": labels, **options})


def test_the_queries_of_a_share_of_labels_are_among_those_of_a_larger_share(larger: Collection) -> None:
    larger.questions = {"more": "dense retrieval"}
    train = larger.splits["train"].queries.keys()
    shares = [made(larger, share, unlabelled=True) for share in (0.0, 0.25, 0.5, 1.0)]
    assert [len(labelled(rows)) for rows in shares] == [0, 8, 16, 32]
    assert labelled(shares[1]) < labelled(shares[2]) < labelled(shares[3])
    assert all(set(rows["query_id"]) == train | {"more"} for rows in shares)
    alone = made(larger, 0.25)
    assert set(alone["query_id"]) == labelled(alone) == labelled(made(larger, 0.25, seed=2)) == labelled(shares[1])
    none = (0.0, r"no train query has a label \(data.labels is 0.0\).*set data.unlabelled")
    for share, message in (none, (1.5, r"A share of 1.5 .*from 0 to 1")):
        with pytest.raises(ValueError, match=message):
            made(larger, share)
    larger.questions = {}
    del larger.splits["train"]
    with pytest.raises(ValueError, match=r"give a file as data\.questions"):
        made(larger, 0.0, unlabelled=True)


def test_judgements_of_an_unlabelled_query_change_no_row(larger: Collection) -> None:
    before = list(made(larger, 0.25, unlabelled=True))
    few = labelled(made(larger, 0.25))
    train = larger.splits["train"]
    for others in ({"p0": 1, "p1": 2}, {"p0": 0}, None):
        qrels = {name: grades if name in few else others for name, grades in train.qrels.items()}
        larger.splits["train"] = Split(train.queries, {name: grades for name, grades in qrels.items() if grades})
        assert list(made(larger, 0.25, unlabelled=True)) == before


def test_a_part_keeps_relevant_passages_and_a_number_of_queries_of_each_split(larger: Collection) -> None:
    larger.questions = {"more": "dense retrieval"}
    test = larger.splits["test"]
    for grades in test.qrels.values():  # what is judged irrelevant is not kept for it
        grades.update(dict.fromkeys([name for name in larger.corpus["id"] if name not in grades], 0))
    part, again, more = (larger.part(passages=size, queries=4) for size in (20, 20, 40))
    assert len(part.corpus) == 20 and part.name == f"{larger.name}, a part" and part.questions == larger.questions
    kept = set(part.corpus["id"])
    for use, split in part.splits.items():
        assert len(split.queries) == 4 and split.queries.items() <= larger.splits[use].queries.items()
        for name, grades in split.qrels.items():
            whole = larger.splits[use].qrels[name]
            assert grades == {passage: grade for passage, grade in whole.items() if passage in kept}
            assert {passage for passage, grade in whole.items() if grade > 0} <= kept
    assert part.corpus["id"][:] == [name for name in larger.corpus["id"] if name in kept]
    assert part.fingerprint["sha256"] != larger.fingerprint["sha256"] and part.fingerprint["passages"] == 20
    assert part.fingerprint == again.fingerprint and kept < set(more.corpus["id"])
    few, several = larger.part(queries=2), larger.part(queries=5)
    assert few.splits["train"].queries.items() < several.splits["train"].queries.items()
    assert len(few.corpus) == 60 and larger.part() is larger
    with pytest.raises(ValueError, match=r"A part of 3 passages can't hold the \d+.*data.max_queries"):
        larger.part(passages=3)


def test_dev_is_held_out_of_the_train_queries_where_there_is_none(beir: Path) -> None:
    found = load_collection(str(beir), dev_split=None)
    train = dict(found.splits["train"].queries)
    found.hold_out_dev(0.0)
    assert "dev" not in found.splits
    found.hold_out_dev(0.34)
    assert list(found.splits) == ["train", "dev", "test"]
    dev, rest = found.splits["dev"], found.splits["train"]
    assert len(dev.queries) == 2 and not dev.queries.keys() & rest.queries.keys()
    assert {**dev.queries, **rest.queries} == train
    assert dev.qrels.keys() == dev.queries.keys() and rest.qrels.keys() == rest.queries.keys()
    assert found.fingerprint["dev_share"] == 0.34
    found.hold_out_dev(0.5)  # a dev split that is there stays
    assert found.splits["dev"] is dev
    (beir / "qrels" / "test.tsv").unlink()
    again = load_collection(str(beir), dev_split=None, required=["train"])
    again.hold_out_dev(0.34)
    assert list(again.splits) == ["train", "dev"] and again.splits["dev"].queries == dev.queries


def test_questions_are_one_a_line_and_those_of_a_split_are_left_out(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir))
    before = found.fingerprint["sha256"]
    texts = [next(iter(split.queries.values())) for split in found.splits.values()]
    same = [f"  {text.replace(' ', '  ')}".upper() + " ?" for text in texts]
    file = tmp_path / "questions.txt"
    lines = "\ufeffwhat is  dense?\r\n\n  \nwhere \u2028 is it\nwhat is dense?\nWhat is DENSE!\n検索\n"
    file.write_bytes((lines + "\n".join([*texts, *same])).encode())
    found.add_questions(file)
    assert found.questions == {"question-1": "what is dense?", "question-2": "where is it", "question-3": "検索"}
    assert found.fingerprint["questions"]["count"] == 3 and len(found.fingerprint["questions"]["sha256"]) == 64
    assert found.fingerprint["sha256"] == before  # the teacher does not depend on them
    assert "3 without judgements" in found.summary()


def test_files_without_questions_are_refused(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir))
    query = next(iter(found.splits["train"].queries.values()))
    for content, message in (
        (b"one\ntwo\nthr\xe9e\n", "line 3: not UTF-8"),
        (b"\xef\xbb\xbfone\n\xff", "line 2: not UTF-8"),
        (b" \n\n", "no question in it; write one a line"),
        (query.upper().encode(), r"every question in it is a query of .* already.*add others"),
    ):
        (tmp_path / "questions.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"questions\.txt(, |: ){message}"):
            found.add_questions(tmp_path / "questions.txt")
    for path in (tmp_path, tmp_path / "nothing.txt"):
        with pytest.raises(FileNotFoundError, match=r"give data\.questions the right path"):
            found.add_questions(path)


def test_held_out_questions_are_the_test_split_and_no_questions_any_more(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir))
    file = tmp_path / "questions.txt"
    forms = ("what is {}", "What is {}?", "WHAT IS, {}")
    file.write_text("\n".join(form.format(f"w{number}") for form in forms for number in range(40)))
    found.add_questions(file)
    everything = dict(found.questions)
    assert list(everything.values()) == [f"what is w{number}" for number in range(40)]  # and no near equal
    found.hold_out_questions(0.5, most=8)
    test = found.splits["test"]
    assert len(test.queries) == 8 and test.qrels == {}
    assert not test.queries.keys() & found.questions.keys() and {**test.queries, **found.questions} == everything
    rows = made(found, 0.0, unlabelled=True)
    assert not set(rows["query_id"]) & test.queries.keys() and found.questions.keys() <= set(rows["query_id"])
    found.questions = {"question-1": "one", "question-2": "two"}
    with pytest.raises(ValueError, match="2 questions are too few to hold out 10% of them for test"):
        found.hold_out_questions(0.1, most=500)


# Questions made of the passages

TEXTS = {
    "a": "Sorting an array. This function sorts the values of an array in place. It returns nothing.",
    "b": "Too short.",
    "c": "Only one sentence of eight words stands here",
    "d": "x = [1, 2, 3, 4]; y = {5: 6}. The median of all values is computed along one axis.",
}


def corpus() -> Dataset:
    return Dataset.from_dict({"id": list(TEXTS), "text": list(TEXTS.values())})


def test_a_question_is_a_sentence_that_its_passage_no_longer_holds() -> None:
    asked = {one.passage_id: (one.text, one.rest) for one in questions_from(corpus(), 10, seed=1)}
    assert set(asked) == {"a", "d"} and asked["d"][0] == "The median of all values is computed along one axis."
    rest = "Sorting an array. It returns nothing."
    assert asked["a"] == ("This function sorts the values of an array in place.", rest)
    assert list(questions_from(corpus(), 1, seed=1)) == list(questions_from(corpus(), 10, seed=1))[:1]


def test_a_title_long_enough_is_the_question_and_leaves_its_passage() -> None:
    titles = ["How arrays are sorted", "Too short", ""]
    bodies = ["The values all stay in place. It returns nothing.", "The median is computed along one axis.", ""]
    texts = [f"{title} {body}".strip() for title, body in zip(titles, bodies, strict=True)]
    titled = Dataset.from_dict({"id": ["a", "b", "c"], "title": titles, "text": texts})
    (made,) = questions_from(titled, 10, seed=1)  # b would keep two words
    assert (made.passage_id, made.text, made.rest) == ("a", titles[0], bodies[0])
    (made,) = questions_from(titled, 10, seed=1, without=["how arrays are sorted?"])
    assert (made.text, made.rest) == ("The values all stay in place.", "How arrays are sorted It returns nothing.")


def test_rows_of_made_questions_learn_from_the_rest_of_their_passage() -> None:
    collection = Collection("made", corpus(), {}, {})
    collection.make_questions(10, seed=1)
    candidates = {name: {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.5} for name in collection.questions}
    options = {"labels": 0.0, "unlabelled": True, "candidates": candidates}
    rows = collection_triples(collection, num_negatives=1, depth=10, seed=0, **options)  # type: ignore[arg-type]
    by_passage = {row["positive_id"]: row for row in rows}
    assert set(by_passage) == {"a", "d"}
    row = by_passage["a"]
    assert row["positive"] == "Sorting an array. It returns nothing." and row["negative_id"] != "a"
    assert row["label_weight"] == 1.0 and not row["labelled"]


def test_so_many_unlabelled_questions_are_the_same_ones_whatever_else_is_asked_for() -> None:
    collection = Collection("made", corpus(), {}, {}, questions={f"q{number}": "a b" for number in range(50)})
    ten = collection.unjudged(most=10)
    assert len(ten) == 10 and set(ten) < set(collection.unjudged(most=20)) < set(collection.unjudged())
