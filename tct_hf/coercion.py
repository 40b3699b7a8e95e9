"""Turn located YAML into a settings dataclass: names and types checked, every error with its file and line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union

from tct_hf.located_yaml import Node, SettingsError, parse_argument

_SCALAR_ORDER = (bool, int, float)
NULL_WORDS = ("null", "none", "~")


@dataclasses.dataclass(frozen=True)
class SettingField:
    """One field of a settings dataclass, its type hint resolved and its default made."""

    name: str
    hint: Any
    help: str
    keys_of: str
    default: Any  # dataclasses.MISSING when the setting must be given


# Settings are written beside every result and released with it.
SECRETS = ("hub_token",)
NO_SECRETS = (
    "is a secret, and settings are written into every result: leave it out, and set HF_TOKEN or log in with "
    "`hf auth login`."
)


def fields_of(schema: type) -> dict[str, SettingField]:
    """Return the settable fields of a dataclass by name."""
    hints = typing.get_type_hints(schema)
    found = {}
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = SettingField(
            field.name, hints[field.name], field.metadata.get("help", ""), field.metadata.get("keys_of", ""), default
        )
    return found


def members_of(hint: Any) -> list[Any]:
    """Return the members of a union, flattened; of any other hint, itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [member for argument in typing.get_args(hint) for member in members_of(argument)]
    return [hint]


def is_section(hint: Any) -> bool:
    """Return whether a hint is a dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def is_dict(hint: Any) -> bool:
    """Return whether a hint is a dict, with or without the types of its items."""
    return hint is dict or typing.get_origin(hint) is dict


def describe(hint: Any) -> str:
    """Return a type hint in words for messages and --help."""
    names = []
    for member in members_of(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if member is type(None):
            names.append("null")
        elif member is Any:
            names.append("anything")
        elif member is bool:
            names.append("true or false")
        elif origin is Literal:
            names.extend(str(argument) for argument in arguments)
        elif origin is list:
            names.append(f"list of {describe(arguments[0])}")
        elif member is list:
            names.append("list")
        elif is_dict(member):
            names.append("mapping")
        elif is_section(member):
            names.append("section")
        else:
            names.append(member.__name__)
    return " or ".join(names)


def hints_of(reference: str) -> dict[str, Any]:
    """Return the fields of "module:Class" and their hints; a recipe's heavy import may happen here."""
    module_name, _, class_name = reference.partition(":")
    schema = getattr(importlib.import_module(module_name), class_name)
    try:
        hints = typing.get_type_hints(schema)
    except NameError:  # a name its module imports for type checkers only; the keys are still checked
        hints = {}
    allowed: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.init:
            hint = hints.get(field.name, Any)
            # Argument classes of other libraries are loose about texts, enums and mappings, and say so in prose only:
            # hold them to their hints where these are plain numbers and switches.
            strict = all(member in (*_SCALAR_ORDER, type(None)) for member in members_of(hint))
            allowed[field.name] = hint if strict else Any
    return allowed


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return close[0]
    nested = [name for name in names if difflib.get_close_matches(key, [name.rpartition(".")[2]], n=1, cutoff=0.8)]
    return nested[0] if nested else ""


def unknown_setting(where: str, key: str, prefix: str, fields: dict[str, Any]) -> SettingsError:
    """Return the error for a name that is not among `fields`, naming the nearest one."""
    known = list(fields)
    for name, field in fields.items():
        if isinstance(field, SettingField):
            for section in filter(is_section, members_of(field.hint)):
                known += [f"{name}.{inner}" for inner in fields_of(section)]
    near = _nearest(key, known)
    if near:
        mend = f'did you mean "{prefix}{near}"?'
    else:
        mend = "known here: " + ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        mend += "".join(
            f'; fields of {field.keys_of.partition(":")[2]} stand under "{prefix}{name}"'
            for name, field in fields.items()
            if isinstance(field, SettingField) and field.keys_of
        )
    return SettingsError(f'{where}: unknown setting "{prefix}{key}": {mend}')


def _wrong(node: Node, name: str, hint: Any, mend: str = "") -> SettingsError:
    if isinstance(node.value, dict):
        got = "a mapping"
    elif isinstance(node.value, list):
        got = f"the list {node.unwrap()!r}"
    elif node.value is None:
        got = "nothing" if not node.plain else node.plain
    elif isinstance(node.value, bool):
        got = f"the switch {str(node.value).lower()}"
    elif isinstance(node.value, str):
        got = f"the text {node.value!r}"
    else:
        got = f"the {type(node.value).__name__} {node.plain or node.value}"
    return SettingsError(f'{node.where}: "{name}" must be {describe(hint)}, got {got}{mend}')


def _is_null(node: Node) -> bool:
    written = node.raw if node.raw is not None else node.plain
    return written is not None and (written.strip().lower() in NULL_WORDS or (written == "" and node.raw is None))


def _coerce_list(node: Node, member: Any, hint: Any, name: str) -> list[Any]:
    if node.raw is not None and not isinstance(node.value, (list, dict)):  # --stages teacher,student in a shell
        node = parse_argument(f"[{node.raw}]", node.where)
    if not isinstance(node.value, list):
        mend = "; write [a, b, c]" if not isinstance(node.value, dict) else ""
        raise _wrong(node, name, hint, mend)
    inner = (typing.get_args(member) or (Any,))[0]
    return [_coerce(item, inner, f"{name}[{position}]") for position, item in enumerate(node.value)]


