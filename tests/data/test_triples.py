from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tct_hf import BM25Index, SkippedRows, bm25_triples, load_beir, load_triples
from tct_hf.data.ids import stable_id
from tests.recipe import write_beir
from tests.rows import jsonl, write

ROWS = [
    {"query": "first query", "positive": "right one", "negative": "wrong one"},
    {"query": "second query", "positive": "right two", "negative": "wrong two"},
]
QUERIES = {"1": "query one", "2": "query two"}
PASSAGES = {f"d{place}": f"passage {place}" for place in range(1, 7)}
ID_LINES = "1\td1\td2\n1\td3\td4\n2\td5\td1\n"


def tsv(rows: dict[str, str]) -> str:
    return "".join(f"{key}\t{text}\n" for key, text in rows.items())


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]


# Text triples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "header"),
    [
        *(("t.tsv", ""), ("T.TSV.GZ", "query\tpositive\tnegative\n"), ("t.txt", "Anchor\tpositive\tnegative\r\n")),
        *((name, "") for name in ("t.jsonl.gz", "t.json", "t.parquet")),
    ],
)
def test_text_triples_are_read_from_files(tmp_path: Path, name: str, header: str) -> None:
    path, more = tmp_path / name, [{**row, "score": 0.5, "meta": {"any": [1]}} for row in ROWS]
    lines = header + "".join("\t".join(row.values()) + "\n" for row in ROWS)
    write(path, jsonl(more) + "\n" if "json" in name else lines)
    if name.endswith("parquet"):
        Dataset.from_list(more).to_parquet(path)
    loaded = load_triples(path)
    assert rows_of(loaded) == ROWS and loaded.cache_files  # memory-mapped


def test_data_set_in_memory_is_read_whatever_its_format() -> None:
    dataset = Dataset.from_list(ROWS)
    assert rows_of(load_triples(dataset.with_format("numpy"))) == ROWS
    assert rows_of(load_triples(DatasetDict({"train": dataset, "dev": dataset.select([0])}), split="dev")) == ROWS[:1]
    turned = Dataset.from_dict({"at": [1, 0]})
    turned.set_transform(lambda batch: {name: [ROWS[at][name] for at in batch["at"]] for name in ROWS[0]})
    assert rows_of(load_triples(turned)) == ROWS[::-1]


def test_columns_are_mapped_or_left_out(tmp_path: Path) -> None:
    rows = [{"anchor": "a", "pos": "b", "neg": "c", "query": "another", "positive_id": "x"}]
    mapping = {"query": "anchor", "positive": "pos", "negative": "neg"}
    for path, columns in (
        (write(tmp_path / "t.jsonl", jsonl(rows)), {**mapping, "positive_id": None}),
        (write(tmp_path / "t.tsv", "score\tneg\tanchor\tpos\n1\tc\ta\tb\n"), mapping),
    ):
        assert rows_of(load_triples(path, columns=columns)) == [{"query": "a", "positive": "b", "negative": "c"}]


def test_several_negatives_are_spread_in_order_as_many_as_asked_for(tmp_path: Path) -> None:
    numbered = [f"negative_{place}" for place in range(1, 12)]
    listed = write(tmp_path / "t.jsonl", jsonl([{"query": "q", "positive": "p", "negative": numbered}]))
    table = Dataset.from_list([{"query": "q", "positive": "p", **{name: name for name in numbered[::-1]}}])
    tsv = write(tmp_path / "t.tsv", "\t".join(["q", "p", *numbered]) + "\n")
    for source, options in ((listed, {}), (table, {}), (tsv, {"num_negatives": 11})):
        [row] = rows_of(load_triples(source, **options))
        assert list(row) == ["query", "positive", *numbered] and [row[name] for name in numbered] == numbered
    for source in (listed, table):
        assert load_triples(source, num_negatives=2).column_names == ["query", "positive", *numbered[:2]]
        one = {"query": "q", "positive": "p", "negative": numbered[0]}
        assert rows_of(load_triples(source, num_negatives=1)) == [one]
        assert load_triples(source, num_negatives=0).column_names == ["query", "positive"]
    with pytest.raises(ValueError, match="13 fields where 3"):
        load_triples(tsv)


# Ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "header"), [(".gz", "qid\tpid+\tpid-\r\n"), ("", "query_id\tpositive_id\tnegative_id\n"), ("", "")]
)
def test_id_triples_are_resolved_and_keep_their_ids(tmp_path: Path, suffix: str, header: str) -> None:
    ids = write(tmp_path / f"ids.tsv{suffix}", header + ID_LINES)
    collection = write(tmp_path / f"collection.tsv{suffix}", tsv(PASSAGES))
    queries = write(tmp_path / f"queries.tsv{suffix}", tsv(QUERIES))
    loaded = load_triples(ids, collection=collection, queries=queries)
    texts = {"query": "query one", "positive": "passage 3", "negative": "passage 4"}
    ids_of_row = {"query_id": "1", "positive_id": "d3", "negative_id": "d4", "known_positive_ids": ["d1", "d3"]}
    assert loaded[1] == {**texts, **ids_of_row} and loaded.cache_files
    assert loaded["known_positive_ids"][:] == [["d1", "d3"], ["d1", "d3"], ["d5"]]
    streamed = load_triples(ids, collection=collection, queries=queries, streaming=True)
    first = rows_of(streamed)
    assert first[2]["negative"] == "passage 1"
    assert rows_of(pickle.loads(pickle.dumps(streamed))) == first  # as it is sent to a worker


def test_texts_come_from_any_kind_of_collection(tmp_path: Path) -> None:
    expected = rows_of(load_triples(write(tmp_path / "i.tsv", ID_LINES), collection=PASSAGES, queries=QUERIES))
    table = Dataset.from_dict({"passage_id": list(PASSAGES), "content": list(PASSAGES.values())})
    table.to_parquet(tmp_path / "c.parquet")
    numbers = Dataset.from_dict({"id": [1, 2], "text": list(QUERIES.values())})
    beir = [{"_id": key, "title": text.split()[0], "text": text.split()[1]} for key, text in PASSAGES.items()]
    for collection in (table, tmp_path / "c.parquet", write(tmp_path / "c.jsonl.gz", jsonl(beir))):
        loaded = load_triples(tmp_path / "i.tsv", collection=collection, queries=numbers)
        assert rows_of(loaded) == expected


BY_ID: dict[str, Any] = {"collection": PASSAGES, "queries": QUERIES}
ONE = {**BY_ID, "num_negatives": 1}
MAPPED = {"query": "anchor", "negative": "neg"}
ID_ROW = {
    "query": "query one", "positive": "passage 1", "negative": "passage 2",
    "query_id": "1", "positive_id": "d1", "negative_id": "d2", "known_positive_ids": ["d1"],
}  # fmt: skip
DISTILLED = {"query_id": 2, "positive_id": "d2", "negative_ids": ["d1", "d5", "d3"], "scores": [1.0, 0.1, 0.2, 0.3]}
OF_DISTILLED = {
    "query": "query two", "positive": "passage 2", "negative_1": "passage 1", "negative_2": "passage 5",
    "query_id": "2", "positive_id": "d2", "negative_1_id": "d1", "negative_2_id": "d5", "known_positive_ids": ["d2"],
}  # fmt: skip
OBJECTS = {
    "query_id": 3, "query": "q", "negative_passages": [{"docid": "9", "title": "N", "text": "n"}],
    "positive_passages": [{"docid": "1", "title": "T", "text": "p1"}, {"docid": "2", "title": "", "text": "p2"}],
}  # fmt: skip
OF_OBJECTS = {"query": "q", "negative": "N n", "query_id": "3", "negative_id": "9", "known_positive_ids": ["1", "2"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"query": 1, "positive": "d1", "negative": "d2"}, BY_ID, [ID_ROW]),
        ({"query": "1", "positive": ["d1"], "negatives": ["d2"]}, BY_ID, [ID_ROW]),
        ({"anchor": "1", "positive": "d1", "neg": "d2"}, {**BY_ID, "columns": MAPPED}, [ID_ROW]),
        ({"query": "1", "positive": "d1", "negative_1": "d2", "negative_2": "d9"}, ONE, [ID_ROW]),
        (DISTILLED, {**BY_ID, "num_negatives": 2}, [OF_DISTILLED]),
        (
            OBJECTS,
            {"columns": {"positives": "positive_passages", "negatives": "negative_passages"}},
            [{**OF_OBJECTS, "positive": text, "positive_id": key} for key, text in (("1", "T p1"), ("2", "p2"))],
        ),
    ],
    ids=["numbers", "lists", "mapped texts", "numbered", "ids alone", "objects"],
)
def test_ids_of_a_row_are_looked_up_and_kept(row: dict, options: dict, expected: list, streaming: bool) -> None:
    source: Any = Dataset.from_list([row])
    if streaming:
        source = source.to_iterable_dataset()
        judged = {"qrels": {"1": {"d1": 1}, "2": {"d2": 1}}} if "queries" in options else {}
        options = {**options, **judged, "streaming": True}
    assert rows_of(load_triples(source, **options)) == expected


