"""What would stop a report, found before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tct_hf.evaluation.measures import cutoff_of, evaluate_run, named_measures
from tct_hf.evaluation.report_settings import ExpansionSettings, ReportSettings
from tct_hf.evaluation.report_systems import KEYS
from tct_hf.evaluation.tuning import check_weight, tuning_queries
from tct_hf.retrieval.runs import Run, read_run

# Codes of a fixed number of parts need a dimension that they divide: these have many divisors, and one is a student's.
_DIMENSIONS = (384, 768, 5040, 64)

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


def check_report(collection: Collection, settings: ReportSettings, runs: Mapping[str, str]) -> dict[str, Run]:
    """Find out before any model is loaded what would stop the report later.

    Args:
        collection: with its split "test".
        settings: of the report.
        runs: name to file of runs from elsewhere.

    Returns:
        The runs from elsewhere, read.

    Raises:
        ValueError: an unknown measure or one that looks deeper than the runs, an id or a question that is blank, no
            query, a setting out of range, a run with passages that the corpus lacks or under a taken name.
        FileNotFoundError: there is no such run.
    """
    measures = settings.measures
    for setting, names in (
        ("measures.names", measures.names),
        *((f"also_report.{split}", names) for split, names in settings.also_report.items()),
    ):
        if not names:
            raise ValueError(f"{setting} is empty; name at least one, for instance RR@10")
        evaluate_run({}, {"query": {"passage": 1}}, named_measures(names), relevance=measures.relevance)
        for measure in named_measures(names):
            cutoff = cutoff_of(measure)
            if cutoff is not None and cutoff > measures.depth:
                raise ValueError(f"measures.depth is {measures.depth}, too little for {measure}: {cutoff} or more.")
    for split in settings.also_report:
        if split not in collection.also or not collection.also[split].queries:
            raise ValueError(
                f"also_report.{split}: {collection.name} has no judged query of this split; load the collection with "
                "it (also=), or leave it out"
            )
    for name, number in (
        ("measures.depth", measures.depth),
        ("late_interaction.rerank", settings.late_interaction.rerank),
        ("cost.queries", settings.cost.queries),
        ("cost.teacher_queries", settings.cost.teacher_queries),
        ("cost.batch_size", settings.cost.batch_size),
        ("cost.threads", settings.cost.threads),
        ("build_threads", settings.build_threads),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name}: {number} is below 1")
    for name, number in (
        ("cost.warm_up", settings.cost.warm_up),
        ("late_interaction.max_passages", settings.late_interaction.max_passages),
    ):
        if number < 0:
            raise ValueError(f"{name}: {number} is below 0; 0 is none")
    if not 0 < settings.ann.recall < 1:
        raise ValueError(
            f"ann.recall: {settings.ann.recall} is not between 0 and 1 (1 is the exact search that is reported anyway)"
        )
    check_weight(settings.hybrid)
    check_expansion(settings.expansion)
    _check_factory(settings.ann.factory, len(collection.corpus))
    test = collection.splits.get("test")
    if test is None or not test.queries:
        raise ValueError(f"{collection.name}: no judged query to report on; check data.source and data.test_split")
    splits = [*collection.splits.values(), *collection.also.values()]
    for judged in splits:
        for query, text in judged.queries.items():
            if not text.strip():
                raise ValueError(f"{collection.name}: query {query!r} is blank; write its text, or take it out")
    known = set(collection.corpus["id"])
    for what, ids in (("passage id", known), *(("query id", judged.queries) for judged in splits)):
        for name in ids:
            if not name or name.split() != [name]:
                raise ValueError(f"The {what} {name!r} has white space, which a TREC run can't hold: rename it.")
    tuning_queries(collection, settings.hybrid)
    read: dict[str, Run] = {}
    for name, file in runs.items():
        if name in KEYS:
            raise ValueError(f"runs.{name}: a system of the report has this name; give the run another")
        read[name] = read_run(file)
        if test.queries.keys().isdisjoint(read[name]):
            raise ValueError(
                f"runs.{name}: {file} has none of the {len(test.queries):,} reported queries "
                f"(for instance {next(iter(test.queries))!r}); give a run of this split, with the same ids"
            )
        for query in test.queries:
            for passage in read[name].get(query, {}):
                if passage not in known:
                    raise ValueError(
                        f"runs.{name}: {file} has passage {passage!r} for query {query!r}, which is not in the corpus "
                        f"of {collection.name}; give a run made on this corpus"
                    )
    for split in settings.also_report:
        run = read.get(measures.baseline or "")
        if run is not None and collection.also[split].queries.keys().isdisjoint(run):
            raise ValueError(
                f"measures.baseline: runs.{measures.baseline} has no query of {split}, which is reported too; choose "
                "another row"
            )
    return read


def check_expansion(settings: ExpansionSettings) -> None:
    """Find out what would stop an expanded index but its passages.

    Args:
        settings: without a path nothing is checked.

    Raises:
        ValueError: a setting out of range, or of a folder that is damaged.
        FileNotFoundError: there is no finished folder of expansions, or none of scores where they decide.
    """
    if settings.path is None:
        return
    if settings.num_queries is not None and settings.num_queries < 1:
        raise ValueError(f"expansion.num_queries: {settings.num_queries} is below 1; leave it out to take all")
    if not 0 <= settings.drop_share < 1:
        raise ValueError(f"expansion.drop_share: {settings.drop_share} is not from 0 to below 1")
    if not 0 <= settings.k1 < math.inf or not 0 <= settings.b <= 1:
        raise ValueError(
            f"expansion.k1 {settings.k1}, expansion.b {settings.b}: k1 must be finite and 0 or more, b from 0 to 1"
        )
    settings.depends()


def _check_factory(factory: str, passages: int) -> None:
    from tct_hf.retrieval.faiss_tools import make_engine, parts

    if factory == "auto":
        return
    for dimension in _DIMENSIONS:
        try:
            _, lists, _ = parts(make_engine(dimension, factory))
        except RuntimeError:
            continue
        if lists is not None and lists.nlist > passages:
            raise ValueError(
                f"ann.factory: {factory!r} has {lists.nlist:,} lists for {passages:,} passages; take fewer"
            )
        return
    raise ValueError(
        f'ann.factory: Faiss knows no index {factory!r} for inner products; use "auto", "HNSW32" or "IVF256,Flat"'
    )
