"""Data sets of ir_datasets (https://ir-datasets.com), named "irds:ID" where a source is named."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

from tct_hf.data.file_sources import Source

PREFIX = "irds:"
# What each setting reads of a data set, and its columns here, in the order of ir_datasets' fields.
KINDS = {"collection": "docs", "queries": "queries", "qrels": "qrels", "triples": "docpairs", "scores": "scoreddocs"}
_COLUMNS = {
    "docs": ["_id", "title", "text"],
    "queries": ["_id", "text"],
    "qrels": ["query-id", "corpus-id", "score"],
    "docpairs": ["query_id", "positive_id", "negative_id"],
    "scoreddocs": ["query_id", "passage_id", "score"],
}


def is_irds(source: Any) -> TypeGuard[str]:
    """Whether a source is named by the id of a data set of ir_datasets."""
    return isinstance(source, str) and source.startswith(PREFIX)


def open_irds(name: str) -> Any:
    """The data set of "irds:ID", not downloaded yet."""
    try:
        import ir_datasets
    except ImportError as error:
        raise ImportError(f"{name} needs ir_datasets ({error}): pip install 'tct_hf[irds]'.") from error
    try:
        return ir_datasets.load(name.removeprefix(PREFIX))
    except KeyError:
        near = difflib.get_close_matches(name.removeprefix(PREFIX), ir_datasets.registry, n=3)
        fix = f"did you mean {' or '.join(near)}?" if near else "https://ir-datasets.com lists all"
        raise FileNotFoundError(f"{name}: ir_datasets has no such data set; {fix}") from None


def judged_sets(name: str) -> dict[str, str]:
    """The splits of "irds:ID", and the data set of each: those below it, such as ID/dev, and its own judgements.

    Its own are the split "train" where the id says so, else "test".
    """
    splits = {"train" if "train" in name.split("/") else "test": name} if open_irds(name).has("qrels") else {}
    import ir_datasets

    for one in ir_datasets.registry:
        _, below, split = f"{PREFIX}{one}".partition(f"{name}/")
        if below and ir_datasets.load(one).has("qrels"):
            splits[split] = PREFIX + one
    return splits


class IrdsSource(Source):
    """The "docs", "queries", "qrels", "docpairs" or "scoreddocs" of a data set."""

    def __init__(self, name: str, kind: str) -> None:
        dataset = open_irds(name)
        if not dataset.has(kind):
            raise FileNotFoundError(f"{name}: this data set of ir_datasets has no {kind}: {dataset!r}")
        self._of, self._kind, self.name, self.names = name, kind, f"{name} ({kind})", _COLUMNS[kind]
        # Published ones are told by their id and counts, one of the user's own by its content.
        with _reading(name, kind):
            known = getattr(dataset, f"{kind}_metadata")() or getattr(dataset, f"{kind}_hash")()
        self.key = ["irds", kind, self._shared_id(), known]

    def _shared_id(self) -> str:
        """The data set that has the same passages and the shortest id, so that these are prepared once."""
        import ir_datasets

        own = self._of.removeprefix(PREFIX)
        return str(ir_datasets.docs_parent_id(own)) if self._kind == "docs" else own

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        read = {"docs": _passage, "queries": lambda query: (query.query_id, query.default_text())}.get(self._kind)
        with _reading(self._of, self._kind):
            for number, row in enumerate(getattr(open_irds(self._of), f"{self._kind}_iter")()):
                yield number, dict(zip(_COLUMNS[self._kind], read(row) if read else row, strict=False))


@contextmanager
def _reading(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(f"{name}: ir_datasets can't read its {kind} ({error})") from error


def _passage(doc: Any) -> tuple[str, str, str]:
    """Id, title and the rest of the text that ir_datasets takes by default."""
    title, text = getattr(doc, "title", None) or "", doc.default_text()
    return (doc.doc_id, title, text.removeprefix(title)) if text.startswith(title) else (doc.doc_id, "", text)
