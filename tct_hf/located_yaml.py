"""YAML that remembers where each value stands, so that an error can name the file and the line.

Plain scalars are read by the rules of YAML 1.2: `1e-4` is a number, `no` and `2024-01-01` are text. (PyYAML by itself
follows YAML 1.1, where `1e-4` is text and `no` is false.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    # tag, what a plain scalar of it looks like, the characters it can begin with ("" stands for an empty one)
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
)


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the file and line, or the option, and says the mend."""


@dataclass(frozen=True)
class Node:
    """One value and where it was written.

    Attributes:
        value: A scalar, a list of nodes, or nodes by key.
        where: For people, such as "quickstart.yaml, line 3".
        plain: The text of an unquoted scalar, None for everything else.
        raw: The text as it came, for a value (or a scalar in a list) given on the command line; None in a file.
    """

    value: Any
    where: str
    plain: str | None = None
    raw: str | None = None

    def unwrap(self) -> Any:
        """Return the value as plain Python objects.

        Returns:
            A scalar, list or dict without any nodes.
        """
        if isinstance(self.value, dict):
            return {key: node.unwrap() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.unwrap() for node in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own way to drop the YAML 1.1 rules


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1, YAML 1.2 or an optional setting ("none") would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _first_characters(characters: str) -> list[str]:
    return ["" if character == "\0" else character for character in characters]


for _name, _pattern, _begins in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first_characters(_begins))
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first_characters(_begins))
_Dumper.add_implicit_resolver(_TAG + "null", re.compile(r"none$", re.IGNORECASE), list("nN"))


def dump(value: Any) -> str:
    """Write plain Python objects as YAML that `read_file` reads back unchanged.

    Args:
        value: Scalars, lists and dicts.

    Returns:
        Block-style YAML, keys in the order given.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    tag, text = node.tag.removeprefix(_TAG), node.value
    try:
        if tag == "str":
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag == "int":
            return int(text.replace("_", ""), 0)
        if tag == "float":
            lowered = text.lower().replace("_", "")
            return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError) as error:
        raise SettingsError(f"{where}: {text!r} cannot be read as !!{tag}") from error
    raise SettingsError(f"{where}: the tag {node.tag} is not used here; write a plain value")


def _locate(node: yaml.Node, source: str, where: str, *, is_file: bool, path: tuple[int, ...] = ()) -> Node:
    if id(node) in path:
        raise SettingsError(f"{where}: this alias refers to a value that holds it; write the value out")
    path = (*path, id(node))

    def at(inner: yaml.Node) -> str:
        return f"{source}, line {inner.start_mark.line + 1}" if is_file else source

    if isinstance(node, yaml.ScalarNode):
        plain = node.value if node.style is None else None
        return Node(_scalar(node, where), where, plain, None if is_file else node.value)
    if node.tag not in (_TAG + "seq", _TAG + "map"):
        raise SettingsError(f"{where}: the tag {node.tag} is not used here; write a plain list or mapping")
    if isinstance(node, yaml.SequenceNode):
        return Node([_locate(item, source, at(item), is_file=is_file, path=path) for item in node.value], where)
    entries: dict[str, Node] = {}
    for key_node, value_node in node.value:
        place = at(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise SettingsError(f"{place}: a key must be a name, not a list or a mapping")
        key = key_node.value
        if key == "<<" and key_node.style is None:
            raise SettingsError(f"{place}: merge keys (<<) are not used here; write the settings out, or use extends")
        if key in entries:
            raise SettingsError(f"{place}: {key!r} is given twice, first at {entries[key].where}; delete one of them")
        entries[key] = _locate(value_node, source, place, is_file=is_file, path=path)
    return Node(entries, where)


def read_file(path: Path, *, asked_by: str = "") -> Node:
    """Read one YAML file whose top level is a mapping.

    Args:
        path: The file, UTF-8; an empty one is an empty mapping.
        asked_by: Where the file is named ("base.yaml, line 1"), for the message when it does not exist.

    Returns:
        A node that holds a dict.

    Raises:
        SettingsError: The file is missing, is not YAML, has a key twice or is not a mapping.
    """
    prefix = f"{asked_by}: " if asked_by else ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SettingsError(f"{prefix}there is no settings file {path}; check the path") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise SettingsError(f"{prefix}the settings file {path} cannot be read: {error.strerror}") from error
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        return Node({}, str(path))
    located = _locate(root, str(path), f"{path}, line {root.start_mark.line + 1}", is_file=True)
    if located.value is None:
        return Node({}, str(path))
    if not isinstance(located.value, dict):
        raise SettingsError(f"{located.where}: the file must hold settings, one `name: value` a line")
    return located


def parse_argument(text: str, where: str) -> Node:
    """Read a value of the command line as a YAML scalar, flow list or flow mapping.

    Args:
        text: The value; what is not YAML stays text.
        where: The option it was given with.

    Returns:
        The node, whose `raw` is the text.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return Node(text, where, text, text)
    if root is None:
        return Node(text, where, text, text)
    located = _locate(root, where, where, is_file=False)
    return Node(located.value, where, located.plain, text)


def merge(base: Node, over: Node) -> Node:
    """Lay one node over another: mappings merge key by key, everything else replaces.

    Args:
        base: What holds where `over` says nothing.
        over: What wins.

    Returns:
        The merged node; neither argument is changed.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    entries = dict(base.value)
    for key, node in over.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Node(entries, over.where)


def read_chain(path: Path, *, asked_by: str = "", seen: Iterable[Path] = ()) -> Node:
    """Read a YAML file and what it `extends`, nearest file winning.

    `extends: other.yaml` names one file, relative to the file that says it.

    Args:
        path: The file.
        asked_by: Where the file is named, for messages.
        seen: The files that led here, to refuse a circle.

    Returns:
        The merged mapping, without `extends`.

    Raises:
        SettingsError: A file cannot be read, or the chain goes in a circle.
    """
    chain = list(seen)
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(file.name for file in [*chain[chain.index(resolved) :], resolved])
        raise SettingsError(f"{asked_by}: extends goes in a circle ({circle}); take one of them out")
    node = read_file(path, asked_by=asked_by)
    entries = dict(node.value)
    extends = entries.pop("extends", None)
    own = Node(entries, node.where)
    if extends is None:
        return own
    if not isinstance(extends.value, str):
        raise SettingsError(f"{extends.where}: extends must name one YAML file, got {extends.unwrap()!r}")
    base = read_chain(path.parent / extends.value, asked_by=extends.where, seen=[*chain, resolved])
    return merge(base, own)
