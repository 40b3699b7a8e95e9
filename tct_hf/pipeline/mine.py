"""Mining for a collection: sources of candidates, and the ColBERT that judges by the margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from sentence_transformers import MultiVectorEncoder

from tct_hf.data.collection import Collection
from tct_hf.evaluation.maxsim import rerank_run
from tct_hf.evaluation.workspace import Workspace, open_teacher
from tct_hf.pipeline.checks import named
from tct_hf.pipeline.settings import MiningSettings
from tct_hf.retrieval.mining import MiningCounts, PairScorer, Rules, Scores, mine_triples
from tct_hf.settings import SettingsError
from tct_hf.teachers.colbert import describe_teacher


def check_mining(settings: MiningSettings, section: str = "") -> None:
    """Refuse rules that nothing could be mined with, before there are candidates; `section` is theirs in a recipe."""
    given = asdict(settings)
    if given.pop("queries_a_part") < 1:
        raise SettingsError(f"{section}.queries_a_part: {settings.queries_a_part} is below 1".lstrip("."))
    with named(section):
        Rules(**given, seed=0)


def check_judged(collection: Collection, labels: float) -> None:
    """Refuse a collection without queries to mine for."""
    if not collection.labelled(labels):
        raise SettingsError(f"data: {collection.name} has no judged train queries to mine for; raise data.labels")


@dataclass(frozen=True)
class Source:
    """Where candidates come from.

    Args:
        origin: its name in the triples.
        run: a run, or a function from queries to one.
        depends: JSON-ready, all that the run depends on.
    """

    origin: str
    run: Scores | Callable[[Mapping[str, str]], Scores]
    depends: Mapping[str, Any]


def student_source(workspace: Workspace, origin: str, *, depth: int, state: PartialState | None = None) -> Source:
    """Exact search with a student; the corpus is encoded first, or the encoding is resumed."""
    if state is not None:
        workspace.encode(state)
        with state.main_process_first():  # one writes the index, the others open it
            workspace.exact()
    return Source(origin, lambda queries: workspace.search(queries, depth), workspace.depends)


def pair_scorer(model: MultiVectorEncoder, *, bf16: bool = False) -> PairScorer:
    """A function that scores (query, passage) texts by MaxSim; it encodes each text of a call once."""

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        run: dict[str, dict[str, float]] = {}
        for query, passage in pairs:
            run.setdefault(query, {})[passage] = 0.0
        most = max(map(len, run.values()))
        found = rerank_run(model, run, {p: p for _, p in pairs}, {q: q for q in run}, k=most, bf16=bf16)
        return [found[query][passage] for query, passage in pairs]

    return score


def mine(
    collection: Collection,
    source: Source,
    settings: MiningSettings,
    output: Path,
    *,
    seed: int,
    labels: float = 1.0,
    teacher: str | None = None,
    bf16: bool = False,
    state: PartialState | None = None,
    write: Callable[[str], None] = print,
) -> MiningCounts:
    """Mine negatives for the judged train queries of a collection, into `output/triples.parquet`.

    Stopped and called again, it goes on after the last whole part; finished, it returns at once.

    Args:
        labels: share of the train queries whose judgements are used.
        teacher: folder or Hub id of the ColBERT that judges by the margin; not loaded without one.

    Returns:
        What was refused, filled up and left out.
    """
    judge: PairScorer | None = None
    depends: dict[str, Any] = dict(source.depends)
    if settings.margin is not None:
        if teacher is None:
            raise ValueError(f"margin is {settings.margin}, but there is no teacher to judge by it: name a ColBERT")
        model = open_teacher(teacher)
        judge = pair_scorer(model, bf16=bf16)
        depends["teacher"] = {**describe_teacher(model), "bf16": bf16}
    counts = MiningCounts()
    mine_triples(
        source.run,
        collection.corpus,
        collection.splits["train"].queries,
        collection.labelled(labels),
        **asdict(settings),
        origin=source.origin,
        seed=seed,
        teacher=judge,
        counts=counts,
        output_dir=output,
        depends=depends,
        state=state,
        write=write,
    )
    return counts
