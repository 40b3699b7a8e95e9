"""Tell what a checkpoint is from its files, or that nobody can tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["student", "tct", "colbert", "dual-encoder", "bare", "sparse", "other"]

# Bare encoders that were trained with the TCT encoding and don't say so in any file.
TCT_CHECKPOINTS = (
    "castorini/tct_colbert-msmarco",
    "castorini/tct_colbert-v2-msmarco",
    "castorini/tct_colbert-v2-hn-msmarco",
    "castorini/tct_colbert-v2-hnp-msmarco",
)

# Beside a teacher's checkpoint: what its scores were multiplied by in training.
TRAINING_FILE = "tct_teacher.json"


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        kind: "student" (with the TCT encoding in its files), "tct" (a bare encoder known to be trained with it),
            "colbert", "dual-encoder" (a SentenceTransformer with another encoding), "bare" (an encoder that does not
            say what its vectors are), "sparse", or "other".
        pooling: of a dual encoder: "mean", "cls" or another of sentence-transformers' names.
        why: what it was told by.
    """

    kind: Kind
    why: str
    pooling: str | None = None


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download or save the checkpoint again.") from None


def read_modules(folder: Path, *, route: str | None = None) -> list[dict[str, str]]:
    """The modules of a checkpoint, each its "type" and "path", those within a Router among them.

    Args:
        folder: where its files are.
        route: of a Router, the modules of this one alone; those of all routes when None.

    Raises:
        ValueError: a file is damaged.
    """
    found: list[dict[str, str]] = []
    for module in read_json(folder / "modules.json") or []:
        found.append({"type": str(module["type"]), "path": str(module["path"])})
        routed = read_json(folder / module["path"] / "router_config.json")
        if routed is None:
            continue
        if route is not None:
            found.pop()
        taken = routed["types"] if route is None else routed["structure"].get(route, [])
        found += [
            {"type": str(routed["types"][name]), "path": (Path(module["path"]) / name).as_posix()} for name in taken
        ]
    return found


def published_name(name_or_path: str, folder: Path) -> str | None:
    """The known TCT checkpoint that a Hub id, a clone of one or the client's cache of one is; None for others.

    Args:
        name_or_path: as the user named it.
        folder: where its files are.
    """
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    for name in TCT_CHECKPOINTS:
        if name_or_path == name or cached == f"models--{name.replace('/', '--')}" or folder.name == name.split("/")[1]:
            return name
    return None


def recognise(name_or_path: str, folder: Path) -> Recognised:
    """What the checkpoint in a folder is.

    Args:
        name_or_path: as the user named it: a bare TCT checkpoint is known by its name alone.
        folder: where its files are.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: a file is damaged.
    """
    config = read_json(folder / "config.json")
    own = read_json(folder / "config_sentence_transformers.json") or {}
    modules = read_json(folder / "modules.json")
    if config is None and modules is None:
        raise FileNotFoundError(f"{folder}: no config.json here, so this is no model folder; name the folder of one.")
    config = config or {}
    classes = [str(module["type"]).rsplit(".", 1)[-1] for module in modules or []]
    if (folder / "artifact.metadata").is_file() or "HF_ColBERT" in (config.get("architectures") or []):
        return Recognised("colbert", "artifact.metadata and architecture of the Stanford code")
    if own.get("model_type") in ("ColBERT", "MultiVectorEncoder") or own.get("similarity_fn_name") == "MaxSim":
        return Recognised("colbert", f"model type {own.get('model_type')} in config_sentence_transformers.json")
    if own.get("model_type") == "SparseEncoder" or "SpladePooling" in classes or "MLMTransformer" in classes:
        return Recognised("sparse", f"modules {classes}")
    if modules is not None:
        return _of_modules(folder, classes, modules, own)
    name = published_name(name_or_path, folder)
    if name is not None and config.get("model_type") == "bert":
        return Recognised("tct", f"a bare BERT, published as {name}")
    return Recognised("bare", f"a bare {config.get('model_type')} encoder without modules.json")


def kind_of(name_or_path: str) -> Kind | None:
    """What a checkpoint is, by its files alone, which are fetched of a Hub id.

    Args:
        name_or_path: folder or Hub id.

    Returns:
        As :func:`recognise`; None where there are no files to tell by.

    Raises:
        ValueError: a file is damaged.
    """
    from sentence_transformers.util import load_file_path

    names = ("modules.json", "config_sentence_transformers.json", "config.json")
    # All are in one folder, of the client's cache where it is a Hub id.
    files = [Path(path) for name in names if (path := load_file_path(name_or_path, name))]
    if not any(file.name != names[1] for file in files):
        return None
    return recognise(name_or_path, files[0].parent).kind


def _of_modules(folder: Path, classes: list[str], modules: list[Any], own: dict[str, Any]) -> Recognised:
    from tct_hf.encoding.tokenization import PROMPTS

    if classes[:2] != ["Transformer", "Pooling"]:
        return Recognised("other", f"modules {classes}")
    pooling = read_json(folder / modules[1]["path"] / "config.json") or {}
    mode = pooling.get("pooling_mode") or _old_pooling_mode(pooling)
    settings = read_json(folder / "sentence_bert_config.json") or {}
    ours = classes in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize", "Dense"])
    if ours and own.get("prompts") == PROMPTS and "document_length" in settings:
        return Recognised("student", "the TCT encoding in its files", mode)
    return Recognised("dual-encoder", f"a SentenceTransformer of {classes} with {mode} pooling", mode)


def _old_pooling_mode(pooling: dict[str, Any]) -> str:
    flags = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    return "+".join(names.get(flag, flag.removeprefix("pooling_mode_")) for flag in flags) or "unknown"
