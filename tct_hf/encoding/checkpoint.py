"""The files of a saved student: the only writer of what its encoding depends on, and the only judge of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.encoding.tokenization import PROMPTS, tct_post_processor
from tct_hf.files import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers.base.modules.transformer import QueryExpansionConfig

_AGAIN = "Save it again with save_student."
REQUIREMENTS = {"sentence-transformers": {"specifier": ">=6.0"}}


def query_expansion(length: int) -> QueryExpansionConfig:
    """Query augmentation as a setting of the stock Transformer module: [MASK]s up to `length` tokens, attended."""
    return {"strategy": "fixed", "attend": True, "token": None, "length": length}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is not a whole student checkpoint. {_AGAIN}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg}): save the student again.") from None


@dataclass(frozen=True)
class _Layout:
    """What a TCT student's files say of its encoding.

    Args:
        settings: of the Transformer module.
        query_length: tokens of a query.
        document_length: tokens a passage keeps.
        augmented: queries are filled with [MASK]s.
        pooling: "mean" or "cls".
        pooling_file: that says so.
        length: of all vectors, where they are normalised; None: vectors as pooled.
        truncate_dim: first dimensions that are kept; None: all.
    """

    settings: dict[str, Any]
    query_length: int
    document_length: int
    augmented: bool
    pooling: str
    pooling_file: str
    length: float | None
    truncate_dim: int | None


def _is_tct(path: Path) -> bool:
    """Whether a checkpoint is one of the TCT encoding, in whatever state; else it reads texts its own way.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no SentenceTransformer.
    """
    modules = _read_json(path / "modules.json")
    config = _read_json(path / "config_sentence_transformers.json")
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise ValueError(f"{path} is a {config['model_type']}, and no student: save it with save_pretrained.")
    if modules[0]["path"] or modules[0]["type"].rsplit(".", 1)[-1] != "Transformer":
        return False
    settings = _read_json(path / "sentence_bert_config.json")
    if settings.get("query_expansion"):
        return True
    if settings.get("document_length") is None:
        return False
    if any((config.get("prompts") or {}).get(side) == PROMPTS[side] for side in PROMPTS):
        return True
    # Its prompts may be lost: TCT's template has one special token.
    template = _read_json(path / "tokenizer.json").get("post_processor") or {}
    return [next(iter(part)) for part in template.get("single", [])] == ["SpecialToken", "Sequence"]


def _read_layout(path: Path) -> _Layout:
    """Read the parts of a TCT student's encoding that only its builder can know.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files describe something other than a student.
    """
    mend = "so this is not a student of this package: build one with build_student or student_from_teacher."
    modules = _read_json(path / "modules.json")
    classes = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if classes not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize", "Dense"]):
        raise ValueError(
            f"{path / 'modules.json'} has the modules {classes}, not Transformer and Pooling (and Normalize and Dense "
            f"of a learned scale), {mend}"
        )
    settings_file = path / "sentence_bert_config.json"
    settings = _read_json(settings_file)
    expansion, document_length = settings.get("query_expansion"), settings.get("document_length")
    query_length = (expansion or settings).get("length" if expansion else "query_length")
    if document_length is None or query_length is None:
        missing = "document_length" if document_length is None else "query length (query_expansion or query_length)"
        raise ValueError(f"{settings_file} has no {missing}, {mend}")
    pooling_file = f"{modules[1]['path']}/config.json"
    pooling = _read_json(path / pooling_file).get("pooling_mode")
    if pooling not in ("mean", "cls"):
        raise ValueError(f"{path / pooling_file} has the pooling_mode {pooling!r}, not mean or cls, {mend}")
    return _Layout(
        settings,
        query_length,
        document_length,
        bool(expansion),
        pooling,
        pooling_file,
        _read_length(path / modules[3]["path"], mend) if len(modules) > 2 else None,
        _read_json(path / "config_sentence_transformers.json").get("truncate_dim"),
    )


def _read_length(folder: Path, mend: str) -> float:
    """The learned length of a student's vectors: the number that its last module's matrix is, times the identity."""
    from safetensors.torch import load_file

    from tct_hf.encoding.scale import is_multiple_of_identity

    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder.parent} is not a whole student checkpoint. {_AGAIN}")
    config, weights = _read_json(folder / "config.json"), load_file(file)
    weight = weights.get("linear.weight")
    if set(weights) != {"linear.weight"} or weight is None or not is_multiple_of_identity(weight):
        raise ValueError(f"{file} holds something other than one number times the identity, {mend}")
    if not str(config.get("activation_function")).endswith(".Identity"):
        raise ValueError(f"{folder / 'config.json'} has the activation {config.get('activation_function')}, {mend}")
    return float(weight[0, 0])


def _token(config: dict[str, Any], *names: str) -> str | None:
    """The first of the special tokens that a tokenizer_config.json names, written as text or as an object."""
    for name in names:
        token = config.get(name)
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    return None


def finalise_checkpoint(path: str | Path) -> None:
    """Write what a saved student needs so that stock sentence-transformers loads it right, or fails loudly.

    The only writer of the tokenizer's class and [SEP]-free template, the version requirement, prompts and whether they
    are pooled, lengths and similarity. Idempotent: a second call changes no byte. A student that reads texts its own
    way is right as sentence-transformers saves it: it only gets the version requirement where it has a query length.

    Args:
        path: folder that a student was saved to.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the folder holds something other than a student.
    """
    path = Path(path)
    is_tct = _is_tct(path)
    own = _read_json(path / "config_sentence_transformers.json")
    if not is_tct:
        module = path / "sentence_bert_config.json"
        if module.is_file() and _read_json(module).get("query_length") is not None:
            _write(path, {"config_sentence_transformers.json": own | {"requirements": REQUIREMENTS}})
        return
    layout = _read_layout(path)
    own |= {"requirements": REQUIREMENTS}
    settings = {key: value for key, value in layout.settings.items() if key != "max_seq_length"}
    if layout.augmented:
        settings["query_expansion"] = query_expansion(layout.query_length)
    changes: dict[str, Any] = {
        "sentence_bert_config.json": settings,
        "config_sentence_transformers.json": own
        | {"prompts": dict(PROMPTS), "default_prompt_name": "document", "similarity_fn_name": "dot"},
        # Plain encode() knows no document_length: the tokenizer's own limit has to be the same.
        "tokenizer_config.json": _read_json(path / "tokenizer_config.json")
        | {
            "tokenizer_class": "TokenizersBackend",
            "model_max_length": layout.document_length,
            "padding_side": "right",
            "truncation_side": "right",
        },
        layout.pooling_file: _read_json(path / layout.pooling_file) | {"include_prompt": layout.pooling == "cls"},
    }
    _write(path, changes)
    _finalise_tokenizer(path, changes["tokenizer_config.json"])


def _write(path: Path, changes: dict[str, Any]) -> None:
    for name, wanted in changes.items():
        if _read_json(path / name) != wanted:
            write_json_atomic(path / name, wanted)


def _finalise_tokenizer(path: Path, config: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    before = _read_json(path / "tokenizer.json")
    start = _token(config, "cls_token", "bos_token")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    start_id = None if start is None else tokenizer.token_to_id(start)
    if start is None or start_id is None:
        raise ValueError(
            f"{path / 'tokenizer_config.json'} names no cls_token or bos_token that is in the vocabulary: save the "
            "student again with save_student."
        )
    tokenizer.post_processor = tct_post_processor(start, start_id)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    after = tokenizer.to_str(pretty=True)
    if json.loads(after) != before:
        write_text_atomic(path / "tokenizer.json", after)


# Texts on which encodings are known to go wrong: empty, longer than a query or a passage, special tokens as text.
GOLDEN_TEXTS = (
    "what is a tightly-coupled teacher",
    "",
    "Café naïve résumé",
    "搜索 passage 検索",
    "a literal [MASK] and [SEP] in the text",
    " ".join(["retrieval"] * 40),
    " ".join(["distillation of dense representations"] * 200),
)

_LOADER = """
import json, sys
sys.modules["tct_hf"] = None  # an import of this package would fail
import numpy as np, torch
from sentence_transformers import SentenceTransformer
path, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = SentenceTransformer(path, device="cpu", model_kwargs={"dtype": torch.float32})
np.savez(
    out, query=model.encode_query(texts), document=model.encode_document(texts), plain=model.encode(texts),
    alone=np.concatenate([model.encode([text]) for text in texts]),
)
"""


@dataclass(frozen=True)
class CheckpointReport:
    """How far a checkpoint's vectors are from the rule, as largest absolute differences over the golden texts."""

    query: float
    document: float
    plain: float


