"""How other libraries get a student's vectors: a table for cards, tried by recipes/benchmarks/clients.py."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tct_hf.encoding.kinds import read_json, read_modules

_HEADING = "## In other libraries"
_TEI = "text-embeddings-inference"


class Client(NamedTuple):
    """How a library gets the vectors of `encode_query` and `encode_document`; without lines it can't."""

    name: str
    questions: str  # Python in which MODEL is the student's id or folder; of a server the body of the request
    passages: str
    note: str = ""


class _Needs(NamedTuple):
    """What a student's files say of its questions and passages."""

    prompts: dict[str, str]
    asked: dict[str, dict[str, str]]  # arguments of `encode`, where the plain call is wrong
    unlike: str  # why questions can't be passages behind another prompt
    query_length: int | None  # where it differs from the passage's
    length: int | None  # of a passage, where the encoder could read more
    other_length: int | None  # a smaller one that the tokenizer's settings say, too, and fastembed keeps to
    pools_prompts: bool
    modules: list[str]
    dimension: int | None  # None: no encoder

    @property
    def unit(self) -> bool:
        return self.modules[-1] == "Normalize"


def _needs(folder: Path) -> _Needs:
    modules = read_modules(folder, route="query")
    encoder = folder / modules[0]["path"]
    own = read_json(folder / "config_sentence_transformers.json") or {}
    files = ("sentence_bert_config.json", "tokenizer_config.json", "config.json")
    settings, tokenizer, config = (read_json(encoder / file) or {} for file in files)
    configs = {
        module["type"].rsplit(".", 1)[-1]: read_json(folder / module["path"] / "config.json") or {}
        for module in modules
    }
    prompts = {"query": "", "document": ""} | {name: text or "" for name, text in (own.get("prompts") or {}).items()}
    plain = prompts.get(own.get("default_prompt_name") or "", "")
    routed = read_modules(folder)[0] != modules[0]
    asked: dict[str, dict[str, str]] = {
        side: {"prompt_name": side} if prompts[side] != plain else {} for side in ("query", "document")
    }
    if routed:
        asked["document"] = {"prompt_name": "document", "task": "document"}
    if routed or settings.get("query_expansion") or settings.get("query_length"):
        asked["query"] = {"prompt_name": "query", "task": "query"}
    elif asked["document"]:
        asked["query"] = {"prompt_name": "query"}  # LangChain takes the passage's where there are none
    sizes = [content["out_features"] for content in configs.values() if "out_features" in content]
    longest, most = tokenizer.get("model_max_length") or 0, config.get("max_position_embeddings") or 0
    return _Needs(
        prompts=prompts,
        asked=asked,
        unlike="questions go through other modules"
        if routed
        else "it doesn't fill questions with `[MASK]`"
        if settings.get("query_expansion")
        else "",
        query_length=min(asked_for, longest or asked_for) if (asked_for := settings.get("query_length")) else None,
        length=longest if 0 < longest < most else None,
        other_length=shorter if 0 < (shorter := tokenizer.get("max_length") or 0) < longest else None,
        pools_prompts=not any(prompts.values()) or configs.get("Pooling", {}).get("include_prompt", True),
        modules=list(configs),
        dimension=[config.get("hidden_size"), *sizes][-1],
    )


