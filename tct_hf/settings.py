"""Settings of a recipe: one dataclass, filled from YAML and the command line, checked before anything heavy runs.

`script.py [settings.yaml] [--key value | --key=value | --section.key value ...]`; the command line wins over the YAML,
the YAML over the dataclass's defaults. Mappings (sections and dict fields) merge key by key, lists replace. A YAML may
name another one that it changes, `extends: other.yaml`, and use OmegaConf's `${output_dir}`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pkgutil
import platform
import re
import shlex
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from tct_hf.files import MADE_AGAIN, is_shallow, read_json, write_json_atomic, write_text_atomic

T = TypeVar("T")

_LEVELS = 20  # of nested settings; each takes OmegaConf some ten calls
_SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "none")


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it and says the fix."""


def setting(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field of a schema: its default and its help."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": text, **more})
    return dataclasses.field(default=default, metadata={"help": text, **more})


def hide_passwords(text: str) -> str:
    """A text without the passwords of the URLs in it, and without the tokens of those that begin with http."""
    text = re.sub(r"(https?://)[^:/@\s]+@", r"\1***@", text)
    text = re.sub(r"(password\s*=\s*)('(\\.|[^'\\])*'|[^\s&]+)", r"\1***", text)  # of libpq
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _section(hint: Any) -> type | None:
    return next((one for one in _members(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


class _Setting(NamedTuple):
    hint: Any = Any
    kind: str = ""
    default: Any = None
    help: str = ""
    keys_of: str = ""

    def below(self) -> dict[str, _Setting]:
        """The settings of a section."""
        section, found = _section(self.hint), {}
        hints = typing.get_type_hints(section) if section else {}
        for one in dataclasses.fields(section) if section else ():
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            kind = re.sub(r"Literal\[([^]]*)\]", r"\1", str(one.type)).replace('"', "").replace("None", "null")
            found[one.name] = _Setting(hints[one.name], kind, default, **one.metadata)
        return found


_SHAPES = {dict: "a mapping is needed; write {name: value}", list: "a list is needed; write [a, b, c]"}


def _with_arguments(setting: _Setting, given: Any, name: str = "") -> Any:
    """What was given, its shape checked, and names and types of mappings that are passed on as arguments."""
    members = [one for one in _members(setting.hint) if one is not type(None)]
    shapes: dict[Any, Any] = {dict if _section(one) else typing.get_origin(one): one for one in members}
    shape = next((one for one in _SHAPES if isinstance(given, one)), None)
    is_value = given is None or "${" in str(given) or not {*shapes} <= {*_SHAPES}
    if Any not in members and (not is_value if shape is None else shape not in shapes):
        fix = next((_SHAPES[one] for one in shapes if one in _SHAPES), "one value is needed")
        raise SettingsError(f'"{name}": {fix}')
    if shape is not dict:
        return given
    if not setting.keys_of:
        of, other = setting.below(), _Setting((typing.get_args(shapes.get(dict)) or [Any])[-1])
        return {
            key: _with_arguments(of.get(key, other), one, f"{name}.{key}".lstrip(".")) for key, one in given.items()
        }
    arguments = pkgutil.resolve_name(setting.keys_of)
    try:
        hints = typing.get_type_hints(arguments)
    except NameError:  # its module imports a name for type checkers only; the keys are still checked
        hints = {}
    # Argument classes of other libraries are loose about texts, enums and mappings, and say so in prose only.
    strict = {key: hint for key, hint in hints.items() if {*_members(hint)} <= {bool, int, float, type(None)}}
    every = [(one.name, strict.get(one.name, Any), MISSING) for one in dataclasses.fields(arguments) if one.init]
    asked = [one for one in every if one[0] in given]
    # Fewer are sooner made; where one is unknown, all of them tell which was meant.
    fields = asked if len(asked) == len(given) else every
    known: Any = OmegaConf.structured(dataclasses.make_dataclass(arguments.__name__, fields))
    try:
        typed: Any = OmegaConf.to_container(OmegaConf.merge(known, given))
    except OmegaConfBaseException as error:
        raise _refused(error, f"{name}.") from error
    return {key: typed[key] for key in given}


def _refused(error: OmegaConfBaseException, prefix: str = "") -> SettingsError:
    said = str(error).splitlines()[0]
    return SettingsError(f'"{prefix}{error.full_key}": {said}' if error.full_key else said)


def _check(given: Any, made: Any, name: str = "") -> None:
    """Refuse secrets, since settings are written beside every result, and numbers that YAML made of texts."""
    if isinstance(given, (Mapping, list)):
        for key, value in given.items() if isinstance(given, Mapping) else enumerate(given):
            _check(value, made[key], f"{name}.{key}" if name else str(key))
    elif name.rpartition(".")[2] == "hub_token" or re.search(r"\bhf_[A-Za-z0-9]{20,}", str(given)):
        raise SettingsError(
            f'"{name}" is a secret, and settings are written into every result: leave it out, and set HF_TOKEN or log '
            "in with `hf auth login`."
        )
    elif isinstance(made, str) and not isinstance(given, str):
        raise SettingsError(f'"{name}" must be a text, got {json.dumps(given)}; write it in quotes')


def read_yaml(path: str | os.PathLike[str], chain: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a settings file and those that it extends."""
    path = Path(path).resolve()
    asked = f"{chain[-1].name}: extends: " if chain else ""
    if path in chain:
        raise SettingsError(f"{asked}a circle: {' -> '.join(file.name for file in [*chain, path])}; take one out")
    try:
        own: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not is_shallow(own, _LEVELS):
            raise RecursionError
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise SettingsError(f"{asked}{path} cannot be read as a settings file: {why}") from error
    if not isinstance(own, dict):
        raise SettingsError(f"{path}: the file must hold settings, one `name: value` a line")
    base = own.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise SettingsError(f"{path}: extends must name one YAML file, got {base!r}")
    extended = read_yaml(path.parent / base, [*chain, path])
    extended.pop("expected", None)  # figures are of one recipe
    return _merge(extended, own)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = [name for name in over if isinstance(base.get(name), dict) and isinstance(over[name], dict)]
    return {**base, **over, **{name: _merge(base[name], over[name]) for name in both}}


def _value(text: str, hint: Any) -> Any:
    """A value of the command line: text where text is meant, else YAML."""
    members = _members(hint)
    if type(None) in members and text.lower() in ("null", "none", "~"):
        return None
    if str in members or any(typing.get_origin(one) is Literal and text in typing.get_args(one) for one in members):
        return text
    if any(typing.get_origin(one) is list for one in members) and not text.lstrip().startswith(("[", "{")):
        text = f"[{text}]"
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (RecursionError, yaml.YAMLError):
        return text


def _command_line(schema: type, words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The settings file and the settings that a command names."""
    file: str | None = None
    given: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") and file is None:
            file = word
            continue
        if not word.startswith("--") or word == "--":
            raise SettingsError(f"{word!r}: write one settings file, and options as --key value")
        option, equals, text = word[2:].partition("=")
        names, here = [], _Setting(schema)
        for part in option.split("."):
            mapping = next((one for one in _members(here.hint) if typing.get_origin(one) is dict), None)
            names.append(part if mapping and not here.keys_of else part.replace("-", "_"))
            here = here.below().get(names[-1], _Setting(typing.get_args(mapping)[-1] if mapping else Any))
        if not equals:
            members = {*_members(here.hint)}
            only_switch = members <= {bool, type(None)}  # the word after one may be the settings file
            if left and not left[0].startswith("--") and (not only_switch or left[0].lower() in _SWITCH_WORDS):
                text = left.pop(0)
            elif members & {bool, Any}:
                text = "true"
            else:
                raise SettingsError(f"--{option}: a value is missing; write --{option}=VALUE")
        value = _value(text, here.hint)
        for name in reversed(names):
            value = {name: value}
        if not is_shallow(value, _LEVELS):
            raise SettingsError(f"--{names[0]}: its value is nested too deeply")
        given = _merge(given, value)
    return file, given


def _help(schema: type, prefix: str = "", defaults: Any = None) -> list[str]:
    lines = []
    for name, one in _Setting(schema).below().items():
        default = one.default if defaults is None else getattr(defaults, name)
        if section := _section(one.hint):
            lines += [f"  {prefix}{name}:", *_help(section, f"{prefix}{name}.", default)]
            continue
        is_given = default is not dataclasses.MISSING
        shown = f"default {json.dumps(default, ensure_ascii=False, default=str)}" if is_given else "must be given"
        mapping = ".KEY" if typing.get_origin(one.hint) is dict else ""
        kind = f"any field of {one.keys_of}" if one.keys_of else one.kind
        lines += [f"  --{prefix}{name}{mapping}  {kind} ({shown})", *([f"      {one.help}"] if one.help else [])]
    return lines


def load_settings(schema: type[T], argv: Sequence[str] | None, *, description: str) -> T:
    """Fill a settings dataclass from the command line and the YAML file it names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {Path(sys.argv[0]).name} [settings.yaml] [--key value | --key=value | --section.key value ...]")
        print(f"\n{description.strip()}\n")
        print("settings (the command line wins over the YAML, the YAML over the defaults):", *_help(schema), sep="\n")
        raise SystemExit(0)
    file, given = _command_line(schema, arguments)
    return filled(schema, given if file is None else _merge(read_yaml(file), given))


_structured: Callable[[type], Any] = cache(OmegaConf.structured)


def filled(schema: type[T], given: Mapping[str, Any]) -> T:
    """A settings dataclass with what was given, by nested names, and its defaults elsewhere."""
    try:
        made: Any = OmegaConf.merge(_structured(schema), _with_arguments(_Setting(schema), given))
        _check(given, OmegaConf.to_container(made))
        return OmegaConf.to_object(made)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise SettingsError(f'"{error.full_key}" must be given: --{error.full_key} VALUE, or in the YAML') from error
    except OmegaConfBaseException as error:
        raise _refused(error) from error
    except ValueError as error:  # a check in the schema's own __post_init__
        raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error


def resolved_yaml(settings: Any) -> str:
    """Filled settings as YAML that `load_settings` reads back to an equal instance."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))


@cache
def _packages() -> dict[str, str | None]:
    """Versions of the required packages."""
    try:
        required = (line for line in metadata.requires("tct_hf") or () if "extra ==" not in line)
        names = ("tct_hf", *(re.split(r"[^\w.-]", line)[0] for line in required))
        return {name: metadata.version(name) for name in names}
    except metadata.PackageNotFoundError:  # run from a source tree
        return {"tct_hf": None}


def environment() -> dict[str, Any]:
    """Versions of the required packages and the machine, JSON-ready, to be stored beside a result."""
    torch = sys.modules.get("torch")
    return {
        "packages": dict(_packages()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch and torch.get_num_threads(),
    }


# The recipe that runs: the name of its file, however it was started; None outside of recipes.
_RECIPE: ContextVar[str | None] = ContextVar("recipe", default=None)
# Beside `settings.yaml`: what the run ran on, and the recipe that it was of.
_ENVIRONMENT_FILE = "environment.json"


def save_resolved(settings: Any, output_dir: str | os.PathLike[str], *, extra: dict[str, Any]) -> None:
    """Write what a run was: `settings.yaml`, loadable again, and `environment.json`, what it ran on."""
    write_text_atomic(Path(output_dir) / "settings.yaml", hide_passwords(resolved_yaml(settings)))
    write_json_atomic(Path(output_dir) / _ENVIRONMENT_FILE, {"recipe": _RECIPE.get(), **environment(), **extra})


def _check_output(folder: str | None) -> None:
    """Refuse an output folder without a name, and one of another recipe, whose settings would be lost."""
    if folder is None:
        return
    if not folder.strip():
        raise SettingsError("output_dir: the name is empty; name a folder")
    other = None
    with suppress(OSError, ValueError):  # damaged: it is written anew
        other = read_json(Path(folder) / _ENVIRONMENT_FILE, MADE_AGAIN).get("recipe")
    if other not in (None, _RECIPE.get()):
        raise SettingsError(f"output_dir: {folder} holds a run of the recipe {other}; name another folder")


def _for_the_user(error: BaseException, output: str | None) -> str | None:
    """What was written for the user, or the system says of a path that can't be used; None of any other error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise "):
        return str(error)
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, os.PathLike)):
        return None
    unwritable = (
        isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or error.errno == errno.EROFS
    )
    if output is not None and unwritable and Path(error.filename).is_relative_to(output):
        return f"output_dir: {error.filename} can't be written ({error.strerror}); name another folder"
    return f"{error.filename}: {error.strerror}"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt(number)
        os._exit(128 + number)  # a worker, which is told to end

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_recipe(
    main: Callable[[T], object], schema: type[T], description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Load the settings, run a recipe with them, and end the process as a command-line program should.

    A recipe script ends with `if __name__ == "__main__": run_recipe(main, Settings, __doc__)`.
    """
    output: str | None = None
    running = _RECIPE.set(Path(main.__code__.co_filename).stem)  # type: ignore[attr-defined]
    try:
        with _stoppable():
            settings = load_settings(schema, argv, description=description or "")
            output = getattr(settings, "output_dir", None)
            _check_output(output)
            main(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        # One of a group of processes speaks for all, and only their launcher knows the command.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if os.environ.get("RANK", "0") == "0":
            again = hide_passwords(shlex.join(sys.orig_argv)) if alone else "run the same command again"
            print(f"interrupted; to go on: {again}", file=sys.stderr)
        raise SystemExit(128 + number) from error
    except (ValueError, OSError, ImportError) as error:
        said = _for_the_user(error, output)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        _RECIPE.reset(running)
