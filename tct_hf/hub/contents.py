"""What a release holds: which files, none of this machine's paths, no token; and which folder it may replace."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tct_hf.encoding.convert import ORIGIN_FILE
from tct_hf.encoding.kinds import read_json
from tct_hf.files import write_json_atomic, write_text_atomic
from tct_hf.hub_client import MARKER

# What a checkpoint is made of; all else stays at home and is listed.
_MODULE = (
    r"(config\.json|sentence_bert_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
_PARTS = re.compile(
    rf"({_MODULE}|README\.md|modules\.json|config_sentence_transformers\.json|tct_teacher\.json|tct_origin\.json"
    r"|\d+_\w+/(config\.json|model\.safetensors)"
    # What a Router sends queries and passages through, such as query_0_SparseStaticEmbedding.
    rf"|router_config\.json|[\w-]+_\d+_[A-Z]\w*/{_MODULE})"
)
RECIPE = "recipe.yaml"
FIGURES = ("report.json", "report.md", "latency.png", "storage.png")
# What others may have put into the repository before: weights that would be loaded in place of the new ones, code, and
# what a training that pushes leaves, pickles among it.
_STALE = re.compile(
    r"model.*\.safetensors|(.*/)?pytorch_model[^/]*\.bin|(.*/)?[^/]*\.py|training_args\.bin|trainer_state\.json"
    r"|(optimizer|scheduler|scaler|rng_state)[^/]*|(last-checkpoint|checkpoint-\d+)/.*"
)

_TOKEN = re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
_PATH = re.compile(r"(?:/|~[\w.-]*/|\.\./|[A-Za-z]:[\\/]|\\\\|file://)\S.*", re.DOTALL)
_PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/~<-])(?:~[\w.-]*|\.\.)?(?:/[^\s/\"'`,;|\[\]{}()<>]+){2,}/?|(?<![\w./~<-])(?:~[\w.-]*|\.\.)/[^\s\"'`,;|\[\]{}()<>]+"
)
# Where transformers writes what a model was loaded from.
_LOADED_FROM = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")


def is_part(name: str) -> bool:
    """Whether a file, by its name below the folder, is a part of a checkpoint."""
    return _PARTS.fullmatch(name) is not None


def is_replaced(name: str) -> bool:
    """Whether a file that is in the repository has to go when the release has none of this name."""
    return is_part(name) or name in (RECIPE, *FIGURES) or _STALE.fullmatch(name) is not None


def check_folder(folder: str | Path, source: Path) -> Path:
    """The folder that a release is kept in, where nothing of anybody's gets lost.

    Args:
        folder: as the user named it.
        source: the checkpoint.

    Returns:
        The folder, with the home directory in full.

    Raises:
        ValueError: it is, holds or lies in the checkpoint's folder.
        FileExistsError: it holds something other than an earlier release.
    """
    place = Path(folder).expanduser()
    kept, checkpoint = place.resolve(), source.resolve()
    if kept.is_relative_to(checkpoint) or checkpoint.is_relative_to(kept):
        raise ValueError(
            f"folder (--output_dir): {place} and the checkpoint {source} lie in one another, and the folder is "
            "replaced as a whole; name another one."
        )
    if not place.exists():
        return place
    if not place.is_dir():
        raise FileExistsError(f"folder (--output_dir): {place} is a file; name a folder.")
    known = {MARKER, *((read_json(place / MARKER) or {}).get("files") or [])}
    others = sorted(
        name
        for file in place.rglob("*")
        if not file.is_dir() and (name := file.relative_to(place).as_posix()) not in known
    )
    if others:
        raise FileExistsError(
            f"folder (--output_dir): {place} holds {others[0]}, which no earlier release put there, and the folder is "
            "replaced as a whole; name another folder, or empty it."
        )
    return place


def mark(folder: Path, files: Sequence[str]) -> None:
    """Leave the names of a release's files in its folder, for :func:`check_folder`; the mark itself is not pushed."""
    write_json_atomic(folder / MARKER, {"files": list(files)})


