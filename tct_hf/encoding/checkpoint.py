"""The files of a saved student: the only writer of what its encoding depends on, and the only judge of it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedTokenizerFast

from tct_hf.encoding.clients import write_client_table
from tct_hf.encoding.encoders import length_of, query_expansion, tct_post_processor
from tct_hf.encoding.export import check_exports
from tct_hf.encoding.kinds import PROMPTS, TCT_MODULES, check_query_length, is_tct, module_classes, read_json
from tct_hf.encoding.weights import refuse_broken_files
from tct_hf.files import write_json_atomic, write_text_atomic

_DENSE = "SentenceTransformer"
REQUIREMENTS = {"sentence-transformers": {"specifier": ">=6.0"}}


@dataclass(frozen=True)
class _Layout:
    settings: dict[str, Any]  # of the Transformer module
    query_length: int
    document_length: int
    augmented: bool
    pooling: dict[str, Any]
    pooling_file: str
    length: float | None  # the norm of every vector; None: vectors as pooled
    truncate_dim: int | None


def _read_layout(path: Path) -> _Layout:
    """Read the parts of a TCT student's encoding that only its builder can know."""
    not_ours = "so this is not a student of this package: build one with build_student."
    modules = read_json(path / "modules.json", required=True)
    if module_classes(modules) not in TCT_MODULES:
        raise ValueError(
            f"{path / 'modules.json'} has the modules {module_classes(modules)}, not {TCT_MODULES[0]}, {not_ours}"
        )
    settings_file, pooling_file = "sentence_bert_config.json", f"{modules[1]['path']}/config.json"
    settings, pooling = (read_json(path / file, required=True) for file in (settings_file, pooling_file))
    check_query_length(str(path), read_json(path / "config.json"), settings)
    expansion, document_length = settings.get("query_expansion"), settings.get("document_length")
    query_length = expansion.get("length") if expansion else settings.get("query_length")
    if document_length is None or query_length is None:
        missing = "document_length" if document_length is None else "query length (query_expansion or query_length)"
        raise ValueError(f"{path / settings_file} has no {missing}, {not_ours}")
    if (mode := pooling.get("pooling_mode")) not in ("mean", "cls"):
        raise ValueError(f"{path / pooling_file} has the pooling_mode {mode!r}, not mean or cls, {not_ours}")
    length = None
    if len(modules) > 2:
        dense = modules[3]["path"]
        weight = length_of(
            [Normalize.load(str(path), modules[2]["path"]), Dense.load(str(path), dense, local_files_only=True)]
        )
        if weight is None:
            raise ValueError(f"{path / dense} does more than multiply by one number, {not_ours}")
        length = float(weight[0, 0].detach())
    cut = read_json(path / "config_sentence_transformers.json", required=True).get("truncate_dim")
    return _Layout(settings, query_length, document_length, bool(expansion), pooling, pooling_file, length, cut)


def finalise_checkpoint(path: str | Path) -> None:
    """Write what a saved student needs so that stock sentence-transformers loads it right, or fails loudly.

    The only writer of the tokenizer's class and [SEP]-free template, the version requirement, prompts and whether they
    are pooled, lengths and similarity, and of the README's table of other libraries. A second call changes no byte. A
    student that reads texts its own way is right as sentence-transformers saves it: it only gets that table, and the
    version requirement where it has a query length or a Router.

    Args:
        path: folder that a student was saved to.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the folder holds something other than a student.
    """
    path = Path(path)
    own_file, settings_file = "config_sentence_transformers.json", "sentence_bert_config.json"
    if not is_tct(path):
        routed = module_classes(read_json(path / "modules.json"))[:1] == ["Router"]
        if routed or (read_json(path / settings_file) or {}).get("query_length") is not None:
            _update(path / own_file, {"requirements": REQUIREMENTS})
        write_client_table(path)
        return
    layout = _read_layout(path)
    tokenizer_config = read_json(path / "tokenizer_config.json", required=True)
    template = _tct_template(path, tokenizer_config)
    settings = {key: value for key, value in layout.settings.items() if key != "max_seq_length"}
    if layout.augmented:
        settings["query_expansion"] = query_expansion(layout.query_length)
    if settings != layout.settings:
        write_json_atomic(path / settings_file, settings)
    _update(
        path / own_file,
        {
            "requirements": REQUIREMENTS,
            "prompts": dict(PROMPTS),
            "default_prompt_name": "document",
            "similarity_fn_name": "dot",
        },
    )
    _update(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            # Plain encode() ignores document_length: the tokenizer's own limit must be the same.
            "model_max_length": layout.document_length,
            "padding_side": "right",
            "truncation_side": "right",
        },
    )
    _update(path / layout.pooling_file, {"include_prompt": layout.pooling["pooling_mode"] == "cls"})
    if template is not None:
        write_text_atomic(path / "tokenizer.json", template)
    write_client_table(path)


