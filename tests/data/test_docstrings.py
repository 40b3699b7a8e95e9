from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tct_hf.data.docstrings import Docstring, package_roots, plain_text, read_docstrings, split_docstring
from tests.rows import write

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
    for name, source in (
        ("__init__.py", 'raise RuntimeError("the package must not be imported")\n'),
        ("_impl/_tools.py", SOURCE),
        ("_impl/broken.py", "def (:\n"),
        ("tests/test_tools.py", 'def check():\n    """Not part of the documentation."""\n'),
    ):
        write(tmp_path / "demo_docs" / name, source)
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.b", "Return the %(klass)s as it is.\n\nRest."),  # a gap filled in at run time
        ("a.b", "ids (torch.LongTensor, optional): the ids of tokens.\n\nRest."),  # of a parameter
        ("a._b", "Some summary of it."),
        ("_a.b", "Some summary of it."),
    ],
)
def test_what_is_no_summary_or_private_is_left_out(name: str, text: str) -> None:
    assert split_docstring(name, text) is None


@pytest.mark.parametrize("before", ["agm(a, b, out=None)\n", "agm(a, b)\n--\n\nagm(a, b)\n", "agm(a, b) -> float"])
def test_signature_lines_before_the_summary_are_dropped(before: str) -> None:
    expected = Docstring("a.agm", "a.agm", "Compute the mean", "Rest.")
    assert split_docstring("a.agm", f"{before}\nCompute the mean.\n\nRest.") == expected


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
    assert plain_text("Text.\n\nArgs:\n\nKeyword args:\n\nReturns:\n    a thing") == "Text. Returns: a thing"


def test_packages_are_found_without_importing_or_named() -> None:
    for name in ("no_such_package_here", "sys"):
        with pytest.raises(ValueError, match=f"'{name}' is not installed here as Python source"):
            package_roots(name)
    with pytest.raises(ValueError, match="scikit-learn"):  # finding a dotted name would import its parent
        package_roots("sklearn.linear_model")