def clients(folder: Path) -> list[Client]:
    """The lines to write in each library for a saved student."""
    needs = _needs(folder)
    query, document = (needs.asked[side] or None for side in ("query", "document"))
    model, texts = "SentenceTransformer(MODEL)", ("questions", "passages")
    by_model = (f"{model}.encode_query(questions)", f"{model}.encode_document(passages)")
    chroma = "SentenceTransformerEmbeddingFunction(MODEL)"
    rows = [
        Client("sentence-transformers", *by_model),
        Client("mteb", *["SentenceTransformerEncoderWrapper(MODEL)"] * 2),
        Client(
            "LangChain",
            *[_call("HuggingFaceEmbeddings", "model_name=MODEL", encode_kwargs=document, query_encode_kwargs=query)]
            * 2,
        ),
        Client(
            "Haystack",
            _call("SentenceTransformersTextEmbedder", "model=MODEL", encode_kwargs=query),
            _call("SentenceTransformersDocumentEmbedder", "model=MODEL", encode_kwargs=document),
        ),
        Client("Chroma", by_model[0], by_model[1] if document else chroma, "pass vectors as `query_embeddings`")
        if query
        else Client("Chroma", chroma, chroma),
    ]
    prompts = [needs.prompts[side] for side in ("query", "document")]
    within = _limits(needs.query_length)
    named = {"query_instruction": prompts[0] or None, "text_instruction": prompts[1] or None}
    index = _call("HuggingFaceEmbedding", "MODEL", **named, normalize=None if needs.unit else False)
    rows.append(_served("LlamaIndex", [index] * 2, within, needs.unlike))

    register = _call(
        "TextEmbedding.add_custom_model",
        f"MODEL, PoolingType.DISABLED, False, ModelSource(hf=MODEL), {needs.dimension}",
        output_name="sentence_embedding",
    )
    lines = [
        f"TextEmbedding(MODEL).embed({f'[{_written(prompt)} + text for text in {name}]' if prompt else name})"
        for prompt, name in zip(prompts, texts, strict=True)
    ]
    limits = _limits(needs.query_length, needs.other_length)
    exported = "; ".join(filter(None, [f"reads the `onnx/model.onnx` of `tct_hf.export`, after `{register}`", limits]))
    rows.append(
        _served("fastembed", lines, exported, needs.unlike or ("" if needs.dimension else "no encoder to export"))
    )

    bodies = [
        json.dumps(
            {"inputs": name} | ({"prompt_name": side} if prompt else {}) | ({} if needs.unit else {"normalize": False})
        )
        for side, prompt, name in zip(("query", "document"), prompts, texts, strict=True)
    ]
    limits = _limits(needs.query_length, needs.length)
    unlike = needs.unlike or ("" if needs.pools_prompts else "it pools the prompt")
    if not unlike and needs.modules not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        unlike = f"it would need the modules {', '.join(needs.modules)}"
    rows.append(_served(_TEI, [f"POST /embed {body}" for body in bodies], limits, unlike))
    return rows


def _served(name: str, lines: Sequence[str], note: str, unlike: str) -> Client:
    questions, passages = lines
    return Client(name, "", "", f"not servable: {unlike}") if unlike else Client(name, questions, passages, note)


def _limits(query_length: int | None, length: int | None = None) -> str:
    said = {"questions": query_length, "passages": length}
    return " and ".join(f"{side} of at most {count} tokens" for side, count in said.items() if count)


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def _call(name: str, *given: str, **named: Any) -> str:
    """A call as Python, without the arguments that are None."""
    settings = [f"{key}={_written(value)}" for key, value in named.items() if value is not None]
    return f"{name}({', '.join([*given, *settings])})"


def client_table(folder: Path) -> str:
    """The section of a card on other libraries, Markdown."""
    needs = _needs(folder)
    lines = [
        _HEADING,
        "",
        "`MODEL` is this model's id or folder. These lines give the vectors of `encode_query` and `encode_document`"
        + ("; others give wrong vectors of questions, without an error:" if needs.asked["query"] else ":"),
        "",
        "| library | questions | passages | |",
        "|---|---|---|---|",
    ]
    for name, questions, passages, note in clients(folder):
        cells = [f"`{questions}`", "the same" if passages == questions else f"`{passages}`"] if questions else ["", ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (name, *cells, note)) + " |")
    return "\n".join(lines) + "\n"


def write_client_table(folder: Path) -> None:
    """Write the section into the README.md of a checkpoint, in place of an earlier one."""
    file = folder / "README.md"
    if not file.is_file():
        return
    before = file.read_text(encoding="utf-8")
    text = re.sub(rf"^{_HEADING}\n.*?(?=^## |\Z)", "", before, flags=re.M | re.S).rstrip("\n")
    # Before what sentence-transformers says of training, where it wrote the rest.
    start, found, rest = text.partition("\n## Training Details\n")
    after = f"{start.rstrip()}\n\n{client_table(folder)}" + f"{found}{rest}\n" * bool(found)
    if after != before:
        file.write_text(after, encoding="utf-8")
