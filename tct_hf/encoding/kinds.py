"""What a checkpoint is, told by its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tct_hf import files
from tct_hf.hub_client import hub_errors

Kind = Literal["student", "tct", "colbert", "dual-encoder", "router", "bare", "sparse", "other"]

PROMPTS = {"query": "[Q] ", "document": "[D] "}  # of the TCT encoding

# Bare encoders that were trained with the TCT encoding, which none of their files says.
TCT_CHECKPOINTS = (
    "castorini/tct_colbert-msmarco",
    "castorini/tct_colbert-v2-msmarco",
    "castorini/tct_colbert-v2-hn-msmarco",
    "castorini/tct_colbert-v2-hnp-msmarco",
    "castorini/tct_colbert-v2-hnp-msmarco-r2",
)
# Modules of a TCT student: without and with a learned scale.
TCT_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize", "Dense"])

_MOST_TOKENS = 65_536  # of a query, whatever number of positions a configuration says

# Whole numbers in the small files and the most that each may be (of padded queries see check_query_length).
_SIZES: dict[str, float] = {
    # Of thirty digits, or 1e30: no limit.
    **dict.fromkeys(("length", "query_length", "query_maxlen", "max_seq_length", "model_max_length"), math.inf),
    **dict.fromkeys(("document_length", "truncate_dim"), 10**8),
    # Without a library's own limit: so many layers are made before the weights are looked at.
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers"), 1000),
    **dict.fromkeys(("num_hidden_groups", "inner_group_num"), 1000),
}
_AGAIN = "download or save the checkpoint again."
_KINDS = {"architectures": list, "query_expansion": dict, "prompts": dict}

TRAINING_FILE = "tct_teacher.json"  # beside a teacher's checkpoint: what its scores were multiplied by in training
ORIGIN_FILE = "tct_origin.json"  # in a conversion: what it was made from
STARTING = "starting student"


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is, what it was recognised by, and sentence-transformers' name of its pooling.

    "student" has the TCT encoding in its files, "tct" is a bare encoder known to be trained with it, "dual-encoder" a
    SentenceTransformer with another encoding, "router" one that sends queries and passages through other modules,
    "bare" an encoder whose files don't say what its vectors are.
    """

    kind: Kind
    why: str
    pooling: str | None = None


def read_json(path: Path, *, required: bool = False) -> Any:
    """A JSON file of a checkpoint; one that is missing is None, or a FileNotFoundError where it is required."""
    if not path.is_file():
        if required:
            raise FileNotFoundError(
                f"{path} is missing: {path.parent} is not a complete student checkpoint. Save it with save_student."
            )
        return None
    kind = list if path.name == "modules.json" else dict
    content = files.read_json(path, _AGAIN, kind=kind)
    if wrong := _wrong_modules(content) if kind is list else _wrong_value(content):
        raise ValueError(f"{path} can't be used ({wrong}): {_AGAIN}")
    return content


def _wrong_modules(modules: list[Any]) -> str | None:
    for place, one in enumerate(modules):
        if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in ("type", "path")):
            return f'entry {place} has no "type" and "path" in text'
    return None if modules else "it lists no module"


def _wrong_value(content: dict[str, Any]) -> str | None:
    for name, value in content.items():
        most, kind = _SIZES.get(name), _KINDS.get(name)
        whole = type(value) is int or (most == math.inf and type(value) is float)
        if most and value is not None and not (whole and 0 < value <= most):
            up_to = f"from 1 to {most:,}" if most < math.inf else "above 0"
            return f"{name}={value!r}: must be a whole number {up_to}"
        if kind and value is not None and not isinstance(value, kind):
            return f"{name}={value!r}: must be a {kind.__name__}"
        if kind is list and not all(isinstance(one, str) for one in value or []):
            return f"{name}={value!r}: must be a list of texts"
    expansion = content.get("query_expansion")
    return _wrong_value(expansion) if expansion else None


def read_json_of(name_or_path: str, file: str) -> Any:
    """A JSON file of a folder or Hub repository; one that is missing is None."""
    return None if (path := _file_of(name_or_path, file)) is None else read_json(path)


def _file_of(name_or_path: str, file: str) -> Path | None:
    from sentence_transformers.util import load_file_path

    with hub_errors(name_or_path, "reading its configuration"):
        path = load_file_path(name_or_path, file)
    return None if path is None else Path(path)


def module_classes(modules: list[dict[str, Any]] | None) -> list[str]:
    """Class names of the modules that a modules.json lists."""
    return [str(module["type"]).rsplit(".", 1)[-1] for module in modules or []]


def read_modules(folder: Path, *, route: str | None = None) -> list[dict[str, str]]:
    """The modules of a checkpoint with those inside a Router, each with "type" and "path".

    With `route`, only the modules of that route, without the Router itself.
    """
    found: list[dict[str, str]] = []
    for module in read_json(folder / "modules.json") or []:
        path = str(module["path"])
        routed = read_json(folder / path / "router_config.json")
        if routed is None or route is None:
            found.append({"type": str(module["type"]), "path": path})
        if routed is not None:
            names = routed["types"] if route is None else routed["structure"].get(route, [])
            found += [{"type": str(routed["types"][name]), "path": (Path(path) / name).as_posix()} for name in names]
    return found


def published_name(name_or_path: str, folder: Path) -> str | None:
    """The known TCT checkpoint that a Hub id, a clone or the client's cache of one is; None for others."""
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    for name in TCT_CHECKPOINTS:
        if name_or_path == name or cached == f"models--{name.replace('/', '--')}" or folder.name == name.split("/")[1]:
            return name
    return None


