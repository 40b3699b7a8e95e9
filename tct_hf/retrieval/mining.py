"""Training triples with mined negatives: passages near the top of a run without a judgement."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from tct_hf.files import claim, write_aside, write_json_atomic
from tct_hf.retrieval.miner import (
    Miner,
    MiningCounts,
    OpenRow,
    PairScorer,
    Rules,
    Scores,
    column_names,
    negative_names,
    passage_ids,
    positive_rows,
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
    teacher: Scores | PairScorer | None = None,
    margin: float | None = None,
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
    have the same text. Each row draws from its own generator, made of seed, query id and positive id, so that a row
    does not depend on which others are asked for.

    Args:
        run: query id to passage id to score, of any system (`read_run`); or a function from queries, id to text, to
            such a run, called for some queries at a time (`BM25Index.run`).
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        origin: name of the source of the negatives, for instance "student round 1"; it is written into every row.
        seed: the seed.
        num_negatives: negatives a row.
        depth: how many of the best passages of a query to sample from, known positives among them.
        teacher: judge of candidates: a function from (query, passage) texts to a score each, asked for as few pairs
            as possible (`CrossEncoder.predict`), or a run with a score of every positive and candidate.
        margin: refuse a candidate whose teacher score is above that of the row's positive by more than this: it
            probably answers the query. None: the teacher's scores are recorded and refuse nothing.
        near_duplicate: refuse candidates that share at least this much of their word triples with a positive (Jaccard
            index, above 0, at most 1). Texts that differ in case and punctuation alone are always refused; None
            refuses nothing else.
        too_few: what becomes of a row with too few candidates left: "fill" takes random passages, which no teacher
            judges, under the other rules; "skip" leaves it out.
        counts: set to what was refused, filled up and left out.
        output_dir: folder for `triples.parquet` and `summary.json`. A call that was stopped goes on after the last
            whole part, one that has finished is read, and a folder of other arguments is refused.
        depends: JSON-ready, all that `run` and `teacher` depend on where they are functions; needed with output_dir.
        queries_a_part: queries that are searched and written at a time; what a kill loses at most.
        state: the processes of a distributed run, which share the parts; one process when None. Needs output_dir.
        write: takes a line of progress a part.

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

    rules = Rules(num_negatives, depth, seed, margin, near_duplicate, too_few)
    functions = callable(run) or callable(teacher)
    refuse(
        {
            f'origin={origin!r}: name where the negatives come from, for instance "bm25"': not origin.strip(),
            f"margin={margin}: there is no teacher to judge by it": margin is not None and teacher is None,
            f"queries_a_part={queries_a_part}: it must be 1 or more": queries_a_part < 1,
            "state: processes share the work through files; give an output_dir": not output_dir and state is not None,
            "depends: run or teacher is a function; give what they depend on, such as the checksum of a model, so "
            "that output_dir tells whether it is of the same": output_dir is not None
            and depends is None
            and functions,
        }
    )
    ids = passage_ids(corpus)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    positives = positive_rows(queries, qrels, row_of)
    if not callable(run) and not any(run.get(query_id) for query_id in positives):
        raise ValueError("run: it has none of the queries with judgements; give the run of the same split as qrels")
    negatives = ["positive", *negative_names(num_negatives)]
    types = {name: pa.string() for name in column_names(num_negatives)} | {"known_positive_ids": pa.list_(pa.string())}
    types |= {f"{name}_score": pa.float64() for name in negatives}
    types |= {f"{name}_teacher_score": pa.float64() for name in negatives} if teacher is not None else {}
    schema = pa.schema({**types, "origin": pa.string()})

    def mine(part: Sequence[str]) -> tuple[Any, MiningCounts]:
        texts = {query_id: queries[query_id] for query_id in part}
        found = run(texts) if callable(run) else run
        opened = []
        for query_id in part:
            candidates = _candidates(found.get(query_id, {}), query_id, depth, row_of)
            own = positives[query_id]
            opened += [OpenRow(query_id, positive, own, candidates) for positive in own]
        miner = Miner(corpus, ids, rules, texts, teacher)
        made = []
        for row in miner.choose(opened):
            score = found.get(row.query_id, {}).get(ids[row.positive])
            scores = [None if score is None else float(score), *(negative.score for negative in row.chosen)]
            judged = [row.positive_teacher_score, *(negative.teacher_score for negative in row.chosen)]
            made.append(
                {
                    **miner.triple(row),
                    **{f"{name}_score": value for name, value in zip(negatives, scores, strict=True)},
                    **{f"{name}_teacher_score": value for name, value in zip(negatives, judged, strict=True)},
                    "origin": origin,
                }
            )
        return pa.Table.from_pylist(made, schema=schema), miner.counts

    asked = list(positives)
    parts = [asked[start : start + queries_a_part] for start in range(0, len(asked), queries_a_part)]
    if output_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            table, done = _mined(Path(scratch), parts, mine, None, write, {})
    else:
        settings = {
            **asdict(rules),
            "origin": origin,
            "queries_a_part": queries_a_part,
            "run": dict(depends or {}) if callable(run) else _digest(run),
            "teacher": None if teacher is None else "a function" if callable(teacher) else _digest(teacher),
            **({"depends": dict(depends)} if depends and not callable(run) else {}),
            "data": _data_digest(corpus, queries, positives, ids),
        }
        table, done = _mined(Path(output_dir), parts, mine, state, write, settings)
    if counts is not None:
        vars(counts).update(vars(done))
    dataset = Dataset(table)
    dataset.info.description = done.summary()
    return dataset


def _mined(
    folder: Path,
    parts: Sequence[Sequence[str]],
    mine: Callable[[Sequence[str]], tuple[Any, MiningCounts]],
    state: PartialState | None,
    write: Callable[[str], None] | None,
    settings: Mapping[str, Any],
) -> tuple[Any, MiningCounts]:
    """Mine what a folder lacks, part by part, join the parts, and read the result."""
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)
    team: Any = state if state is not None else alone
    if team.is_main_process:
        claim(folder, settings)
    team.wait_for_everyone()
    if not ((folder / SUMMARY_FILE).is_file() and (folder / TRIPLES_FILE).is_file()):
        files = [folder / _PARTS / f"{number:05d}.parquet" for number in range(len(parts))]
        rows = 0
        for number in range(team.process_index, len(parts), team.num_processes):
            if not files[number].is_file():
                table, counts = mine(parts[number])
                table = table.replace_schema_metadata({_COUNTS: json.dumps(asdict(counts))})
                with write_aside(files[number]) as aside:
                    pq.write_table(table, aside, compression="zstd")
                rows += counts.rows
                if write is not None and len(parts) > 1 and team.is_main_process:
                    write(f"  part {number + 1} of {len(parts)}: {rows:,} triples")
        team.wait_for_everyone()
        if team.is_main_process:
            _join(files, folder, settings)
        team.wait_for_everyone()
    if team.is_main_process:
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return pq.read_table(folder / TRIPLES_FILE), read_counts(folder)


def _join(files: Sequence[Path], folder: Path, settings: Mapping[str, Any]) -> None:
    """One file of all parts, in their order, with what they counted beside it."""
    done, tables = MiningCounts(), []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: damaged ({error}); delete it and start again") from error
        done.add(MiningCounts(**json.loads(tables[-1].schema.metadata[_COUNTS])))
    refuse(
        {
            "run: it has no passage for any of the queries with judgements; give the run of these": not done.drawn,
            f"mining: none of {done.skipped_rows:,} rows has enough candidates; raise depth or margin, or fill rows "
            'up with too_few="fill"': not done.rows,
        }
    )
    with write_aside(folder / TRIPLES_FILE) as aside:
        table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        pq.write_table(table, aside, compression="zstd")
    write_json_atomic(folder / SUMMARY_FILE, {"counts": asdict(done), "settings": dict(settings)})


def read_counts(folder: str | Path) -> MiningCounts:
    """What mining into a folder did, once it has finished."""
    return MiningCounts(**json.loads((Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8"))["counts"])


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


def _digest(scores: Scores) -> str:
    digest = sha256()
    for query_id in sorted(scores):
        digest.update(json.dumps([query_id, sorted(scores[query_id].items())]).encode())
    return digest.hexdigest()


def _data_digest(
    corpus: Dataset, queries: Mapping[str, str], positives: Mapping[str, Sequence[int]], ids: Sequence[str]
) -> str:
    digest = sha256()
    for batch in corpus.select_columns(["id", "text"]).iter(1000):
        digest.update(json.dumps([batch["id"], batch["text"]]).encode())
    for query_id, rows in positives.items():
        digest.update(json.dumps([query_id, queries[query_id], [ids[row] for row in rows]]).encode())
    return digest.hexdigest()
