"""The embedded data set: known-item search in the documentation of installed packages, without any download."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]

from tct_hf.cache import prepared
from tct_hf.data.docstrings import Docstring, package_roots, read_docstrings
from tct_hf.data.near_duplicates import groups, near_duplicate_pairs
from tct_hf.data.sources import write_rows
from tct_hf.files import MADE_AGAIN, read_json

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_PACKAGES = ("numpy", "scipy", "pandas", "sklearn")
SPLITS = ("train", "dev", "test")

# Part of the cache key and the fingerprint: raise it with every change to what is extracted, grouped or split.
EXTRACTION_VERSION = 2
_SUMMARY_WORDS = (4, 40)
_BODY_WORDS = 15
# A name that so many docstrings of a package share (fit, transform, get) says nothing about similarity.
_COMMON_NAME = 8
# A group with more than this share of all passages trains: in dev or test it would outweigh everything else there.
_LARGEST_HELD_OUT_GROUP = 0.01


def builtin_corpus(
    split: str, *, packages: Sequence[str] = DEFAULT_PACKAGES, cache_dir: str | Path | None = None
) -> tuple[Dataset, dict[str, str], dict[str, dict[str, int]]]:
    """Load the documentation of installed packages as a retrieval collection.

    Docstrings are read from source files; nothing is imported or run. The summary (4 to 40 words) is the query, and
    the rest (at least 15 words) its passage, under a title of package, module and class. Identical summaries are one
    query with several positives. Near-duplicates (`Series.add` and `DataFrame.add`) go to one split, by hash: about
    70% train, 10% dev, 20% test; with other packages or versions perhaps to another one.

    Args:
        split: "train", "dev" or "test".
        packages: top-level import names.
        cache_dir: where the prepared collection is kept; by default `default_cache_dir()`.

    Returns:
        The whole corpus, the same for every split (memory-mapped, columns id and text), the split's queries
        {query id: text} and its judgements {query id: {passage id: 1}}.

    Raises:
        ValueError: an unknown split, a package that is not installed, or packages without usable docstrings.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    from datasets import Dataset

    folder = _prepared(packages, cache_dir)
    part = read_json(folder / f"{split}.json", MADE_AGAIN)
    return Dataset.from_file(str(folder / "corpus.arrow")), part["queries"], part["qrels"]


def builtin_fingerprint(
    *, packages: Sequence[str] = DEFAULT_PACKAGES, cache_dir: str | Path | None = None
) -> dict[str, Any]:
    """The identity of the built-in corpus a result was measured on, JSON-ready, to be stored beside it."""
    return read_json(_prepared(packages, cache_dir) / "fingerprint.json", MADE_AGAIN)


def _prepared(packages: Sequence[str], cache_dir: str | Path | None) -> Path:
    if isinstance(packages, str) or not packages:
        raise ValueError(f"packages: {packages!r} must be a list of installed packages, such as [numpy]")
    versions = {name: _version(name) for name in sorted(set(packages))}
    return prepared("builtin", [EXTRACTION_VERSION, versions], lambda staging: _build(staging, versions), cache_dir)


def _version(package: str) -> str:
    package_roots(package)
    # packages_distributions alone misses wheels without top_level.txt on Python 3.10 (scikit-learn's is one).
    marks = tuple(f"{package}{ending}," for ending in ("/__init__.py", ".py"))
    for distribution in metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        if record.startswith(marks) or any(f"\n{mark}" in record for mark in marks):
            return distribution.version
    for owner in metadata.packages_distributions().get(package, []):
        return metadata.version(owner)
    raise ValueError(f"packages: {package!r} has source here but no version; install it with pip or leave it out")