def copy_parts(source: Path, staging: Path) -> list[str]:
    """Copy the parts of a checkpoint, its card aside.

    Args:
        source: the checkpoint.
        staging: a folder to make.

    Returns:
        Names of the files that are no part.

    Raises:
        OSError: a file can't be read or written.
    """
    staging.mkdir(parents=True)
    left_out = []
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        if not is_part(name):
            left_out.append(name)
        elif name != "README.md":  # written anew
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staging / name)
    return left_out


def cut_local_paths(staging: Path) -> None:
    """Cut the paths of this machine in all files of a release that may name any; see :func:`without_local_paths`."""
    for name in (RECIPE, ORIGIN_FILE, *FIGURES[:2]):
        if (staging / name).is_file():
            text = (staging / name).read_text(encoding="utf-8")
            cut = without_local_paths(text, (staging / name).suffix)
            if cut != text:
                write_text_atomic(staging / name, cut)
    for file in [*staging.rglob("config.json"), *staging.rglob("tokenizer_config.json")]:
        name = file.relative_to(staging).as_posix()
        content = read_json(staging / name)
        named = {key: content[key] for key in _LOADED_FROM if key in content} if isinstance(content, dict) else {}
        if named != (cut_names := _cut_values(named)):
            write_json_atomic(staging / name, content | cut_names)


def without_local_paths(text: str, suffix: str = ".yaml") -> str:
    """A text in which paths that are absolute, or begin with ~ or .., are cut to their last name: they tell who works
    where.

    Args:
        text: of a recipe, a report or a record.
        suffix: ".yaml" and ".json" are cut value by value, so that a path may hold spaces; others by what looks like a
            path of two names or more. URLs and Hub ids stay.

    Raises:
        ValueError: it is not the format that its suffix says.
    """
    if suffix == ".json":
        content = json.loads(text)
        cut = _cut_values(content)
        return text if cut == content else json.dumps(cut, indent=2, ensure_ascii=False) + "\n"
    if suffix in (".yaml", ".yml"):
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"the recipe is not YAML ({error}); name the settings.yaml of the training.") from error
        for node in sorted(_scalars(root), key=lambda node: -node.start_mark.index):
            if node.style in (None, "'", '"') and (name := _cut(node.value)) != node.value:
                # JSON's quotes are YAML's too, in which an end on ": " or " #" is harmless.
                plain = node.style is None and re.fullmatch(r"[A-Za-z_][\w.-]*", name)
                new = name if plain else json.dumps(name, ensure_ascii=False)
                text = text[: node.start_mark.index] + new + text[node.end_mark.index :]
    return _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), text)


def _scalars(node: Any) -> list[Any]:
    if isinstance(node, yaml.ScalarNode):
        return [node]
    if isinstance(node, yaml.SequenceNode):
        return [scalar for item in node.value for scalar in _scalars(item)]
    if isinstance(node, yaml.MappingNode):
        return [scalar for pair in node.value for item in pair for scalar in _scalars(item)]
    return []


def _cut_values(content: Any) -> Any:
    if isinstance(content, str):
        return _cut(content)
    if isinstance(content, list):
        return [_cut_values(item) for item in content]
    if isinstance(content, dict):
        return {_cut(key): _cut_values(item) for key, item in content.items()}
    return content


def _cut(value: str) -> str:
    if _PATH.fullmatch(value) and "\n" not in value:
        return _last_name(value)
    return _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), value)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def refuse_tokens(staging: Path, token: str | None) -> None:
    """Refuse a release that has a Hub token in a file.

    Args:
        staging: what would be pushed.
        token: that the push would use; looked for whatever its form.

    Raises:
        ValueError: names the file and not the token.
    """
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        content = _text_of(file)
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise ValueError(
                f"{file.relative_to(staging).as_posix()}: a Hub token stands in it, for whoever reads it to use. "
                "Take it out where the file comes from (set HF_TOKEN or log in with `hf auth login` instead), and "
                "revoke it if anybody else has seen it."
            )


def _text_of(file: Path) -> bytes:
    """The content, of weights their header."""
    with file.open("rb") as content:
        if file.suffix == ".safetensors":
            return content.read(int.from_bytes(content.read(8), "little"))
        return content.read()
