"""Training triples with mined negatives: passages near the top of a run without a judgement."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa

from tct_hf.data.column_names import negative_columns
from tct_hf.data.file_sources import read_parquet, write_parquet
from tct_hf.data.rows import checked_texts
from tct_hf.data.shards import digest_of, run_shards
from tct_hf.files import claim, read_json, working_in, write_json_atomic
from tct_hf.retrieval.miner import (
    Judged,
    Miner,
    MiningCounts,
    OpenRow,
    PairScorer,
    Rules,
    Scores,
    column_names,
    refuse,
)
from tct_hf.retrieval.runs import rank

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset

# Queries, id to text, to a run of them: the `run` of an index.
Search: TypeAlias = Callable[[Mapping[str, str]], Scores]

TRIPLES_FILE = "triples.parquet"
SUMMARY_FILE = "summary.json"
_MINE_AGAIN = "delete the folder, and mine again."
_PARTS = "parts"
_COUNTS = b"tct_mining_counts"


def mine_triples(
    run: Scores | Search,
    corpus: Dataset,
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    origin: str,
    seed: int,
    num_negatives: int = 1,
    depth: int = 200,
    teacher: PairScorer | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    near_duplicate: float | None = 0.6,
    too_few: Literal["fill", "skip"] = "fill",
    counts: MiningCounts | None = None,
    output_dir: str | Path | None = None,
    depends: Mapping[str, Any] | None = None,
    queries_a_part: int = 2048,
    state: PartialState | None = None,
    write: Callable[[str], None] | None = None,
) -> Dataset:
    """Pair every query and positive with negatives sampled from the best passages of any run.

    A negative is never a known positive of its query, nor nearly the same text as one, and no two negatives of a row
    have the same text. A passage that is the query itself, by id or text, is neither a negative nor a positive. Each
    row draws from its own generator, made of seed, query id and positive id, so that a row does not depend on which
    others are asked for.

    Args:
        run: query id to passage id to score, of any system (`read_run`); or a function from some queries, id to text,
            to such a run (`BM25Index.run`).
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        origin: name of the source of the negatives, for instance "student round 1"; it is written into every row.
        seed: the seed.
        num_negatives: negatives a row.
        depth: how many of the best passages of a query to sample from, known positives among them.
        teacher: a function from (query, passage) texts to a score each, asked for as few pairs as possible
            (`CrossEncoder.predict`).
        margin: refuse a candidate whose teacher score is above that of the row's positive by more than this: it
            probably answers the query. None: the teacher's scores are recorded and refuse nothing.
        relative_margin: refuse a candidate whose teacher score is not below that of the row's positive by this share
            of its size, as `sentence_transformers.util.mine_hard_negatives` does: 0.05 keeps what scores at most 95%
            of a positive score.
        near_duplicate: refuse candidates that share at least this much of their word triples with a positive (Jaccard
            index, above 0, at most 1). Texts that differ in case and punctuation alone are always refused.
        too_few: what becomes of a row with too few candidates left: "fill" takes random passages, which no teacher
            judges, under the other rules; "skip" leaves it out.
        counts: set to what was refused, filled up and left out.
        output_dir: folder for `triples.parquet` and `summary.json`. A call that was stopped goes on after the last
            whole part, one that has finished is read, and a folder of other arguments is refused.
        depends: JSON-ready, all that `run` and `teacher` depend on where they are functions; needed with output_dir.
        queries_a_part: queries that are searched and written at a time; what a kill loses at most.
        state: the processes of a distributed run, which share the parts; one process when None. Needs output_dir.
        write: takes a line of progress for each part of several.

    Returns:
        One row a (query, positive): the columns of `bm25_triples`; then positive_score and negative_score (or
        negative_1_score ...), the run's, null for a positive outside it and for a random passage; the same with
        _teacher_score for _score where there is a teacher; origin. `load_triples` opens the file.

    Raises:
        ValueError: an argument out of range, a query or passage that the data lack, a run without any of the queries,
            a score that is missing or not finite, a corpus too small to fill a row up, no row at all, or an output_dir
            of other arguments.
        OSError: output_dir can't be written.

    Source: Lin, Yang, Lin, RepL4NLP 2021 (sampled from the student's top 200, judged positives not excluded); the
        margin as in de Souza Moreira et al., "NV-Retriever", arXiv 2407.15831.
    """
    from datasets import Dataset  # slow to import

    [origin] = checked_texts([origin], "origin")
    rules = Rules(num_negatives, depth, seed, margin, near_duplicate, too_few, relative_margin)
    refuse(
        {
            f'origin={origin!r}: name where the negatives come from, for instance "bm25"': not origin.strip(),
            "margin, relative_margin: there is no teacher to judge by them": rules.judges and teacher is None,
            f"queries_a_part={queries_a_part}: it must be 1 or more": queries_a_part < 1,
            "state: processes share the work through files; give an output_dir": not output_dir and state is not None,
            "depends: run or teacher is a function; give what they depend on, such as the checksum of a model, so "
            "that output_dir tells whether it is of the same": output_dir is not None
            and depends is None
            and (callable(run) or teacher is not None),
        }
    )
    judged = Judged.of(corpus, queries, qrels)
    ids, positives = judged.ids, judged.positives
    if not callable(run) and not any(run.get(query_id) for query_id in positives):
        raise ValueError("run: it has none of the queries with judgements; give the run of the same split as qrels")
    names = ["positive", *negative_columns(num_negatives)]
    types = {name: pa.string() for name in column_names(num_negatives)} | {"known_positive_ids": pa.list_(pa.string())}
    for kind in ("score",) if teacher is None else ("score", "teacher_score"):
        types |= {f"{name}_{kind}": pa.float64() for name in names}
    schema = pa.schema({**types, "origin": pa.string()})
    asked = list(positives)
    parts = [asked[start : start + queries_a_part] for start in range(0, len(asked), queries_a_part)]

    def mine(part: Sequence[str]) -> Any:
        texts = {query_id: queries[query_id] for query_id in part}
        found = run(texts) if callable(run) else run
        opened = []
        for query_id in part:
            candidates = _candidates(found.get(query_id, {}), query_id, depth, judged.row_of)
            own = positives[query_id]
            opened += [OpenRow(query_id, positive, own, candidates) for positive in own]
        miner = Miner(judged, rules, texts, teacher)
        made = []
        for row in miner.choose(opened):
            score = found.get(row.query_id, {}).get(ids[row.positive])  # also below the candidates
            scores = [None if score is None else float(score), *map(row.candidates.get, row.chosen)]
            by_teacher = [miner.scores.get((row.query_id, passage)) for passage in (row.positive, *row.chosen)]
            triple = {**miner.triple(row), "origin": origin}
            triple |= {f"{name}_score": one for name, one in zip(names, scores, strict=True)}
            triple |= {f"{name}_teacher_score": one for name, one in zip(names, by_teacher, strict=True)}
            made.append(triple)
        if write is not None and len(parts) > 1 and (state is None or state.is_main_process):
            write(f"  part {parts.index(list(part)) + 1} of {len(parts)}: {len(made):,} triples")
        counts = json.dumps(asdict(miner.counts))
        return pa.Table.from_pylist(made, schema.with_metadata({_COUNTS: counts}))

    if output_dir is None:
        table, done = _joined([mine(part) for part in parts])
    else:
        settings = {
            **asdict(rules),
            "origin": origin,
            "queries_a_part": queries_a_part,
            "run": dict(depends or {}) if callable(run) else _run_digest(run),
            "teacher": None if teacher is None else "a function",
            **({"depends": dict(depends)} if depends and not callable(run) else {}),
            "data": _data_digest(judged, queries),
        }
        table, done = _mined(Path(output_dir), parts, mine, state, settings)
    if counts is not None:
        vars(counts).update(vars(done))
    dataset = Dataset(table)
    dataset.info.description = done.summary()
    return dataset


def _joined(tables: Sequence[Any]) -> tuple[Any, MiningCounts]:
    """The rows of all parts, in their order, and what they counted."""
    done = MiningCounts()
    for table in tables:
        done.add(MiningCounts(**json.loads(table.schema.metadata[_COUNTS])))
    refuse(
        {
            "run: it has no passage for any of the queries with judgements; give the run of these": not done.drawn,
            f"mining: none of {done.skipped_rows:,} rows has enough candidates; raise depth or margin, or fill rows "
            'up with too_few="fill"': not done.rows,
        }
    )
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]), done


def _mined(
    folder: Path,
    parts: Sequence[Sequence[str]],
    mine: Callable[[Sequence[str]], Any],
    state: PartialState | None,
    settings: Mapping[str, Any],
) -> tuple[Any, MiningCounts]:
    """Mine the parts that a folder lacks, join them in one file, and read it."""
    is_main = state is None or state.process_index == 0
    wait = state.wait_for_everyone if state is not None else lambda: None

    def join(tables: Sequence[Any]) -> dict[str, Any]:
        table, done = _joined(tables)
        write_parquet(folder / TRIPLES_FILE, table)
        write_json_atomic(folder / SUMMARY_FILE, {"counts": asdict(done), "settings": dict(settings)})
        return {}

    with working_in(folder, is_main):
        if is_main:
            claim(folder, settings)
        wait()
        if not ((folder / SUMMARY_FILE).is_file() and (folder / TRIPLES_FILE).is_file()):
            run_shards(folder / _PARTS, {}, ((digest_of(part), part) for part in parts), mine, about=join, state=state)
            wait()
        if is_main:
            shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return read_parquet(folder / TRIPLES_FILE), read_counts(folder)


def read_counts(folder: str | Path) -> MiningCounts:
    """What mining into a folder did, once it has finished."""
    file = Path(folder) / SUMMARY_FILE
    counts = read_json(file, _MINE_AGAIN, needs=["counts"])["counts"]
    kinds = {name: type(count) for name, count in counts.items()} if isinstance(counts, dict) else None
    if kinds != dict.fromkeys(asdict(MiningCounts()), int):
        raise ValueError(f"{file} does not hold the counts of mining: {_MINE_AGAIN}")
    return MiningCounts(**counts)


def _candidates(scores: Mapping[str, float], query_id: str, depth: int, row_of: Mapping[str, int]) -> dict[int, float]:
    """The best passages of a query as rows of the corpus, best first."""
    for passage_id, score in scores.items():  # all of them: one that is nan leaves the others in no order
        if not math.isfinite(score):
            raise ValueError(
                f"run: the score of query {query_id!r} and passage {passage_id!r} is {score}; leave the passage out, "
                "or score it again"
            )
    best = rank(scores)[:depth]
    try:
        return {row_of[passage_id]: float(score) for passage_id, score in best}
    except KeyError as error:
        raise ValueError(
            f"run: passage {error.args[0]!r} (query {query_id!r}) is not in the corpus; give the corpus that the run "
            "was made on"
        ) from None


def _run_digest(run: Scores) -> str:
    return digest_of(json.dumps([query_id, sorted(run[query_id].items())]) for query_id in sorted(run))


def _data_digest(judged: Judged, queries: Mapping[str, str]) -> str:
    def texts() -> Iterator[str]:
        for batch in judged.corpus.iter(1000):
            yield from (*map(str, batch["id"]), *batch["text"])
        for query_id, rows in judged.positives.items():
            yield from (query_id, queries[query_id], *(judged.ids[row] for row in rows))

    return digest_of(texts())
