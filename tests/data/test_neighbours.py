from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from tct_hf import load_triples
from tests.models import tiny_bert
from tests.rows import jsonl, write

PASSAGES = {str(number): f"passage {number}" for number in range(1, 9)}
BY_ID: dict[str, Any] = {"collection": PASSAGES, "queries": {"7": "first question", "8": "second question"}}
TEXTS = [("first question", "passage 1", ["passage 2", "passage 3"])]
SCORES = [[4.5, 1.0, 2.0]]


def passages(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [{"title": "passage", "text": str(number), **more} for number in numbers]


def numbered(key: str, *numbers: int) -> list[dict[str, Any]]:
    return [{key: f"d{one}", **row} for one, row in zip(numbers, passages(*numbers), strict=True)]


FIRST = {"query": "first question"}
NEGATIVES = {"negative_1": "passage 2", "negative_2": "passage 3"}
TUPLE = {**FIRST, "positive": "passage 1", **NEGATIVES}
FLAG = {"pos": ["passage 1"], "neg": ["passage 2", "passage 3"]}
DPR = {
    "dataset": "nq",
    "question": "first question",
    "answers": ['a } [ \\" in a string'],
    "positive_ctxs": numbered("passage_id", 1),
    "hard_negative_ctxs": numbered("passage_id", 2),
    "negative_ctxs": numbered("passage_id", 3),
}
PAIRS = [
    {"question": "first question", "answer": "passage 1", "label": 1},
    {"question": "first question", "answer": "passage 2", "label": 0},
    {"question": "first question", "answer": "passage 3", "label": 0},
]
TEVATRON = {"query_id": "7", "positive_passages": numbered("docid", 1), "negative_passages": numbered("docid", 2, 3)}
# Name: file, its content, options, and its scores ("best": in the teacher's order, "one": a single negative).
SHAPES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "Tevatron": ("t.jsonl", jsonl([{**FIRST, **TEVATRON}]), {}, None),
    "Tevatron, by id": (
        "t.jsonl",
        jsonl([{"query_id": 7, "query_text": "first question", "positive_document_ids": ["1"],
                "negative_document_ids": ["2", "3"]}]),
        {"collection": PASSAGES},
        None,
    ),
    "FlagEmbedding": ("t.jsonl", jsonl([{**FIRST, **FLAG}]), {}, None),
    "FlagEmbedding, scored": (
        "t.jsonl",
        jsonl([{**FIRST, **FLAG, "pos_scores": [4.5], "neg_scores": [1.0, 2.0], "prompt": "", "type": "normal"}]),
        {},
        SCORES,
    ),
    "PyLate": (
        "t.jsonl",
        jsonl([{"query_id": 7, "document_ids": [2, 1, 3], "scores": [1.0, 4.5, 2.0]}]),
        BY_ID,
        "best",
    ),
    "PyLate, as text": (
        "t.jsonl",
        jsonl([{"query_id": "7", "document_ids": '["2", "1", "3"]', "scores": "[1.0, 4.5, 2.0]"}]),
        BY_ID,
        "best",
    ),
    "triplet": ("t.csv", "question,answer,negative\nfirst question,passage 1,passage 2\n", {}, "one"),
    "n-tuple": ("t.jsonl", jsonl([{"anchor": "first question", "answer": "passage 1", **NEGATIVES}]), {}, None),
    "n-tuple-scores": (
        "t.jsonl",
        jsonl([{"anchor": "first question", "positive": "passage 1", **NEGATIVES, "scores": SCORES[0]}]),
        {},
        SCORES,
    ),
    "labeled-pair": ("t.jsonl", jsonl(PAIRS), {}, None),
    "labeled-list": (
        "t.jsonl",
        jsonl([{"question": "first question", "answer": list(PASSAGES.values())[:3], "labels": [1, 0, 0]}]),
        {},
        None,
    ),
    "labeled-list, scored": (
        "t.jsonl",
        jsonl([{"question": "first question", "answer": list(PASSAGES.values())[:3], "scores": SCORES[0]}]),
        {},
        SCORES,
    ),
    "label of scores": ("t.jsonl", jsonl([{**TUPLE, "label": SCORES[0]}]), {}, SCORES),
    "label of margins": (
        "t.jsonl",
        jsonl([{**TUPLE, "label": [3.5, 2.5]}]),
        {},
        [[0.0, -3.5, -2.5]],
    ),
    "DPR": ("t.json", json.dumps([DPR], indent=4), {}, None),
    "DPR, one line": ("t.json", json.dumps([DPR]), {}, None),
    "ColBERT": ("t.json", "[7, 1, 2, 3]\n", BY_ID, None),
    "ColBERT, scored": ("t.json", "[7, [1, 4.5], [2, 1.0], [3, 2.0]]\n", BY_ID, SCORES),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_neighbours_write_is_read_without_mapping(tmp_path: Path, name: str, streaming: bool) -> None:
    file, content, options, scores = SHAPES[name]
    options = {**options, "streaming": streaming, **({"scores": "scores"} if isinstance(scores, list | str) else {})}
    if scores == "one":
        del options["scores"]
    rows = list(load_triples(write(tmp_path / file, content), **options))
    found = [
        (row["query"], row["positive"], [row[key] for key in row if key in ("negative", "negative_1", "negative_2")])
        for row in rows
    ]
    if scores == "best":  # in the order of the teacher, whose first is not judged
        assert found == [("first question", "passage 1", ["passage 3", "passage 2"])]
        assert rows[0]["scores"] == [4.5, 2.0, 1.0] and rows[0]["labelled"] is False
    elif scores == "one":
        assert found == [("first question", "passage 1", ["passage 2"])]
    else:
        assert found == TEXTS and (scores is None or [row["scores"] for row in rows] == scores)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("form", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_what_sentence_transformers_mines_is_read(tmp_path: Path, form: str, scored: bool) -> None:
    words = [f"{a} {b}" for a in ("dense", "teacher", "token") for b in ("query", "passage", "retrieval")]
    pairs = Dataset.from_dict({"question": [f"what is {text}" for text in words], "answer": words})
    model = SentenceTransformer(str(tiny_bert(tmp_path / "bert")), device="cpu")
    options: dict[str, Any] = {"num_negatives": 2, "output_format": form, "output_scores": scored, "verbose": False}
    mined = mine_hard_negatives(pairs, model, **options)
    if scored and form == "labeled-pair":
        with pytest.raises(ValueError, match="a pair with a score may be a negative"):
            load_triples(mined)
        return
    rows = list(load_triples(mined, scores="scores" if scored else None))
    assert len(rows) == len(words) * (2 if form == "triplet" else 1)
    for row in rows:
        assert row["query"] == f"what is {row['positive']}"
        assert row["positive"] not in [row[name] for name in row if name.startswith("negative")]
        if scored:
            texts = [row["query"], *(row[name] for name in row if name.startswith(("positive", "negative")))]
            query, *vectors = model.encode(texts)
            assert row["scores"] == pytest.approx(model.similarity(query, vectors)[0].tolist(), abs=1e-4)


def test_gpls_margins_are_stored_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "gpl-training-data.tsv", "7\t1\t2\t3.25\n8\t4\t5\t-1.5\n")
    rows = list(load_triples(path, scores="scores", **BY_ID))
    assert [row["scores"] for row in rows] == [[3.25, 0.0], [-1.5, 0.0]]
    assert (rows[1]["query"], rows[1]["positive"], rows[1]["negative"]) == (
        "second question",
        "passage 4",
        "passage 5",
    )
    one = {**FIRST, "pos": "passage 1", "neg": "passage 2", "margin": 3.25}
    assert load_triples(Dataset.from_list([one]), scores="scores")["scores"][:] == [[3.25, 0.0]]


def test_each_positive_of_a_row_has_its_score(tmp_path: Path) -> None:
    row = {**FIRST, "pos": ["passage 1", "passage 4"], "neg": ["passage 2"], "pos_scores": [4, 5], "neg_scores": [1]}
    rows = list(load_triples(write(tmp_path / "t.jsonl", jsonl([row])), scores="scores"))
    assert [(row["positive"], row["scores"]) for row in rows] == [("passage 1", [4.0, 1.0]), ("passage 4", [5.0, 1.0])]


def test_arrays_have_their_elements_by_number_and_pairs_their_queries_apart(tmp_path: Path) -> None:
    second = {**DPR, "question": "second question", "positive_ctxs": []}
    path = write(tmp_path / "t.json", json.dumps([DPR, second], indent=1))
    with pytest.raises(ValueError, match=r"t.json, element 2, column .*the list is empty"):
        load_triples(path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"t.json, after element 1: the list is not closed"):
        load_triples(path)
    more = [{**row, "question": "second question"} for row in PAIRS]
    rows = load_triples(write(tmp_path / "pairs.jsonl", jsonl([*PAIRS, *more])))
    assert rows["query"][:] == ["first question", "second question"] and rows["negative_2"][:] == ["passage 3"] * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*PAIRS[:2], {**PAIRS[2], "label": 0.4}], "column 'label': holds 0.4 where 1"),
        ([{"question": "a", "answer": "b", "score": 0.4}], "line 1, column 'score': a pair with a score may be a neg"),
        ([{**FIRST, "pos": ["a"], "neg": ["b"], "pos_scores": 3, "neg_scores": [1]}], "of another shape than usual"),
        ([{**FIRST, **FLAG, "pos_scores": [4.5, 1.0], "neg_scores": [2.0]}], "2 pos_scores of 1 pos"),
        ([{**FIRST, "documents": ["a", "b", "c"], "scores": [2.0, 1.0]}], "of another shape than usual"),
        ([{**FIRST, "answer": ["a", "b", "c"], "labels": [1, 0]}], "of another shape than usual"),
        ([{"question": "a", "answer": "b", "passage": "c"}], "more than one of question, answer, passage may be"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_triples(write(tmp_path / "t.jsonl", jsonl(lines)))
    with pytest.raises(ValueError, match=r"line 1: \[7, 1\] where \[query, positive, negative"):
        load_triples(write(tmp_path / "lists.jsonl", "[7, 1]\n"))
