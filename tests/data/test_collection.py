from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tct_hf.data.collection import Collection, Split, load_collection
from tct_hf.data.near_duplicates import folded
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.negatives import collection_bm25, collection_triples
from tests.recipe import write_beir


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "beir", passages=20, train=6, dev=3, test=4)


def test_splits_go_by_their_use(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").rename(beir / "qrels" / "validation.tsv")
    found = load_collection(str(beir), dev_split="validation")
    assert {name: len(split.queries) for name, split in found.splits.items()} == {"train": 6, "dev": 3, "test": 4}
    assert found.splits["dev"].qrels.keys() == found.splits["dev"].queries.keys()
    assert found.summary() == f"{beir}: 20 passages; queries: 6 train, 3 dev, 4 test"
    assert "dev" not in load_collection(str(beir), dev_split=None).splits


def test_choosing_models_on_the_reported_split_is_refused(beir: Path) -> None:
    with pytest.raises(ValueError, match="must not be chosen on the queries that are reported"):
        load_collection(str(beir), dev_split="test")


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
    found = load_collection("builtin", packages=["bm25s", "huggingface_hub"])
    assert found.name == "built-in API docs" and list(found.splits) == ["train", "dev", "test"]
    assert "sha256" in found.fingerprint and "huggingface_hub" in json.dumps(found.fingerprint)


@pytest.fixture
def larger(tmp_path: Path) -> Collection:
    return load_collection(str(write_beir(tmp_path / "larger", passages=60, train=32, dev=6, test=8)))


def labelled(rows: Any) -> set[str]:
    flags = rows["labelled"] if "labelled" in rows.column_names else [True] * len(rows)
    return {name for name, flag in zip(rows["query_id"], flags, strict=True) if flag}


def made(collection: Collection, labels: float, **options: Any) -> Any:
    return collection_triples(collection, **{"num_negatives": 1, "depth": 10, "seed": 1, "labels": labels, **options})


def test_the_queries_of_a_share_of_labels_are_among_those_of_a_larger_share(larger: Collection) -> None:
    shares = [labelled(made(larger, share, unlabelled=True)) for share in (0.25, 0.5, 1.0)]
    assert [len(part) for part in shares] == [8, 16, 32]
    assert shares[0] < shares[1] < shares[2]
    assert labelled(made(larger, 0.25)) == labelled(made(larger, 0.25, seed=2)) == shares[0]


def test_the_other_queries_and_the_questions_are_unlabelled_when_asked_for(larger: Collection) -> None:
    larger.questions = {"more": "dense retrieval"}
    rows = made(larger, 0.25, unlabelled=True)
    train = set(larger.splits["train"].queries)
    assert set(rows["query_id"]) == train | {"more"} and len(labelled(rows)) == 8
    assert set(made(larger, 0.25)["query_id"]) < train
    assert labelled(made(larger, 0.0, unlabelled=True)) == set()


def test_judgements_of_an_unlabelled_query_change_no_row(larger: Collection) -> None:
    before = list(made(larger, 0.25, unlabelled=True))
    few = labelled(made(larger, 0.25))
    train = larger.splits["train"]
    for others in ({"p0": 1, "p1": 2}, {"p0": 0}, None):
        qrels = {name: grades if name in few else others for name, grades in train.qrels.items()}
        larger.splits["train"] = Split(train.queries, {name: grades for name, grades in qrels.items() if grades})
        assert list(made(larger, 0.25, unlabelled=True)) == before


def test_nothing_to_train_on_is_an_error_with_the_fix(larger: Collection) -> None:
    with pytest.raises(ValueError, match=r"no train query has a label \(data.labels is 0.0\).*set data.unlabelled"):
        made(larger, 0.0)
    del larger.splits["train"]
    with pytest.raises(ValueError, match=r"give a file of them as data\.questions"):
        made(larger, 0.0, unlabelled=True)
    with pytest.raises(ValueError, match=r"A share of 1.5 .*from 0 to 1"):
        made(larger, 1.5)


def test_a_part_keeps_relevant_passages_and_a_number_of_queries_of_each_split(larger: Collection) -> None:
    larger.questions = {"more": "dense retrieval"}
    part = larger.part(passages=20, queries=4)
    assert len(part.corpus) == 20 and part.name == f"{larger.name}, a part" and part.questions == larger.questions
    with pytest.raises(ValueError, match=r"A part of 3 passages can't hold the \d+.*data.max_queries"):
        larger.part(passages=3)
    kept = set(part.corpus["id"])
    for use, split in part.splits.items():
        assert len(split.queries) == 4 and split.queries.items() <= larger.splits[use].queries.items()
        assert split.qrels == {name: larger.splits[use].qrels[name] for name in split.queries}
        assert {passage for grades in split.qrels.values() for passage in grades} <= kept
    order = [name for name in larger.corpus["id"] if name in kept]
    assert part.corpus["id"][:] == order
    assert part.fingerprint["sha256"] != larger.fingerprint["sha256"] and part.fingerprint["passages"] == 20


def test_parts_are_the_same_each_time_and_nested(larger: Collection) -> None:
    parts = [larger.part(passages=size, queries=4) for size in (20, 20, 40)]
    assert parts[0].fingerprint == parts[1].fingerprint
    assert set(parts[0].corpus["id"]) < set(parts[2].corpus["id"])
    few, more = larger.part(queries=2), larger.part(queries=5)
    assert few.splits["train"].queries.items() < more.splits["train"].queries.items()
    assert len(few.corpus) == 60 and larger.part() is larger


def test_a_passage_judged_irrelevant_is_not_kept_for_it(larger: Collection) -> None:
    test = larger.splits["test"]
    for grades in test.qrels.values():
        grades.update(dict.fromkeys([name for name in larger.corpus["id"] if name not in grades], 0))
    part = larger.part(passages=20, queries=4)
    kept = set(part.corpus["id"])
    assert len(kept) == 20
    for name, grades in part.splits["test"].qrels.items():
        assert set(grades) == kept and {p for p, g in test.qrels[name].items() if g > 0} <= kept


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


def test_questions_are_one_a_line_and_join_the_fingerprint(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir))
    before = found.fingerprint["sha256"]
    file = tmp_path / "questions.txt"
    file.write_bytes("\ufeffwhat is  dense?\r\n\n  \nwhere \u2028 is it\nwhat is dense?\n検索\n".encode())
    found.add_questions(file)
    assert found.questions == {"question-1": "what is dense?", "question-2": "where is it", "question-3": "検索"}
    assert found.fingerprint["questions"]["count"] == 3 and len(found.fingerprint["questions"]["sha256"]) == 64
    assert found.fingerprint["sha256"] == before  # the teacher does not depend on them
    assert "3 without judgements" in found.summary()