def check_query_length(name: str, config: Any, *settings: Any) -> None:
    """Refuse a checkpoint whose queries would be padded to more tokens than its encoder has positions.

    `config` is its config.json, `settings` are the other files of JSON that may say a length; None where one lacks.
    """
    most = (config or {}).get("max_position_embeddings")
    most = min(most, _MOST_TOKENS) if isinstance(most, int) and most > 0 else _MOST_TOKENS
    for found in settings:
        found = found or {}
        lengths = {
            "sentence_bert_config.json": (found.get("query_expansion") or {}).get("length"),
            "artifact.metadata": found.get("query_maxlen"),
            # Of PyLate, which always pads.
            "config_sentence_transformers.json": found.get("query_length") if "query_prefix" in found else None,
        }
        for file, length in lengths.items():
            if isinstance(length, (int, float)) and length > most:
                raise ValueError(
                    f"{name}/{file}: it pads queries to {length:,} tokens, but its encoder takes {most:,}: its files "
                    "are damaged or forged; get the checkpoint from another place."
                )


def recognise(name_or_path: str, folder: Path) -> Recognised:
    """What the checkpoint in a folder is."""
    config, modules = read_json(folder / "config.json"), read_json(folder / "modules.json")
    own = read_json(folder / "config_sentence_transformers.json") or {}
    if config is None and modules is None:
        raise FileNotFoundError(f"{folder}: no config.json here, so this is no model folder; name the folder of one.")
    config = config or {}
    others = (folder / "sentence_bert_config.json", folder / "artifact.metadata")
    read_json(folder / "tokenizer_config.json")  # for its check
    check_query_length(name_or_path, config, own, *map(read_json, others))
    classes = module_classes(modules)
    architectures = [str(name) for name in config.get("architectures") or []]
    if (folder / "artifact.metadata").is_file() or "HF_ColBERT" in architectures:
        return Recognised("colbert", "artifact.metadata and architecture of the Stanford code")
    if modules is None and any(name.endswith("ForRetrieval") for name in architectures):
        return Recognised("colbert", f"architecture {architectures[0]}")
    if own.get("model_type") in ("ColBERT", "MultiVectorEncoder") or own.get("similarity_fn_name") == "MaxSim":
        return Recognised("colbert", f"model type {own.get('model_type')} in config_sentence_transformers.json")
    if own.get("model_type") == "SparseEncoder" or {"SpladePooling", "MLMTransformer"} & set(classes):
        return Recognised("sparse", f"modules {classes}")
    if modules is None:
        name = published_name(name_or_path, folder)
        if name is not None and config.get("model_type") == "bert":
            return Recognised("tct", f"a bare BERT, published as {name}")
        return Recognised("bare", f"a bare {config.get('model_type')} encoder without modules.json")
    if classes[:1] == ["StaticEmbedding"]:
        return Recognised("dual-encoder", f"a SentenceTransformer of {classes}", "mean")
    if classes[0] == "Router":
        return Recognised("router", f"a SentenceTransformer that begins with a Router, modules {classes}")
    if classes[:2] != ["Transformer", "Pooling"]:
        return Recognised("other", f"modules {classes}")
    mode = _pooling_mode(read_json(folder / modules[1]["path"] / "config.json") or {})
    settings = read_json(folder / "sentence_bert_config.json") or {}
    if classes in TCT_MODULES and own.get("prompts") == PROMPTS and "document_length" in settings:
        return Recognised("student", "the TCT encoding in its files", mode)
    return Recognised("dual-encoder", f"a SentenceTransformer of {classes} with {mode} pooling", mode)


def _pooling_mode(pooling: dict[str, Any]) -> str:
    if mode := pooling.get("pooling_mode"):
        return str(mode)
    # sentence-transformers before 6 wrote a flag for each mode.
    flags = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on and "pooling_mode_" in name]
    return "+".join({"cls_token": "cls", "mean_tokens": "mean"}.get(flag, flag) for flag in flags) or "unknown"


def kind_of(name_or_path: str) -> Kind | None:
    """What a folder or Hub id is, by its configuration files alone, which are downloaded; None without any."""
    names = ("modules.json", "config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    files = [path for name in (*names, "tokenizer_config.json") if (path := _file_of(name_or_path, name))]
    if not any(file.name in names[:2] for file in files):
        return None
    return recognise(name_or_path, files[0].parent).kind  # the client's cache has them in one folder


def is_tct(folder: Path) -> bool:
    """Whether a saved model reads TCT input, also where files of it were altered by a stock save or by hand."""
    modules = read_json(folder / "modules.json", required=True)
    config = read_json(folder / "config_sentence_transformers.json", required=True)
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise ValueError(f"{folder} is a {config['model_type']}, not a student: save it with save_pretrained.")
    if modules[0]["path"] or module_classes(modules)[0] != "Transformer":
        return False
    settings = read_json(folder / "sentence_bert_config.json", required=True)
    if settings.get("query_expansion") or settings.get("document_length") is None:
        return bool(settings.get("query_expansion"))
    if any((config.get("prompts") or {}).get(side) == prompt for side, prompt in PROMPTS.items()):
        return True
    # The prompts may be lost: the template of TCT input has one special token.
    template = read_json(folder / "tokenizer.json", required=True).get("post_processor") or {}
    return [next(iter(part)) for part in template.get("single", [])] == ["SpecialToken", "Sequence"]
