"""Docstrings read from the source of installed packages, as plain text."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = ["tests", "test", "testing", "conftest.py", "setup.py", "_vendor", "_vendored", "externals", "_external"]
_BLOCK_KEEP_TEXT = ["note", "notes", "warning", "important", "tip", "hint", "caution", "attention", "seealso", "topic"]
_PLACEHOLDER = re.compile(r"%\(\w+\)s|\{\w*\}")
_ROLE = re.compile(r":[\w:+-]+:`(?:[^`<]*<)?[~!.]*([^`>]*)>?`")
_LITERAL = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}")
# The marks by which a reference is shown without its module: ~numpy.linalg.svd, .DataFrame.
_SHORTENED = re.compile(r"^[~!.]+(?=[A-Za-z_])")
_PARAMETER = re.compile(r"\w+ \(.*?\)\s*:|(?:Args|Arguments|Parameters|Returns?)\s*:?\s")
_FOOTNOTE = re.compile(r"(?:,?\s*\[[\w.-]{1,20}\]_)+")
_MARKDOWN_LINK = re.compile(r"\[([^\[\]]+)\]\(\S+?\)|\[`([^`]+)`\]")
# A heading whose content went: "Examples" before the next heading or at the end.
_EMPTY_HEADING = re.compile(
    r"\b(?:Args|Arguments|Keyword args|Examples?|See Also|Notes?)\s*:?\s+(?=(?:Args|Keyword args|Returns?)\s*:|$)"
)
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*](?:[^*]*[^\s*])?)\*{1,2}(?![\w*])")
_UNDERLINE = re.compile(r"[-=~^\"'*#+]{3,}")
_DIRECTIVE = re.compile(r"\.\. *(?:([\w:-]+?)::|\[|_|\|)(.*)")
_SIGNATURE = re.compile(r"[\w.]+\((?s:.*)\)(\s*->.*)?( *\n?--)?")


@dataclass(frozen=True)
class Docstring:
    """One documented name: its public dotted name, its full dotted name, the summary and the rest."""

    name: str
    full_name: str
    summary: str
    body: str


def package_roots(package: str) -> list[Path]:
    """Folders or the single file of a package's source, found without importing it."""
    if not package.isidentifier():
        fix = 'use the name that is imported, for instance "sklearn" for scikit-learn'
        raise ValueError(f"packages: {package!r} is not a top-level module name; {fix}")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        spec = None
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if spec and not roots and spec.origin and spec.origin.endswith(".py"):
        roots = [Path(spec.origin)]
    if not roots:
        raise ValueError(f"packages: {package!r} is not installed here as Python source; install it or leave it out")
    return roots


def read_docstrings(package: str) -> tuple[list[Docstring], int]:
    """The docstrings of an installed package's public names in the order of its files; and how many can't be parsed.

    Those of compiled functions that a package attaches by a call (`add_newdoc`, `add_docstr`) are read from it.
    """
    found: list[Docstring] = []
    unreadable = 0
    for root in package_roots(package):
        files = [root] if root.is_file() else sorted(root.rglob("*.py"), key=lambda path: path.as_posix())
        for path in files:
            relative = path.relative_to(root.parent)
            if any(part in _SKIPPED or part.startswith("test_") for part in relative.parts):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                # Packages ship templates and files for other Python versions; the count is recorded by the caller.
                unreadable += 1
                continue
            module = [part for part in relative.with_suffix("").parts if part != "__init__"]
            for full_name, text in _documented(tree, module):
                docstring = split_docstring(full_name, text)
                if docstring is not None:
                    found.append(docstring)
    return found, unreadable