def _coerce_dict(node: Node, member: Any, hint: Any, name: str) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        raise _wrong(node, name, hint, "; write one `key: value` a line")
    inner = (typing.get_args(member) or (str, Any))[1]
    return {key: _coerce(item, inner, f"{name}.{key}") for key, item in node.value.items()}


def _coerce_one(node: Node, member: Any, hint: Any, name: str) -> Any:
    value = node.value
    if member is Any:
        return node.unwrap()
    if typing.get_origin(member) is Literal:
        for argument in typing.get_args(member):
            written = node.raw if node.raw is not None else node.plain
            if (type(value) is type(argument) and value == argument) or (
                isinstance(argument, str) and written == argument
            ):
                return argument
    elif member is bool:
        if isinstance(value, bool):
            return value
        # The switches of YAML 1.1, which people go on writing; here the schema says that a switch is meant.
        if node.plain is not None and node.plain.lower() in ("yes", "no", "on", "off"):
            return node.plain.lower() in ("yes", "on")
    elif member is int:
        if type(value) is int:
            return value
        if isinstance(value, float):
            raise _wrong(node, name, hint, "; write it without a fraction or exponent")
    elif member is float:
        if type(value) in (int, float):
            return float(value)
        if isinstance(value, str) and node.plain is None and node.raw is None:
            raise _wrong(node, name, hint, "; take the quotes away")
    elif member is str:
        if node.raw is not None:
            return node.raw
        if isinstance(value, str):
            return value
        if node.plain is not None and node.plain.lower() == "none":
            return node.plain
        if isinstance(value, (bool, int, float)):
            raise _wrong(node, name, hint, f'; write "{node.plain}" in quotes if that text is meant')
    elif typing.get_origin(member) is list or member is list:
        return _coerce_list(node, member, hint, name)
    elif is_dict(member):
        return _coerce_dict(node, member, hint, name)
    elif is_section(member):
        return build(member, node, name + ".", None)
    else:
        raise TypeError(f"{name}: a setting cannot have the type {member!r}")
    raise _wrong(node, name, hint)


def _preference(member: Any) -> int:
    if typing.get_origin(member) is Literal:
        return 0
    if member in _SCALAR_ORDER:
        return 1 + _SCALAR_ORDER.index(member)
    return {str: 10, Any: 11}.get(member, 5)


def _coerce(node: Node, hint: Any, name: str) -> Any:
    members = members_of(hint)
    real = sorted((member for member in members if member is not type(None)), key=_preference)
    literals = [member for member in real if typing.get_origin(member) is Literal]
    written = node.raw if node.raw is not None else node.plain
    if type(None) in members and _is_null(node) and all(written not in typing.get_args(one) for one in literals):
        return None
    if len(real) == 1:
        return _coerce_one(node, real[0], hint, name)
    for member in real:
        try:
            return _coerce_one(node, member, hint, name)
        except SettingsError:
            continue  # the next type of the union may fit; if none does, the error below names them all
    raise _wrong(node, name, hint)


def _coerce_keys_of(node: Node, field: SettingField, name: str) -> Any:
    if node.value == {} or not isinstance(node.value, dict):
        return _coerce(node, field.hint, name)
    allowed = hints_of(field.keys_of)
    values = {}
    for key, item in node.value.items():
        if key not in allowed:
            raise unknown_setting(item.where, key, name + ".", allowed)
        if key in SECRETS:
            raise SettingsError(f'{item.where}: "{name}.{key}" {NO_SECRETS}')
        values[key] = _coerce(item, allowed[key], f"{name}.{key}")
    return values


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def build(schema: type, node: Node, prefix: str, default: Any) -> Any:
    """Fill a settings dataclass from a node.

    Args:
        schema: The dataclass.
        node: The values given, by name.
        prefix: The section's name and a dot, for messages; empty at the top.
        default: An instance that holds what is not given; None takes the dataclass's own defaults.

    Returns:
        The instance.

    Raises:
        SettingsError: A name is unknown or missing, a value has a wrong type, or the dataclass refuses it.
    """
    if not isinstance(node.value, dict):
        raise _wrong(node, prefix.rstrip("."), schema, "; write one `key: value` a line below it")
    fields = fields_of(schema)
    values: dict[str, Any] = {}
    for key, item in node.value.items():
        if key not in fields:
            raise unknown_setting(item.where, key, prefix, fields)
        field, name = fields[key], prefix + key
        present = getattr(default, key) if default is not None else field.default
        sections = [member for member in members_of(field.hint) if is_section(member)]
        if field.keys_of:
            value = _coerce_keys_of(item, field, name)
        elif sections and isinstance(item.value, dict):
            value = build(sections[0], item, name + ".", present if isinstance(present, sections[0]) else None)
        else:
            value = _coerce(item, field.hint, name)
        if isinstance(value, dict) and isinstance(present, dict):
            value = _overlay(present, value)
        values[key] = value
    if default is None:
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in values:
                raise SettingsError(
                    f'"{prefix}{key}" must be given: --{prefix}{key} VALUE, or {key}: VALUE in the YAML'
                )
    try:
        return dataclasses.replace(default, **values) if default is not None else schema(**values)
    except SettingsError:
        raise
    except ValueError as error:  # a check in the schema's own __post_init__
        # It names the fields it is about, as people do; where those were given is where to mend it.
        named = [item.where for key, item in node.value.items() if re.search(rf"\b{re.escape(key)}\b", str(error))]
        places = " and ".join(dict.fromkeys(named))
        raise SettingsError(": ".join(filter(None, (places, prefix.rstrip("."), str(error))))) from error