def test_ids_of_one_kind_are_looked_up_beside_texts_of_the_other() -> None:
    row = {"query": "2", "positive": "p", "negative": "n"}
    [found] = rows_of(load_triples(Dataset.from_list([row]), queries=QUERIES))
    assert found == {**row, "query": "query two", "query_id": "2"}
    rows = [{"query": "own words", "positive_id": key, "negative_id": "d2"} for key in ("d1", "d1", "d3")]
    loaded = load_triples(Dataset.from_list(rows), collection=PASSAGES)
    assert loaded[0]["positive"] == "passage 1" and loaded["known_positive_ids"][:] == [["d1", "d3"]] * 3


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_judgements_stay_marked(tmp_path: Path, streaming: bool) -> None:
    judged = {**ROWS[0], "query_id": "1", "positive_id": "d1", "negative_id": "d2", "labelled": True}
    rows = [judged, {**judged, "positive_id": "d3", "labelled": False}]
    path = write(tmp_path / "t.jsonl", jsonl(rows))
    loaded = load_triples(path, streaming=streaming, qrels={"1": {"d1": 1}} if streaming else None)
    # The candidate of a row without a label is not known to be positive.
    assert rows_of(loaded) == [{**row, "known_positive_ids": ["d1"]} for row in rows]
    assert loaded.features is not None and loaded.features["labelled"] == datasets.Value("bool")
    assert "labelled" not in load_triples(path, columns={"labelled": None}).column_names


@pytest.mark.parametrize("streaming", [False, True])
def test_known_positives_come_from_qrels(tmp_path: Path, streaming: bool) -> None:
    qrels = write(tmp_path / "trec.txt.gz", "1 0 d1 1\n1 0 d6 2\n1 0 d2 0\n")
    loaded = load_triples(write(tmp_path / "ids.tsv", ID_LINES), qrels=qrels, streaming=streaming, **BY_ID)
    # The row's own positive is known even where it is not judged.
    assert [row["known_positive_ids"] for row in loaded] == [["d1", "d6"], ["d1", "d6", "d3"], ["d5"]]


def test_given_known_positives_are_kept_and_joined_over_the_rows_of_a_query() -> None:
    row = {**ROWS[0], "query_id": "1", "negative_id": 5}
    rows = [{**row, "positive_id": 1, "known_positive_ids": [7]}, {**row, "positive_id": 2, "known_positive_ids": []}]
    assert load_triples(Dataset.from_list(rows))["known_positive_ids"][:] == [["1", "7", "2"]] * 2


# Folders and the Hub -----------------------------------------------------------------------------------------------


def test_beir_folder_gives_bm25_triples(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "set", passages=8, train=3, dev=1, test=1)
    loaded = load_triples(folder, num_negatives=2, seed=3, columns={})  # as a recipe has them that maps none
    expected = bm25_triples(*load_beir(folder, "train"), num_negatives=2, seed=3)
    assert rows_of(loaded) == rows_of(expected)
    assert loaded.cache_files
    assert rows_of(load_triples(folder, num_negatives=2, seed=4)) != rows_of(expected)
    words: dict[str, Any] = {"language": "none", "stemmer": None}
    corpus, *judged = load_beir(folder, "train")
    index = BM25Index.build(corpus["text"], corpus["id"], **words)
    expected = bm25_triples(corpus, *judged, seed=3, index=index)
    assert rows_of(load_triples(folder, seed=3, **words)) == rows_of(expected)
    wrong: Any
    for wrong, message in (
        ({"language": "klingon"}, "language: no stop words for 'klingon'"),
        ({"qrels": {}}, "qrels= does not go with a BEIR collection"),
        ({"revision": "v1"}, r"revision= does not go with a BEIR.*download it and give its"),
    ):
        with pytest.raises(ValueError, match=message):
            load_triples(folder, **wrong)