def split_docstring(full_name: str, text: str) -> Docstring | None:
    """Summary and rest of a dedented docstring as plain text; None for a private name or without a summary."""
    parts = full_name.split(".")
    public = [part for part in parts if not part.startswith("_")]
    if parts[-1].startswith("_") or len(public) < 2:
        return None
    paragraphs = [part for part in re.split(r"\n[ \t]*\n", text.strip()) if part.strip() and part.strip() != "--"]
    # Compiled functions start with their signature, sometimes twice.
    while len(paragraphs) > 1 and _SIGNATURE.fullmatch(paragraphs[0].strip()):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return None
    first = paragraphs[0].strip()
    lines = first.split("\n")
    if _SIGNATURE.fullmatch(lines[0].strip()) and len(lines) > 1:
        first = "\n".join(lines[1:])
    summary = " ".join(_inline(first).split())
    # A summary with a gap for a class name is filled in at run time, so this is not what the reader sees.
    if not summary or first.startswith((".. ", ">>>")) or _PLACEHOLDER.search(first) or _PARAMETER.match(summary):
        return None
    return Docstring(".".join(public), full_name, summary.rstrip(" .:"), plain_text("\n\n".join(paragraphs[1:])))


def plain_text(text: str) -> str:
    """Strip reStructuredText to one line of prose: notes and parameters stay; code, figures and references go."""
    kept: list[str] = []
    lines = text.expandtabs().split("\n")
    at, skip_deeper_than = 0, -1
    in_doctest = in_references = False
    while at < len(lines):
        line = lines[at]
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        underlined = at + 1 < len(lines) and bool(_UNDERLINE.fullmatch(lines[at + 1].strip())) and bool(stripped)
        at += 1
        if not stripped:
            in_doctest = False
            continue
        if skip_deeper_than >= 0 and indent > skip_deeper_than:
            continue
        skip_deeper_than = -1
        if underlined:
            in_references = stripped.lower() in ("references", "reference")
        if in_references or _UNDERLINE.fullmatch(stripped):
            continue
        if stripped.startswith((">>>", "...")):
            in_doctest = True
        if in_doctest:
            continue
        directive = _DIRECTIVE.match(stripped)
        if directive:
            if directive.group(1) in _BLOCK_KEEP_TEXT:
                kept.append(directive.group(2).strip())
            else:
                skip_deeper_than = indent
            continue
        if re.fullmatch(r":[\w-]+:", stripped):
            continue
        kept.append(re.sub(r"::$", ":", stripped))
    running = " ".join(_inline("\n".join(kept)).split())
    return _EMPTY_HEADING.sub("", running + " ").strip()


def _inline(text: str) -> str:
    text = _PLACEHOLDER.sub(" ", text)
    text = _FOOTNOTE.sub("", text)
    text = _MARKDOWN_LINK.sub(lambda match: match.group(1) or match.group(2), text)
    text = _ROLE.sub(lambda match: match.group(1).strip(), text)
    text = _LITERAL.sub(lambda match: _SHORTENED.sub("", match.group(1) or match.group(2) or ""), text)
    return _EMPHASIS.sub(r"\1", text)


def _documented(tree: ast.AST, path: Sequence[str]) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield ".".join([*path, node.name]), text
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from _documented(node, [*path, node.name])
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _documented(node, path)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _attached(node.value, path)


def _attached(call: ast.Call, path: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Read add_newdoc(place, name, doc), add_newdoc(name, doc) or add_docstr(function, doc)."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in ("add_newdoc", "add_docstr", "add_docstr_all") or len(call.args) < 2:
        return
    first, last = call.args[0], call.args[-1]
    member = None
    if isinstance(last, ast.Tuple) and len(last.elts) == 2:
        member, last = _text(last.elts[0]), last.elts[1]
    doc = _text(last)
    if not doc:
        return
    if function == "add_docstr" and isinstance(first, ast.Attribute):
        place = ast.unparse(first)
    elif function == "add_docstr_all":
        place = ".".join([path[0], "Tensor", _text(first) or ""])
    elif len(call.args) >= 3:
        place = f"{_text(first)}.{_text(call.args[1])}"
    else:
        place = ".".join([*path[:-1], _text(first) or ""])
    name = f"{place}.{member}" if member else place
    if all(part.isidentifier() for part in name.split(".")):
        yield name, inspect.cleandoc(doc)


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _text(node.func.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        left = _text(node.left)
        if isinstance(node.op, ast.Mod):
            return left
        right = _text(node.right)
        return None if left is None or right is None else left + right
    return None
