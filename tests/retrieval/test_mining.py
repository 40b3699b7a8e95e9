"""Mining against a plain version of its rules, and what it does with too little and with wrong things."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tct_hf import MiningCounts, load_triples, mine_triples
from tct_hf.data.column_names import candidate_columns
from tct_hf.data.shards import FORMAT
from tct_hf.files import claim
from tests.retrieval import test_negatives
from tests.retrieval.test_negatives import QRELS, QUERIES, corpus
from tests.rows import content

TEXTS = {**test_negatives.TEXTS, "near": "apple tree fruit garden gate"}
RUN = {
    "q1": {"apple": 9.0, "copy": 8.0, "near": 7.0, "plum": 6.0, "apple2": 5.0, "pear": 4.0, "car": 3.0},
    "q2": {"plum": 3.0, "apple": 3.0, "copy": 2.0, "boat": 1.0, "pear": 0.5},
    "q3": {"car": 1.0, "plum": 0.5},
    "q9": {"no such passage": 1.0},
}


def mined(run: Any = RUN, **options: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"seed": 1, "origin": "test", **options}
    return list(mine_triples(run, corpus(TEXTS), QUERIES, QRELS, **given))


def triples_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def plainly_allowed(
    ranked: list[str], texts: dict[str, str], positive: str, known: list[str], scores: dict[str, float], margins: Any
) -> list[str]:
    """What may be a negative of a row, in rank order: every candidate judged by itself, by the words of the rules."""
    allowed = []
    for passage in ranked:
        mine = triples_of_words(texts[passage])
        if passage in known:
            continue
        if any(len(mine & other) / len(mine | other) >= 0.6 for other in (triples_of_words(texts[k]) for k in known)):
            continue
        margin, relative = margins
        if margin is not None and scores[passage] > scores[positive] + margin:
            continue
        if relative is not None and scores[positive] - scores[passage] < abs(scores[positive]) * relative:
            continue
        allowed.append(passage)
    return allowed


word = st.sampled_from(["a", "b", "c", "d"])
texts_of = st.lists(st.lists(word, min_size=1, max_size=7).map(" ".join), min_size=4, max_size=14)


@settings(max_examples=40, deadline=None)
@given(texts_of, st.data())
def test_rows_are_a_random_order_of_what_the_plain_rules_allow(bodies: list[str], data: st.DataObject) -> None:
    texts = {f"p{at}": body for at, body in enumerate(bodies)}
    names = sorted(texts)
    queries = {f"q{at}": f"query {at}" for at in range(3)}
    qrels = {q: dict.fromkeys(data.draw(st.lists(st.sampled_from(names), max_size=2)), 1) for q in queries}
    qrels["q0"] = qrels["q0"] or {"p0": 1}
    score = st.integers(-3, 3).map(float)
    run = {q: data.draw(st.dictionaries(st.sampled_from(names), score, min_size=1)) for q in queries}
    table = {(q, p): data.draw(score) for q in queries for p in names}
    depth, count = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 2))
    margin, seed = data.draw(st.none() | st.integers(-2, 2).map(float)), data.draw(st.integers(0, 5))
    relative = data.draw(st.sampled_from([None, None, 0.0, 0.5, 1.0]))

    def predict(pairs: Any) -> list[float]:
        return [table[query.replace("query ", "q"), passage.partition(" ")[0]] for query, passage in pairs]

    marked = {name: f"{name} {body}" for name, body in texts.items()}  # each text its own
    counts = MiningCounts()
    given: dict[str, Any] = {"depth": depth, "num_negatives": count, "seed": seed, "near_duplicate": 0.6}
    given |= {
        "teacher": predict,
        "margin": margin,
        "relative_margin": relative,
        "origin": "x",
        "too_few": "skip",
        "counts": counts,
    }
    try:
        rows = list(mine_triples(run, corpus(marked), queries, qrels, **given))
    except ValueError as error:
        assert "has enough candidates" in str(error) or "none of the queries" in str(error)
        rows = []
    made = {(row["query_id"], row["positive_id"]): row for row in rows}
    skipped = 0
    for query_id, grades in qrels.items():
        for positive in grades:
            ranked = sorted(run[query_id], key=lambda name: (-run[query_id][name], name))[:depth]
            scores = {name: table[query_id, name] for name in names}
            allowed = plainly_allowed(ranked, marked, positive, list(grades), scores, (margin, relative))
            # The same generator; the order of all candidates, of which the allowed are taken first come first.
            order = random.Random(f"{seed}\x1f{query_id}\x1f{positive}").sample(ranked, len(ranked))
            expected = [name for name in order if name in allowed][:count]
            if len(expected) < count:
                skipped += 1
                assert (query_id, positive) not in made
                continue
            row = made[query_id, positive]
            columns = ["negative"] if count == 1 else ["negative_1", "negative_2"]
            for key, name in [("positive", positive), *zip(columns, expected, strict=True)]:
                found = [row[f"{key}{what}"] for what in ("_id", "", "_score", "_teacher_score")]
                assert found == [name, marked[name], run[query_id].get(name), scores[name]]
            assert row["known_positive_ids"] == list(grades)
    if rows:
        assert (counts.rows, counts.skipped_rows, counts.random_negatives) == (len(rows), skipped, 0)


def test_no_near_duplicate_of_a_known_positive_and_no_text_twice_comes_out() -> None:
    for seed in range(6):
        for row in mined(seed=seed, num_negatives=2):
            negatives = {row["negative_1_id"], row["negative_2_id"]}
            assert len(negatives) == 2 and not negatives & set(row["known_positive_ids"])
            assert row["query_id"] != "q1" or not negatives & {"copy", "near"}
            assert not {"apple", "copy"} <= negatives  # one text
    found = {row["negative_id"] for seed in range(15) for row in mined(seed=seed, near_duplicate=None)[:2]}
    assert found == {"near", "plum", "pear", "car"}  # without a threshold only equal texts are refused
    texts = {"a": "密集检索的老师和学生模型的蒸馏方法在这里被描述", "c": "今天天气很好我们去公园散步"}
    passages = corpus({**texts, "b": texts["a"] + "了"})  # words without blanks between them
    [row] = mine_triples({"q1": {"b": 2.0, "c": 1.0}}, passages, {"q1": "蒸馏"}, {"q1": {"a": 1}}, origin="x", seed=1)
    assert row["negative_id"] == "c"


def test_the_files_are_the_rows_and_a_finished_folder_is_read_again(tmp_path: Path) -> None:
    folder, counts, again = tmp_path / "out", MiningCounts(), MiningCounts()
    options: dict[str, Any] = {"output_dir": folder, "queries_a_part": 1}
    rows = mined(**options, counts=counts)
    # A row depends on nothing but its own query and the seed.
    assert rows == mined() and any(mined(seed=seed) != rows for seed in range(2, 6))
    assert {file.name for file in folder.iterdir()} == {"triples.parquet", "summary.json", "tct_settings.json"}
    written = json.loads((folder / "summary.json").read_text())
    assert written["counts"]["rows"] == 4 and written["settings"]["origin"] == "test"
    before = (folder / "triples.parquet").stat().st_mtime_ns
    assert mined(**options, counts=again) == rows and again == counts
    assert (folder / "triples.parquet").stat().st_mtime_ns == before
    for name, value in (("depth", 3), ("origin", "other"), ("run", {**RUN, "q3": {"car": 2.0}}), ("teacher", predict)):
        with pytest.raises(ValueError, match=rf"holds a run with {name} = .*choose another folder"):
            mined(**{**options, "depends": {} if name == "teacher" else None, name: value})

    (folder / "triples.parquet").unlink()  # a lost file is mined again
    assert mined(**options) == rows
    (folder / "triples.parquet").unlink()
    part = folder / "parts" / "00000.arrow"
    claim(part.parent, {"format": FORMAT})
    part.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"00000\.arrow: damaged .*delete it, and run again"):
        mined(**options)


def test_random_passages_fill_rows_up_or_short_rows_are_left_out_and_what_was_refused_is_counted() -> None:
    counts = MiningCounts()
    rows = [row for seed in range(20) for row in mined(seed=seed, depth=2, counts=counts)]
    assert {row["negative_id"] for row in rows if row["query_id"] == "q2"} == {"apple", "plum"}
    filled = [row for row in rows if row["query_id"] == "q1"]
    assert all(row["negative_score"] is None for row in filled)
    assert {row["negative_id"] for row in filled} == {"plum", "pear", "car", "boat"}
    assert (counts.rows, counts.short_rows, counts.random_negatives) == (4, 2, 2)
    assert "2 rows had too few candidates: filled up with 2 random passages" in counts.summary()
    mined(num_negatives=4, depth=5, counts=counts)
    assert (counts.queries, counts.rows, counts.positives_found, counts.drawn) == (3, 4, 3, 5 + 5 + 5 + 2)
    assert (counts.known_positives, counts.near_duplicates, counts.repeated) == (5, 4, 1)
    rows = mined(depth=2, too_few="skip", counts=counts)
    assert [row["query_id"] for row in rows] == ["q2", "q3"]
    assert (counts.rows, counts.skipped_rows, counts.drawn, counts.known_positives) == (2, 2, 6, 2)


TEACHER = {
    "q1": {"apple": 5.0, "apple2": 3.0, "plum": 4.0, "pear": 6.0, "car": 0.0},
    "q2": {"pear": 1.0, "plum": 2.0, "apple": 0.0, "copy": 0.0, "boat": -1.0},
    "q3": {"boat": 0.0, "car": 0.0, "plum": 0.0},
}


def predict(pairs: Sequence[tuple[str, str]]) -> list[float]:
    names = {text: name for name, text in TEXTS.items()}
    of_query = {text: name for name, text in QUERIES.items()}
    return [TEACHER[of_query[query]][names[passage]] for query, passage in pairs]  # not of copies, near and q9


def search(queries: dict[str, str]) -> dict[str, dict[str, float]]:
    return {name: RUN[name] for name in queries}


def test_a_function_gives_what_its_run_gives_and_is_asked_for_some_queries_at_a_time() -> None:
    asked = Mock(side_effect=search)
    assert mined(asked, queries_a_part=2) == mined()
    assert [list(call.args[0]) for call in asked.call_args_list] == [["q1", "q2"], ["q3"]]


def test_a_call_that_was_stopped_goes_on_in_two_processes_to_the_bytes_of_one(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    asked: list[str] = []

    def stopping(queries: dict[str, str]) -> dict[str, dict[str, float]]:
        asked.extend(queries)
        if asked == ["q1", "q2"]:
            raise KeyboardInterrupt
        return search(queries)

    options: dict[str, Any] = {"output_dir": tmp_path / "two", "queries_a_part": 1, "depends": {"model": "m"}}
    with pytest.raises(KeyboardInterrupt):
        mined(stopping, **options)
    assert [file.name for file in (tmp_path / "two" / "parts").glob("*.arrow")] == ["00000.arrow"]
    with pytest.raises(ValueError, match=r"holds a run with run.model = 'm', but now run.model = 'n'"):
        mined(stopping, **{**options, "depends": {"model": "n"}})

    def process(rank: int) -> list[dict[str, Any]]:
        state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: barrier.wait(60)
        )
        return mined(stopping, **options, state=state)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [mined(), mined()]
    assert asked[:2] == ["q1", "q2"] and sorted(asked[2:]) == ["q2", "q3"]
    mined(search, **{**options, "output_dir": tmp_path / "one"})
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with pytest.raises(ValueError, match="state: processes share the work through files"):
        mined(state=SimpleNamespace())


def test_load_triples_and_the_collator_take_the_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"origin": "x", "seed": 1, "teacher": predict, "num_negatives": 2}
    names = mine_triples(RUN, corpus(TEXTS), QUERIES, QRELS, **options).column_names
    assert names[:2] == ["query", "positive"] and names[-1] == "origin" and "negative_2_teacher_score" in names
    assert candidate_columns(names) == ["positive", "negative_1", "negative_2"]
    mined(output_dir=tmp_path / "out", num_negatives=2)
    loaded = load_triples(tmp_path / "out" / "triples.parquet", cache_dir=tmp_path / "cache")
    expected = [{name: row[name] for name in loaded.column_names} for row in mined(num_negatives=2)]
    assert list(loaded) == expected and "origin" not in loaded.column_names
    assert loaded["known_positive_ids"][0] == ["apple", "apple2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 5}, r"query 'q1' has only 4 passages.*num_negatives is 5"),
        ({"depth": 7, "num_negatives": 7, "too_few": "skip"}, r"none of 4 rows has enough candidates; raise depth"),
        ({"depth": 1, "num_negatives": 2}, "depth=1: too few candidates"),
        ({"margin": 1.0}, "margin, relative_margin: there is no teacher"),
        ({"relative_margin": 0.1}, "margin, relative_margin: there is no teacher"),
        ({"relative_margin": 1.5}, r"relative_margin=1.5: give a share"),
        ({"near_duplicate": 0.0}, "near_duplicate=0.0"),
        ({"too_few": "drop"}, 'use "fill" or "skip"'),
        ({"origin": " "}, "origin=' '"),
        ({"origin": "x\ud800"}, "origin, number 0: half a surrogate pair"),
        ({"origin": b"x"}, "origin, number 0: holds b'x' where text is needed"),
        ({"queries_a_part": 0}, "queries_a_part=0"),
        ({"run": {"q9": {"apple": 1.0}}}, "run: it has none of the queries"),
        ({"run": lambda queries: {}}, "run: it has no passage for any of the queries"),
        ({"run": {"q1": {"quince": 1.0}}}, "run: passage 'quince' .query 'q1'. is not in the corpus"),
        # Wherever it stands: the others could not be put in order.
        ({"run": {"q1": {"bus": 1.0, "car": float("nan"), "train": 3.0}}, "depth": 1}, "passage 'car' is nan; leave"),
        ({"teacher": lambda pairs: [1.0]}, r"teacher: it gave 1 scores for \d+ pairs"),
        ({"teacher": lambda pairs: [float("inf")] * len(pairs)}, "teacher: its score of query 'q1'.*is inf"),
        ({"run": lambda queries: RUN, "output_dir": "x"}, "depends: run or teacher is a function"),
    ],
)
def test_wrong_arguments_are_named_with_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mined(**options)
