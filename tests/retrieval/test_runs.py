from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tct_hf import read_run, write_run
from tct_hf.retrieval.runs import rank, read_tag

ids = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=8).filter(
    lambda text: text.split() == [text] and text[0] != "\ufeff"
)
scores = st.floats(allow_nan=False, allow_infinity=False)
runs = st.dictionaries(ids, st.dictionaries(ids, scores, min_size=1, max_size=5), max_size=4)


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
@settings(max_examples=40, deadline=None)
@given(run=runs)
def test_run_round_trips_exactly(tmp_path_factory: pytest.TempPathFactory, name: str, run: dict) -> None:
    path = tmp_path_factory.mktemp("runs") / name
    write_run(run, path, "tag")
    assert read_run(path) == run
    assert [item.name for item in path.parent.iterdir()] == [name]


def test_lines_are_ordered_by_score_then_id_and_bytes_are_the_same_in_any_order(tmp_path: Path) -> None:
    write_run({"q": {"b": 1.0, "c": 2.0, "a": 1.0}}, tmp_path / "run", "me")
    assert (tmp_path / "run").read_text() == "q Q0 c 1 2.0 me\nq Q0 a 2 1.0 me\nq Q0 b 3 1.0 me\n"
    assert [name for name, _ in rank({"d9": 1.0, "d10": 1.0, "x": 3.0})] == ["x", "d10", "d9"]
    for name, run in (("1.gz", {"b": 1.0, "a": 1.0}), ("2.gz", {"a": 1.0, "b": 1.0})):
        write_run({"q": run}, tmp_path / name, "mine")
    assert (tmp_path / "1.gz").read_bytes() == (tmp_path / "2.gz").read_bytes()
    assert read_tag(tmp_path / "1.gz") == "mine"
    with pytest.raises(FileNotFoundError, match="no such run file"):
        read_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        ({"q 1": {"a": 1.0}}, "t", "query id 'q 1'"),
        ({"q": {"a\tb": 1.0}}, "t", "passage id"),
        ({"q": {"": 1.0}}, "t", "passage id ''"),
        ({"\ufeffq": {"a": 1.0}}, "t", "a byte order mark"),
        ({"q": {"a": 1.0}}, "my run", "tag 'my run'"),
        ({"q": {"a": float("nan")}}, "t", "score nan is not finite"),
        ({"q\ud800": {"a": 1.0}}, "t", r"id 'q\\ud800' is .* a lone surrogate"),
    ],
)
def test_what_the_format_cannot_hold_leaves_the_old_file(tmp_path: Path, run: dict, tag: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_run(run, path, tag)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q Q0 a 1 2.0 t\nq Q0 a 2\n", "run, line 2: 4 columns instead of 6"),
        (b"q Q0 a 1 high t\n", "run, line 1: score 'high'"),
        (b"q Q0 a 1 nan t\n", "run, line 1: score 'nan'"),
        (b"q Q0 a 1 2.0 t\nq Q0 b 2 1_0 t\n", "run, line 2: score '1_0' .* is not a finite number"),
        ("q Q0 a 1 \u0661 t\n".encode(), "run, line 1: score .* is not a finite number"),
        (b"q Q0 a 1 2 t\n\nq Q0 a 2 1 t\n", "run, line 3: passage 'a' comes twice"),
        (b"q Q0 \xff 1 2 t\n", "run, line 1: not UTF-8"),
        (b"q Q0 a 1 1e400 t\n", "run, line 1: score '1e400'"),
        (b"q Q0 a 1 2 t\r\nq Q0 b 2 1 my t\r\n", "run, line 2: 7 columns instead of 6"),
        # One column less, and a no-break space that Python takes for white space: the score would be the rank.
        ("q Q0 a\u00a0b 1 0.5\n".encode(), "run, line 1: 5 columns instead of 6"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


def test_run_of_another_system_is_read(tmp_path: Path) -> None:
    """Tabs, Windows line ends, a byte order mark, integers and powers, wrong ranks, a query in two blocks, gzip."""
    lines = "\ufeffq1\tQ0\td1\t0\t12\tlucene\r\n\r\nq1 0 d2 7 1.5e1 lucene\r\nq2 Q0 d1 1 -.5 lucene"
    lines += "\nq1 Q0 d3 1 9 lucene"
    for packed in (lines.encode(), gzip.compress(lines.encode())):
        (tmp_path / "run").write_bytes(packed)
        assert read_run(tmp_path / "run") == {"q1": {"d1": 12.0, "d2": 15.0, "d3": 9.0}, "q2": {"d1": -0.5}}
        assert read_tag(tmp_path / "run") == "lucene"