def validate_checkpoint(path: str | Path, *, tolerance: float = 1e-5) -> CheckpointReport:
    """Load a student in a fresh interpreter that cannot import tct_hf and compare its vectors with the rule.

    The rule of a student that reads texts its own way is plain transformers for a mean or start token's vector,
    normalised or not; for other modules it is its own vectors here, one text at a time.

    Args:
        path: folder of the checkpoint.
        tolerance: largest absolute difference of a vector's element, relative to the vectors' largest element where
            that is above 1.

    Returns:
        The differences found.

    Raises:
        ValueError: it is no student, doesn't load without this package, or its vectors differ, with what to do.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    import numpy as np

    path = Path(path)
    texts = list(GOLDEN_TEXTS)
    is_tct = _is_tct(path)
    if is_tct:
        layout = _read_layout(path)
        found = _fresh_vectors(path, texts)
        rule = {side: _rule_vectors(path, texts, side, layout) for side in PROMPTS}
        rule["plain"] = rule["document"]
    else:
        found = _fresh_vectors(path, texts)
        rule = _own_vectors(path, texts)
    rule["alone"] = rule["plain"]  # as LangChain and others encode a question
    encoding = "TCT" if is_tct else "model's own"
    differences = {}
    for name, vectors in found.items():
        differences[name] = float(np.abs(vectors - rule[name]).max())
        if not differences[name] <= tolerance * max(1.0, float(np.abs(rule[name]).max())):
            raise ValueError(
                f"{path}: {name} vectors differ from the {encoding} encoding by {differences[name]:.2g}. Run "
                "finalise_checkpoint on the folder; if that does not help, build the student again with build_student."
            )
    plain = max(differences["plain"], differences["alone"])
    return CheckpointReport(differences["query"], differences["document"], plain)


def _fresh_vectors(path: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Vectors of encode_query, encode_document, encode and encode of one text at a time, `(texts, dim)` each, from an
    interpreter without tct_hf."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vectors.npz"
        done = subprocess.run(
            [sys.executable, "-c", _LOADER, str(path.resolve()), json.dumps(texts), str(out)],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        if done.returncode != 0:
            raise ValueError(f"{path} does not load as a plain SentenceTransformer:\n{done.stderr.strip()[-2000:]}")
        with np.load(out) as vectors:
            return dict(vectors)


def _own_vectors(path: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """A student's vectors by its own way of reading texts, one text at a time, `(texts, dim)` for each way to ask."""
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    modules, config = (_read_json(path / f"{name}.json") for name in ("modules", "config_sentence_transformers"))
    classes = [module["type"].rsplit(".", 1)[-1] for module in modules]
    pool = _read_json(path / modules[1]["path"] / "config.json") if classes[1:2] == ["Pooling"] else {}
    if (
        classes not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        or pool.get("pooling_mode") not in ("mean", "cls")
        or not pool.get("include_prompt", True)
        or AutoConfig.from_pretrained(str(path)).is_encoder_decoder
    ):
        student = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        ways: dict[str, Any] = {
            "query": student.encode_query,
            "document": student.encode_document,
            "plain": student.encode,
        }
        return {name: np.concatenate([encode([text]) for text in texts]) for name, encode in ways.items()}
    settings = _read_json(path / "sentence_bert_config.json")
    tokenizer, model = AutoTokenizer.from_pretrained(str(path)), AutoModel.from_pretrained(str(path)).float().eval()
    longest = settings.get("max_seq_length") or min(tokenizer.model_max_length, model.config.max_position_embeddings)
    lengths = {"query": settings.get("query_length"), "document": settings.get("document_length")}
    prompts = config.get("prompts") or {}
    found = {}
    for name, side in (("query", "query"), ("document", "document"), ("plain", config.get("default_prompt_name"))):
        vectors = []
        for text in texts:
            whole = (prompts.get(side) or "") + text
            ids = tokenizer(whole, truncation=True, max_length=lengths.get(name) or longest)["input_ids"]
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # (tokens, dim)
            vector = hidden[0] if pool["pooling_mode"] == "cls" else hidden.mean(0)
            vector = torch.nn.functional.normalize(vector, dim=0) if "Normalize" in classes else vector
            vectors.append(vector[: config.get("truncate_dim")])
        found[name] = torch.stack(vectors).numpy()
    return found


