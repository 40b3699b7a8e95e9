"""What a release holds: which files, no path of this machine, no token; and which folder it may replace."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tct_hf.encoding.kinds import ORIGIN_FILE, TRAINING_FILE, read_json
from tct_hf.files import write_json_atomic, write_text_atomic
from tct_hf.hub_client import MARKER

RECIPE = "recipe.yaml"
FIGURES = ("report.json", "report.md", "latency.png", "storage.png")

# The parts of a checkpoint; every other file stays at home and is listed.
_MODULE = (
    r"(config\.json|sentence_bert_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
_PARTS = re.compile(
    rf"{_MODULE}|README\.md|modules\.json|config_sentence_transformers\.json"
    rf"|{re.escape(TRAINING_FILE)}|{re.escape(ORIGIN_FILE)}|\d+_\w+/(config\.json|model\.safetensors)"
    # The modules of a Router, such as query_0_SparseStaticEmbedding.
    rf"|router_config\.json|[\w-]+_\d+_[A-Z]\w*/{_MODULE}"
)
# What others may have put into the repository before: weights that would be loaded instead of the new ones, code, and
# what a training that pushes leaves, pickles among it.
_STALE = re.compile(
    r"model.*\.safetensors|(.*/)?pytorch_model[^/]*\.bin|(.*/)?[^/]*\.py|training_args\.bin|trainer_state\.json"
    r"|(optimizer|scheduler|scaler|rng_state)[^/]*|(last-checkpoint|checkpoint-\d+)/.*"
)

_TOKEN = re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
_PATH = re.compile(r"(?:/|~[\w.-]*/|\.\./|[A-Za-z]:[\\/]|\\\\|file://)\S.*")
_PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/~<-])(?:~[\w.-]*|\.\.)?(?:/[^\s/\"'`,;|\[\]{}()<>]+){2,}/?"
    r"|(?<![\w./~<-])(?:~[\w.-]*|\.\.)/[^\s\"'`,;|\[\]{}()<>]+"
)
# Where transformers writes what a model was loaded from.
_LOADED_FROM = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")


def is_replaced(name: str) -> bool:
    """Whether a file in the repository goes when the release has none of this name."""
    return bool(_PARTS.fullmatch(name) or name in (RECIPE, *FIGURES) or _STALE.fullmatch(name))


def check_folder(folder: str | Path, source: Path) -> Path:
    """The folder that a release of the checkpoint `source` is kept in, with the home directory in full."""
    place = Path(folder).expanduser()
    kept, checkpoint = place.resolve(), source.resolve()
    if kept.is_relative_to(checkpoint) or checkpoint.is_relative_to(kept):
        raise ValueError(f"folder (--output_dir): {place} and {source} lie in one another; name another one.")
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"folder (--output_dir): {place} is a file; name a folder.")
    known = {MARKER, *((read_json(place / MARKER) or {}).get("files") or [])}
    others = sorted({file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()} - known)
    if others:
        raise FileExistsError(
            f"folder (--output_dir): {place} holds {others[0]}, which no earlier release put there; name another."
        )
    return place


def mark(folder: Path, files: Sequence[str]) -> None:
    """Leave the names of a release's files in its folder, for :func:`check_folder`; the mark itself is not pushed."""
    write_json_atomic(folder / MARKER, {"files": list(files)})


def copy_parts(source: Path, staging: Path) -> list[str]:
    """Copy the parts of a checkpoint except its card to a new folder; the names of the files that are no part."""
    staging.mkdir(parents=True)
    left_out = []
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        if not _PARTS.fullmatch(name):
            left_out.append(name)
        elif name != "README.md":  # written anew
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staging / name)
    return left_out


def cut_local_paths(staging: Path) -> None:
    """Cut the paths of this machine in all files of a release that may name any; see :func:`without_local_paths`."""
    for file in filter(Path.is_file, (staging / name for name in (RECIPE, ORIGIN_FILE, *FIGURES[:2]))):
        try:
            text = file.read_text(encoding="utf-8")
            cut = without_local_paths(text, file.suffix)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{file.name} can't be read ({why}); give it as the run wrote it.") from error
        if cut != text:
            write_text_atomic(file, cut)
    for file in [*staging.rglob("config.json"), *staging.rglob("tokenizer_config.json")]:
        content = read_json(file)
        named = {key: content[key] for key in _LOADED_FROM if key in content}
        if named != (cut_names := _cut_values(named)):
            write_json_atomic(file, content | cut_names)


def without_local_paths(text: str, suffix: str = ".yaml") -> str:
    """A text with absolute paths, and those that begin with ~ or .., cut to their last name: they name people."""
    if suffix == ".json":
        content = json.loads(text)
        cut = _cut_values(content)
        return text if cut == content else json.dumps(cut, indent=2, ensure_ascii=False) + "\n"
    if suffix in (".yaml", ".yml"):
        content = yaml.safe_load(text)
        if (cut := _cut_values(content)) != content:
            text = yaml.safe_dump(cut, sort_keys=False, allow_unicode=True)
    return _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), text)


def _cut_values(content: Any) -> Any:
    if isinstance(content, str):
        whole = _PATH.fullmatch(content)
        return _last_name(content) if whole else _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), content)
    if isinstance(content, list):
        return [_cut_values(item) for item in content]
    if isinstance(content, dict):
        return {_cut_values(key): _cut_values(item) for key, item in content.items()}
    return content


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def refuse_tokens(staging: Path, token: str | None) -> None:
    """Refuse a release that has a Hub token in a file, or `token`, whatever its form."""
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        with file.open("rb") as opened:  # of weights their header
            weights = file.suffix == ".safetensors"
            content = opened.read(int.from_bytes(opened.read(8), "little") if weights else -1)
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise ValueError(
                f"{file.relative_to(staging).as_posix()} holds a Hub token: take it out where the file comes from "
                "(HF_TOKEN gives it), and revoke it if anybody else has seen it."
            )
