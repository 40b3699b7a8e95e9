from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tct_hf.data.docstrings import Docstring, package_roots, plain_text, read_docstrings, split_docstring

SOURCE = '''
raise RuntimeError("the package must not be run")


def scale(x):
    """Scale every column of ``x`` to unit variance.

    Works in place.
    """


def _private():
    """A private helper that nobody calls from outside."""


class Box:
    """Hold a box of :class:`~demo.Thing` objects."""

    if True:
        def fit(self):
            """Fit the box around *all* points.

            Rest.
            """


add_newdoc("demo.core", "fast", """
    fast(x, /)

    Compute it in compiled code.

    The rest of it.
    """)
add_newdoc("demo.core", "Ring", ("size", """Number of elements in the ring."""))
add_docstr(demo.outer, "outer(a, b) -> Tensor\\n\\nMultiply {a} outside." .format(a=1))
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "demo_docs"
    (root / "_impl").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text('raise RuntimeError("the package must not be imported")\n')
    (root / "_impl" / "_tools.py").write_text(SOURCE)
    (root / "_impl" / "broken.py").write_text("def (:\n")
    (root / "tests" / "test_tools.py").write_text('def check():\n    """Not part of the documentation."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return "demo_docs"


def test_docstrings_are_read_without_importing_the_package(package: str) -> None:
    found, unparsed = read_docstrings(package)
    assert package not in sys.modules
    assert unparsed == 1
    assert {entry.name: entry.summary for entry in found} == {
        "demo_docs.scale": "Scale every column of x to unit variance",
        "demo_docs.Box": "Hold a box of demo.Thing objects",
        "demo_docs.Box.fit": "Fit the box around all points",
        "demo.core.fast": "Compute it in compiled code",
        "demo.core.Ring.size": "Number of elements in the ring",
    }
    assert found[0].full_name == "demo_docs._impl._tools.scale"
    assert {entry.name: entry.body for entry in found}["demo.core.fast"] == "The rest of it."


def test_summary_with_a_gap_filled_in_at_run_time_is_left_out() -> None:
    assert split_docstring("a.b", "Return the %(klass)s as it is.\n\nRest.") is None


def test_parameter_description_is_not_a_summary() -> None:
    assert split_docstring("a.b", "ids (torch.LongTensor, optional): the ids of tokens.\n\nRest.") is None


def test_private_and_bare_names_are_left_out() -> None:
    assert split_docstring("a._b", "Some summary of it.") is None
    assert split_docstring("_a.b", "Some summary of it.") is None


def test_signature_lines_before_the_summary_are_dropped() -> None:
    expected = Docstring("a.agm", "a.agm", "Compute the mean", "Rest.")
    assert split_docstring("a.agm", "agm(a, b, out=None)\n\nCompute the mean.\n\nRest.") == expected
    assert split_docstring("a.agm", "agm(a, b)\n--\n\nagm(a, b)\n\nCompute the mean.\n\nRest.") == expected
    assert split_docstring("a.agm", "agm(a, b) -> float\nCompute the mean.\n\nRest.") == expected


def test_plain_text_keeps_prose_and_drops_markup() -> None:
    text = """
Parameters
----------
x : array
    The input, see `Lib <https://example.org>`_ and [`Thing`] [1]_, [2]_.

.. versionadded:: 1.2
   Not before.
.. note::
   Kept, with ``code`` and **bold** and 2 * 3 * 4.

.. math::

    a = b

Then::

    literal

Examples
--------
>>> f(1)
2

References
----------
.. [1] Someone, "Something".
   Continued.
"""
    plain = plain_text(text)
    assert plain == (
        "Parameters x : array The input, see Lib <https://example.org> and Thing. "
        "Kept, with code and bold and 2 * 3 * 4. Then: literal"
    )


def test_empty_headings_go() -> None:
    assert plain_text("Text.\n\nArgs:\n\nKeyword args:\n\nReturns:\n    a thing") == "Text. Returns: a thing"


def test_standard_library_is_found_without_importing() -> None:
    names = {path.name for path in package_roots("stdlib")}
    assert {"json", "argparse.py"} <= names


@pytest.mark.parametrize("name", ["no_such_package_here", "sys"])
def test_package_without_source_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not installed here as Python source"):
        package_roots(name)


def test_dotted_name_is_refused_since_finding_it_would_import_its_parent() -> None:
    with pytest.raises(ValueError, match="scikit-learn"):
        package_roots("sklearn.linear_model")