def _update(file: Path, wanted: dict[str, Any]) -> None:
    content = read_json(file, required=True)
    if content | wanted != content:
        write_json_atomic(file, content | wanted)


def _token(config: dict[str, Any], *names: str) -> str | None:
    """The first of these special tokens that a tokenizer_config.json names, written as text or as an object."""
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return str(found["content"]) if isinstance(found, dict) else found


def _tct_template(path: Path, config: dict[str, Any]) -> str | None:
    """The tokenizer.json with the [SEP]-free template; None where it is so already."""
    before = read_json(path / "tokenizer.json", required=True)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    start = _token(config, "cls_token", "bos_token")
    if start is None or tokenizer.token_to_id(start) is None:
        raise ValueError(
            f"{path / 'tokenizer_config.json'} names no cls_token or bos_token of the vocabulary: save it again."
        )
    tokenizer.post_processor = tct_post_processor(tokenizer, start)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    after = tokenizer.to_str(pretty=True)
    return None if json.loads(after) == before else after


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


def vectors_of(model: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Vectors of a model by each way to ask for them, `(texts or tokens, dim)` each."""
    ways = {"query": model.encode_query, "document": model.encode_document}
    if type(model).__name__ == "SentenceTransformer":
        ways |= {"plain": model.encode, "alone": lambda texts: [model.encode(text) for text in texts]}
    found = {}
    for way, encode in ways.items():
        vectors = encode(list(texts))
        vectors = vectors.to_dense().cpu() if torch.is_tensor(vectors) else vectors
        found[way] = np.concatenate([np.atleast_2d(np.asarray(one)) for one in vectors])
    return found


_LOADER = f"""
import json, sys
sys.modules["tct_hf"] = None  # an import of this package would fail
from collections.abc import Sequence
from typing import Any
import numpy as np, sentence_transformers, torch
{inspect.getsource(vectors_of)}
path, loader, texts, out = sys.argv[1:]
model = getattr(sentence_transformers, loader)(path, device="cpu", model_kwargs={{"dtype": torch.float32}})
np.savez(out, **vectors_of(model, json.loads(texts)))
"""


def fresh_vectors(path: Path, texts: Sequence[str], loader: str = _DENSE) -> dict[str, np.ndarray]:
    """:func:`vectors_of` in an interpreter that cannot import tct_hf; `loader`: a class of sentence-transformers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vectors.npz"
        words = [str(path.resolve()), loader, json.dumps(texts), str(out)]
        command = [sys.executable, "-c", _LOADER, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode != 0:
            raise ValueError(f"{path} does not load as a plain {loader}:\n{done.stderr.strip()[-2000:]}")
        with np.load(out) as vectors:
            return dict(vectors)


def check_vectors(
    path: Path, rule: Mapping[str, np.ndarray], *, loader: str = _DENSE, tolerance: float, than: str, fix: str
) -> dict[str, float]:
    """Compare a checkpoint's vectors of the golden texts in a fresh interpreter with a rule's, by each way to encode.

    Vectors of a way that the rule lacks must only be finite. `tolerance` is relative to the rule's largest number,
    where that is above 1. Returns the largest absolute differences.
    """
    refuse_broken_files(path)
    found = {}
    for way, vectors in fresh_vectors(path, GOLDEN_TEXTS, loader).items():
        wanted = rule.get(way, vectors)
        same = vectors.shape == wanted.shape
        found[way] = float(np.abs(vectors - wanted).max()) if same else float("inf")
        if not found[way] <= tolerance * max(1.0, float(np.abs(wanted).max())):
            raise ValueError(f"{path}: {way} vectors differ from {than} by {found[way]:.2g}. {fix}")
    return found


@dataclass(frozen=True)
class CheckpointReport:
    """How far a checkpoint's vectors are from the rule, as largest absolute differences over the golden texts.

    `exports` has the same of every exported file in it, and of int8 files the lowest cosine.
    """

    query: float
    document: float
    plain: float
    exports: dict[str, float] = field(default_factory=dict)


def validate_checkpoint(path: str | Path) -> CheckpointReport:
    """Load a student in a fresh interpreter that cannot import tct_hf and compare its vectors with the rule.

    The rule of a TCT student is computed with plain transformers; that of a student that reads texts its own way is
    its own vectors in this interpreter. Each file that :func:`tct_hf.export` wrote there is run as a server would, and
    its vectors must be equal to 1e-4 (of int8 files, have a cosine of .9 at least).

    Args:
        path: folder of the checkpoint.

    Returns:
        The differences found.

    Raises:
        ValueError: it is no student, its weights are not finite, it doesn't load without this package, or its vectors
            differ, with what to do.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    path = Path(path)
    tct = is_tct(path)
    rule = _rule_vectors(path, GOLDEN_TEXTS) if tct else own_vectors(path)
    found = check_vectors(
        path,
        {**rule, "alone": rule["plain"]},  # one text at a time, as LangChain and others encode a question
        tolerance=1e-5,
        than="the TCT encoding" if tct else "the model's own encoding",
        fix="Run finalise_checkpoint on the folder; if that does not help, build it again with build_student.",
    )
    exports = check_exports(path, GOLDEN_TEXTS, rule)
    return CheckpointReport(found["query"], found["document"], max(found["plain"], found["alone"]), exports)


def own_vectors(path: Path, loader: str = _DENSE) -> dict[str, np.ndarray]:
    """:func:`vectors_of` of the golden texts by a checkpoint as this interpreter loads it."""
    model = getattr(sentence_transformers, loader)(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
    return vectors_of(model, GOLDEN_TEXTS)


def _rule_vectors(path: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The rule of :mod:`tct_hf.encoding.build` with plain transformers, one text at a time, `(texts, dim)` a way."""
    layout = _read_layout(path)
    model = AutoModel.from_pretrained(str(path), dtype=torch.float32).eval()
    config = read_json(path / "tokenizer_config.json", required=True)
    start, mask = _token(config, "cls_token", "bos_token"), _token(config, "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), cls_token=start, mask_token=mask)
    found = {}
    for side, length in (("query", layout.query_length), ("document", layout.document_length)):
        opening = f"{start}{PROMPTS[side]}"
        ending = str(mask) * length if side == "query" and layout.augmented else ""
        prompt = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
        vectors = []
        for text in texts:
            ids = tokenizer(opening + text + ending, add_special_tokens=False)["input_ids"][:length]
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # (tokens, dim)
            if layout.pooling["pooling_mode"] == "cls":
                pooled = hidden[0]
            else:
                pooled = hidden[prompt:].mean(0) if len(ids) > prompt else torch.zeros_like(hidden[0])
            if layout.length is not None:
                pooled = pooled / pooled.norm().clamp(min=1e-12) * layout.length
            vectors.append(pooled[: layout.truncate_dim])
        found[side] = torch.stack(vectors).numpy()
    return {**found, "plain": found["document"]}
