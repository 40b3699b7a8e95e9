"""Collections in the BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, in a folder or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from tct_hf.data.documents import DocumentSource, document_files
from tct_hf.data.file_sources import LineSource, Source
from tct_hf.data.irds import IrdsSource, is_irds, judged_sets
from tct_hf.data.qrels import Judgements, Qrels, check_positives, read_qrels
from tct_hf.data.rows import SkippedRows, is_hub_id, refuse_or_skip
from tct_hf.data.sources import MissingSplitError, named_by_header, one_split, parts_of, reach
from tct_hf.data.texts import TEXT_FIX, prepare_corpus, records_of
from tct_hf.files import command

if TYPE_CHECKING:
    from datasets import Dataset


def load_beir(
    path_or_hub_id: str | Path,
    split: str,
    *,
    allow_empty: bool = False,
    skip_bad_rows: bool = False,
    skipped: SkippedRows | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Dataset, dict[str, str], Qrels]:
    """Load a collection in the BEIR layout, its files plain or .gz; a passage's title and text are joined by a space.

    Args:
        path_or_hub_id: a folder, or a Hub data set with configurations "corpus" and "queries" whose judgements are
            in `<id>-qrels`, or in its own configuration "default" or "qrels"; or "irds:ID" of ir_datasets, whose
            splits are the data sets below it (the split "dev" is "ID/dev"), its own judgements being "test".
        split: the judgements to load, for instance "test".
        allow_empty: keep passages without any text (some published collections have them) instead of refusing them.
        skip_bad_rows: leave out malformed, empty and repeated passages, queries and judgements, and judgements of
            passages or queries that are not there, instead of refusing the collection.
        skipped: takes what was left out, per kind, with the first of each.
        cache_dir: folder of the prepared corpus; by default `default_cache_dir()`.

    Returns:
        The corpus (memory-mapped, columns id and text), the queries judged in the split {query id: text} and the
        judgements {query id: {passage id: relevance}}, both in the order of the judgements.

    Raises:
        FileNotFoundError: a missing folder, file or split; the message lists what there is.
        ValueError: a malformed file, named with its line, or a split without positives.
        OSError: the cache can't be written, or the Hub can't be reached.
    """
    folder = open_beir(path_or_hub_id, cache_dir, skip_bad_rows=skip_bad_rows)
    corpus, queries, qrels = folder.load(split, allow_empty=allow_empty)
    if skipped is not None:
        skipped.replace(folder.skipped)
    return corpus.select_columns(["id", "text"]), queries, qrels


def open_beir(
    path_or_hub_id: str | Path, cache_dir: str | Path | None = None, *, skip_bad_rows: bool = False
) -> BeirFolder:
    """The collection of a folder, a Hub id or "irds:ID", not read yet."""
    if is_irds(path_or_hub_id):
        return BeirOfIrds(path_or_hub_id, cache_dir, skip_bad_rows)
    folder = Path(path_or_hub_id)
    if not str(path_or_hub_id).strip():
        raise ValueError("source: the name is empty; name a BEIR folder or a Hub id")
    if folder.is_dir():
        return BeirFolder(folder, cache_dir, skip_bad_rows)
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds corpus.jsonl, queries.jsonl and qrels/")
    if is_hub_id(str(path_or_hub_id)):
        return BeirOnHub(path_or_hub_id, cache_dir, skip_bad_rows)
    raise FileNotFoundError(f"{folder}: no such folder, and no Hub id (owner/name) or irds:ID; give the right path")


class BeirFolder:
    """A folder with corpus.jsonl, queries.jsonl and qrels/."""

    def __init__(self, place: str | Path, cache_dir: str | Path | None = None, skip_bad_rows: bool = False) -> None:
        self.place, self.cache_dir, self._skips = str(place), cache_dir, skip_bad_rows
        self._skipped: dict[str, SkippedRows] = {}  # of each file, however often it is read

    @property
    def skipped(self) -> SkippedRows:
        found = SkippedRows()
        for one in self._skipped.values():
            found.update(one)
        return found

    def _skip(self, part: str) -> SkippedRows | None:
        """Where bad rows of a part are counted, anew; None where they are refused."""
        if not self._skips:
            return None
        self._skipped[part] = SkippedRows()
        return self._skipped[part]

    def part(self, name: str) -> Source:
        folder = Path(self.place)
        for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if path.is_file():
                return LineSource(path)
        there = sorted(path.name for path in folder.iterdir())
        mistyped = any(one.partition(".")[0] == name for one in there)  # in another format, beside a README
        if name == "corpus" and not mistyped and document_files(folder):
            return DocumentSource(folder)
        said = ", ".join(there) or "nothing"
        more = ", nor Markdown or text files instead," if name == "corpus" else ""
        raise FileNotFoundError(
            f"{folder}: neither {name}.jsonl nor {name}.jsonl.gz{more} is there (there is: {said})"
        )

    def queries(self, split: str) -> Source:
        """The raw rows of the queries, of this split at least."""
        return self.part("queries")

    def judgements(self, split: str) -> Judgements:
        folder = Path(self.place) / "qrels"
        for path in (folder / f"{split}.tsv", folder / f"{split}.tsv.gz"):
            if path.is_file():
                return read_qrels(path, skipped=self._skip(f"qrels of {split}"))
        splits = sorted({path.name.split(".tsv")[0] for path in folder.glob("*.tsv*")})
        there = ", ".join(splits) or f"none; without judgements, train by {command('train unlabelled')}"
        raise MissingSplitError(f"{folder}: no {split}.tsv or {split}.tsv.gz; splits there: {there}")

    def load(self, split: str, *, allow_empty: bool = False) -> tuple[Dataset, dict[str, str], Qrels]:
        """As :func:`load_beir`; the corpus has a column title besides, empty where a passage has none."""
        judged = self.judgements(split)
        texts = _judged_queries(self.queries(split), judged, self._skip(f"queries of {split}"))
        corpus = self.corpus(allow_empty=allow_empty)
        _check_passages(corpus, judged, f"the corpus of {self.place}", self._skip(f"judgements of {split}"))
        return corpus, {name: texts[name] for name in judged.qrels}, judged.qrels

    def corpus(self, *, allow_empty: bool = False) -> Dataset:
        skipped = self._skip("corpus")
        return prepare_corpus(self.part("corpus"), self.cache_dir, allow_empty=allow_empty, skipped=skipped)


class BeirOnHub(BeirFolder):
    """The same on the Hub."""

    def part(self, name: str) -> Source:
        # A configuration "corpus" or "queries", whose only split usually has the same name.
        parts = parts_of(self.place, name)
        return one_split(parts, None if len(parts) == 1 else name, f"{self.place} ({name})")()

    def judgements(self, split: str) -> Judgements:
        own = next((name for name in hub_configurations(self.place) if name in ("default", "qrels")), None)
        place = self.place if own else f"{self.place}-qrels"
        try:
            parts = parts_of(place, own, named_by_header)
        except FileNotFoundError as error:
            raise error if own else MissingSplitError(str(error)) from error
        rows = one_split(parts, split, f"{place} ({own})" if own else place)()
        return read_qrels(rows, skipped=self._skip(f"qrels of {split}"))


class BeirOfIrds(BeirFolder):
    """The same of ir_datasets."""

    def part(self, name: str) -> Source:
        return IrdsSource(self.place, "docs")

    def queries(self, split: str) -> Source:
        return IrdsSource(judged_sets(self.place)[split], "queries")

    def judgements(self, split: str) -> Judgements:
        judged = IrdsSource(one_split(judged_sets(self.place), split, self.place), "qrels")
        # MS MARCO's train judgements have the same line twice here and there.
        return read_qrels(judged, allow_repeats=True, skipped=self._skip(f"qrels of {split}"))


def hub_configurations(hub_id: str) -> list[str]:
    """Names of the configurations of a Hub data set."""
    from datasets import get_dataset_config_names

    return list(reach(hub_id, lambda: get_dataset_config_names(hub_id)))


def _judged_queries(source: Source, judged: Judgements, skipped: SkippedRows | None) -> dict[str, str]:
    """The texts of the judged queries; judgements of others are refused, or left out and added to `skipped`."""
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, (query_id, _, text) in records_of(source, title=False, skipped=skipped, fix=TEXT_FIX):
        if (first := places.setdefault(query_id, place)) is not place:
            message = f"{place}: query id {query_id!r} was used before, in {first}; make ids unique"
            refuse_or_skip(skipped, "repeated id", message)
        elif query_id in judged.qrels:
            texts[query_id] = text
    for query_id, place in judged.places.items():
        if query_id not in texts:
            fix = "add it, or leave such judgements out with skip_bad_rows"
            message = f"{place}: query {query_id!r} is not in {source.name}; {fix}"
            refuse_or_skip(skipped, "judged query that is missing", message)
            del judged.qrels[query_id]
    return texts


def _check_passages(corpus: Dataset, judged: Judgements, source: str, skipped: SkippedRows | None) -> None:
    """Refuse judgements of passages that the corpus lacks, or leave them out and add them to `skipped`."""
    wanted = {passage_id for grades in judged.qrels.values() for passage_id in grades}
    # One batch of ids at a time: the corpus stays on disk.
    values = pa.array(list(wanted), pa.string())
    for batch in corpus.data.column("id").chunks:
        wanted.difference_update(batch.filter(pc.is_in(batch, value_set=values)).to_pylist())
    for query_id, grades in list(judged.qrels.items()) if wanted else ():
        for passage_id in wanted & grades.keys():
            what = f"{judged.places[query_id]} and after: query {query_id!r} is judged with passage {passage_id!r}"
            fix = "add the passage, or leave such judgements out with skip_bad_rows"
            message = f"{what}, which is not in {source} ({len(wanted)} are missing); {fix}"
            refuse_or_skip(skipped, "judged passage that is missing", message)
            del grades[passage_id]
        if not grades:
            del judged.qrels[query_id]
    file = next(iter(judged.places.values())).rpartition(", ")[0]
    check_positives(judged.qrels, f"{file}, without judgements of missing queries and passages")
