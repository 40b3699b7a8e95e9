"""Training triples with mined negatives: what a retriever puts near the top and nobody has judged relevant."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tct_hf.files import claim, write_aside, write_json_atomic
from tct_hf.retrieval.mining_rules import BlockMiner, MiningCounts, PairScorer, Rules, Scores
from tct_hf.retrieval.negatives import column_names, passage_ids, positive_rows

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset

__all__ = ["MiningCounts", "mine_triples", "mined_columns"]

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
        run: query id to passage id to score, of a student, of BM25, of any system (`read_run`); or a function from
            queries, id to text, to such a run, called for some queries at a time (`BM25Index.run`): a run of all
            queries then never is in memory.
        corpus: columns id and text.
        queries: query id to text.
        qrels: query id to passage id to relevance; 1 and more is positive. Queries without positives give no row.
        origin: names the source of the negatives, for instance "student round 1"; it is written into every row.
        seed: the seed.
        num_negatives: negatives a row.
        depth: how many of the best passages of a query to sample from, known positives among them.
        teacher: what judges candidates: a function from (query, passage) texts to a score each, asked for as few pairs
            as will do (`CrossEncoder.predict`, `tct_hf.pipeline.rounds.pair_scorer`), or a run that holds a score of
            every positive and candidate.
        margin: refuse a candidate whose teacher score is above that of the row's positive by more than this, in the
            teacher's units: it probably answers the query. Negative for those that only come near. None: the teacher's
            scores are recorded, where there is one, and refuse nothing.
        near_duplicate: refuse candidates that share at least this much of their word triples with a positive (Jaccard
            index, above 0, at most 1). Texts that differ in case and punctuation alone are refused always; None
            refuses nothing else.
        too_few: what becomes of a row with too few candidates left: "fill" takes random passages, which no teacher
            judges, under the other rules; "skip" leaves it out.
        counts: takes what was refused, filled up and left out.
        output_dir: write `triples.parquet` and `summary.json` there. A call that was stopped goes on after the last
            whole part, one that has finished is read, and a folder of other arguments is refused.
        depends: JSON-ready, all that `run` and `teacher` depend on where they are functions; needed with output_dir.
        queries_a_part: queries that are searched and written at a time; what is lost at most when a process is killed.
        state: the processes of a distributed run, which share the parts; one process when None. Needs output_dir.
        write: takes a line of progress a part.

    Returns:
        One row a (query, positive): the columns of `bm25_triples`; then positive_score and negative_score (or
        negative_1_score ...), the run's, null for a positive outside it and for a random passage; the same with
        _teacher_score for _score where there is a teacher; origin. Trainers take the data set as it is;
        `load_triples` opens the file.

    Raises:
        ValueError: an argument out of range, a query or passage that judgements name and the data lack, a passage that
            the run names (of a judged query: others are not looked at) and the corpus lacks, a run without any of
            the queries, a score that is missing or not finite, a corpus too small to fill a row up, no row at all, or
            an output_dir of other arguments.
        OSError: output_dir can't be written.

    Source: Lin, Yang, Lin, "In-Batch Negatives for Knowledge Distillation with Tightly-Coupled Teachers for Dense
        Retrieval", RepL4NLP 2021 (sampled from the student's top 200, judged positives not excluded); the margin as
        in de Souza Moreira et al., "NV-Retriever", arXiv 2407.15831.
    """
    rules = Rules(num_negatives, depth, seed, margin, near_duplicate, too_few)
    _check(run, teacher, rules, origin, queries_a_part, output_dir, depends, state)
    ids = passage_ids(corpus)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    positives = positive_rows(queries, qrels, row_of)
    if not callable(run) and not any(run.get(query_id) for query_id in positives):
        raise ValueError("run: it has none of the queries with judgements; give the run of the same split as qrels")
    names = mined_columns(num_negatives, teacher=teacher is not None)
    counts = counts if counts is not None else MiningCounts()

    def mine(part: Sequence[str]) -> tuple[Any, MiningCounts]:
        texts = {query_id: queries[query_id] for query_id in part}
        found = run(texts) if callable(run) else run
        candidates = {query_id: _candidates(found.get(query_id, {}), query_id, depth, row_of) for query_id in part}
        miner = BlockMiner(corpus, ids, rules, texts, teacher)
        rows = miner.rows({query_id: positives[query_id] for query_id in part}, candidates)
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            known = [ids[positive] for positive in row.positives]
            values: list[Any] = [texts[row.query_id], miner.text[row.positive]]
            values += [miner.text[negative.row] for negative in row.chosen]
            values += [row.query_id, ids[row.positive], *(ids[negative.row] for negative in row.chosen), known]
            own = found.get(row.query_id, {}).get(ids[row.positive])
            values += [None if own is None else float(own), *(negative.score for negative in row.chosen)]
            if teacher is not None:
                values += [row.positive_teacher_score, *(negative.teacher_score for negative in row.chosen)]
            for name, value in zip(names, [*values, origin], strict=True):
                columns[name].append(value)
        return _table(columns), miner.counts

    asked = list(positives)
    parts = [asked[start : start + queries_a_part] for start in range(0, len(asked), queries_a_part)]
    if output_dir is None:
        tables = []
        done = MiningCounts()
        for number, part in enumerate(parts):
            table, of_part = mine(part)
            tables.append(table)
            done.add(of_part)
            _tell(write, number, len(parts), done)
        return _result(_concatenated(tables), done, counts)
    settings = {
        **asdict(rules),
        "origin": origin,
        "queries_a_part": queries_a_part,
        "run": dict(depends or {}) if callable(run) else _digest(run),
        "teacher": None if teacher is None else "a function" if callable(teacher) else _digest(teacher),
        **({"depends": dict(depends)} if depends and not callable(run) else {}),
        "data": _data_digest(corpus, queries, positives, ids),
    }
    folder = Path(output_dir)
    if state is None or state.is_main_process:
        claim(folder, settings)
    if state is not None:
        state.wait_for_everyone()
    if not ((folder / SUMMARY_FILE).is_file() and (folder / TRIPLES_FILE).is_file()):
        _write_parts(folder, parts, mine, state, write)
        if state is not None:
            state.wait_for_everyone()
        if state is None or state.is_main_process:
            _join_parts(folder, len(parts), settings)
        if state is not None:
            state.wait_for_everyone()
    if state is None or state.is_main_process:
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    return _result(pq.read_table(folder / TRIPLES_FILE), read_counts(folder), counts)


