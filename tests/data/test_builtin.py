from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from tct_hf import builtin_corpus
from tct_hf.data.builtin import SPLITS, builtin_fingerprint, make_collection
from tct_hf.data.docstrings import Docstring
from tests.rows import write


def entry(name: str, summary: str, body: str) -> Docstring:
    return Docstring(name, name, summary, body)


def body(word: str, length: int = 20) -> str:
    return " ".join(f"{word}{at}" for at in range(length))


def every(parts: dict[str, dict[str, dict]], key: str) -> dict:
    return {name: value for part in parts.values() for name, value in part[key].items()}


def split_of(parts: dict[str, dict[str, dict]], query_id: str) -> str:
    return next(split for split, part in parts.items() if query_id in part["queries"])


def test_summary_is_the_query_and_not_part_of_the_passage() -> None:
    passages, parts = make_collection(
        [
            entry("pkg.sub.Thing.make", "Make a thing of parts", body("w")),
            entry("p.a", "Only three words", body("w")),
            entry("p.b", "w " * 41, body("w")),
            entry("p.c", "A summary of five words", body("w", 14)),
        ]
    )
    assert every(parts, "queries") == {"q-pkg.sub.Thing.make": "Make a thing of parts"}
    assert passages == {"pkg.sub.Thing.make": f"pkg sub Thing: {body('w')}"}
    assert every(parts, "qrels") == {"q-pkg.sub.Thing.make": {"pkg.sub.Thing.make": 1}}


def test_identical_summaries_are_one_query_and_identical_passages_one_passage() -> None:
    first = entry("p.a", "Return the sum of it", body("x"))
    _, parts = make_collection([first, entry("q.b", "return the  sum of it", body("y"))])
    assert every(parts, "qrels") == {"q-p.a": {"p.a": 1, "q.b": 1}}
    passages, parts = make_collection([first, entry("p.b", "Add up the whole thing", body("x"))])
    assert list(passages) == ["p.a"] and every(parts, "qrels") == {"q-p.a": {"p.a": 1}, "q-p.b": {"p.a": 1}}


PAIRS = [(("Series.add", "DataFrame.add"), ("x", "y")), (("a", "b"), ("x", "x"))]


@pytest.mark.parametrize(("names", "bodies"), PAIRS, ids=["name", "text"])
def test_near_duplicates_go_to_one_split(names: tuple[str, str], bodies: tuple[str, str]) -> None:
    for number in range(40):
        first = entry(f"p.{names[0]}{number}", f"First words that differ much {number}", body(bodies[0]))
        second = entry(f"p.{names[1]}{number}", f"Other terms with no overlap {number}", body(bodies[1]) + " more")
        _, parts = make_collection([first, second])
        assert len({split_of(parts, name) for name in every(parts, "queries")}) == 1


def test_name_of_many_docstrings_does_not_group_them() -> None:
    many = [entry(f"p.Model{at}.fit", f"Fit model {at} {body(f's{at}-', 4)}", body(f"b{at}-")) for at in range(60)]
    _, parts = make_collection(many)
    assert {len(part["queries"]) > 0 for part in parts.values()} == {True}


def test_name_defined_twice_keeps_the_first_and_a_taken_short_name_becomes_the_full_one() -> None:
    modules = (("_one", "x"), ("_two", "z"), ("_one", "y"))
    found = [Docstring("p.f", f"p.{module}.f", f"Do this thing of {word}", body(word)) for module, word in modules]
    passages, _ = make_collection(found)
    assert passages == {"p.f": f"p: {body('x')}", "p._two.f": f"p: {body('z')}"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def test_installed_package_gives_disjoint_splits_over_one_corpus(built: Path) -> None:
    corpora, seen = [], set()
    fingerprint = _fingerprint(built)
    for split in SPLITS:
        corpus, queries, qrels = builtin_corpus(split, packages=["numpy"], cache_dir=built)
        assert corpus.column_names == ["id", "text"] and corpus.cache_files
        assert list(queries) == list(qrels) and not seen & set(queries)
        assert fingerprint["passages"] == len(corpus) and fingerprint["queries"][split] == len(queries)
        seen |= set(queries)
        assert {passage for grades in qrels.values() for passage in grades} <= set(corpus["id"])
        corpora.append(corpus["id"][:])
    assert corpora[0] == corpora[1] == corpora[2] and len(set(corpora[0])) == len(corpora[0])
    assert list(json.loads(json.dumps(fingerprint))["packages"]) == ["numpy"] and len(fingerprint["sha256"]) == 64


@pytest.mark.slow
def test_building_again_elsewhere_gives_the_same_fingerprint(built: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        # Two fresh processes with their own hash seeds, at once, on one empty cache.
        found = pool.map(_fingerprint, [tmp_path] * 2, chunksize=1)
    assert found == [_fingerprint(built)] * 2
    assert [path.name.startswith("builtin-") for path in tmp_path.iterdir()] == [True]


def _fingerprint(cache_dir: Path) -> dict:
    return builtin_fingerprint(packages=["numpy"], cache_dir=cache_dir)


def test_a_damaged_cache_is_made_again(built: Path, tmp_path: Path) -> None:
    made = _fingerprint(built)
    (folder,) = shutil.copytree(built, tmp_path / "copy").iterdir()
    (folder / "fingerprint.json").write_text("{")
    assert _fingerprint(tmp_path / "copy") == made


def test_wrong_arguments_and_packages_that_give_nothing_are_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (
        ("loose_demo.py", "x = 1\n"),
        ("bare_demo.py", "x = 1\n"),
        ("bare_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: bare_demo\nVersion: 1.0\n"),
        ("bare_demo-1.0.dist-info/RECORD", "bare_demo.py,,\n"),
    ):
        write(tmp_path / name, content)
    monkeypatch.syspath_prepend(tmp_path)
    packages: Any
    for split, packages, message in (
        ("validation", ["numpy"], "train, dev, test"),
        ("dev", ["not_there_at_all"], "not_there_at_all"),
        *(("dev", packages, "must be a list") for packages in ("numpy", [])),
        ("dev", ["loose_demo"], "'loose_demo' has source here but no version"),
        ("dev", ["bare_demo"], "bare_demo hold no docstring"),
    ):
        with pytest.raises(ValueError, match=message):
            builtin_corpus(split, packages=packages)
    assert list(cache.iterdir()) == []