def _build(staging: Path, versions: dict[str, str]) -> None:
    found = [read_docstrings(name) for name in versions]
    passages, parts = make_collection([docstring for docstrings, _ in found for docstring in docstrings])
    if not passages:
        what = "no docstring with a summary of {} to {} words".format(*_SUMMARY_WORDS)
        raise ValueError(f"packages: {', '.join(versions)} hold {what}, and {_BODY_WORDS} after it; name others")
    content = json.dumps([versions, passages, parts], sort_keys=True)
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    write_rows(staging / "corpus.arrow", schema, ({"id": name, "text": text} for name, text in passages.items()))
    for split, part in parts.items():
        (staging / f"{split}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    fingerprint = {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "packages": versions,
        "extraction_version": EXTRACTION_VERSION,
        "passages": len(passages),
        "queries": {split: len(part["queries"]) for split, part in parts.items()},
        "unparsed_files": sum(bad for _, bad in found),
    }
    (staging / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


def make_collection(docstrings: Sequence[Docstring]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Passages {id: text} and {split: {"queries", "qrels"}}, without near-duplicates across splits."""
    chosen: dict[str, Docstring] = {}
    id_of_text: dict[str, str] = {}
    names: set[str] = set()
    full_names: set[str] = set()
    first_of: dict[str, tuple[str, str]] = {}
    members: dict[str, list[str]] = defaultdict(list)
    for entry in docstrings:
        shortest, longest = _SUMMARY_WORDS
        if not shortest <= len(entry.summary.split()) <= longest or len(entry.body.split()) < _BODY_WORDS:
            continue
        name = entry.name if entry.name not in names else entry.full_name
        if entry.full_name in full_names or name in names:
            # The same name defined twice in a file (overloads, a property and its setter): the first stands.
            continue
        names.add(name)
        full_names.add(entry.full_name)
        passage_id = id_of_text.setdefault(f"{_title(entry.name)}: {entry.body}", name)
        chosen.setdefault(passage_id, entry)
        summary = " ".join(entry.summary.lower().split())
        first_of.setdefault(summary, (name, entry.summary))
        if passage_id not in members[summary]:
            members[summary].append(passage_id)
    group_of = _group(chosen, members) if chosen else {}
    sizes = Counter(group_of.values())

    parts: dict[str, dict[str, Any]] = {split: {"queries": {}, "qrels": {}} for split in SPLITS}
    for summary, passage_ids in members.items():
        group = group_of[passage_ids[0]]
        large = sizes[group] > max(_COMMON_NAME, _LARGEST_HELD_OUT_GROUP * len(chosen))
        part = parts["train" if large else _split_of(group)]
        name, query = first_of[summary]
        part["queries"][f"q-{name}"] = query
        part["qrels"][f"q-{name}"] = dict.fromkeys(passage_ids, 1)
    return {passage_id: text for text, passage_id in id_of_text.items()}, parts


def _group(chosen: dict[str, Docstring], members: dict[str, list[str]]) -> dict[str, str]:
    ids = list(chosen)
    row = {passage_id: at for at, passage_id in enumerate(ids)}
    pairs = [(row[first], row[other]) for first, *others in members.values() for other in others]
    short = [(name.split(".")[0], name.split(".")[-1].lower()) for name in (chosen[i].name for i in ids)]
    common, first_of = Counter(short), dict[tuple[str, str], int]()
    pairs += [(first_of.setdefault(name, at), at) for at, name in enumerate(short) if common[name] <= _COMMON_NAME]
    pairs += near_duplicate_pairs([chosen[i].body for i in ids], width=3, threshold=0.6)
    pairs += near_duplicate_pairs([chosen[i].summary for i in ids], width=1, threshold=0.8)
    return {passage_id: ids[group] for passage_id, group in zip(ids, groups(pairs, len(ids)), strict=True)}


def _split_of(group: str) -> str:
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.7 else "dev" if share < 0.8 else "test"


def _title(name: str) -> str:
    """Package, module and class of a name in plain words, without the name itself: it often repeats the summary."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[._]+", " ", name.rpartition(".")[0])
    return " ".join(words.split())