def test_hub_data_set_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    parts: dict[str | None, list[dict[str, Any]]] = {
        "texts": [{"id": key, "text": text} for key, text in PASSAGES.items()],
        "ids": [{"query": "q", "positive_id": "d1", "negative_id": "d2"}],
        # The BEIR layout.
        "corpus": [{"_id": f"d{at}", "title": "", "text": f"word{at}"} for at in range(4)],
        "queries": [{"_id": "q1", "text": "what is word1"}],
        "default": [{"query-id": "q1", "corpus-id": "d1", "score": 1}],
    }

    def load_dataset(name: str, config: str | None = None, **options: Any) -> DatasetDict:
        asked.append((name, config, options.get("revision")))
        split = str(config) if config in ("corpus", "queries") else "train"
        return DatasetDict({split: Dataset.from_list(parts[config])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_triples("owner/name", config="ids", revision="v1", collection="owner/name:texts")
    assert loaded[0]["positive"] == "passage 1"
    assert asked == [("owner/name", "ids", "v1"), ("owner/name", "texts", None)]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["corpus", "queries", "default"])
    loaded = load_triples("owner/name")
    assert loaded[0]["positive_id"] == "d1" and loaded[0]["negative_id"] != "d1"


# Streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.tsv"])
def test_streaming_gives_the_same_rows_again_and_goes_on_from_a_saved_state(tmp_path: Path, name: str) -> None:
    text = jsonl(ROWS) if "json" in name else "".join("\t".join(row.values()) + "\n" for row in ROWS)
    loaded = load_triples(write(tmp_path / name, text), streaming=True)
    assert isinstance(loaded, IterableDataset) and loaded.column_names == ["query", "positive", "negative"]
    assert rows_of(loaded) == rows_of(loaded) == ROWS
    assert not (tmp_path / "cache").exists()
    next(iter(loaded))
    loaded.load_state_dict(loaded.state_dict())
    assert rows_of(loaded) == ROWS[1:]


# The cache ---------------------------------------------------------------------------------------------------------


def test_same_source_and_settings_are_prepared_once(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "t.jsonl", jsonl([{**row, "negative": [row["negative"]] * 2} for row in ROWS]))
    for options, prepared in (({}, 1), ({}, 1), ({"num_negatives": 1}, 2)):
        load_triples(path, **options)  # type: ignore[arg-type]
        assert len(list(cache.glob("triples-*"))) == prepared
    write(path, path.read_bytes() * 2)
    assert len(load_triples(path)) == 4
    path = write(tmp_path / "ids.tsv", ID_LINES)
    for text in ("old text", "new text"):
        loaded = load_triples(path, collection={**PASSAGES, "d1": text}, queries=QUERIES)
        assert loaded[0]["positive"] == text


def test_skipped_rows_are_reported_each_time_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{**ROWS[0], "query": ""}, {**ROWS[0], "positive": 3}, {**ROWS[0], "query": None}]
    path = write(tmp_path / "t.jsonl", jsonl([*ROWS, *bad]) + "{oops\n")
    with caplog.at_level(logging.WARNING):
        first = load_triples(path, skip_bad_rows=True)
    assert "4 bad rows were left out" in caplog.text
    skipped = SkippedRows()
    again = load_triples(path, skip_bad_rows=True, skipped=skipped)
    assert rows_of(first) == rows_of(again) == ROWS
    assert skipped.counts == {"empty text": 2, "mixed types": 1, "not JSON": 1}
    assert f"{path}, line 3, column 'query'" in skipped.examples["empty text"]
    assert first.info.description == again.info.description == skipped.summary()
    assert skipped.summary().splitlines()[0] == "4 bad rows were left out"
    streamed = load_triples(path, streaming=True, skip_bad_rows=True, skipped=skipped)
    for _ in range(2):  # counted once a pass
        assert rows_of(streamed) == ROWS and skipped.total == 4