def test_questions_that_are_not_utf8_are_named_with_their_line(beir: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    for content, line in ((b"one\ntwo\nthr\xe9e\n", 3), (b"\xef\xbb\xbfone\n\xff", 2)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"questions\.txt, line {line}: not UTF-8"):
            load_collection(str(beir)).add_questions(file)


def test_a_file_without_a_question_is_refused(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: no question in it; write one a line"):
        found.add_questions(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match=r"give data\.questions the right path"):
        found.add_questions(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"give data\.questions the right path"):
        found.add_questions(tmp_path)


def test_held_out_questions_are_the_test_split_and_no_questions_any_more(beir: Path) -> None:
    found = load_collection(str(beir))
    everything = {f"question-{number}": f"text {number}" for number in range(50)}
    found.questions = dict(everything)
    found.hold_out_questions(0.2, most=8)
    test = found.splits["test"]
    assert len(test.queries) == 8 and test.qrels == {}
    assert not test.queries.keys() & found.questions.keys()
    assert {**test.queries, **found.questions} == everything
    rows = made(found, 0.0, unlabelled=True)
    assert not set(rows["query_id"]) & test.queries.keys() and found.questions.keys() <= set(rows["query_id"])


def test_too_few_questions_to_hold_some_out_are_refused(beir: Path) -> None:
    found = load_collection(str(beir))
    found.questions = {"question-1": "one", "question-2": "two"}
    with pytest.raises(ValueError, match="2 questions are too few to hold out 10% of them for test"):
        found.hold_out_questions(0.1, most=500)


def test_splits_may_be_missing_where_they_are_not_required(beir: Path) -> None:
    (beir / "qrels" / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="splits there: dev, test"):
        load_collection(str(beir))
    assert list(load_collection(str(beir), required=["test"]).splits) == ["dev", "test"]
    with pytest.raises(FileNotFoundError, match="validation"):
        load_collection(str(beir), dev_split="validation", required=["dev"])
    for name in ("qrels/dev.tsv", "qrels/test.tsv", "queries.jsonl"):
        (beir / name).unlink()
    alone = load_collection(str(beir), required=())
    assert alone.splits == {} and len(alone.corpus) == 20
    assert alone.fingerprint["passages"] == 20


def test_questions_that_are_queries_of_a_split_are_left_out_whatever_their_case_and_punctuation(
    beir: Path, tmp_path: Path
) -> None:
    found = load_collection(str(beir))
    texts = [next(iter(split.queries.values())) for split in found.splits.values()]
    file = tmp_path / "questions.txt"
    same = [f"  {text.replace(' ', '  ')}".upper() + " ?" for text in texts]
    file.write_text("\n".join(["one more", *texts, *same, "One more!"]))
    found.add_questions(file)
    assert found.questions == {"question-1": "one more"}
    assert found.fingerprint["questions"]["count"] == 1
    file.write_text("\n".join(same))
    with pytest.raises(ValueError, match=r"every question in it is a query of .* already.*add others"):
        found.add_questions(file)


def test_held_out_questions_have_no_near_equal_among_those_trained_on(beir: Path, tmp_path: Path) -> None:
    found = load_collection(str(beir), required=())
    del found.splits["test"]
    file = tmp_path / "questions.txt"
    forms = ("what is {}", "What is {}?", "WHAT IS, {}")
    file.write_text("\n".join(form.format(f"w{number}") for form in forms for number in range(40)))
    found.add_questions(file)
    assert len(found.questions) == 40
    found.hold_out_questions(0.5, most=500)
    assert not {folded(text) for text in found.splits["test"].queries.values()} & set(
        map(folded, found.questions.values())
    )
    assert set(found.splits["test"].queries.values()) | set(found.questions.values()) == {
        f"what is w{number}" for number in range(40)
    }


def test_wrong_paths_and_splits_and_missing_queries_are_errors_even_where_nothing_is_required(beir: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_collection(str(beir / "nothing"), required=())
    with pytest.raises(FileNotFoundError, match=r"no tets\.tsv.*splits there: dev, test, train"):
        load_collection(str(beir), test_split="tets", required=())
    with pytest.raises(FileNotFoundError, match=r"no validation\.tsv"):
        load_collection(str(beir), dev_split="validation", required=())
    (beir / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither queries\.jsonl nor"):
        load_collection(str(beir), required=())
    (beir / "qrels" / "train.tsv").write_text("only one field\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 1"):
        load_collection(str(beir), required=())


def test_settings_without_labels_still_name_a_mistyped_split(beir: Path) -> None:
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.settings import DataSettings

    data = DataSettings(source=str(beir), labels=0.0, test_split="tets")
    with pytest.raises(FileNotFoundError, match=r"no tets\.tsv"):
        read_collection(data, train=False)