def _rule_vectors(path: Path, texts: Sequence[str], side: str, layout: _Layout) -> np.ndarray:
    """The rule of :mod:`tct_hf.encoding.build` with plain transformers, one text at a time, `(texts, dim)`."""
    import torch
    from transformers import AutoModel, PreTrainedTokenizerFast

    model = AutoModel.from_pretrained(str(path), dtype=torch.float32).eval()
    length = layout.query_length if side == "query" else layout.document_length
    config = _read_json(path / "tokenizer_config.json")
    start, mask = _token(config, "cls_token", "bos_token"), _token(config, "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), cls_token=start, mask_token=mask)
    augmented = side == "query" and layout.augmented
    opening = f"{start}{PROMPTS[side]}"
    prompt = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    wholes = [opening + text + (str(mask) * length if augmented else "") for text in texts]
    inputs = [tokenizer(whole, add_special_tokens=False)["input_ids"][:length] for whole in wholes]
    vectors = []
    for ids in inputs:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # (tokens, dim)
        if layout.pooling == "cls":
            pooled = hidden[0]
        else:
            own_tokens = hidden[prompt:]
            pooled = own_tokens.mean(0) if len(own_tokens) else torch.zeros_like(hidden[0])
        if layout.length is not None:
            pooled = pooled / pooled.norm().clamp(min=1e-12) * layout.length
        vectors.append(pooled[: layout.truncate_dim])
    return torch.stack(vectors).numpy()
