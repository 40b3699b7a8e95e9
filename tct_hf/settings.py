"""Settings of a recipe: one dataclass, filled from YAML and the command line, checked before anything heavy runs.

`script.py [settings.yaml] [--key value | --key=value | --section.key value ...]`; the command line wins over the YAML,
the YAML over the dataclass's defaults. Mappings (sections and dict fields) merge key by key, lists replace.
"""

from __future__ import annotations

import dataclasses
import linecache
import os
import platform
import sys
import typing
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tct_hf.coercion import (
    NULL_WORDS,
    build,
    describe,
    fields_of,
    hints_of,
    is_dict,
    is_section,
    members_of,
    unknown_setting,
)
from tct_hf.files import write_json_atomic, write_text_atomic
from tct_hf.located_yaml import Node, SettingsError, dump, merge, parse_argument, read_chain

__all__ = ["DEPENDENCIES", "SettingsError", "load_settings", "resolved_yaml", "run_recipe", "save_resolved"]

T = TypeVar("T")

DEPENDENCIES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "faiss-cpu",
    "bm25s",
    "numba",
    "PyStemmer",
    "ir-measures",
    "pytrec_eval-terrier",
    "pyyaml",
    "numpy",
    "scipy",
)


def setting(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field of a schema: its default and its help.

    Args:
        default: Value where nothing is given; lists and dicts are copied for each instance.
        text: One line for --help.
        **more: Further metadata, such as `keys_of`.

    Returns:
        The field.
    """
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": text, **more})
    return dataclasses.field(default=default, metadata={"help": text, **more})


def _resolve_option(schema: type, option: str) -> tuple[list[str], Any]:
    """Names along a dotted option (dashes made underscores where a field is named) and the hint of what it sets."""
    names: list[str] = []
    hint: Any = schema
    keys_of = ""
    for part in option.split("."):
        prefix = "".join(f"{name}." for name in names)
        sections = [member for member in members_of(hint) if is_section(member)]
        dicts = [member for member in members_of(hint) if is_dict(member)]
        if sections:
            part = part.replace("-", "_")
            fields = fields_of(sections[0])
            if part not in fields:
                raise unknown_setting(f"command line, --{option}", part, prefix, fields)
            hint, keys_of = fields[part].hint, fields[part].keys_of
        elif keys_of:
            part = part.replace("-", "_")
            allowed = hints_of(keys_of)
            if part not in allowed:
                raise unknown_setting(f"command line, --{option}", part, prefix, allowed)
            hint, keys_of = allowed[part], ""
        elif dicts or Any in members_of(hint):
            hint = typing.get_args(dicts[0])[1] if dicts and typing.get_args(dicts[0]) else Any
        else:
            raise SettingsError(f'command line, --{option}: "{".".join(names)}" is {describe(hint)}, not a section')
        names.append(part)
    return names, hint


def _read_command_line(schema: type, argv: Sequence[str]) -> tuple[str | None, Node]:
    config: str | None = None
    given = Node({}, "command line")
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("-"):
            if config is not None:
                raise SettingsError(
                    f"command line: {word!r} is a second settings file after {config!r}; "
                    "give one, or write `extends` in it"
                )
            config = word
            continue
        if not word.startswith("--") or word == "--":
            raise SettingsError(f"command line: {word!r} is no option; options are written --key value")
        option, equals, text = word[2:].partition("=")
        names, hint = _resolve_option(schema, option)
        where = f"command line, --{option}"
        if not equals:
            following = argv[position] if position < len(argv) else "--"
            switch = bool in members_of(hint)
            only_switch = all(member in (bool, type(None)) for member in members_of(hint))
            words = ("true", "false", "yes", "no", "on", "off", *NULL_WORDS)
            if following.startswith("--") or (only_switch and following.lower() not in words):
                if not switch:
                    raise SettingsError(
                        f"{where}: a value is missing; write --{option} VALUE, or --{option}=VALUE "
                        "for one that begins with --"
                    )
                text = "true"
            else:
                text = following
                position += 1
        node = parse_argument(text, where)
        for name in reversed(names):
            node = Node({name: node}, where)
        given = merge(given, node)
    return config, given


def _help(schema: type, prefix: str = "", default: Any = None) -> list[str]:
    lines = []
    for name, field in fields_of(schema).items():
        present = getattr(default, name) if default is not None else field.default
        sections = [member for member in members_of(field.hint) if is_section(member)]
        if sections:
            lines += [f"  {prefix}{name}: {field.help}" if field.help else f"  {prefix}{name}:"]
            lines += _help(sections[0], f"{prefix}{name}.", present if isinstance(present, sections[0]) else None)
            continue
        if present is dataclasses.MISSING:
            shown = "must be given"
        else:
            shown = "default " + (
                "null"
                if present is None
                else str(present).lower()
                if present is True or present is False
                else repr(present)
                if isinstance(present, str)
                else str(present)
            )
        option = f"--{prefix}{name}" + (".KEY" if is_dict(members_of(field.hint)[0]) else "")
        kind = f"any field of {field.keys_of}" if field.keys_of else describe(field.hint)
        lines.append(f"  {option}  {kind} ({shown})")
        if field.help:
            lines.append(f"      {field.help}")
    return lines


def load_settings(schema: type[T], argv: Sequence[str] | None, *, description: str) -> T:
    """Fill a settings dataclass from the command line and the YAML file it names.

    Args:
        schema: A dataclass. Fields may be str, int, float, bool, Any, Literal, lists, dicts with text keys, other
            dataclasses (sections) and unions of these. Field metadata: "help", one sentence; "keys_of",
            "module:Class", for a dict whose keys are fields of that dataclass, imported only when a key is given.
        argv: The arguments after the script's name; None takes those of the process.
        description: What the script does, for --help.

    Returns:
        The filled instance.

    Raises:
        SettingsError: A setting is unknown, missing or of a wrong type, or a file cannot be read; the message names
            the file and line or the option.
        SystemExit: With status 0, after --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        script = Path(sys.argv[0]).name
        print(f"usage: {script} [settings.yaml] [--key value | --key=value | --section.key value ...]\n")
        print(f"{description.strip()}\n\nsettings (the command line wins over the YAML, the YAML over the defaults):")
        print("\n".join(_help(schema)))
        raise SystemExit(0)
    config, given = _read_command_line(schema, arguments)
    node = given if config is None else merge(read_chain(Path(config)), given)
    return typing.cast(T, build(schema, node, "", None))


def resolved_yaml(settings: Any) -> str:
    """Write filled settings as YAML that `load_settings` reads back to an equal instance.

    Args:
        settings: An instance of a settings dataclass.

    Returns:
        The YAML, every setting with its value.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return dump(plain(settings))


def environment() -> dict[str, Any]:
    """Versions of the packages and the machine, JSON-ready, to be stored beside a result."""
    versions: dict[str, str | None] = {}
    for name in ("tct_hf", *DEPENDENCIES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None  # recorded as null: run from a source tree, or an engine that was not needed
    torch = sys.modules.get("torch")
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
    }


def save_resolved(settings: Any, output_dir: str | os.PathLike[str], *, extra: dict[str, Any]) -> None:
    """Write what a run was: `settings.yaml`, loadable again, and `environment.json`, what it ran on.

    Args:
        settings: The filled settings dataclass.
        output_dir: The directory, made when missing.
        extra: More to record in `environment.json`, such as the fingerprint of the corpus.

    Raises:
        ValueError: `extra` has a key that `environment.json` has already, or holds what JSON cannot express.
        OSError: A file cannot be written.
    """
    here = environment()
    taken = sorted(here.keys() & extra.keys())
    if taken:
        raise ValueError(f"extra: environment.json has {', '.join(taken)} already; choose another name")
    write_text_atomic(Path(output_dir) / "settings.yaml", resolved_yaml(settings))
    write_json_atomic(Path(output_dir) / "environment.json", here | extra)


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error, so that its message was written for the user."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    frame = last.tb_frame
    module = frame.f_globals.get("__name__", "")
    line = linecache.getline(frame.f_code.co_filename, last.tb_lineno).strip()
    return module.partition(".")[0] == "tct_hf" and line.startswith("raise ")


def run_recipe(
    main: Callable[[T], object], schema: type[T], description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Load the settings, run a recipe with them, and end the process as a command-line program should.

    A recipe script ends with `if __name__ == "__main__": run_recipe(main, TrainSettings, __doc__)`.

    Args:
        main: What to do with the settings.
        schema: The settings dataclass, as for `load_settings`.
        description: What the script does, for --help; usually its docstring.
        argv: The arguments after the script's name; None takes those of the process.

    Raises:
        SystemExit: Status 2 after a wrong setting and 1 after an error this package raised on purpose, each shown as
            one message; 130 after Ctrl-C. Every other error passes through with its traceback: it is a bug.
    """
    try:
        main(load_settings(schema, argv, description=description or ""))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error
    except (ValueError, OSError, ImportError) as error:
        if not _raised_on_purpose(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