def test_positives_of_a_query_are_known_by_text_where_there_are_no_ids(tmp_path: Path) -> None:
    lists = (("one", "ab"), ("two", "c"), ("one", "da"))
    rows = [{"query": query, "positives": list(texts), "negatives": ["n"]} for query, texts in lists]
    path = write(tmp_path / "lists.jsonl", jsonl(rows))
    for streaming, known in ((False, ("abd", "abd", "c", "abd", "abd")), (True, ("ab", "ab", "c", "ad", "ad"))):
        found = [set(row["known_positives"]) for row in load_triples(path, streaming=streaming)]
        assert found == [{stable_id(text) for text in texts} for texts in known]
    assert "known_positives" not in load_triples(write(tmp_path / "one.jsonl", jsonl(ROWS))).column_names


# Scores that come with triples --------------------------------------------------------------------------------------

LISTED = {"query": "first query", "positive": "right", "negatives": ["wrong", "worse"], "label": [1.5, 0, -2]}
EACH = {
    "query": "first query", "positive": "right", "negative_1": "wrong", "negative_2": "worse", "origin": "bm25",
    "positive_teacher_score": 1.5, "negative_1_teacher_score": 0.0, "negative_2_teacher_score": -2.0,
    "positive_score": None,
}  # fmt: skip


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    return rows_of(load_triples(write(path / "t.jsonl", jsonl(rows)), **settings))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("row", "name"), [(LISTED, "label"), (EACH, "teacher_score")])
def test_scores_become_one_list_a_row(tmp_path: Path, row: dict[str, Any], name: str, streaming: bool) -> None:
    texts = {"query": "first query", "positive": "right"}
    two = {"negative_1": "wrong", "negative_2": "worse"}
    for options, added in (
        ({"scores": name}, {**two, "scores": [1.5, 0.0, -2.0]}),
        ({}, two),  # as if there were no scores
        ({"scores": name, "num_negatives": 1}, {"negative": "wrong", "scores": [1.5, 0.0]}),
        ({"scores": name, "num_negatives": 0}, {"scores": [1.5]}),
    ):
        assert load(tmp_path, [row], streaming=streaming, **options) == [{**texts, **added}]


def test_one_negative_and_ids(tmp_path: Path) -> None:
    row = {"query_id": 1, "positive_id": "a", "negative_id": "b", "positive_score": 2, "negative_score": 1.0}
    texts = {"collection": {"a": "right", "b": "wrong"}, "queries": {"1": "query"}}
    [found] = load(tmp_path, [row], scores="score", **texts)
    assert found["scores"] == [2.0, 1.0] and found["negative_id"] == "b"
    Dataset.from_list([{**found, "labelled": True}]).to_parquet(tmp_path / "t.parquet")
    [again] = rows_of(load_triples(tmp_path / "t.parquet", scores="scores"))
    assert again == {**found, "labelled": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [1.0, 2.0]}, "line 2, column 'label': 2 scores for 3 candidates; give one each, positive"),
        ({"label": 1.0}, "line 2, column 'label': holds 1.0, where a list of 3 scores is needed"),
        ({"label": [1.0, None, 2.0]}, r"column 'label': negatives\[0\] of query 'first query' has no score"),
        ({"label": [1, 0, "x"]}, r"the score of negatives\[1\] of query 'first query' is 'x', which is no number"),
        ({"positive": ["right", "also right"]}, "3 scores for 4 candidates"),
    ],
)
def test_bad_scores_are_named_and_can_be_skipped(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    first = {**LISTED, "positive": ["right"]} if "positive" in change else LISTED
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [first, {**first, **change}], scores="label")
    skipped = SkippedRows()
    assert len(load(tmp_path, [first, {**first, **change}], scores="label", skip_bad_rows=True, skipped=skipped)) == 1
    assert skipped.total == 1


def test_scores_that_are_not_finite_or_not_there_are_named(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf"), 1e300):
        rows = Dataset.from_list([LISTED, {**LISTED, "label": [1.0, 0.0, bad]}])
        with pytest.raises(
            ValueError, match=r"row 1, column 'label': the score of negatives\[1\] of query 'first q.* is"
        ):
            load_triples(rows, scores="label")
    with pytest.raises(ValueError, match=r"neither a column 'scores' nor 'positive_scores' .*what follows positive_"):
        load(tmp_path, [EACH], scores="scores")
    with pytest.raises(ValueError, match="nor 'negative_1_score'"):
        load(tmp_path, [EACH], scores="score")