def read_counts(folder: str | Path) -> MiningCounts:
    """What mining into a folder did.

    Args:
        folder: an output_dir of `mine_triples` that has finished.
    """
    return MiningCounts(**json.loads((Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8"))["counts"])


def mined_columns(num_negatives: int, *, teacher: bool) -> list[str]:
    """Name the columns of mined triples.

    Args:
        num_negatives: negatives a row, at least one.
        teacher: whether a teacher has scored them.

    Returns:
        The names, in the order of `mine_triples`.
    """
    names = column_names(num_negatives)
    candidates = names[1 : 2 + num_negatives]
    scores = [f"{name}_score" for name in candidates]
    judged = [f"{name}_teacher_score" for name in candidates] if teacher else []
    return [*names, *scores, *judged, "origin"]


def _check(
    run: Any,
    teacher: Any,
    rules: Rules,
    origin: str,
    queries_a_part: int,
    output_dir: str | Path | None,
    depends: Mapping[str, Any] | None,
    state: Any,
) -> None:
    if not isinstance(origin, str) or not origin.strip():
        raise ValueError(f'origin={origin!r}: name where the negatives come from, for instance "bm25"')
    if rules.margin is not None and teacher is None:
        raise ValueError(f"margin={rules.margin}: there is no teacher to judge by it; give one, or leave margin out")
    if queries_a_part < 1:
        raise ValueError(f"queries_a_part={queries_a_part}: it must be 1 or more")
    if output_dir is None and state is not None:
        raise ValueError("state: processes share the work through files; give an output_dir")
    if output_dir is not None and depends is None and (callable(run) or callable(teacher)):
        raise ValueError(
            "depends: run or teacher is a function, and output_dir must tell whether its content is of the same; give "
            "what they depend on, for instance the checksum of a model"
        )


def _candidates(scores: Mapping[str, float], query_id: str, depth: int, row_of: Mapping[str, int]) -> dict[int, float]:
    """The best passages of a query as rows of the corpus, best first."""
    # As `tct_hf.retrieval.runs.rank`, which data does not know.
    for passage_id, score in scores.items():  # all of them: one that is nan leaves the others in no order
        if not math.isfinite(score):
            raise ValueError(
                f"run: the score of query {query_id!r} and passage {passage_id!r} is {score}; leave the passage out, "
                "or score it again"
            )
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:depth]
    for passage_id, _ in best:
        if passage_id not in row_of:
            raise ValueError(
                f"run: passage {passage_id!r} (query {query_id!r}) is not in the corpus; give the corpus that the run "
                "was made on"
            )
    return {row_of[passage_id]: float(score) for passage_id, score in best}


def _table(columns: Mapping[str, Sequence[Any]]) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    def kind(name: str) -> Any:
        if name == "known_positive_ids":
            return pa.list_(pa.string())
        return pa.float64() if name.endswith("_score") else pa.string()

    return pa.table({name: pa.array(values, kind(name)) for name, values in columns.items()})


def _concatenated(tables: Sequence[Any]) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    return pa.concat_tables(tables)


def _result(table: Any, done: MiningCounts, counts: MiningCounts) -> Dataset:
    from datasets import Dataset

    counts.replace(done)
    _refuse_none(done)
    dataset = Dataset(table.replace_schema_metadata(None))
    dataset.info.description = done.summary()
    return dataset


def _refuse_none(done: MiningCounts) -> None:
    if not done.drawn:
        raise ValueError(
            "run: it has no passage for any of the queries with judgements; give the run of these queries"
        )
    if not done.rows:
        raise ValueError(
            f"mining: none of {done.skipped_rows:,} rows has enough candidates; raise depth or margin, or fill rows "
            'up with too_few="fill"'
        )


def _tell(write: Callable[[str], None] | None, number: int, parts: int, done: MiningCounts) -> None:
    if write is not None and parts > 1:
        write(f"  part {number + 1} of {parts}: {done.rows:,} triples")


def _part_file(folder: Path, number: int) -> Path:
    return folder / _PARTS / f"{number:05d}.parquet"


def _write_parts(
    folder: Path,
    parts: Sequence[Sequence[str]],
    mine: Callable[[Sequence[str]], tuple[Any, MiningCounts]],
    state: Any,
    write: Callable[[str], None] | None,
) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    done = MiningCounts()
    for number in range(rank, len(parts), processes):
        file = _part_file(folder, number)
        if file.is_file():
            continue
        table, of_part = mine(parts[number])
        table = table.replace_schema_metadata({_COUNTS: json.dumps(asdict(of_part)).encode()})
        with write_aside(file) as aside:
            pq.write_table(table, aside, compression="zstd")
        done.add(of_part)
        if rank == 0:
            _tell(write, number, len(parts), done)


def _join_parts(folder: Path, parts: int, settings: Mapping[str, Any]) -> None:
    """One file of all parts, in their order, with what they counted beside it."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    done = MiningCounts()

    def tables() -> Iterator[Any]:
        for number in range(parts):
            file = _part_file(folder, number)
            try:
                table = pq.read_table(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file}: damaged ({error}); delete it and start again") from error
            done.add(MiningCounts(**json.loads(table.schema.metadata[_COUNTS])))
            yield table.replace_schema_metadata(None)

    with write_aside(folder / TRIPLES_FILE) as aside:
        writer = None
        for table in tables():
            writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()
        _refuse_none(done)
    write_json_atomic(folder / SUMMARY_FILE, {"counts": asdict(done), "settings": dict(settings)})


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
